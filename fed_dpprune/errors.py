"""The exception tree; each class knows the exit code that the command line ends with.

FedDPPruneError                 1   something unexpected inside the project
|-- BadInput                    2   a key, file or argument of the user; nothing was written
|   |-- ConfigError             2   names the config key
|   `-- DataError               2   names the data set or file
|-- LedgerError                 2   the privacy ledger is missing, damaged, locked or not writable
|-- RunStopped                  3   budgets spent or too few clients; outputs are complete up to there
|-- WireError                   1   bytes or fields of a message that do not fit the terms
`-- ClientFault                 1   a typed refusal or failure of a client (code only, no text leaves it)
"""

from __future__ import annotations


class FedDPPruneError(Exception):
    """Base of all errors raised on purpose.

    Printed as `fed-dpprune: <what>: <why>; <what to do>`.

    Args:
        what: The key, file or part concerned.
        why: What is wrong with it, in a few words.
        fix: What the user can do about it; empty when there is nothing.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(f"{what}: {why}" + (f"; {fix}" if fix else ""))

    def __reduce__(self) -> tuple[type[FedDPPruneError], tuple[str, str, str]]:
        """Survive pickling between processes: `Exception` would call `cls(message)`."""
        return (type(self), (self.what, self.why, self.fix))


class BadInput(FedDPPruneError):
    """A mistake in what the user gave; nothing has been written."""

    exit_code = 2


class ConfigError(BadInput):
    """A config key that is unknown, of the wrong type, impossible, or not available yet."""


class DataError(BadInput):
    """A data set or file that is missing, damaged or of the wrong shape."""


class LedgerError(FedDPPruneError):
    """The privacy ledger cannot be trusted or written; training is refused."""

    exit_code = 2


class RunStopped(FedDPPruneError):
    """The run ended before its last round for a reason of its own (budgets spent, too few clients)."""

    exit_code = 3


class WireError(FedDPPruneError):
    """Bytes or fields of a message that do not fit the round's terms."""


class ClientFault(FedDPPruneError):
    """A typed refusal or failure of a client.

    Args:
        code: One of the codes in `federation.messages.REPLY_CODES`; all that leaves the client.
        detail: For the client's own log; never sent.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        self.code, self.detail = code, detail
        super().__init__("client", code, detail)

    def __reduce__(self) -> tuple[type[ClientFault], tuple[str, str]]:  # type: ignore[override]
        return (type(self), (self.code, self.detail))
