"""Nets by name: one file each, imported only when asked for. `layout` needs no torch for the nets of TABLE.

A new net is one file with `net(spec)` and one line in TABLE; the tests run over the table. A name that is not in the table
may be `torchvision:<name>` or a user's `package.module:factory` (see `foreign.py`).
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fed_dpprune import dotted
from fed_dpprune.errors import ConfigError
from fed_dpprune.models import layers, layout_cache
from fed_dpprune.models.flat import Layout, Tensor, Work
from fed_dpprune.models.spec import TORCHVISION
from fed_dpprune.models.spec import ModelSpec as ModelSpec  # re-exported: the spec belongs to this front door
from fed_dpprune.models.spec import from_config as from_config

if TYPE_CHECKING:
    from torch import nn

TABLE: dict[str, str] = {
    "mlp": "mlp",
    "logistic": "logistic",
    "tanh-cnn": "tanh_cnn",
    "dp-cnn": "dp_cnn",
    "resnet20": "resnet20",
    "wrn16-4": "wrn16_4",
}
MOST = 2**31  # coordinates, 8 GiB of float32: beyond that a vector is no plan, but a slip in a width


def _net(spec: ModelSpec) -> layers.Net:
    net: layers.Net = importlib.import_module(f"fed_dpprune.models.{TABLE[spec.name]}").net(spec)
    return net


def _is_foreign(name: str) -> bool:
    """Whether the net comes as a torch module.

    Raises:
        ConfigError: No net of that name.
    """
    if name in TABLE:
        return False
    if name.startswith(TORCHVISION) or dotted.is_path(name):
        return True
    near = difflib.get_close_matches(name, TABLE, n=1)
    kinds = f"one of {', '.join(TABLE)}, torchvision:<name>, or package.module:factory"
    raise ConfigError("model.name", f"{name!r} is not a net", f"did you mean {near[0]!r}?" if near else f"use {kinds}")


def _foreign_parts(spec: ModelSpec) -> tuple[tuple[Tensor, ...], Work | None]:
    """Remembered for torchvision's nets; a user's factory is asked every time, since its code may have changed."""

    def make() -> tuple[tuple[Tensor, ...], Work | None]:
        from fed_dpprune.models import foreign

        module = _foreign(spec)
        return foreign.tensors(module), foreign.work(module, spec.input_shape)

    return layout_cache.parts(spec, make) if spec.name.startswith(TORCHVISION) else make()


def coordinates(spec: ModelSpec) -> int | None:
    """How many coordinates the net has, before any memory is spent on it; None for a user's own factory, which is not called.

    By arithmetic for the nets of TABLE, by shapes alone for torchvision's.

    Raises:
        ConfigError: Unknown net, or one that does not fit the input.
    """
    if not _is_foreign(spec.name):
        return sum(tensor.size for tensor in _tensors(spec))
    if not spec.name.startswith(TORCHVISION):
        return None

    def count() -> int:
        from fed_dpprune.models import foreign

        return foreign.coordinates(spec)

    return layout_cache.counted(spec, count)


def _foreign(spec: ModelSpec) -> nn.Module:
    import torch

    from fed_dpprune.models import foreign

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return foreign.build(spec)


def _tensors(spec: ModelSpec) -> tuple[Tensor, ...]:
    """Parameters of the net, the head marked, nothing frozen."""
    if _is_foreign(spec.name):
        return _foreign_parts(spec)[0]
    net = _net(spec)
    try:
        tensors = tuple(layers.tensors(net, spec.input_shape))
    except layers.DoesNotFit as error:
        raise ConfigError(
            "model.name and data.dataset", f"{spec.name} does not fit inputs of shape {spec.input_shape} ({error})", "use mlp"
        ) from None
    last = net[-1][0] + "."
    return tuple(replace(tensor, head=tensor.name.startswith(last)) for tensor in tensors)


def _matches(name: str, pattern: str) -> bool:
    """A pattern matches a tensor by its whole name or by the name of a layer it is in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def freeze(tensors: tuple[Tensor, ...], patterns: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The tensors with those marked frozen that a pattern matches (`fc1`, `conv*`, `*.bias`).

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left to train.
    """
    for pattern in patterns:
        if not any(_matches(tensor.name, pattern) for tensor in tensors):
            tops = ", ".join(dict.fromkeys(tensor.name.split(".")[0] for tensor in tensors))
            raise ConfigError("model.freeze-layers", f"{pattern!r} matches no layer", f"the layers are {tops}")
    frozen = tuple(replace(t, frozen=any(_matches(t.name, p) for p in patterns)) for t in tensors)
    if all(tensor.frozen for tensor in frozen):
        raise ConfigError("model.freeze-layers", "freezes the whole net", "leave a layer to train, the head at least")
    return frozen


def _layout(spec: ModelSpec, tensors: tuple[Tensor, ...]) -> Layout:
    found = Layout(freeze(tensors, spec.freeze_layers))
    if found.d > MOST:
        raise ConfigError("model.name and model.hidden", f"{spec.name} has {found.d} coordinates", f"at most {MOST} are taken")
    return found


def layout(spec: ModelSpec) -> Layout:
    """Names, shapes and order of the net's parameters.

    Raises:
        ConfigError: Unknown net, a net that does not fit the input, one of more than MOST coordinates, or a freeze pattern
            that matches nothing.
    """
    return _layout(spec, _tensors(spec))


def described(spec: ModelSpec) -> tuple[Layout, Work | None]:
    """(the layout, what a forward pass of one example takes or None where that cannot be counted).

    Raises:
        ConfigError: As `layout`.
    """
    if _is_foreign(spec.name):
        tensors, work = _foreign_parts(spec)
        return _layout(spec, tensors), work
    return layout(spec), layers.work(_net(spec), spec.input_shape)


def build(spec: ModelSpec) -> nn.Module:
    """The torch module, in eval mode, with values still to be loaded (`vector.load`). Imports torch.

    Parameter names, shapes and order are those of `layout(spec)`; torch's global random state is left as it was.

    Raises:
        ConfigError: As `layout`.
    """
    import torch

    from fed_dpprune.models import modules

    if _is_foreign(spec.name):
        return _foreign(spec)
    layout(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return modules.build(_net(spec), spec.input_shape).eval()
