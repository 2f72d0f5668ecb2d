"""Calls into the compiled kernel that several rules share: the live weights of a sliding product, example by example."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.grad_sample.contribution import Blocks, on_device
from fed_dpprune.dpsgd.live import LiveTensor

# A band of both operands should stay in the second-level cache, a block of channels closer; measured, not delicate.
TILE_BYTES = 512 * 1024
CHANNEL_BYTES = 192 * 1024
# Sampled products run at about half the speed of dense ones, so from here on computing all and picking is cheaper.
DENSE_FROM = 0.55
_Geometry = ctypes.c_int64 * 26  # struct Shape of the kernel


class Window(NamedTuple):
    """A convolution's geometry: pairs are (vertical, horizontal); padding is what lies above and to the left."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def sliding(
    kernel: Kernel, x: Tensor, g: Tensor, window: Window, weight: LiveTensor | None, bias: LiveTensor | None
) -> tuple[Blocks | None, Blocks | None]:
    """Per-example gradients of a convolution's live weights and biases.

    Args:
        kernel: The loaded library.
        x: Input, shape (n, channels, height, width), float32, any strides.
        g: Gradient of the output, shape (n, outputs, height', width'), float32, any strides.
        window: The geometry.
        weight: Live part of the weight, shape (outputs, channels / groups, *window.kernel); None when it is frozen.
        bias: Live part of the bias; None when there is none or it is frozen.

    Raises:
        MemoryError: The scratch of a thread could not be had.
    """
    asked = _asked(weight, bias, g.shape[1])
    if x.dtype != torch.float32 or g.dtype != torch.float32:
        raise TypeError(f"the kernel needs float32, not {x.dtype} and {g.dtype}")
    n, groups, lanes = len(g), -(-len(g) // kernel.lanes), kernel.lanes
    pairs = (*window.kernel, *window.stride, *window.padding, *window.dilation)
    geometry = _Geometry(*x.shape, *g.shape[1:], *pairs, window.groups, *x.stride(), *g.stride(), TILE_BYTES, CHANNEL_BYTES)
    values = torch.empty(groups, asked.count, lanes, dtype=torch.float32)
    sums = torch.empty(groups, bias.count, lanes, dtype=torch.float32) if bias else None
    squared = torch.empty(2, groups * lanes, dtype=torch.float64)
    starts, columns, wanted = asked.addresses
    into = values.data_ptr(), sums.data_ptr() if sums is not None else None
    where = x.data_ptr(), g.data_ptr(), starts, columns, asked.product
    if kernel.library.conv_values(geometry, *where, *into, wanted, squared.data_ptr()):
        raise MemoryError("no memory for the kernel's scratch")
    weights = None
    if weight is not None and asked.everything:
        weights = Blocks(kernel, n, values.index_select(1, on_device(weight, values.device)))
    elif weight is not None:
        weights = Blocks(kernel, n, values, squared[0])
    return weights, None if sums is None else Blocks(kernel, n, sums, squared[1])


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the kernel is asked for: compressed rows of weights, and biases; made once per support.

    Attributes:
        everything: All weights, to be picked from.
        product: All rows with weights have the same columns.
        count: Weights.
        arrays: Starts of the rows (outputs + 1,), columns (count,), whether a bias is wanted (outputs,).
        addresses: Where these lie in memory.
    """

    everything: bool
    product: bool
    count: int
    arrays: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]
    addresses: tuple[int, int, int]


def _asked(weight: LiveTensor | None, bias: LiveTensor | None, outputs: int) -> _Asked:
    cache = weight.cache if weight is not None else cast(LiveTensor, bias).cache
    key = ("asked", None if bias is None else bias.name)  # a tied weight may have a bias in one layer and none in the other
    if key not in cache:
        everything = weight is not None and weight.count > DENSE_FROM * weight.size and not weight.product
        starts, columns, product = _rows(weight, outputs, everything)
        wanted = np.zeros(outputs, dtype=np.uint8)
        if bias is not None:
            wanted[bias.positions] = 1
        addresses = starts.ctypes.data, columns.ctypes.data, wanted.ctypes.data
        cache[key] = _Asked(everything, product, int(starts[-1]), (starts, columns, wanted), addresses)
    found: _Asked = cache[key]
    return found


def _rows(weight: LiveTensor | None, outputs: int, everything: bool) -> tuple[NDArray[np.int64], NDArray[np.int32], bool]:
    """Compressed rows for the kernel: starts (outputs + 1,), columns, and whether all live rows have the same columns."""
    if weight is None:
        return np.zeros(outputs + 1, dtype=np.int64), np.zeros(0, dtype=np.int32), False
    if everything:
        starts = np.arange(outputs + 1, dtype=np.int64) * weight.columns
        return starts, np.tile(np.arange(weight.columns, dtype=np.int32), outputs), True
    return weight.row_starts, weight.within_row, weight.product
