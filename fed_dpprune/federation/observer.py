"""What a run tells its surroundings while it goes: a progress bar, a log, a sweep's counter."""

from __future__ import annotations

import logging
from typing import Protocol

from fed_dpprune.records import RoundRecord

_log = logging.getLogger("fed_dpprune.run")


class Observer(Protocol):
    """Hears of a run's progress; `console.Progress` is the one with a screen."""

    def phase(self, text: str) -> None:
        """Something long has begun ("starting Ray")."""

    def round_done(self, record: RoundRecord, rounds: int, epsilon_so_far: float, megabytes: float) -> None:
        """A round is recorded."""

    def note(self, text: str) -> None:
        """Something a reader should know (a refusal, a rejected update)."""

    def close(self) -> None:
        """The run is over."""


class LogObserver:
    """Tells the log alone: what `flwr run` shows of a ServerApp."""

    def phase(self, text: str) -> None:
        """As in Observer."""
        _log.info("%s", text)

    def round_done(self, record: RoundRecord, rounds: int, epsilon_so_far: float, megabytes: float) -> None:
        """As in Observer."""
        accuracy = "" if record.accuracy is None else f"accuracy {record.accuracy:.4f} "
        _log.info("round %d/%d %sepsilon so far %.4f uplink %.3f MB", record.round, rounds, accuracy, epsilon_so_far, megabytes)

    def note(self, text: str) -> None:
        """As in Observer."""
        _log.warning("%s", text)

    def close(self) -> None:
        """As in Observer."""
