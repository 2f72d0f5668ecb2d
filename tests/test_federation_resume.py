"""Invariant 11: one seed, one result, whatever the order of replies, and however often the run was broken off."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import small_run
from flwr.app import Message

from fed_dpprune import config as cfg
from fed_dpprune.errors import BadInput
from fed_dpprune.federation import aggregate, checkpoint, messages, run_dir
from fed_dpprune.federation.host import HostGrid
from fed_dpprune.privacy.ledger import Ledger
from fed_dpprune.records import read_lines

HARD: dict[str, Any] = {
    "server.momentum": 0.9,
    "server.schedule": "cosine",
    "federation.clients-per-round": 3,
    "federation.rounds": 6,
    "sparsity.drop.method": "random",
    "sparsity.drop.rate": 0.3,
    "wire.uplink": "int8",
}


@pytest.fixture(scope="module")
def conf() -> cfg.Config:
    return small_run.config(**HARD)


@pytest.fixture(scope="module")
def whole(conf, tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert small_run.run(conf, out)[0].status == "complete"
    return out


def assert_same_run(out: Path, whole: Path) -> None:
    for mine, theirs in zip(small_run.result(out), small_run.result(whole), strict=True):
        assert mine == theirs
    with Ledger.read(out / "ledger.sqlite") as one, Ledger.read(whole / "ledger.sqlite") as other:
        assert [one.history(c) for c in one.clients()] == [other.history(c) for c in other.clients()]


def test_two_runs_of_one_seed_are_bit_identical(conf, whole, tmp_path):
    small_run.run(conf, tmp_path)
    assert_same_run(tmp_path, whole)


def test_another_seed_gives_another_run(conf, whole, tmp_path):
    small_run.run(small_run.config(**HARD, seed=4), tmp_path)
    assert small_run.result(tmp_path)[3] != small_run.result(whole)[3]


class Shuffled(small_run.Tap):
    """Replies come in any order."""

    rng = random.Random(1)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        self.rng.shuffle(ids)
        return super().pull_messages(ids)


def test_the_order_of_replies_does_not_matter(conf, whole, tmp_path):
    _, grid = small_run.run(conf, tmp_path, tap=Shuffled)
    assert grid.order != sorted(grid.order)
    assert_same_run(tmp_path, whole)


def test_values_are_added_in_order_of_partition_id(tmp_path):
    """The order of a sum of floats is part of its result."""
    added = []
    mean = aggregate.mean_on_support

    def watched(values):
        added.append([value.tobytes() for value in values])
        return mean(values)

    with patch.object(aggregate, "mean_on_support", watched):
        _, grid = small_run.run(small_run.config(), tmp_path, tap=Shuffled)
    sent = {place: messages.payload_of(replies[0], "update") for place, replies in grid.replies.items()}
    assert added == [[sent[number, client] for client in range(4)] for number in range(1, 5)]
    assert grid.order != sorted(grid.order)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_adam_and_momentum_resume_too(tmp_path, optimizer):
    conf = small_run.config(**{"server.optimizer": optimizer, "server.momentum": 0.5, "server.learning-rate": 0.5})
    small_run.run(conf, tmp_path / "whole")
    small_run.run(conf, tmp_path / "cut", tap=stopping(3, 1))
    assert small_run.run(conf, tmp_path / "cut", resume=True)[0].status == "complete"
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def stopping(number: int, client: int) -> type[small_run.Tap]:
    """Ctrl-C as the request of that round reaches that client."""

    class Stopping(small_run.Tap):
        def asked(self, place: tuple[int, int], message: Message) -> None:
            if place[0] == number and place[1] == self.cohort(number)[client]:
                raise KeyboardInterrupt

        def cohort(self, number: int) -> list[int]:
            return sorted(client for round, client in self.requests if round == number)

    return Stopping


@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_a_run_resumed_after_an_interrupt_equals_the_uninterrupted_one(conf, whole, tmp_path, number):
    cut, _ = small_run.run(conf, tmp_path, tap=stopping(number, 1))
    assert (cut.status, cut.exit_code) == ("interrupted", 130)
    made = small_run.summary(tmp_path)
    assert (made["status"], made["rounds"]) == ("interrupted", number - 1)
    assert [row["round"] for row in small_run.rounds(tmp_path)] == list(range(1, number))
    outcome, grid = small_run.run(conf, tmp_path, resume=True)
    assert outcome.status == "complete"
    assert min(round for round, _ in grid.requests) == number
    assert_same_run(tmp_path, whole)


def test_an_interrupted_rounds_charges_are_in_the_summary_and_not_made_twice(conf, whole, tmp_path):
    small_run.run(conf, tmp_path, tap=stopping(4, 1))
    with Ledger.read(tmp_path / "ledger.sqlite") as ledger:
        charged = {c: sum(e.steps for e in ledger.history(c)) for c in ledger.clients()}
        assert ledger.head().count == 4 * 3
    assert {c: s for c, s in small_run.summary(tmp_path)["privacy"]["steps_by_client"].items() if s} == charged
    small_run.run(conf, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_what_was_computed_before_the_interrupt_is_not_computed_again(conf, tmp_path):
    _, cut = small_run.run(conf, tmp_path, tap=stopping(3, 2))
    _, resumed = small_run.run(conf, tmp_path, resume=True)
    before = {place for place in cut.order if place[0] == 3 and place in cut.replies}
    assert len(before) == 2
    assert before.isdisjoint(resumed.order)


def test_a_run_broken_off_twice_is_still_the_same(conf, whole, tmp_path):
    small_run.run(conf, tmp_path, tap=stopping(2, 0))
    small_run.run(conf, tmp_path, tap=stopping(5, 2), resume=True)
    assert small_run.summary(tmp_path)["status"] == "interrupted"
    small_run.run(conf, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_a_complete_run_resumes_to_itself(conf, whole, tmp_path):
    small_run.run(conf, tmp_path)
    outcome, grid = small_run.run(conf, tmp_path, resume=True)
    assert outcome.status == "complete"
    assert grid.order == []
    assert_same_run(tmp_path, whole)


# --- kill -9 --------------------------------------------------------------------------------------------------------------


def killed(work: Callable[[], Any]) -> int:
    """Do the work in a forked child; the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """The function, killed before (or after) its call of that number."""
    count = iter(range(1, 10**6))

    def counted(*arguments: Any, **keywords: Any) -> Any:
        here = next(count)
        if here == number and not after:
            die()
        result = function(*arguments, **keywords)
        if here == number:
            die()
        return result

    return counted


