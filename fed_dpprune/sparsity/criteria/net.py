"""Nets for criteria: built on the context's weights, run on one thread. Imports torch; only criteria import this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.criteria.table import CriterionContext


def loaded(context: CriterionContext, dtype: torch.dtype) -> nn.Module:
    """A fresh net in eval mode that carries the context's weights.

    Raises:
        ValueError: The net's parameters are not those of the layout.
    """
    model = context.build().to(dtype).eval()
    parameters = dict(model.named_parameters())
    if list(parameters) != [t.name for t in context.layout.tensors]:
        raise ValueError("the net's parameters are not those of the layout")
    for name, value in context.layout.split(context.weights).items():
        parameters[name].data = torch.from_numpy(value.copy()).to(dtype)
    return model


def gathered(layout: Layout, values: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    """Tensors by parameter name as one flat float64 vector, shape (d,); names that are missing give zeros."""
    flat = np.zeros(layout.d)
    for tensor, span in layout.spans():
        if tensor.name in values:
            flat[span] = values[tensor.name].detach().to(torch.float64).reshape(-1).numpy()
    return flat


def energy(gradient: torch.Tensor | None) -> float:
    """Mean square of a gradient's entries; 0 for a parameter that the net does not use."""
    return 0.0 if gradient is None or not gradient.numel() else float(gradient.double().square().mean())


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: the same scores whatever number of threads the process was given."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
