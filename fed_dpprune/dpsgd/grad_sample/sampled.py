"""Calls into the compiled kernel that several rules share: the live weights of a sliding product, example by example."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Window:
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
    n, outputs = g.shape[:2]
    groups = -(-n // kernel.lanes)
    everything = weight is not None and weight.count > DENSE_FROM * weight.size and not weight.product
    starts, columns, product = _rows(weight, outputs, everything)
    wanted = np.zeros(outputs, dtype=np.uint8)
    if bias is not None:
        wanted[bias.positions] = 1
    shape = [n, *x.shape[1:], *g.shape[1:], *window.kernel, *window.stride, *window.padding, *window.dilation, window.groups]
    numbers = np.array([*shape, *x.stride(), *g.stride(), TILE_BYTES, CHANNEL_BYTES], dtype=np.int64)
    values = torch.empty(groups, int(starts[-1]), kernel.lanes)
    sums = torch.empty(groups, bias.count if bias else 0, kernel.lanes)
    squared = torch.empty(groups * kernel.lanes, dtype=torch.float64)
    failed = kernel.library.conv_values(
        numbers.ctypes.data,
        x.data_ptr(),
        g.data_ptr(),
        starts.ctypes.data,
        columns.ctypes.data,
        int(product),
        values.data_ptr(),
        sums.data_ptr() if bias else None,
        wanted.ctypes.data,
        squared.data_ptr(),
    )
    if failed:
        raise MemoryError("no memory for the kernel's scratch")
    weights = None
    if weight is not None and everything:
        weights = Blocks(kernel, n, values.index_select(1, on_device(weight, values.device)))
    elif weight is not None:
        weights = Blocks(kernel, n, values, squared)
    return weights, Blocks(kernel, n, sums) if bias else None


def _rows(weight: LiveTensor | None, outputs: int, everything: bool) -> tuple[NDArray[np.int64], NDArray[np.int32], bool]:
    """Compressed rows for the kernel: starts (outputs + 1,), columns, and whether all live rows have the same columns."""
    if weight is None:
        return np.zeros(outputs + 1, dtype=np.int64), np.zeros(0, dtype=np.int32), False
    if everything:
        starts = np.arange(outputs + 1, dtype=np.int64) * weight.columns
        return starts, np.tile(np.arange(weight.columns, dtype=np.int32), outputs), True
    return weight.row_starts, weight.within_row, weight.product
