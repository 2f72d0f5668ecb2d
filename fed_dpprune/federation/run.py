"""One simulated run from config to run directory: `execute` is what `fed-dpprune run` and `sweep` call."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flwr.serverapp import Grid

from fed_dpprune import config as cfg
from fed_dpprune.data import registry as datasets
from fed_dpprune.errors import FedDPPruneError, LedgerError, RunStopped
from fed_dpprune.federation import checkpoint, simulation, summary
from fed_dpprune.federation.facts import Gathered, actors, prepare
from fed_dpprune.federation.guard import LedgerGuard
from fed_dpprune.federation.host import HostGrid
from fed_dpprune.federation.model_store import SharedStore
from fed_dpprune.federation.observer import LogObserver, Observer
from fed_dpprune.federation.run_dir import RunDir, default_path
from fed_dpprune.federation.secrets import OsSecrets, SeededSecrets
from fed_dpprune.federation.strategy import Interrupted, Recorder, Server, World
from fed_dpprune.federation.terms import blake, config_digest
from fed_dpprune.federation.world import build_world
from fed_dpprune.models import registry, vector
from fed_dpprune.models.spec import from_config
from fed_dpprune.plan import Facts, Plan, make_plan
from fed_dpprune.privacy import statement
from fed_dpprune.privacy.ledger import Head, Ledger
from fed_dpprune.privacy.policy import ClientPolicy
from fed_dpprune.records import ClientCounts, ClientRecord, RoundRecord, read_lines

_log = logging.getLogger(__name__)
EXIT_CODES = {"complete": 0, "failed": 1, "stopped": 3, "interrupted": 130}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: One of `records.STATUSES`.
        error: Why it is not complete; None when it is.
        out: The run directory.
        summary: As in summary.json.
        plan: What was planned; None when the run failed before.
        warnings: Of the plan.
    """

    status: str
    error: BaseException | None
    out: Path
    summary: dict[str, Any]
    plan: Plan | None

    @property
    def exit_code(self) -> int:
        """As in the contract; a failure with a class of its own has its own code."""
        if self.status == "failed" and isinstance(self.error, FedDPPruneError):
            return self.error.exit_code
        return EXIT_CODES[self.status]


def run_identity(config: cfg.Config) -> str:
    """Identity of a simulated run: the same config and seed are the same run, on every runner."""
    return blake(f"{config_digest(config)} {config.seed}".encode())


class DirRecorder(Recorder):
    """Writes every round to the run directory: lines, checkpoint, summary.

    Args:
        files: The run directory, prepared.
        config: Of the run.
        ledger: The clients', where this host holds it; its stored replies are dropped once their round is checkpointed.
        store: The clients' models; versions that nobody holds are deleted.
        clock: Seconds so far.
        noise_source: The clients' label.
    """

    def __init__(
        self,
        files: RunDir,
        config: cfg.Config,
        ledger: Ledger | None,
        store: SharedStore,
        clock: summary.Clock,
        noise_source: str,
    ) -> None:
        self._files, self._config, self.ledger, self._store = files, config, ledger, store
        self.clock, self._noise_source = clock, noise_source
        self.simulated = ledger is not None  # a host that holds the clients' ledger plays the clients
        self.rounds: list[RoundRecord] = []
        self._begun = time.perf_counter()
        self._before = 0.0

    def resume(self, last_round: int) -> None:
        """Take over the records up to `last_round`, and the seconds that they took."""
        self._files.rewind(last_round)
        compute: dict[int, float] = {}
        for row in read_lines(self._files.clients):
            compute[row["round"]] = compute.get(row["round"], 0.0) + (row["compute_s"] or 0.0)
        for row in read_lines(self._files.rounds):
            counts, notes = ClientCounts(**row.pop("clients")), tuple(row.pop("notes"))
            self._add(RoundRecord(**row, clients=counts, notes=notes), compute.get(row["round"], 0.0))
        self._before = sum(self.clock.rounds)

    def _add(self, record: RoundRecord, compute: float) -> None:
        self.rounds.append(record)
        self.clock.rounds.append(record.wall_s)
        self.clock.compute.append(compute)

    def round(self, record: RoundRecord, clients: list[ClientRecord], server: Server) -> None:
        """Lines first, then the checkpoint that vouches for them, then what may be forgotten."""
        if not self.clock.start:
            self.clock.start = time.perf_counter() - self._begun - record.wall_s
        self._add(record, summary.client_seconds(clients))
        self._files.append(record, clients)
        if server.done == record.round:
            state, arrays = server.state()
            if self.ledger is not None:
                head = self.ledger.head()
                state["ledger"] = [head.count, head.digest]
            checkpoint.write(
                self._files.checkpoint, checkpoint.Checkpoint(server.done, config_digest(self._config), state, arrays)
            )
            self._store.keep_only(server.broadcast.versions_held())
            if self.ledger is not None:
                self.ledger.forget_replies(server.done)
        self.summarise(server, "interrupted", "the run has not ended", final=False)

    def summarise(self, server: Server, status: str, reason: str, *, final: bool) -> dict[str, Any]:
        """Write summary.json."""
        self.clock.total = time.perf_counter() - self._begun + self._before
        charged = _charged(self.ledger) if final and self.ledger is not None else {}
        made = summary.make(
            self._config,
            server,
            self.rounds,
            self.clock,
            status=status,
            reason=reason,
            noise_source=self._noise_source,
            simulated=self.simulated,
            charged=charged,
            final=final,
        )
        self._files.write_summary(made)
        return made


