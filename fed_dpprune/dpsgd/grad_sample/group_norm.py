"""GroupNorm: per channel, sums over space of g * normalised input (weight) and of g (bias)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.grad_sample.contribution import Call, Contribution, Values, address, pick
from fed_dpprune.dpsgd.live import LiveTensor


def contributions(
    layer: nn.Module, live: Mapping[str, LiveTensor], calls: Sequence[Call], kernel: Kernel | None
) -> dict[str, Contribution]:
    """Rule for nn.GroupNorm; inputs (n, channels, ...)."""
    norm = cast(nn.GroupNorm, layer)
    sums = [_compiled(norm, call, kernel) if kernel else _torch(norm, call) for call in calls]
    weight, bias = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    return {name: Values(pick(weight if name == "weight" else bias, tensor)) for name, tensor in live.items()}


def _torch(norm: nn.GroupNorm, call: Call) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, each (n, channels)."""
    x, g = call.x, call.g.flatten(2) if call.g.ndim > 2 else call.g.unsqueeze(2)
    normalised = nn.functional.group_norm(x, norm.num_groups, eps=norm.eps).view_as(g)
    return torch.linalg.vecdot(g, normalised), g.sum(2)


def _compiled(norm: nn.GroupNorm, call: Call, kernel: Kernel) -> tuple[Tensor, Tensor]:
    x, g = call.x.contiguous(), call.g.contiguous()
    n, channels = x.shape[:2]
    weight, bias = (torch.empty(n, channels, dtype=torch.float32) for _ in range(2))
    kernel.library.group_norm_values(
        n, channels, norm.num_groups, x[0, 0].numel(), norm.eps, *(address(t, torch.float32) for t in (x, g, weight, bias))
    )
    return weight, bias
