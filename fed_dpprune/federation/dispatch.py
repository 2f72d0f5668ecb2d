"""Flower's simulation looks for new messages every 0.1 s; within `prompt_dispatch` it looks when there are some.

A round of a small net takes two such looks in all, so half a look of waiting is a quarter of it. Flower has no option for
the interval. Its loop is kept as it is: it is handed a stop event whose `wait` also ends when a message has been pushed. A
version of Flower that has no such loop keeps its own pace.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

LOOP = "add_messages_to_queue"


class _Bell:
    """A stop event whose `wait` a push cuts short."""

    def __init__(self, stop: threading.Event, pushed: threading.Event) -> None:
        self._stop, self._pushed = stop, pushed

    def is_set(self) -> bool:
        """As the stop event."""
        return self._stop.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Until something is pushed or time is up; a push during the look that follows rings again."""
        self._pushed.wait(timeout)
        self._pushed.clear()
        return self._stop.is_set()


@contextmanager
def prompt_dispatch() -> Iterator[Callable[[Grid], None]]:
    """Yields what makes a grid ring: call it with the ServerApp's before its first push. Put back when the run is over."""
    from flwr.server.superlink.fleet.vce import vce_api

    plain = getattr(vce_api, LOOP, None)
    pushed = threading.Event()

    def prompt(*arguments: Any, **options: Any) -> Any:
        def bell(value: Any) -> Any:
            return _Bell(value, pushed) if isinstance(value, threading.Event) else value

        return plain(*map(bell, arguments), **{name: bell(value) for name, value in options.items()})  # type: ignore[misc]

    def ring(grid: Grid) -> None:
        push = grid.push_messages

        def push_and_ring(messages: Iterable[Message]) -> Iterable[str]:
            ids = push(messages)
            pushed.set()
            return ids

        setattr(grid, "push_messages", push_and_ring)  # noqa: B010

    if plain is None:
        yield lambda grid: None
        return
    setattr(vce_api, LOOP, prompt)
    try:
        yield ring
    finally:
        setattr(vce_api, LOOP, plain)
