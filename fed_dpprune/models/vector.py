"""Between a torch module, the flat vector, and model.safetensors. Only `read` and `load` touch torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fed_dpprune.errors import DataError
from fed_dpprune.models.flat import Layout
from fed_dpprune.records import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn


def _parameters(module: nn.Module, layout: Layout) -> list[torch.Tensor]:
    """The module's parameters, checked against the layout: the flat order must mean the same at both ends.

    Raises:
        ValueError: Names, shapes or order differ.
    """
    named = list(module.named_parameters())
    if [(name, tuple(p.shape)) for name, p in named] != [(t.name, t.shape) for t in layout.tensors]:
        raise ValueError("the module's parameters are not those of the layout")
    return [parameter.detach() for _, parameter in named]


def read(module: nn.Module, layout: Layout) -> NDArray[np.float32]:
    """All parameters as one float32 vector of shape (d,), a copy."""
    out = np.empty(layout.d, dtype=np.float32)
    for parameter, (_, span) in zip(_parameters(module, layout), layout.spans(), strict=True):
        out[span] = parameter.cpu().numpy().reshape(-1)
    return out


def load(module: nn.Module, layout: Layout, vector: NDArray[np.float32]) -> None:
    """Write a vector of shape (d,) into the module's parameters, in place, bit for bit.

    Raises:
        ValueError: Another length, or a module that is not of this layout.
    """
    import torch

    if vector.shape != (layout.d,):
        raise ValueError(f"a vector of shape {vector.shape} for {layout.d} parameters")
    source = torch.from_numpy(np.array(vector, dtype=np.float32))  # a copy: torch wants it writable
    for parameter, (_, span) in zip(_parameters(module, layout), layout.spans(), strict=True):
        parameter.copy_(source[span].reshape(parameter.shape))


def save(path: Path, layout: Layout, vector: NDArray[np.float32]) -> None:
    """Write a vector as safetensors with the tensors' names, atomically."""
    named = {name: np.ascontiguousarray(part) for name, part in layout.split(vector).items()}
    write_atomically(path, safetensors.numpy.save(named, {"layout": layout.digest}))


def open_saved(path: Path, layout: Layout) -> NDArray[np.float32]:
    """Read what `save` wrote, shape (d,), float32.

    Raises:
        DataError: Missing or damaged file, or tensors that are not the layout's.
    """
    try:
        named = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(str(path), f"cannot be read as safetensors ({error})") from None
    if {n: (v.shape, v.dtype) for n, v in named.items()} != {t.name: (t.shape, np.dtype("f4")) for t in layout.tensors}:
        raise DataError(str(path), "holds tensors of another net", "use the config that wrote it")
    return np.concatenate([named[tensor.name].reshape(-1) for tensor in layout.tensors])
