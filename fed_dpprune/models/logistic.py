"""Multinomial logistic regression: any input flattened, one linear layer."""

from __future__ import annotations

from fed_dpprune.models.layers import Flatten, Linear, Net
from fed_dpprune.models.spec import ModelSpec


def net(spec: ModelSpec) -> Net:
    """Layers flatten, head."""
    return (("flatten", Flatten()), ("head", Linear(spec.classes)))
