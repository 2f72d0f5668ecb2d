"""Seconds a round in steady state: this project on Ray and inline, and what a user writes today, in one run.

    python benchmarks/federated_round.py [--models tanh-cnn,dp-cnn] [--rounds 8] [--systems ours-ray,...] [--json]

Every system does the same work: Fashion-MNIST shared out evenly among 10 clients, all asked in each round, 2 local steps of
120 expected examples by Poisson sampling; systems on Ray have 2 actors. Ours has 10% of the coordinates live, drawn anew
each round. Systems run in processes of their own and take turns round by round, so that a busy machine slows all alike.
What comes before the third round (starting Ray, imports, first calls) is given apart as `start_s`, never mixed in.

`wall` is the median seconds from the release of a round to its end, `cpu` the mean CPU seconds of the whole process tree in
that time (driver, Ray's own processes, actors), `client` the clients' seconds, all together. The other columns share out
the wall: client seconds are divided by the number of client processes. Nobody evaluates on a test set: ours always does,
so it is given ten test images. Needs FED_DPPRUNE_DATA (a folder with FashionMNIST) and Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fed_dpprune import config as cfg
from fed_dpprune import console
from fed_dpprune.errors import BadInput, FedDPPruneError

MODELS = ("tanh-cnn", "dp-cnn")
SYSTEMS = {
    "ours-ray": "this project on Ray",
    "ours-inline": "this project in one process",
    "flower-opacus": "Flower + Opacus, as published: epsilon in every client",
    "flower-opacus-no-epsilon": "the same without epsilon",
    "flower-opacus-our-net": "the published peer with this project's faster max pooling",
    "plain-loop": "no privacy, no messages, one process",
}
# All at once are what 24 GB hold on the DP-CNN: an actor of a peer takes up to 3 GB. The other system goes with the small net.
USUAL = tuple(name for name in SYSTEMS if name != "flower-opacus-our-net")
PEER, OURS = "flower-opacus", "ours-ray"
WARM_UP = 2  # rounds that belong to the start: in the first, one of two actors may not have been used
LIVE = 0.1
PARTS = ("compute_s", "epsilon_s", "serialise_s", "server_s", "waiting_s")


# ---------------------------------------------------------------------- a system's process


def tree_cpu(root: int) -> float:
    """CPU seconds of a process and all its living descendants, every thread of each.

    Read from each process's own CPU clock (Linux: nanoseconds), not from /proc's ticks of 10 ms.
    """
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = Path("/proc", entry, "stat").read_text()
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    total, waiting = 0.0, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~process << 3) | 2)  # the kernel's name of that process's clock (CPUCLOCK_SCHED)
    return total


class Gate:
    """Where a system waits for its turn: each round is timed from its release to its end.

    Args:
        lines: To the main process, one JSON object a round.
        turns: From it, one line for each round that may begin.
    """

    def __init__(self, lines: IO[str], turns: IO[str]) -> None:
        self._lines, self._turns, self._round = lines, turns, 0
        self._released, self._cpu = time.perf_counter(), 0.0

    def reached(self, parts: dict[str, float]) -> None:
        """A round is over: say so, and come back when the next may begin."""
        wall, cpu = time.perf_counter() - self._released, tree_cpu(os.getpid()) - self._cpu
        self._round += 1
        print(json.dumps({"round": self._round, "wall_s": wall, "cpu_s": cpu, **parts}), file=self._lines, flush=True)
        self._turns.readline()
        self._cpu = tree_cpu(os.getpid())
        self._released = time.perf_counter()


def our_config(work: Any, rounds: int, backend: str) -> cfg.Config:
    """The same work as a config of ours."""
    return cfg.build(
        {
            "name": "federated-round",
            "data.dataset": work.data,
            "model.name": work.model,
            "federation.backend": backend,
            "federation.clients": work.clients,
            "federation.rounds": rounds,
            "federation.local-steps": work.local_steps,
            "federation.actors": work.actors,
            "sparsity.freeze.method": "random",
            "sparsity.freeze.rate": 1 - LIVE,
            "sparsity.freeze.ramp": "constant",
            "privacy.noise-multiplier": work.noise_multiplier,
            "privacy.delta": work.delta,
            "privacy.clip-norm": work.clip_norm,
            "privacy.expected-batch": float(work.batch),
            "client.learning-rate": work.learning_rate,
        }
    )


class Timers:
    """Seconds spent inside chosen functions of ours; a function inside another chosen one counts for the inner alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Let every call of `owner.name` count for `part`."""
        plain = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            begun = time.perf_counter()
            try:
                return plain(*arguments, **options)
            finally:
                spent = time.perf_counter() - begun
                self.seconds[part] = self.seconds.get(part, 0.0) + spent - self._inner.pop()
                self._inner[-1] += spent

        setattr(owner, name, timed)

    def leave_out(self, seconds: float) -> None:
        """Let time spent elsewhere count for none of the functions under way."""
        self._inner[-1] += seconds

    def take(self) -> dict[str, float]:
        """All seconds since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


