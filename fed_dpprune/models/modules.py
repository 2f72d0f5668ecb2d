"""From a net's plain list to a torch module with the same parameter names. Imports torch."""

from __future__ import annotations

from collections import OrderedDict
from functools import singledispatch

import torch
from torch import nn

from fed_dpprune.models import layers
from fed_dpprune.models.layers import Layer, Net, Shape

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Residual(nn.Module):
    """h = entry(x); body(h) + shortcut(h), or body(h) + x without a shortcut."""

    def __init__(self, entry: nn.Module, body: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.entry, self.body, self.shortcut = entry, body, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, *shape) to (n, *output)."""
        inside = self.entry(x)
        beside = x if self.shortcut is None else self.shortcut(inside)
        result: torch.Tensor = self.body(inside) + beside
        return result


class PadShortcut(nn.Module):
    """See layers.PadShortcut."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, channels, height, width)."""
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class MaxPool(nn.MaxPool2d):
    """nn.MaxPool2d with channels innermost while it works: the same bits, ties included, forward and backward.

    torch's kernel for the usual order is scalar: at 128 x 16 x 14 x 14 and stride 1 its backward takes 25 times as long.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, channels, height, width)."""
        if x.is_cuda or torch._C._functorch.is_functorch_wrapped_tensor(x):  # the latter has no memory formats
            plain: torch.Tensor = super().forward(x)
            return plain.contiguous()
        pooled: torch.Tensor = super().forward(_channels_inside(x))
        if pooled.requires_grad:  # a gradient in the usual order would choose the scalar kernel again
            pooled.register_hook(_channels_inside)  # type: ignore[no-untyped-call]
        return pooled.contiguous()


def _channels_inside(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class MeanPool(nn.Module):
    """See layers.MeanPool."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, channels, height, width) to (n, channels)."""
        return x.mean(dim=(2, 3))


def build(net: Net, shape: Shape) -> nn.Sequential:
    """The module of a net for inputs of `shape`; its values are torch's own draw, to be overwritten."""
    named = zip(net, layers.shapes(net, shape), strict=True)
    return nn.Sequential(OrderedDict((name, _module(layer, at)) for (name, layer), at in named))


@singledispatch
def _module(layer: Layer, shape: Shape) -> nn.Module:
    raise TypeError(f"no torch module for {type(layer).__name__}")


@_module.register
def _(layer: layers.Flatten, shape: Shape) -> nn.Module:
    return nn.Flatten()


@_module.register
def _(layer: layers.Activation, shape: Shape) -> nn.Module:
    return ACTIVATIONS[layer.function]()


@_module.register
def _(layer: layers.Linear, shape: Shape) -> nn.Module:
    return nn.Linear(shape[0], layer.outputs)


@_module.register
def _(layer: layers.Conv, shape: Shape) -> nn.Module:
    return nn.Conv2d(shape[0], layer.outputs, layer.kernel, layer.stride, layer.padding, bias=layer.bias)


@_module.register
def _(layer: layers.MaxPool, shape: Shape) -> nn.Module:
    return MaxPool(layer.kernel, layer.stride)


@_module.register
def _(layer: layers.MeanPool, shape: Shape) -> nn.Module:
    return MeanPool()


@_module.register
def _(layer: layers.GroupNorm, shape: Shape) -> nn.Module:
    return nn.GroupNorm(layer.groups, shape[0])


@_module.register
def _(layer: layers.PadShortcut, shape: Shape) -> nn.Module:
    return PadShortcut(layer.outputs - shape[0], layer.stride)


@_module.register
def _(layer: layers.Residual, shape: Shape) -> nn.Module:
    inside = layers.output(layer.entry, shape)
    shortcut = None if layer.shortcut is None else build(layer.shortcut, inside)
    return Residual(build(layer.entry, shape), build(layer.body, inside), shortcut)