def _charged(ledger: Ledger) -> dict[int, int]:
    """Steps by client in the ledger: what counts when a round was cut short."""
    return {int(client): sum(entry.steps for entry in ledger.history(client)) for client in ledger.clients()}


@contextmanager
def ctrl_c(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C asks the run to end at the next chance; the second ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    terminated = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, terminated)


def _open_ledger(files: RunDir, config: cfg.Config, identity: str) -> Ledger:
    return Ledger.open_or_create(
        files.ledger,
        identity,
        mode="simulation",
        delta=config.privacy.delta,
        accountant=config.privacy.accountant,
        unit=config.privacy.unit,
    )


def execute(
    config: cfg.Config,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    observer: Observer | None = None,
    prepared: tuple[Gathered, Plan] | None = None,
    on_ready: Callable[[Plan], None] | None = None,
) -> Outcome:
    """Run a simulation to its end, whatever that end is.

    Args:
        config: Validated; `federation.backend` chooses the runner.
        out: The run directory.
        resume: Continue what is there.
        force: Overwrite what is there.
        observer: Hears of progress.
        prepared: The result of `facts.prepare`, where the caller has it already.
        on_ready: Called with the plan before the first message.

    Raises:
        BadInput: Nothing was written. Any other failure is in the outcome.
    """
    observer = observer or LogObserver()
    gathered, plan = prepared or prepare(config)
    files = RunDir(out)
    files.check(config, resume=resume, force=force)
    try:
        observer.phase("loading data and model")
        world = build_world(config, gathered.layout, datasets.load(config.data, config.seed))
        saved = checkpoint.read(files.checkpoint, config_digest(config)) if resume else None
        files.prepare(config, resume=resume, force=force)
    except BaseException:
        observer.close()
        raise
    if on_ready:
        on_ready(plan)
    if not files.summary.exists():
        files.write_summary(summary.unstarted(config, "interrupted", "the run has not begun"))
    identity = run_identity(config)
    ledger = _open_ledger(files, config, identity)
    store = SharedStore(files.models, gathered.layout.d)
    clock = summary.Clock(actors=actors(config))
    recorder = DirRecorder(files, config, ledger, store, clock, SeededSecrets(config.seed).label)
    stop = threading.Event()
    servers: list[Server] = []
    error: BaseException | None = None
    try:
        with ctrl_c(stop):
            _run(config, gathered, plan, world, saved, files, ledger, recorder, observer, stop, identity, servers)
    except (Interrupted, KeyboardInterrupt) as interrupted:
        error = interrupted
    except Exception as failure:
        _log.exception("the run ended early")
        error = failure
    finally:
        observer.close()
    try:
        return _finish(config, files, plan, recorder, servers, error)
    finally:
        ledger.close()


