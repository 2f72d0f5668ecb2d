"""Flower's loop hands messages out when they are pushed, and is put back afterwards."""

from __future__ import annotations

import threading
import time
from queue import Queue

from flwr.server.superlink.fleet.vce import vce_api

from fed_dpprune.federation import dispatch


class State:
    """A link state with one node."""

    def __init__(self) -> None:
        self.waiting: list[str] = []

    def get_message_ins(self, node_id: int, limit: int) -> list[str]:
        return [self.waiting.pop(0)] if self.waiting else []


class Pushing:
    """A grid that only pushes."""

    def __init__(self, state: State) -> None:
        self.state = state

    def push_messages(self, messages):
        self.state.waiting += messages
        return [f"id of {m}" for m in messages]


def seconds_to_hand_out(rounds: int, *, ringing: bool) -> list[float]:
    """How long each of `rounds` messages, pushed at random moments, waits for Flower's loop."""
    state, queue, stop = State(), Queue(), threading.Event()
    grid, waits = Pushing(state), []
    with dispatch.prompt_dispatch() as ring:
        if ringing:
            ring(grid)
        loop = threading.Thread(target=vce_api.add_messages_to_queue, args=(state, queue, {7: 0}, stop))
        loop.start()
        for number in range(rounds):
            time.sleep(0.013 * (number % 5) + 0.011)
            begun = time.perf_counter()
            assert grid.push_messages([f"m{number}"]) == [f"id of m{number}"]
            assert queue.get(timeout=5) == f"m{number}"
            waits.append(time.perf_counter() - begun)
        stop.set()
        loop.join(timeout=5)
        assert not loop.is_alive()
    return waits


def test_a_pushed_message_does_not_wait_for_the_next_look():
    prompt, plain = seconds_to_hand_out(12, ringing=True), seconds_to_hand_out(12, ringing=False)
    assert sorted(prompt)[6] < 0.03
    assert sorted(prompt)[6] < sorted(plain)[6] / 2


def test_flowers_loop_is_put_back():
    before = vce_api.add_messages_to_queue
    with dispatch.prompt_dispatch():
        assert vce_api.add_messages_to_queue is not before
    assert vce_api.add_messages_to_queue is before


def test_a_flower_without_that_loop_is_left_alone(monkeypatch):
    monkeypatch.delattr(vce_api, "add_messages_to_queue")
    grid = Pushing(State())
    with dispatch.prompt_dispatch() as ring:
        ring(grid)
        assert grid.push_messages(["a"]) == ["id of a"]
    assert not hasattr(vce_api, "add_messages_to_queue")
    assert "push_messages" not in vars(grid)
