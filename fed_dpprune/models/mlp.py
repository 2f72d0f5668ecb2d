"""A multi-layer perceptron: any input flattened, `model.hidden` layers with `model.activation`, a linear head."""

from __future__ import annotations

from fed_dpprune.models.layers import Activation, Flatten, Layer, Linear, Net
from fed_dpprune.models.spec import ModelSpec


def net(spec: ModelSpec) -> Net:
    """Layers flatten, fc1, act1, ..., head."""
    hidden: list[tuple[str, Layer]] = []
    for number, width in enumerate(spec.hidden, start=1):
        hidden += [(f"fc{number}", Linear(width)), (f"act{number}", Activation(spec.activation))]
    return (("flatten", Flatten()), *hidden, ("head", Linear(spec.classes)))