def watch_client(timers: Timers) -> None:
    """Private work, and bringing models and updates in and out of messages."""
    from fed_dpprune.federation import client

    timers.watch(client, "train", "compute_s")
    timers.watch(client.ClientRuntime, "train", "serialise_s")


def watch_server(timers: Timers) -> None:
    """The charges in the ledger (with their epsilons), messages, and everything else that the server does itself."""
    from fed_dpprune.federation import messages, run, strategy
    from fed_dpprune.federation.guard import LedgerGuard

    timers.watch(LedgerGuard, "admit_many", "epsilon_s")
    for name in ("train_request", "message_bytes", "read_reply", "freeze"):
        timers.watch(messages, name, "serialise_s")
    timers.watch(strategy.Server, "_request", "serialise_s")
    timers.watch(strategy.Server, "_judge", "serialise_s")
    for owner, name in ((strategy.Server, "_order"), (strategy.Server, "_step"), (strategy.Server, "_record")):
        timers.watch(owner, name, "server_s")
    timers.watch(run.DirRecorder, "round", "server_s")


def in_actors(app: Callable[..., Any], notes: str) -> Callable[..., Any]:
    """Our ClientApp for Ray, whose clients leave the seconds of their parts in a folder: one line a request."""

    def timed(clients: Any) -> Any:
        inner = app(clients)

        def handle(message: Any, context: Any) -> Any:
            import federated_round

            timers = federated_round.actor_timers()
            reply = inner(message, context)
            with open(f"{notes}/{os.getpid()}.jsonl", "a") as file:
                file.write(json.dumps(timers.take()) + "\n")
            return reply

        return handle

    return timed


_actor: list[Timers] = []


def actor_timers() -> Timers:
    """This process's timers, set up at the first call."""
    if not _actor:
        _actor.append(Timers())
        watch_client(_actor[0])
    return _actor[0]


class Notes:
    """What the actors have written since the last look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def take(self) -> dict[str, float]:
        """Seconds by part, all clients together."""
        total: dict[str, float] = {}
        for path in self._folder.glob("*.jsonl"):
            lines = path.read_text().splitlines()
            for line in lines[self._read.get(path, 0) :]:
                for part, seconds in json.loads(line).items():
                    total[part] = total.get(part, 0.0) + seconds
            self._read[path] = len(lines)
        return total


def serve_ours(work: Any, rounds: int, gate: Gate, backend: str, folder: Path) -> None:
    """Run this project as `fed-dpprune run` does; the observer's end of round is the gate."""
    from fed_dpprune.federation import run, simulation
    from fed_dpprune.federation.observer import LogObserver

    server, actors = Timers(), 1
    watch_server(server)
    notes = Notes(folder / "notes")
    if backend == "ray":
        actors = work.actors
        (folder / "notes").mkdir()
        simulation.SimulatedClients.app = in_actors(simulation.SimulatedClients.app, str(folder / "notes"))  # type: ignore[method-assign,assignment]
    client = actor_timers() if backend == "inline" else notes

    class AtTheGate(LogObserver):
        def round_done(self, *about: Any) -> None:
            own, theirs = server.take(), client.take()
            parts = {part: own.get(part, 0.0) + theirs.get(part, 0.0) / actors for part in PARTS[:-1]}
            begun = time.perf_counter()
            gate.reached(parts | {"client_s": sum(theirs.values())})
            server.leave_out(time.perf_counter() - begun)

    outcome = run.execute(our_config(work, rounds, backend), folder / "run", observer=AtTheGate())
    if outcome.error is not None:
        raise outcome.error