def _run(
    config: cfg.Config,
    gathered: Gathered,
    plan: Plan,
    world: World,
    saved: checkpoint.Checkpoint | None,
    files: RunDir,
    ledger: Ledger,
    recorder: DirRecorder,
    observer: Observer,
    stop: threading.Event,
    identity: str,
    servers: list[Server],
) -> None:
    """Let the runner carry the server's loop, over clients made here."""
    guard = LedgerGuard(ledger, ClientPolicy.from_config(config.policy), dict(enumerate(plan.nominal_sizes)))
    parts = files.checkpoint / "partition.npz"
    clients = simulation.SimulatedClients(
        config=config,
        data=datasets.absolute(config.data),
        partition=parts.resolve(),
        partition_digest=simulation.write_parts(parts, gathered.parts),
        models=files.models.resolve(),
        sizes=plan.nominal_sizes,
        d=gathered.layout.d,
        home=os.getcwd(),
    )
    if saved is not None and not ledger.contains(Head(*saved.state["ledger"])):
        raise LedgerError(str(files.ledger), "is older than the checkpoint beside it", "start anew with --force")

    def serve(grid: Grid) -> None:
        server = Server(world, lambda sizes, known: plan, HostGrid(grid, guard), observer, recorder, stop, identity)
        if saved is not None:
            server.restore(saved.round, saved.state, saved.arrays)
            recorder.resume(saved.round)
        else:
            recorder.resume(0)
        servers.append(server)
        server.run()

    if config.federation.backend == "inline":
        simulation.run_inline(clients, serve)
    else:
        observer.phase("starting Ray")
        simulation.run_ray(clients, serve, stop)


def serve_app(grid: Grid, config: cfg.Config, stop: threading.Event) -> None:
    """The ServerApp of `flwr run`: the same server, with the clients' own sizes, secrets and, on SuperNodes, ledgers.

    Outputs go to a new folder under runs/ of the working directory, which is the SuperLink's; its path is logged.

    Args:
        grid: Flower's.
        config: From the run-config.
        stop: Set to end the run.

    Raises:
        FedDPPruneError: Any end but completion, so that Flower marks the run as failed; outputs are written first.
    """
    files = RunDir(default_path(config, Path("flower")).absolute())
    observer = LogObserver()
    observer.phase(f"writing to {files.path}")
    dataset = datasets.load(config.data, config.seed)
    layout = registry.layout(from_config(config.model, dataset.input_shape, dataset.classes))
    files.prepare(config, resume=False, force=False)
    identity = blake(os.urandom(16))
    clock, store = summary.Clock(), SharedStore(files.models, layout.d)
    recorder = DirRecorder(files, config, None, store, clock, OsSecrets().label)
    ledgers: list[Ledger] = []

    def host(inner: Grid, sizes: tuple[int, ...]) -> HostGrid:
        ledgers.append(_open_ledger(files, config, identity))
        recorder.ledger, recorder.simulated = ledgers[0], True
        observer.note(statement.SIMULATED)
        return HostGrid(inner, LedgerGuard(ledgers[0], ClientPolicy.from_config(config.policy), dict(enumerate(sizes))))

    def plan_for(sizes: tuple[int, ...], known: bool) -> Plan:
        return make_plan(config, Facts(layout, sizes, len(dataset.test)), cohorts_known=known)

    server = Server(build_world(config, layout, dataset), plan_for, grid, observer, recorder, stop, identity, host)
    error: BaseException | None = None
    try:
        server.run()
    except Exception as failure:
        error = failure
    _finish(config, files, None, recorder, [server], error)
    for ledger in ledgers:
        ledger.close()
    observer.phase(f"wrote {files.path}")
    if error is not None:
        raise error


def _finish(
    config: cfg.Config,
    files: RunDir,
    plan: Plan | None,
    recorder: DirRecorder,
    servers: list[Server],
    error: BaseException | None,
) -> Outcome:
    """Leave a readable, labelled run directory, whatever happened."""
    from fed_dpprune.study.figures import curves

    status, reason = _status(error)
    made: dict[str, Any] = {}
    if servers and hasattr(servers[0], "book"):
        server = servers[0]
        made = recorder.summarise(server, status, reason, final=True)
        vector.save(files.model, server.layout, server.broadcast.model)
        curves.draw(files.path, files.curves)
    elif not any(read_lines(files.rounds)):
        files.write_summary(summary.unstarted(config, status, reason))
    return Outcome(status, error, files.path, made, plan)


def _status(error: BaseException | None) -> tuple[str, str]:
    if error is None:
        return "complete", ""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted", "interrupted by the user"
    if isinstance(error, RunStopped):
        return "stopped", str(error)
    return "failed", str(error) if isinstance(error, FedDPPruneError) else f"{type(error).__name__}: {error}"
