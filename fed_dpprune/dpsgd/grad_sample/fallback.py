"""Every other layer: run again example by example under vmap, and the chain rule gives its own parameters' gradients.

Costs one more forward and backward of this layer and memory for its per-example gradients, nothing for the rest of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.grad_sample.contribution import Call, Contribution, Values, pick
from fed_dpprune.dpsgd.live import LiveTensor


def contributions(
    layer: nn.Module, live: Mapping[str, LiveTensor], calls: Sequence[Call], kernel: Kernel | None
) -> dict[str, Contribution]:
    """Rule for any layer whose tensor arguments and single output have the examples in their first dimension."""
    own = {name: parameter.detach() for name, parameter in layer.named_parameters() if name in live}
    total: dict[str, Tensor] = {}
    for call in calls:
        for name, values in _values(layer, own, call).items():
            part = pick(values.flatten(1), live[name])
            total[name] = total[name] + part if name in total else part
    return {name: Values(values) for name, values in total.items()}


def _values(layer: nn.Module, own: dict[str, Tensor], call: Call) -> dict[str, Tensor]:
    def one(arguments: tuple[Tensor, ...], gradient: Tensor) -> dict[str, Tensor]:
        def output(parameters: dict[str, Tensor]) -> Tensor:
            result: Tensor = torch.func.functional_call(layer, parameters, tuple(a.unsqueeze(0) for a in arguments))
            return result.squeeze(0)

        result, pull_back = cast(tuple[Tensor, Callable[[Tensor], Any]], torch.func.vjp(output, own))
        pulled: dict[str, Tensor] = pull_back(gradient.to(result.dtype))[0]
        return pulled

    made: dict[str, Tensor] = torch.func.vmap(one)(call.arguments, call.gradient)
    return made
