"""Wide ResNet 16-4 (Zagoruyko and Komodakis 2016) with group norm (16 groups): 2,748,890 parameters at 3 x 32 x 32, 10 classes.

De et al. (arXiv 2204.13650) train it with DP-SGD; their weight standardisation is left out here.
"""

from __future__ import annotations

from fed_dpprune.models.layers import Activation, Conv, GroupNorm, Layer, Linear, MeanPool, Net, Residual
from fed_dpprune.models.spec import ModelSpec

WIDTHS = (64, 128, 256)
BLOCKS = 2
GROUPS = 16


def _block(width: int, stride: int, first: bool) -> Residual:
    """Normalise and activate before each convolution; the first block of a stage widens its shortcut by a 1 x 1."""
    entry: Net = (("norm", GroupNorm(GROUPS)), ("act", Activation("relu")))
    body: Net = (
        ("conv1", Conv(width, 3, stride, 1, bias=False)),
        ("norm", GroupNorm(GROUPS)),
        ("act", Activation("relu")),
        ("conv2", Conv(width, 3, 1, 1, bias=False)),
    )
    return Residual(body, (("conv", Conv(width, 1, stride, bias=False)),) if first else None, entry)


def net(spec: ModelSpec) -> Net:
    """A convolution, three stages of two blocks, a last norm, the mean over pixels, the head."""
    stages: list[tuple[str, Layer]] = []
    for stage, width in enumerate(WIDTHS, start=1):
        for block in range(1, BLOCKS + 1):
            stages.append((f"stage{stage}_block{block}", _block(width, 2 if stage > 1 and block == 1 else 1, block == 1)))
    end: Net = (("norm", GroupNorm(GROUPS)), ("act", Activation("relu")), ("pool", MeanPool()), ("head", Linear(spec.classes)))
    return (("conv", Conv(16, 3, 1, 1, bias=False)), *stages, *end)
