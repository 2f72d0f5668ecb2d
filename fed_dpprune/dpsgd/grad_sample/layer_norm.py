"""LayerNorm: sums over the positions outside the normalised shape of g * normalised input (weight) and of g (bias)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.grad_sample.contribution import Call, Contribution, Values, pick
from fed_dpprune.dpsgd.live import LiveTensor


def contributions(
    layer: nn.Module, live: Mapping[str, LiveTensor], calls: Sequence[Call], kernel: Kernel | None
) -> dict[str, Contribution]:
    """Rule for nn.LayerNorm; inputs (n, ..., *normalized_shape)."""
    norm = cast(nn.LayerNorm, layer)
    found: dict[str, Contribution] = {}
    for name, tensor in live.items():
        parts = [_weight(norm, call) if name == "weight" else call.g for call in calls]
        total = sum(part.reshape(part.shape[0], -1, tensor.size).sum(1) for part in parts)
        found[name] = Values(pick(cast(Tensor, total), tensor))
    return found


def _weight(norm: nn.LayerNorm, call: Call) -> Tensor:
    return call.g * nn.functional.layer_norm(call.x, norm.normalized_shape, eps=norm.eps)