def serve_peer(work: Any, rounds: int, gate: Gate, system: str) -> None:
    """Run one of the others."""
    import federated_peers as peers

    def reached(seconds: dict[str, float]) -> None:
        parts = {part: seconds.get(part, 0.0) / actors for part in PARTS[:3]}
        gate.reached(parts | {"server_s": seconds.get("server_s", 0.0), "client_s": seconds["client_s"]})

    actors = 1 if system == "plain-loop" else work.actors
    if system == "plain-loop":
        peers.serve_loop(work, rounds, reached)
    else:
        peers.serve_flower(work, rounds, reached, epsilon="no-epsilon" not in system, our_net="our-net" in system)


def play(system: str, work: Any, rounds: int, folder: Path) -> None:
    """The main function of a system's process: stdout belongs to the gate, everything that others print to the log."""
    gate = Gate(os.fdopen(os.dup(1), "w"), sys.stdin)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if system.startswith("ours"):
        serve_ours(work, rounds, gate, system.removeprefix("ours-"), folder)
    else:
        serve_peer(work, rounds, gate, system)


# ---------------------------------------------------------------------- the main process


@dataclass
class Player:
    """A system at work."""

    system: str
    process: subprocess.Popen[str]
    log: Path
    started: float
    rounds: list[dict[str, float]]

    def end_of_round(self) -> dict[str, float]:
        """Wait for it.

        Raises:
            FedDPPruneError: The process ended instead.
        """
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            tail = " | ".join(self.log.read_text().splitlines()[-3:])
            raise FedDPPruneError(self.system, f"ended early ({tail})", f"see {self.log}")
        found: dict[str, float] = json.loads(line)
        self.rounds.append(found)
        return found

    def go(self) -> None:
        """Let the next round begin."""
        if self.process.stdin:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()


def start(system: str, work: Any, rounds: int, folder: Path) -> Player:
    """A process for one system, on its way to the end of its first round."""
    home = folder / f"{work.model}-{system}"
    home.mkdir()
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(here / "federated_round.py"), "--play", json.dumps([system, asdict(work), rounds, str(home)])]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    return Player(system, process, home / "log.txt", begun, [])


def measure(work: Any, systems: list[str], rounds: int, folder: Path, told: Callable[[str], None]) -> list[dict[str, Any]]:
    """One model: start the systems one after the other, then let them take turns."""
    players: list[Player] = []
    starts: dict[str, float] = {}
    try:
        for system in systems:
            told(f"{work.model}: starting {system}")
            player = start(system, work, WARM_UP + rounds, folder)
            players.append(player)
            player.end_of_round()
            starts[system] = time.perf_counter() - player.started
        for turn in range(WARM_UP - 1 + rounds):
            for place in range(len(players)):
                player = players[(turn + place) % len(players)]
                told(f"{work.model}: round {turn + 2} of {player.system}")
                player.go()
                player.end_of_round()
    finally:
        for player in players:
            _end(player)
    return [row(work.model, player, starts[player.system]) for player in players]


def _end(player: Player) -> None:
    """The last round needs no release, but the process waits for one before it closes down."""
    with contextlib.suppress(OSError):
        player.go()
    try:
        player.process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        player.process.kill()


def row(model: str, player: Player, start_s: float) -> dict[str, Any]:
    """The contract's keys, and where the time goes."""
    timed = player.rounds[WARM_UP:]
    walls = sorted(r["wall_s"] for r in timed)
    typical = min(timed, key=lambda r: abs(r["wall_s"] - statistics.median(walls)))  # one real round: its parts add up
    parts = {part: typical.get(part, 0.0) for part in PARTS[:-1]}
    parts["waiting_s"] = max(0.0, typical["wall_s"] - sum(parts.values()))
    return {
        "model": model,
        "system": player.system,
        "seconds_per_round": statistics.median(walls),
        "cpu_seconds_per_round": statistics.fmean(r["cpu_s"] for r in timed),
        "client_compute_s": statistics.median(r["client_s"] for r in timed),
        "fastest_s": walls[0],
        "slowest_s": walls[-1],
        "start_s": start_s,
        "parts": parts,
    }


def prepare(folder: Path, actors: int) -> Callable[[str], Any]:
    """Write what all systems read, the training rows with ten test images and everybody's part; gives `Work` by model.

    Raises:
        FedDPPruneError: There is no Fashion-MNIST.
    """
    from fed_dpprune.data import registry
    from fed_dpprune.federation.facts import gather

    whole = registry.load(cfg.Data(dataset="fashion-mnist"), 0)
    data, parts = folder / "rows.npz", folder / "parts.npz"
    images = {"x_train": whole.train.x[:, 0], "x_test": whole.test.x[:10, 0]}
    np.savez(data, **images, y_train=whole.train.y, y_test=whole.test.y[:10], classes=np.int64(whole.classes))

    from federated_peers import Work

    drawn = gather(our_config(Work("tanh-cnn", str(data), ""), 1, "inline")).parts
    np.savez(parts, rows=np.concatenate(drawn), edges=np.cumsum([0, *map(len, drawn)]))
    return lambda model: Work(model, str(data), str(parts), actors=actors)