# Round 3, with 3 clients in each. The four hellos pass the host too, and touch no ledger.
KILLS = {
    "before-the-charge": (Ledger, "charge_many", 3, False),
    "after-the-charge": (Ledger, "charge_many", 3, True),
    "before-the-second-reply-is-stored": (Ledger, "store_replies", 8, False),
    "after-the-second-reply-is-stored": (Ledger, "store_replies", 8, True),
    "before-the-records": (run_dir.RunDir, "append", 3, False),
    "between-client-and-round-lines": (run_dir, "append_lines", 5, True),
    "before-the-checkpoint": (checkpoint, "write", 3, False),
    "between-the-checkpoints-two-files": (checkpoint, "write_atomically", 5, True),
    "after-the-checkpoint": (checkpoint, "write", 3, True),
    "before-the-summary": (run_dir.RunDir, "write_summary", 4, False),
    "after-replies-are-forgotten": (Ledger, "forget_replies", 3, True),
    "before-the-replies-reach-the-server": (HostGrid, "_keep", 13, True),
}


@pytest.mark.parametrize("point", KILLS)
def test_a_run_killed_at_any_point_leaves_readable_files_and_resumes_to_the_same_result(conf, whole, tmp_path, point):
    owner, name, call, after = KILLS[point]

    def work() -> None:
        with patch.object(owner, name, bound(owner, name, call, after)):
            small_run.run(conf, tmp_path)

    assert killed(work) == signal.SIGKILL
    assert small_run.summary(tmp_path)["status"] == "interrupted"
    assert len(list(read_lines(tmp_path / "rounds.jsonl"))) in (2, 3)
    assert len(list(read_lines(tmp_path / "clients.jsonl"))) in (6, 9)
    with Ledger.read(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.head().count in (6, 9)
    outcome, _ = small_run.run(conf, tmp_path, resume=True)
    assert outcome.status == "complete"
    assert_same_run(tmp_path, whole)


def bound(owner: Any, name: str, call: int, after: bool) -> Any:
    counted = at_call(call, getattr(owner, name), after=after)
    return (lambda self, *a, **k: counted(self, *a, **k)) if isinstance(owner, type) else counted


def test_a_run_killed_before_its_first_round_is_labelled(conf, whole, tmp_path):
    def work() -> None:
        with patch("fed_dpprune.federation.strategy.Server.meet", die):
            small_run.run(conf, tmp_path)

    assert killed(work) == signal.SIGKILL
    made = small_run.summary(tmp_path)
    assert (made["status"], made["rounds"], made["seed"]) == ("interrupted", 0, conf.seed)
    small_run.run(conf, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_a_run_resumes_under_its_own_config_only(conf, tmp_path):
    small_run.run(conf, tmp_path, tap=stopping(2, 0))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(BadInput, match=r"another client\.learning-rate"):
        small_run.run(small_run.config(**HARD, **{"client.learning-rate": 2.0}), tmp_path, resume=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("change", [{"name": "other"}, {"federation.actors": 2}, {"federation.reply-timeout": 5}])
def test_what_changes_no_number_may_change_on_resume(conf, whole, tmp_path, change):
    small_run.run(conf, tmp_path, tap=stopping(2, 0))
    outcome, _ = small_run.run(small_run.config(**{**HARD, **change}), tmp_path, resume=True)
    assert outcome.status == "complete"
    assert small_run.result(tmp_path)[3] == small_run.result(whole)[3]


def test_a_damaged_checkpoint_is_refused(conf, tmp_path):
    small_run.run(conf, tmp_path, tap=stopping(3, 0))
    arrays = next((tmp_path / "checkpoint").glob("arrays-*.safetensors"))
    blob = bytearray(arrays.read_bytes())
    blob[-1] ^= 1
    arrays.write_bytes(bytes(blob))
    with pytest.raises(BadInput, match="damaged"):
        small_run.run(conf, tmp_path, resume=True)


def test_a_checkpoint_does_not_grow_with_the_rounds_behind_it(tmp_path):
    sizes = []
    write = checkpoint.write

    def measured(folder: Path, made: checkpoint.Checkpoint) -> None:
        write(folder, made)
        sizes.append(len(made.state["meter"]["clients"]))

    with patch.object(checkpoint, "write", measured):
        small_run.run(small_run.config(**{"federation.rounds": 8}), tmp_path)
    assert max(sizes) <= 2 * 4
