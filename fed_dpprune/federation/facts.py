"""Facts for the plan, gathered from labels and shapes; features are never read here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.comm.link import parse_link
from fed_dpprune.data import partition
from fed_dpprune.data import registry as datasets
from fed_dpprune.data.dataset import Labels
from fed_dpprune.models import registry as nets
from fed_dpprune.models import weights
from fed_dpprune.models.flat import Layout, Work
from fed_dpprune.models.spec import from_config
from fed_dpprune.plan import Facts, Plan, make_plan
from fed_dpprune.sparsity import files


@dataclass(frozen=True)
class Gathered:
    """What simulation knows beforehand.

    Attributes:
        labels: Of the training rows, with shapes.
        parts: The rows of each client, drawn once.
        layout: Coordinate order.
        work: Of a forward pass; None where it cannot be counted.
        actors: Client processes at work at a time.
    """

    labels: Labels
    parts: list[NDArray[np.int64]]
    layout: Layout
    work: Work | None
    actors: int

    @property
    def facts(self) -> Facts:
        """For `make_plan`: in simulation a client's nominal size is its part's, by declaration."""
        return Facts(self.layout, tuple(len(part) for part in self.parts), self.labels.test_size, self.work, self.actors)


def actors(config: cfg.Config) -> int:
    """Client processes: as the config says, else one per core that this process may use, at most one per client asked."""
    if config.federation.backend == "inline":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.federation.actors or min(cores, config.federation.cohort)


def gather(config: cfg.Config) -> Gathered:
    """Labels, partition and layout of a simulated run.

    Raises:
        ConfigError: The data does not fit the partition or the net.
        DataError: The data is missing or damaged.
    """
    labels = datasets.labels(config.data, config.seed)
    layout, work = nets.described(from_config(config.model, labels.input_shape, labels.classes))
    parts = partition.draw(config.data, config.federation.clients, labels.y, labels.natural, config.seed)
    return Gathered(labels, parts, layout, work, actors(config))


def prepare(config: cfg.Config) -> tuple[Gathered, Plan]:
    """Everything that can be wrong with a config and its data, checked before a file is written.

    Raises:
        BadInput: See `gather` and `plan.make_plan`.
    """
    parse_link(config.wire.link)
    if config.model.weights and not weights.is_torchvision(config.model.weights):
        weights.file(config.model.weights)
    gathered = gather(config)
    if config.sparsity.prune.method == "file":
        files.load(Path(config.sparsity.prune.file), gathered.layout)
    return gathered, make_plan(config, gathered.facts)
