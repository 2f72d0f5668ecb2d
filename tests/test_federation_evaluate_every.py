"""`federation.evaluate-every`: the test data is looked at less often, and nothing else of the run changes."""

from __future__ import annotations

import pytest
import small_run
from flwr.app import Message

ROUNDS = {"federation.rounds": 5}
SPARSE = {**ROUNDS, "federation.evaluate-every": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of one run that looks every round and of one that looks every second, with its picture."""
    folder = tmp_path_factory.mktemp("runs")
    small_run.run(small_run.config(**ROUNDS), folder / "always")
    outcome, _ = small_run.run(small_run.config(**SPARSE), folder / "sometimes", picture=True)
    assert outcome.status == "complete"
    return folder / "always", folder / "sometimes"


def test_every_nth_round_and_the_last_are_measured(runs):
    always, sometimes = (small_run.rounds(out) for out in runs)
    assert [row["round"] for row in sometimes if row["accuracy"] is not None] == [2, 4, 5]
    for before, after in zip(always, sometimes, strict=True):
        measured = after["round"] in (2, 4, 5)
        for key in ("accuracy", "loss"):
            assert after[key] == (before[key] if measured else None)


def test_nothing_else_changes(runs):
    always, sometimes = runs
    assert (always / "model.safetensors").read_bytes() == (sometimes / "model.safetensors").read_bytes()
    assert small_run.same(small_run.clients(always)) == small_run.same(small_run.clients(sometimes))
    assert small_run.summary(always)["bytes"] == small_run.summary(sometimes)["bytes"]


def test_the_best_is_the_best_that_was_measured(runs):
    rows = [row for row in small_run.rounds(runs[1]) if row["accuracy"] is not None]
    best = max(rows, key=lambda row: row["accuracy"])
    made = small_run.summary(runs[1])["accuracy"]
    assert made == {"last": rows[-1]["accuracy"], "best": best["accuracy"], "best_round": best["round"]}
    assert (runs[1] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_says_what_it_measured_and_resumes_to_the_same(runs, tmp_path):
    class Stopping(small_run.Tap):
        def asked(self, place: tuple[int, int], message: Message) -> None:
            if place[0] == 4:
                raise KeyboardInterrupt

    conf = small_run.config(**SPARSE)
    small_run.run(conf, tmp_path, tap=Stopping, picture=True)
    made = small_run.summary(tmp_path)["accuracy"]
    assert (made["last"], made["best_round"]) == (None, 2)
    small_run.run(conf, tmp_path, resume=True)
    assert small_run.result(tmp_path) == small_run.result(runs[1])
