"""A user's own loader by dotted path, `package.module:function`.

Protocol: `function(data: config.Data, seed: int) -> data.dataset.Dataset`; the same arguments must give the same rows in
the same order in every process. It may have an attribute `labels` with the same arguments that returns
data.dataset.Labels without reading features; without one, `plan` loads the whole set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fed_dpprune import config, dotted
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.errors import ConfigError, FedDPPruneError

Kind = TypeVar("Kind")


def load(data: config.Data, seed: int) -> Dataset:
    """What the user's function returns.

    Raises:
        ConfigError: It cannot be imported, fails, or returns something else.
    """
    return _call(_function(data), data, seed, Dataset)


def labels(data: config.Data, seed: int) -> Labels:
    """From the function's own `labels` where it has one, else from the loaded set."""
    function = _function(data)
    quick = getattr(function, "labels", None)
    return load(data, seed).labels() if quick is None else _call(quick, data, seed, Labels)


def _function(data: config.Data) -> Callable[..., Any]:
    return dotted.resolve(data.dataset, "data.dataset")


def _call(function: Callable[..., Any], data: config.Data, seed: int, kind: type[Kind]) -> Kind:
    try:
        value = function(data, seed)
    except FedDPPruneError:
        raise
    except Exception as error:  # the user's own code may raise anything
        why = f"{data.dataset} failed ({type(error).__name__}: {error})"
        raise ConfigError("data.dataset", why, "it is called with the [data] table and the seed") from error
    if not isinstance(value, kind):
        why = f"{data.dataset} returned {type(value).__name__}, not {kind.__name__}"
        raise ConfigError("data.dataset", why, "see fed_dpprune/data/loader.py for what it should return")
    return value
