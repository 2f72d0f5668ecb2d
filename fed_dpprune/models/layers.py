"""A net as a plain list of named layers: shapes and parameters follow from the input shape, without torch.

`layout` gives the coordinate order and `modules.build` the torch module, both from the same list, so they cannot drift
apart. Shapes are those of one example, channels first. Lives here: the layers that the built-in nets use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fed_dpprune.models.flat import Tensor, Work

Shape = tuple[int, ...]


class DoesNotFit(ValueError):
    """A layer cannot take the shape it is given; the text says why."""


@dataclass(frozen=True)
class Layer:
    """A step from one shape to the next, with parameters or without."""

    def output(self, shape: Shape) -> Shape:
        """Shape after the layer; raises DoesNotFit."""
        return shape

    def tensors(self, shape: Shape) -> Iterator[Tensor]:
        """Parameters by their name inside the layer, in torch's order, for an input of `shape`."""
        yield from ()

    def work(self, shape: Shape) -> Work:
        """Of one example of `shape`: by default no multiply-adds, and as many values as come out."""
        return Work(0, math.prod(self.output(shape)))


Net = tuple[tuple[str, Layer], ...]


@dataclass(frozen=True)
class Flatten(Layer):
    """Any shape to (features,)."""

    def output(self, shape: Shape) -> Shape:
        """(features,)."""
        return (math.prod(shape),)

    def work(self, shape: Shape) -> Work:
        """None: the same values under another shape."""
        return Work(0, 0)


@dataclass(frozen=True)
class Activation(Layer):
    """`tanh` or `relu`, value by value."""

    function: str


@dataclass(frozen=True)
class Linear(Layer):
    """y = W x + b; W has shape (outputs, inputs)."""

    outputs: int

    def output(self, shape: Shape) -> Shape:
        """(outputs,)."""
        return (self.outputs,)

    def tensors(self, shape: Shape) -> Iterator[Tensor]:
        """Weight and bias."""
        yield Tensor("weight", (self.outputs, shape[0]), "weight", shape[0])
        yield Tensor("bias", (self.outputs,), "bias", shape[0])

    def work(self, shape: Shape) -> Work:
        """A multiply-add for each weight."""
        return Work(self.outputs * shape[0], self.outputs)


def _image(shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise DoesNotFit(f"it needs images, not {shape[0]} features" if len(shape) == 1 else f"it needs images, not {shape}")
    return shape[0], shape[1], shape[2]


def _slid(size: int, kernel: int, stride: int, padding: int) -> int:
    """Positions of a window of `kernel` that slides over `size` pixels."""
    positions = (size + 2 * padding - kernel) // stride + 1
    if size + 2 * padding < kernel or positions < 1:
        raise DoesNotFit(f"a window of {kernel} pixels finds only {size}")
    return positions


@dataclass(frozen=True)
class Conv(Layer):
    """A square 2-d convolution; the weight has shape (outputs, inputs, kernel, kernel)."""

    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: bool = True

    def output(self, shape: Shape) -> Shape:
        """(outputs, height, width)."""
        _, height, width = _image(shape)
        slide = (self.kernel, self.stride, self.padding)
        return (self.outputs, _slid(height, *slide), _slid(width, *slide))

    def tensors(self, shape: Shape) -> Iterator[Tensor]:
        """Weight and, unless switched off, bias."""
        fan_in = shape[0] * self.kernel**2
        yield Tensor("weight", (self.outputs, shape[0], self.kernel, self.kernel), "weight", fan_in)
        if self.bias:
            yield Tensor("bias", (self.outputs,), "bias", fan_in)

    def work(self, shape: Shape) -> Work:
        """A multiply-add for each weight of a channel, at every output value."""
        values = math.prod(self.output(shape))
        return Work(values * shape[0] * self.kernel**2, values)


@dataclass(frozen=True)
class MaxPool(Layer):
    """The largest value of each square window."""

    kernel: int
    stride: int

    def output(self, shape: Shape) -> Shape:
        """(channels, height, width)."""
        channels, height, width = _image(shape)
        return (channels, _slid(height, self.kernel, self.stride, 0), _slid(width, self.kernel, self.stride, 0))


@dataclass(frozen=True)
class MeanPool(Layer):
    """The mean over all pixels of each channel."""

    def output(self, shape: Shape) -> Shape:
        """(channels,)."""
        return (_image(shape)[0],)


@dataclass(frozen=True)
class GroupNorm(Layer):
    """Group normalisation: within one example, so that each example has a gradient of its own (batch norm has none)."""

    groups: int

    def output(self, shape: Shape) -> Shape:
        """The shape it was given."""
        if _image(shape)[0] % self.groups:
            raise DoesNotFit(f"{shape[0]} channels do not part into {self.groups} groups")
        return shape

    def tensors(self, shape: Shape) -> Iterator[Tensor]:
        """Weight and bias, one of each per channel."""
        yield Tensor("weight", shape[:1], "norm")
        yield Tensor("bias", shape[:1], "norm")


@dataclass(frozen=True)
class PadShortcut(Layer):
    """Every `stride`-th pixel, and channels of zeros up to `outputs`: a shortcut without parameters (He et al. 2016, A)."""

    outputs: int
    stride: int

    def output(self, shape: Shape) -> Shape:
        """(outputs, height, width)."""
        _, height, width = _image(shape)
        return (self.outputs, _slid(height, 1, self.stride, 0), _slid(width, 1, self.stride, 0))


@dataclass(frozen=True)
class Residual(Layer):
    """h = entry(x); body(h) + shortcut(h), or body(h) + x where `shortcut` is None."""

    body: Net
    shortcut: Net | None = None
    entry: Net = ()

    def output(self, shape: Shape) -> Shape:
        """The shape that body and shortcut agree on."""
        inside = output(self.entry, shape)
        after = output(self.body, inside)
        beside = shape if self.shortcut is None else output(self.shortcut, inside)
        if after != beside:
            raise DoesNotFit(f"a residual block adds {after} to {beside}")
        return after

    def tensors(self, shape: Shape) -> Iterator[Tensor]:
        """Those of entry, body and shortcut."""
        inside = output(self.entry, shape)
        yield from tensors(self.entry, shape, "entry.")
        yield from tensors(self.body, inside, "body.")
        yield from tensors(self.shortcut or (), inside, "shortcut.")

    def work(self, shape: Shape) -> Work:
        """That of entry, body and shortcut, and the values of their sum."""
        inside = output(self.entry, shape)
        parts = work(self.entry, shape) + work(self.body, inside) + work(self.shortcut or (), inside)
        return parts + Work(0, math.prod(self.output(shape)))


def output(net: Net, shape: Shape) -> Shape:
    """Shape after the last layer; raises DoesNotFit."""
    for _, layer in net:
        shape = layer.output(shape)
    return shape


def tensors(net: Net, shape: Shape, prefix: str = "") -> Iterator[Tensor]:
    """Every parameter of the net in coordinate order, with its full name; raises DoesNotFit."""
    for name, layer in net:
        after = layer.output(shape)
        for tensor in layer.tensors(shape):
            yield Tensor(f"{prefix}{name}.{tensor.name}", tensor.shape, tensor.kind, tensor.fan_in)
        shape = after


def work(net: Net, shape: Shape) -> Work:
    """Of all layers together, for one example of `shape`; raises DoesNotFit."""
    total = Work(0, 0)
    for _, layer in net:
        total += layer.work(shape)
        shape = layer.output(shape)
    return total


def shapes(net: Net, shape: Shape) -> Iterator[Shape]:
    """The input shape of each layer."""
    for _, layer in net:
        yield shape
        shape = layer.output(shape)
