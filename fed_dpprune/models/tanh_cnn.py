"""The small tanh CNN of Papernot et al. (arXiv 2007.14191) for 28 x 28: 26,010 parameters with 1 channel and 10 classes.

Larger or coloured images fit as well; the first fully connected layer grows with them.
"""

from __future__ import annotations

from fed_dpprune.models.layers import Activation, Conv, Flatten, Linear, MaxPool, Net
from fed_dpprune.models.spec import ModelSpec


def net(spec: ModelSpec) -> Net:
    """Two convolutions, each with tanh and an overlapping pool, and two fully connected layers."""
    return (
        ("conv1", Conv(16, 8, stride=2, padding=3)),
        ("act1", Activation("tanh")),
        ("pool1", MaxPool(2, 1)),
        ("conv2", Conv(32, 4, stride=2)),
        ("act2", Activation("tanh")),
        ("pool2", MaxPool(2, 1)),
        ("flatten", Flatten()),
        ("fc1", Linear(32)),
        ("act3", Activation("tanh")),
        ("head", Linear(spec.classes)),
    )
