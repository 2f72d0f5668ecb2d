"""A user's own loader by dotted path, `package.module:function`.

Protocol: `function(data: config.Data, seed: int) -> data.dataset.Dataset`; the same arguments must give the same rows in
the same order in every process. It may have an attribute `labels` with the same arguments that returns
data.dataset.Labels without reading features; without one, `plan` loads the whole set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fed_dpprune import config, dotted
from fed_dpprune.data.dataset import Dataset, Examples, Labels
from fed_dpprune.errors import ConfigError, FedDPPruneError


def load(data: config.Data, seed: int) -> Dataset:
    """What the user's function returns.

    Raises:
        ConfigError: It cannot be imported, fails, or returns something else.
    """
    made: Dataset = _call(_function(data), data, seed, Dataset)
    return made


def examples(path: str) -> Examples:
    """A node's own rows: the same function, which may return data.dataset.Examples alone.

    It is called with the [data] table at its defaults (but for `dataset`) and seed 0, whatever a server's config says.
    What such a function computes over several rows at once is its author's word, not this package's.

    Raises:
        ConfigError: As `load`.
    """
    data = config.Data(dataset=path)
    made: Dataset | Examples = _call(_function(data), data, 0, Dataset, Examples)
    return made.train if isinstance(made, Dataset) else made


def labels(data: config.Data, seed: int) -> Labels:
    """From the function's own `labels` where it has one, else from the loaded set."""
    function = _function(data)
    quick = getattr(function, "labels", None)
    made: Labels = load(data, seed).labels() if quick is None else _call(quick, data, seed, Labels)
    return made


def _function(data: config.Data) -> Callable[..., Any]:
    return dotted.resolve(data.dataset, "data.dataset")


def _call(function: Callable[..., Any], data: config.Data, seed: int, *kinds: type[Any]) -> Any:
    try:
        value = function(data, seed)
    except FedDPPruneError:
        raise
    except Exception as error:  # the user's own code may raise anything
        why = f"{data.dataset} failed ({type(error).__name__}: {error})"
        raise ConfigError("data.dataset", why, "it is called with the [data] table and the seed") from error
    if not isinstance(value, kinds):
        why = f"{data.dataset} returned {type(value).__name__}, not {' or '.join(kind.__name__ for kind in kinds)}"
        raise ConfigError("data.dataset", why, "see fed_dpprune/data/loader.py for what it should return")
    return value
