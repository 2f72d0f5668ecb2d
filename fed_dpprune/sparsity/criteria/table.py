"""The table of criteria, and what they are given. A new criterion is one file and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.models.flat import Layout

if TYPE_CHECKING:
    from torch import nn

MODULES = {
    "random": "fed_dpprune.sparsity.criteria.random",
    "magnitude": "fed_dpprune.sparsity.criteria.magnitude",
    "gradient": "fed_dpprune.sparsity.criteria.gradient",
    "synflow": "fed_dpprune.sparsity.criteria.synflow",
    "snip": "fed_dpprune.sparsity.criteria.snip",
}
NEEDS = ("nothing", "weights", "model", "public-data")

Scorer = Callable[[NDArray[np.bool_]], NDArray[np.float64]]


class Examples(Protocol):
    """Labelled examples, as the data room makes them (`data.dataset.Examples`)."""

    def __len__(self) -> int:
        """How many."""

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Inputs, shape (n, *input_shape), float32, and labels, shape (n,), int64."""


@dataclass(frozen=True)
class CriterionContext:
    """All that a criterion may look at; nothing in here is private.

    Attributes:
        layout: Coordinate order of the net.
        weights: The weights to score, shape (d,), float32.
        build: Makes the net, with weights of any value, parameters named as in the layout.
        input_shape: Shape of one example, without the batch.
        seed: The run's public seed.
        public: Examples declared public, or None.
        iterations: Iterations of a criterion that prunes step by step.
        weights_provenance: `data-free` for an initial draw, `public` for weights learnt on public data, else `private`.
    """

    layout: Layout
    weights: NDArray[np.float32]
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    seed: int
    public: Examples | None = None
    iterations: int = 100
    weights_provenance: str = "data-free"

    @classmethod
    def without_net(cls, layout: Layout, seed: int) -> CriterionContext:
        """For the criteria that need nothing but shapes and the public seed."""

        def build() -> nn.Module:
            raise ValueError("this criterion was to need no net")

        return cls(layout, np.zeros(layout.d, dtype=np.float32), build, (), seed)


@dataclass(frozen=True)
class Criterion:
    """One line of the table, loaded.

    Attributes:
        name: As in the config.
        needs: One of NEEDS.
        provenance: What a support chosen by it may claim, the weights' own provenance aside.
        scores: Score of every coordinate, float64, shape (d,), larger = keep; zero where the criterion has no opinion.
        scorer: For a criterion that prunes step by step: makes a function from the mask that lives so far to scores.
    """

    name: str
    needs: str
    provenance: str
    scores: Callable[[CriterionContext], NDArray[np.float64]]
    scorer: Callable[[CriterionContext], Scorer] | None


def criterion(name: str) -> Criterion:
    """The criterion of that name; its file is imported now.

    Raises:
        ValueError: No such criterion.
    """
    if name not in MODULES:
        raise ValueError(f"unknown criterion {name!r}; there are {', '.join(MODULES)}")
    module = importlib.import_module(MODULES[name])
    return Criterion(module.NAME, module.NEEDS, module.PROVENANCE, module.scores, getattr(module, "scorer", None))
