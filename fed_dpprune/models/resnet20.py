"""ResNet-20 for small images (He et al. 2016, section 4.2) with group norm (8 groups) in the place of batch norm.

269,722 parameters at 3 x 32 x 32 and 10 classes; shortcuts without parameters (option A).
"""

from __future__ import annotations

from fed_dpprune.models.layers import Activation, Conv, GroupNorm, Layer, Linear, MeanPool, Net, PadShortcut, Residual
from fed_dpprune.models.spec import ModelSpec

WIDTHS = (16, 32, 64)
BLOCKS = 3
GROUPS = 8


def _block(width: int, stride: int) -> Residual:
    body: Net = (
        ("conv1", Conv(width, 3, stride, 1, bias=False)),
        ("norm1", GroupNorm(GROUPS)),
        ("act1", Activation("relu")),
        ("conv2", Conv(width, 3, 1, 1, bias=False)),
        ("norm2", GroupNorm(GROUPS)),
    )
    return Residual(body, (("pad", PadShortcut(width, stride)),) if stride > 1 else None)


def net(spec: ModelSpec) -> Net:
    """A convolution, three stages of three blocks, the mean over pixels, the head."""
    stages: list[tuple[str, Layer]] = []
    for stage, width in enumerate(WIDTHS, start=1):
        for block in range(1, BLOCKS + 1):
            name = f"stage{stage}_block{block}"
            stages.append((name, _block(width, 2 if stage > 1 and block == 1 else 1)))
            stages.append((f"{name}_act", Activation("relu")))
    stem: Net = (("conv", Conv(16, 3, 1, 1, bias=False)), ("norm", GroupNorm(GROUPS)), ("act", Activation("relu")))
    return (*stem, *stages, ("pool", MeanPool()), ("head", Linear(spec.classes)))