def speedups(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Wall seconds of the published peer over ours on Ray, for the models where both ran."""
    wall = {(r["model"], r["system"]): r["seconds_per_round"] for r in rows}
    models = dict.fromkeys(r["model"] for r in rows)
    return {m: wall[m, PEER] / wall[m, OURS] for m in models if (m, PEER) in wall and (m, OURS) in wall}


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    names = [part.removesuffix("_s") for part in PARTS]
    lines = [
        f"{'model':<10}{'system':<26}{'wall':>8}{'cpu':>8}{'client':>8}  " + "".join(f"{n:>11}" for n in names) + f"{'start':>8}"
    ]
    for r in rows:
        figures = f"{r['seconds_per_round']:>8.3f}{r['cpu_seconds_per_round']:>8.3f}{r['client_compute_s']:>8.3f}  "
        lines.append(
            f"{r['model']:<10}{r['system']:<26}{figures}"
            + "".join(f"{r['parts'][p]:>11.3f}" for p in PARTS)
            + f"{r['start_s']:>8.1f}"
        )
    found = {(r["model"], r["system"]): r for r in rows}
    for model, ratio in speedups(rows).items():
        cpu = found[model, PEER]["cpu_seconds_per_round"] / found[model, OURS]["cpu_seconds_per_round"]
        lines.append(f"{model}: {ratio:.2f} times as fast as the published peer by wall, {cpu:.2f} times by CPU")
    for model in dict.fromkeys(r["model"] for r in rows):
        if (model, "plain-loop") in found and (model, "ours-inline") in found:
            keys = ("seconds_per_round", "cpu_seconds_per_round")
            wall, cpu = (found[model, "ours-inline"][k] / found[model, "plain-loop"][k] for k in keys)
            lines.append(f"{model}: a private round in one process is {wall:.2f} times the plain loop by wall, {cpu:.2f} by CPU")
    return "\n".join(lines)


@contextlib.contextmanager
def progress(turns: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr where that is a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading the data", total=turns)

        def told(text: str) -> None:
            bar.update(task, description=text, advance=1)

        yield told


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _chosen(text: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
    return names


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: _chosen(text, MODELS), default=list(MODELS), help="comma list")
    parser.add_argument("--systems", type=lambda text: _chosen(text, SYSTEMS), default=list(USUAL), help=", ".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds of each system, after the start (default 8)")
    parser.add_argument("--actors", type=int, default=2, help="client processes on Ray (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    found = parser.parse_args(given)
    if found.rounds < 1 or found.actors < 1:
        parser.error("--rounds and --actors are at least 1")
    return found


def main() -> int:
    """Print a table, or one JSON object."""
    given = arguments()
    console.calm_environment()
    if given.play:
        from federated_peers import Work

        system, work, rounds, folder = json.loads(given.play)
        play(system, Work(**work), rounds, Path(folder))
        return 0
    if not os.environ.get("FED_DPPRUNE_DATA"):
        print(
            f"federated_round: {BadInput('FED_DPPRUNE_DATA', 'is not set', 'name a folder that holds FashionMNIST/raw')}",
            file=sys.stderr,
        )
        return 2
    rows: list[dict[str, Any]] = []
    code = 0
    scratch = Path(tempfile.mkdtemp(prefix="federated-round-"))
    try:
        turns = len(given.models) * len(given.systems) * (WARM_UP + given.rounds)
        with progress(turns) as told:
            work_of = prepare(scratch, given.actors)
            for model in given.models:
                rows += measure(work_of(model), given.systems, given.rounds, scratch, told)
        shutil.rmtree(scratch)  # after a failure it stays: the error names a log in it
    except FedDPPruneError as error:
        print(f"federated_round: {error}", file=sys.stderr)
        code = 2 if isinstance(error, BadInput) else 1
        if not rows:
            return code
    if given.json:
        print(json.dumps({"machine": machine(), "rows": rows, "speedup": speedups(rows)}))
    else:
        print(table(rows))
    return code


if __name__ == "__main__":
    sys.exit(main())
