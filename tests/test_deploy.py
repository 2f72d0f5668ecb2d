"""A real SuperLink and two SuperNodes on loopback: ledgers and policies of the nodes' operators, a kill, a return."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.report import ledger_report

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SIZE, BATCH, NOISE, DELTA, STEPS, ROUNDS = 670, 67.0, 2.0, 1e-3, 2, 4
PATIENCE_S = 600


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Deployment:
    """Processes of one deployment in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        home, cwd = folder / "home", folder / "cwd"
        home.mkdir()
        cwd.mkdir()
        text = f'[superlink]\ndefault = "dep"\n[superlink.dep]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (home / "config.toml").write_text(text)
        self.environment = os.environ | {
            "FLWR_HOME": str(home),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # Flower starts its own helpers by name
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=self.folder / "cwd",
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def superlink(self) -> None:
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        server = self.start("superlink", "flower-superlink", "--insecure", *address, "--disable-runtime-dependency-installation")
        while server.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return
            time.sleep(0.5)
        raise AssertionError("the SuperLink did not start")

    def ledger(self, partition: int) -> Path:
        return self.folder / f"node{partition}" / "ledger.sqlite"

    def node(self, partition: int, max_epsilon: float = 50.0) -> subprocess.Popen[bytes]:
        config = {
            "partition-id": partition,
            "num-partitions": 2,
            "data": "digits",
            "nominal-size": SIZE,
            "classes": 10,
            "shape": "64",
            "ledger": str(self.ledger(partition)),
            "accountant": "pld",
            "policy-delta": DELTA,
            "policy-max-epsilon": max_epsilon,
            "policy-min-noise-multiplier": NOISE,
        }
        file = self.folder / f"node{partition}.toml"
        file.write_text(tomli_w.dumps(config))
        ports = ("--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()))
        return self.start(f"node{partition}", "flower-supernode", "--insecure", *ports, "--node-config", str(file))

    def submit(self) -> subprocess.Popen[bytes]:
        overrides = (
            f"federation.rounds={ROUNDS} federation.clients=2 federation.min-clients=1 federation.local-steps={STEPS} "
            f'privacy.epsilon="" privacy.noise-multiplier={NOISE} privacy.expected-batch={BATCH} privacy.delta={DELTA}'
        )
        return self.start("run", "flwr", "run", str(ROOT), "dep", "--stream", "--run-config", overrides)

    def out(self) -> Path:
        return self.folder / "cwd" / "runs" / "quickstart"

    def lines(self, name: str) -> list[dict]:
        path = self.out() / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_rounds(self, count: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while len(self.lines("rounds.jsonl")) < count:
            assert time.monotonic() < end, (self.folder / "run.log").read_text()[-3000:]
            time.sleep(0.5)

    def close(self) -> None:
        for process in self.running:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill -9 a node with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory) -> Iterator[Deployment]:
    """Four rounds; node 0 is killed after the first and started again, node 1 may spend what two rounds cost."""
    rate = BATCH / SIZE
    costs = [table.epsilon([Entry(NOISE, rate, STEPS * rounds)], DELTA) for rounds in (2, 3)]
    made = Deployment(tmp_path_factory.mktemp("deployment"))
    try:
        made.superlink()
        first = made.node(0)
        made.node(1, sum(costs) / 2)
        made.submit()
        made.wait_for_rounds(1)
        kill(first)
        made.node(0)
        made.wait_for_rounds(ROUNDS)
        end = time.monotonic() + PATIENCE_S
        while json.loads((made.out() / "summary.json").read_text())["status"] != "complete":
            assert time.monotonic() < end
            time.sleep(0.5)
        yield made
    finally:
        made.close()


def of_client(deployment: Deployment, client: int) -> list[dict]:
    return [row for row in deployment.lines("clients.jsonl") if row["client"] == client]


def test_the_run_completes_with_noise_of_the_operating_system(deployment):
    summary = json.loads((deployment.out() / "summary.json").read_text())
    assert summary["privacy"]["noise_source"] == "os-entropy"
    assert [row["compute_s"] for row in deployment.lines("clients.jsonl")] == [None] * (2 * ROUNDS)


def test_a_killed_node_comes_back_and_its_ledger_remembers(deployment):
    rows = of_client(deployment, 0)
    assert [row["status"] for row in rows] == ["answered"] * ROUNDS
    spent = ledger_report(deployment.ledger(0))["clients"]
    (client,) = spent.values()
    assert [run["rounds"] for run in client["runs"]] == [ROUNDS]
    assert client["epsilon"] == pytest.approx(rows[-1]["epsilon"], abs=1e-9)


def test_a_limit_in_one_nodes_config_stops_that_node_alone(deployment):
    rows = of_client(deployment, 1)
    assert [(row["status"], row["reason"]) for row in rows] == [("answered", "")] * 2 + [("refused", "budget-exhausted")] * 2
    assert [row["steps"] for row in rows] == [STEPS, STEPS, 0, 0]
    (client,) = ledger_report(deployment.ledger(1))["clients"].values()
    assert [run["steps"] for run in client["runs"]] == [2 * STEPS]


def test_ledgers_are_for_their_owner_alone(deployment):
    for partition in (0, 1):
        path = deployment.ledger(partition)
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0


def test_a_nodes_own_log_says_whose_code_it_runs(deployment):
    assert "runs whatever code the server's side submits" in (deployment.folder / "node0.log").read_text()
