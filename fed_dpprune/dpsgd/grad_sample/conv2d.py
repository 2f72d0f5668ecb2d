"""Conv2d: every live weight is one product of the output gradient with a shifted input, example by example.

A per-example weight gradient has the operations of the batch's; what costs is moving data. The compiled kernel computes live
weights only, on bands that stay in cache (kernels/sampled.cpp); the torch rule all weights of the live output channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.grad_sample.contribution import Call, Contribution, Shared, Values, on_device, pick
from fed_dpprune.dpsgd.grad_sample.sampled import Window, sliding
from fed_dpprune.dpsgd.live import LiveTensor

CHUNK_BYTES = 32 * 2**20
GROUPED_FROM = 100  # output positions; below, the grouped convolution is the slower one (measured on CPU)


def contributions(
    layer: nn.Module, live: Mapping[str, LiveTensor], calls: Sequence[Call], kernel: Kernel | None
) -> dict[str, Contribution]:
    """Rule for nn.Conv2d; inputs (n, channels, height, width)."""
    conv = cast(nn.Conv2d, layer)
    found: list[dict[str, Contribution]] = []
    for call in calls:
        x, window = _padded(conv, call.x)
        found.append(_compiled(kernel, x, call.g, window, live) if kernel else _torch(x, call.g, window, live))
    return found[0] if len(found) == 1 else {name: Shared([one[name] for one in found]) for name in live}


def _padded(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Window]:
    """The input and the geometry with zero padding above and to the left; other paddings are laid out first."""
    size, stride, dilation = (cast(tuple[int, int], pair) for pair in (conv.kernel_size, conv.stride, conv.dilation))
    if conv.padding_mode != "zeros":
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = (0, 0)
    elif conv.padding == "same":
        padding = (dilation[0] * (size[0] - 1) // 2, dilation[1] * (size[1] - 1) // 2)
    else:
        padding = (0, 0) if conv.padding == "valid" else cast(tuple[int, int], conv.padding)
    return x, Window(size, stride, padding, dilation, conv.groups)


def _compiled(kernel: Kernel, x: Tensor, g: Tensor, window: Window, live: Mapping[str, LiveTensor]) -> dict[str, Contribution]:
    weight, bias = sliding(kernel, x, g, window, live.get("weight"), live.get("bias"))
    made = {"weight": weight, "bias": bias}
    return {name: cast(Contribution, made[name]) for name in live}


def _torch(x: Tensor, g: Tensor, window: Window, live: Mapping[str, LiveTensor]) -> dict[str, Contribution]:
    found: dict[str, Contribution] = {}
    if "bias" in live:
        found["bias"] = Values(pick(g.sum((2, 3)), live["bias"]))
    if "weight" in live:
        found["weight"] = Values(_weights(x, g, window, live["weight"]))
    return found


def _weights(x: Tensor, g: Tensor, window: Window, live: LiveTensor) -> Tensor:
    """Gradients of the live weights, shape (n, m), some examples at a time; frozen output channels are left out."""
    n, outputs = g.shape[:2]
    positions, kept = on_device(live, x.device), outputs
    if window.groups == 1 and live.rows.size < outputs:
        rows = torch.as_tensor(live.rows, device=x.device)
        place = torch.zeros(outputs, device=x.device, dtype=torch.int64)
        place[rows] = torch.arange(rows.numel(), device=x.device)
        positions = place[positions // live.columns] * live.columns + positions % live.columns
        g, kept = g.index_select(1, rows), rows.numel()
    unfolds = window.groups == 1 and g[0, 0].numel() < GROUPED_FROM
    one = _unfolded if unfolds else _grouped
    scratch = live.columns * (g[0, 0].numel() if unfolds else 0) + kept * live.columns
    size = max(1, CHUNK_BYTES // (4 * scratch))
    parts = []
    for start in range(0, n, size):
        whole = one(x[start : start + size], g[start : start + size], window, live.columns)
        parts.append(whole if positions.numel() == whole.shape[1] else whole.index_select(1, positions))
    return torch.cat(parts)


def _grouped(x: Tensor, g: Tensor, window: Window, columns: int) -> Tensor:
    """All weights of all examples as one convolution with the examples as groups (what vmap makes of it): best on large maps."""
    weight = g.new_empty(g.shape[1], x.shape[1] // window.groups, *window.kernel)
    x = _roomy(x, g, window)

    def one(xi: Tensor, gi: Tensor) -> Tensor:
        made = torch.ops.aten.convolution_backward(
            gi.unsqueeze(0),
            xi.unsqueeze(0),
            weight,
            None,
            window.stride,
            [0, 0],
            window.dilation,
            False,
            [0, 0],
            window.groups,
            [False, True, False],
        )
        return cast(Tensor, made[1])

    return torch.func.vmap(one)(x, g).flatten(1)


def _unfolded(x: Tensor, g: Tensor, window: Window, columns: int) -> Tensor:
    """Windows laid out as columns, then one matrix product per example: best on small maps."""
    x = _roomy(x, g, window)
    (n, channels), (height, width) = x.shape[:2], g.shape[2:]
    of_n, of_c, of_y, of_x = x.stride()
    strides = (of_n, of_c, of_y * window.dilation[0], of_x * window.dilation[1], of_y * window.stride[0], of_x * window.stride[1])
    windows = x.as_strided((n, channels, *window.kernel, height, width), strides).reshape(n, columns, height * width)
    return torch.bmm(g.flatten(2), windows.transpose(1, 2)).flatten(1)


def _roomy(x: Tensor, g: Tensor, window: Window) -> Tensor:
    """The input with its padding laid out and cut to what the output positions reach."""
    reach = [
        (size - 1) * stride + dilation * (kernel - 1) + 1
        for size, stride, dilation, kernel in zip(g.shape[2:], window.stride, window.dilation, window.kernel, strict=True)
    ]
    (top, left), (height, width) = window.padding, x.shape[2:]
    below, right = max(0, reach[0] - top - height), max(0, reach[1] - left - width)
    return nn.functional.pad(x, (left, right, top, below))[:, :, : reach[0], : reach[1]]
