"""SynFlow: iterative pruning by synaptic flow, without data (Tanaka et al. 2020, arXiv 2006.05467, Algorithm 1).

Scores |w * dR/dw| with R = sum of the outputs for an all-ones input of the net with |w| for w. While scoring, activations
and normalisation act as the identity: an all-positive input saturates tanh, and a norm layer subtracts the very mean that
flows. Float64 throughout, since R is a product over layers. Max and average pooling stay, and keep the conservation law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from fed_dpprune.errors import ConfigError
from fed_dpprune.sparsity.criteria import net
from fed_dpprune.sparsity.criteria.table import CriterionContext, Scorer

NAME = "synflow"
NEEDS = "model"
PROVENANCE = "data-free"

_ACTIVATIONS = (
    "relu relu_ relu6 leaky_relu elu selu celu gelu silu mish softplus softsign tanh sigmoid hardtanh hardswish hardsigmoid"
)
_NORMS = "batch_norm group_norm layer_norm instance_norm local_response_norm rms_norm"
_DROPOUTS = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
_TENSOR = "relu relu_ tanh tanh_ sigmoid sigmoid_"


def _identities() -> frozenset[Any]:
    """Every spelling of the functions that act as the identity while scoring."""
    spaces = ((F, f"{_ACTIVATIONS} {_NORMS} {_DROPOUTS}"), (torch, f"{_TENSOR} batch_norm group_norm layer_norm"))
    named = [getattr(space, name, None) for space, names in spaces for name in names.split()]
    named += [getattr(torch.Tensor, name, None) for name in _TENSOR.split()]
    return frozenset(function for function in named if function is not None)


IDENTITIES = _identities()


class Linearised(TorchFunctionMode):
    """Inside this, activations, norm layers and dropout return their input, however a net spells them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Pass everything else on."""
        if func in IDENTITIES:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


def scorer(context: CriterionContext) -> Scorer:
    """A function from the mask that lives so far, shape (d,), to scores, shape (d,).

    Raises (from the function):
        ConfigError: The flow is not finite, or none of it comes from the input any more: a layer is emptied. (Biases keep
            the output away from zero, so the sum of the outputs does not tell; a parallel branch may be emptied.)
    """
    model = net.loaded(context, torch.float64)
    for buffer in model.buffers():
        buffer.data = buffer.data.abs()
    parameters = dict(model.named_parameters())
    magnitudes = {name: parameter.data.abs() for name, parameter in parameters.items()}
    ones = torch.ones((1, *context.input_shape), dtype=torch.float64, requires_grad=True)

    def score(live: NDArray[np.bool_]) -> NDArray[np.float64]:
        for tensor, span in context.layout.spans():
            mask = torch.from_numpy(live[span].reshape(tensor.shape).astype(np.float64))
            parameters[tensor.name].data = magnitudes[tensor.name] * mask
        with net.one_thread(), Linearised():
            flow = model(ones.clone()).sum()
            through, *gradients = torch.autograd.grad(flow, [ones, *parameters.values()], allow_unused=True)
        products = {
            name: (parameter.detach() * gradient).abs()
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
            if gradient is not None
        }
        flat = net.gathered(context.layout, products)
        if not np.isfinite(flat).all():
            raise ConfigError("sparsity.prune.method", "the synaptic flow of this net overflows", 'use "magnitude" or "random"')
        if through is None or not bool(through.any()):
            raise ConfigError(
                "sparsity.prune.rate", "no path is left from input to output", 'lower it, exempt more, or use scope = "layer"'
            )
        return flat

    return score


def scores(context: CriterionContext) -> NDArray[np.float64]:
    """Scores of the unpruned net, shape (d,); `sparsity.prune` iterates."""
    return scorer(context)(np.ones(context.layout.d, dtype=np.bool_))
