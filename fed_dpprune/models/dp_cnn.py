"""DP-CNN: the tanh CNN for CIFAR-10 of Papernot et al. (arXiv 2007.14191), as used for random freeze (arXiv 2112.00845).

550,570 parameters at 3 x 32 x 32 and 10 classes.
"""

from __future__ import annotations

from fed_dpprune.models.layers import Activation, Conv, Flatten, Layer, Linear, MaxPool, Net
from fed_dpprune.models.spec import ModelSpec

WIDTHS = (32, 64, 128)


def net(spec: ModelSpec) -> Net:
    """Three blocks of two 3 x 3 convolutions and a pool that halves, then 128 units and the head."""
    body: list[tuple[str, Layer]] = []
    for block, width in enumerate(WIDTHS, start=1):
        for half in "ab":
            body += [(f"conv{block}{half}", Conv(width, 3, padding=1)), (f"act{block}{half}", Activation("tanh"))]
        body.append((f"pool{block}", MaxPool(2, 2)))
    head = (("flatten", Flatten()), ("fc1", Linear(128)), ("act4", Activation("tanh")), ("head", Linear(spec.classes)))
    return (*body, *head)
