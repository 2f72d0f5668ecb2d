"""Conv2d: every live weight is one product of the output gradient with a shifted input, example by example.

A per-example weight gradient has the operations of the batch's; what costs is moving data. The compiled kernel computes live
weights only, on bands that stay in cache (kernels/sampled.cpp); the torch rule all weights of the live output channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.grad_sample.contribution import Call, Contribution, Shared, Values, even_part, pick
from fed_dpprune.dpsgd.grad_sample.sampled import Window, sliding
from fed_dpprune.dpsgd.live import LiveTensor

# Output positions from which the grouped convolution is the faster one, unless the windows of one example are small (floats).
# Measured on CPU.
GROUPED_FROM = 100
SMALL_WINDOWS = 16 * 1024


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
    """Gradients of the live weights, shape (n, m), some examples at a time.

    All weights are computed, whatever lives: the shapes of the products, hence their rounding, follow from the layer alone
    and are those that the module was proven with. A support is the server's choice.
    """
    places = g[0, 0].numel()
    unfolds = window.groups == 1 and (places < GROUPED_FROM or places * live.columns < SMALL_WINDOWS)
    positions = _positions(live, window, g.device, channels_inside=unfolds)
    size = even_part(g.shape[0], live.columns * (places if unfolds else 0) + g.shape[1] * live.columns)
    parts = []
    for start in range(0, g.shape[0], size):
        here = slice(start, start + size)
        whole = _unfolded(x[here], g[here], window) if unfolds else _grouped(x[here], g[here], window)
        parts.append(whole.index_select(1, positions))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _positions(live: LiveTensor, window: Window, device: torch.device, *, channels_inside: bool) -> Tensor:
    """The live weights' places among all weights as the product lays them out; once per support."""
    key = ("places", str(device), channels_inside)
    if key not in live.cache:
        row, column = np.divmod(live.positions, live.columns)
        if channels_inside:
            channel, inside = np.divmod(column, window.kernel[0] * window.kernel[1])
            column = inside * (live.columns // (window.kernel[0] * window.kernel[1])) + channel
        live.cache[key] = torch.tensor(row * live.columns + column, device=device)
    found: Tensor = live.cache[key]
    return found


def _grouped(x: Tensor, g: Tensor, window: Window) -> Tensor:
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


def _unfolded(x: Tensor, g: Tensor, window: Window) -> Tensor:
    """Windows laid out as rows, then one matrix product per example: best on small maps.

    A window and the result's columns are ordered (vertical, horizontal, channel): longer runs to copy.
    """
    x = _roomy(x, g, window).contiguous(memory_format=torch.channels_last)
    (n, channels), (height, width) = x.shape[:2], g.shape[2:]
    of_n, of_c, of_y, of_x = x.stride()
    inner = [(window.kernel[0], of_y * window.dilation[0]), (window.kernel[1], of_x * window.dilation[1]), (channels, of_c)]
    dimensions = [(n, of_n), (height, of_y * window.stride[0]), (width, of_x * window.stride[1]), *inner]
    windows = x.as_strided([size for size, _ in dimensions], [stride for _, stride in dimensions])
    return torch.bmm(g.flatten(2), windows.reshape(n, height * width, -1)).flatten(1)


def _roomy(x: Tensor, g: Tensor, window: Window) -> Tensor:
    """The input with its padding laid out and cut to what the output positions reach."""
    reach = [
        (size - 1) * stride + dilation * (kernel - 1) + 1
        for size, stride, dilation, kernel in zip(g.shape[2:], window.stride, window.dilation, window.kernel, strict=True)
    ]
    (top, left), (height, width) = window.padding, x.shape[2:]
    below, right = max(0, reach[0] - top - height), max(0, reach[1] - left - width)
    return nn.functional.pad(x, (left, right, top, below))[:, :, : reach[0], : reach[1]]
