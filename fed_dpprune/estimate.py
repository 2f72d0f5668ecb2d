"""What a run takes of memory and time, roughly: counted work at rates that were measured once. Pure.

Unlike everything else in a plan these figures are estimates, and a run does not use them. They hold within a factor of 2
for the runs of benchmarks/NOTES.md ("The plan's estimate"), on an unloaded core like the one there.
Lives here: the measured rates, and what is multiplied with them. Read first: `estimate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fed_dpprune import config as cfg
from fed_dpprune.models.flat import Layout, Work

# A private step, one thread of AMD EPYC (AVX-512), compiled route: seconds for one example's forward and backward pass, by
# multiply-add and by value between layers. Fitted to the nets of docs/results/dpsgd_step.md; a forward pass alone takes half.
SECONDS_PER_MULTIPLY_ADD = 0.05e-9
SECONDS_PER_VALUE = 2.5e-9
FORWARD_SHARE = 0.5
# An example's own gradient, by live coordinate: of convolutions and norms, while that of a matrix is never written out.
SECONDS_PER_OWN_GRADIENT = 5e-9
# Noise (float64), optimiser and payload by live coordinate of a step, and the fixed cost of a step.
SECONDS_PER_LIVE = 60e-9
SECONDS_PER_STEP = 1.5e-3
# Messages, ledger and records by client and round; evaluation's and records' fixed part by round; imports, data and the
# closing figures by run. configs/quickstart.toml, whose clients have next to nothing to compute.
SECONDS_PER_CLIENT = {"inline": 1.5e-3, "ray": 6e-3}
SECONDS_PER_ROUND = 5e-3
SECONDS_PER_RUN = {"inline": 5.0, "ray": 15.0}
# Resident set of a process before the first step: torch and flwr; inline it is the server too (accountants, figures).
PROCESS_BYTES = {"inline": 880e6, "ray": 690e6}
# Copies of the model in float32: the net, the round's and the local model, the store's last four, float64 work (twice).
MODEL_COPIES = 16
# dpsgd.reference.MEMORY_BYTES, which caps the gradients held at once; kept equal by a test (no torch here).
HELD_BYTES = 256 * 2**20
# dpsgd.gradient's micro-batches, which are filled up to these rows, and what counts as a small net there; likewise.
ROWS, ROWS_OF_SMALL, SMALL = 32, 64, 1 << 16
FLOAT32 = 4
ASSUMES = "one unloaded CPU core (AVX-512) per client process; within a factor of 2 of the runs in benchmarks/NOTES.md"


@dataclass(frozen=True)
class Estimate:
    """Rough figures; None where the net's work cannot be counted.

    Attributes:
        multiply_adds_per_example: Of one forward pass; this one is counted, not estimated.
        actors: Client processes at work at a time.
        client_memory_bytes: Resident set of one client process at its largest.
        seconds_by_round: Of each round, evaluation included.
        seconds_before: Start of the run and its end: imports, data, Ray, figures.
    """

    multiply_adds_per_example: int | None
    actors: int
    client_memory_bytes: float | None
    seconds_by_round: tuple[float, ...] | None
    seconds_before: float

    @property
    def seconds(self) -> float | None:
        """Of the whole run."""
        return None if self.seconds_by_round is None else self.seconds_before + sum(self.seconds_by_round)

    @property
    def seconds_per_round(self) -> float | None:
        """Mean over the rounds."""
        return None if self.seconds_by_round is None else sum(self.seconds_by_round) / len(self.seconds_by_round)

    def as_json(self) -> dict[str, Any]:
        """The object `estimate` of `plan --json`."""
        memory = self.client_memory_bytes
        return {
            "multiply_adds_per_example": self.multiply_adds_per_example,
            "actors": self.actors,
            "client_memory_mb": None if memory is None else memory / 1e6,
            "seconds_per_round": self.seconds_per_round,
            "seconds": self.seconds,
            "assumes": ASSUMES,
        }


def estimate(
    config: cfg.Config,
    layout: Layout,
    work: Work | None,
    *,
    batches: Sequence[float],
    cohorts: Sequence[Sequence[int]],
    live_by_round: Sequence[int],
    test_size: int,
    actors: int,
) -> Estimate:
    """Memory and time of a run.

    Args:
        config: Rounds, steps, runner, micro-batch.
        layout: Coordinate order: which tensors are matrices.
        work: Of a forward pass; None where unknown.
        batches: Expected batch of each client.
        cohorts: Who is asked in each round.
        live_by_round: Live coordinates of an update.
        test_size: Examples that the server evaluates.
        actors: Client processes.
    """
    backend = config.federation.backend
    before = SECONDS_PER_RUN[backend]
    if work is None:
        return Estimate(None, actors, None, None, before)
    own = _own_share(layout)
    memory = _memory(config, layout, work, batch=max(batches), own=own * max(live_by_round))
    evaluation = test_size * FORWARD_SHARE * _example_seconds(work, own=0.0) * _evaluations(config) / config.federation.rounds
    seconds = []
    rows = ROWS_OF_SMALL if work.values <= SMALL else ROWS  # on average half of the last micro-batch is filling
    for cohort, live in zip(cohorts, live_by_round, strict=True):
        example = _example_seconds(work, own=own * live)
        clients = [
            SECONDS_PER_CLIENT[backend]
            + config.federation.local_steps
            * (SECONDS_PER_STEP + SECONDS_PER_LIVE * live + (batches[client] + 0.5 * rows) * example)
            for client in cohort
        ]
        seconds.append(SECONDS_PER_ROUND + evaluation + max(max(clients), sum(clients) / actors))
    return Estimate(work.multiply_adds, actors, memory, tuple(seconds), before)


def _evaluations(config: cfg.Config) -> int:
    """Rounds in which the test set is evaluated: every n-th, and the last."""
    return -(-config.federation.rounds // config.federation.evaluate_every)


def _own_share(layout: Layout) -> float:
    """Share of the trainable coordinates that are not in a matrix: these get a gradient of each example's own."""
    trainable = [tensor for tensor in layout.tensors if not tensor.frozen]
    apart = sum(tensor.size for tensor in trainable if len(tensor.shape) != 2)
    return apart / max(1, sum(tensor.size for tensor in trainable))


def _example_seconds(work: Work, *, own: float) -> float:
    """Forward and backward of one example."""
    return work.multiply_adds * SECONDS_PER_MULTIPLY_ADD + work.values * SECONDS_PER_VALUE + own * SECONDS_PER_OWN_GRADIENT


def _memory(config: cfg.Config, layout: Layout, work: Work, *, batch: float, own: float) -> float:
    """Process, model copies, and for the examples held at once: values with their gradients, and own gradients."""
    gradients = FLOAT32 * own
    most = config.engine.micro_batch or max(1.0, HELD_BYTES // max(1.0, gradients))
    held = min(batch, most)
    return PROCESS_BYTES[config.federation.backend] + FLOAT32 * (MODEL_COPIES * layout.d + held * (2 * work.values + own))
