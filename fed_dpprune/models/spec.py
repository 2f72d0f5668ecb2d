"""Which net, for which input: all that a layout depends on. Plain types."""

from __future__ import annotations

from dataclasses import dataclass

from fed_dpprune import config

TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class ModelSpec:
    """The [model] table, and the shapes that the data set gives it.

    Attributes:
        name: As in `model.name`.
        hidden: Widths of the hidden layers (mlp).
        activation: "tanh" or "relu" (mlp).
        input_shape: Shape of one example.
        classes: Outputs.
        freeze_layers: Name patterns of tensors or layers that are held at their value.
        weights: A file to start from, "torchvision" or "torchvision:<weights>", or "".
    """

    name: str
    hidden: tuple[int, ...]
    activation: str
    input_shape: tuple[int, ...]
    classes: int
    freeze_layers: tuple[str, ...] = ()
    weights: str = ""


def from_config(model: config.Model, input_shape: tuple[int, ...], classes: int) -> ModelSpec:
    """The spec of a config for data of this shape."""
    return ModelSpec(model.name, model.hidden, model.activation, input_shape, classes, model.freeze_layers, model.weights)
