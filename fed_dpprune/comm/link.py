"""How long messages would take: a simple model of a link, for studies. Reported apart from computing time.

seconds(bytes) = latency + 8 * bytes / (rate * (1 - loss)): every lost packet is sent once more on average 1/(1-loss)
times; no congestion, no connection set-up, no duty cycle. The named profiles are round, typical figures, not
measurements of ours:

| name | up Mbit/s | down Mbit/s | latency s | loss | what it stands for |
|---|---|---|---|---|---|
| lan | 1000 | 1000 | 0.0005 | 0 | gigabit Ethernet |
| wifi | 50 | 100 | 0.005 | 0.005 | a shared home or office network |
| 4g | 10 | 30 | 0.05 | 0.01 | a phone outdoors, LTE |
| nb-iot | 0.0625 | 0.026 | 2 | 0.02 | 3GPP Release 13 peak rates (Cat-NB1, multi-tone up); latency of seconds in good coverage |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.errors import ConfigError
from fed_dpprune.sparsity.support import draw_positions

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3}
_FIX = "name one of lan, wifi, 4g, nb-iot, or write like up=10M,down=30M,latency=50ms,loss=0.01,stragglers=0.1,slowdown=4"


@dataclass(frozen=True)
class Link:
    """One kind of connection between each client and the server.

    Attributes:
        up: Bits per second from client to server.
        down: Bits per second from server to client.
        latency: Seconds before the first bit of a message arrives.
        loss: Share of packets lost and sent again, in [0, 1).
        stragglers: Share of the clients that are slow, in [0, 1].
        slowdown: How many times longer a slow client takes, >= 1.
    """

    up: float
    down: float
    latency: float = 0.0
    loss: float = 0.0
    stragglers: float = 0.0
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers that no link has."""
        rates = all(math.isfinite(rate) and rate > 0 for rate in (self.up, self.down))
        if not (rates and math.isfinite(self.latency) and self.latency >= 0 and 0 <= self.loss < 1):
            raise ConfigError("wire.link", "rates must be above 0, latency not below 0, loss in [0, 1)", _FIX)
        if not (0 <= self.stragglers <= 1 and math.isfinite(self.slowdown) and self.slowdown >= 1):
            raise ConfigError("wire.link", "stragglers must lie in [0, 1] and slowdown must be at least 1", _FIX)

    def seconds(self, message_bytes: int, direction: Literal["up", "down"]) -> float:
        """Time of one message of that many bytes."""
        rate = self.up if direction == "up" else self.down
        return self.latency + 8.0 * message_bytes / (rate * (1.0 - self.loss))

    def slowdowns(self, clients: int, seed: int) -> NDArray[np.float64]:
        """How many times longer each client takes, shape (clients,): `slowdown` for the drawn stragglers, else 1."""
        factors = np.ones(clients)
        factors[draw_positions(clients, round(self.stragglers * clients), seed, "control", "stragglers")] = self.slowdown
        return factors


@dataclass(frozen=True)
class RoundTime:
    """Seconds that a round's messages take: each client's own, and the slowest, whom a synchronous round waits for."""

    by_client: Mapping[int, float]
    slowest: int | None
    seconds: float


PROFILES = {
    "lan": Link(up=1e9, down=1e9, latency=0.0005),
    "wifi": Link(up=50e6, down=100e6, latency=0.005, loss=0.005),
    "4g": Link(up=10e6, down=30e6, latency=0.05, loss=0.01),
    "nb-iot": Link(up=62.5e3, down=26e3, latency=2.0, loss=0.02),
}


def round_time(link: Link, traffic: Mapping[int, tuple[int, int]], slowdowns: NDArray[np.float64] | None = None) -> RoundTime:
    """The time of one round's messages; clients do not share their links.

    Args:
        link: The connection of every client.
        traffic: Client -> (message bytes down, message bytes up).
        slowdowns: From `Link.slowdowns`, indexed by client; None for no stragglers.
    """
    by_client = {
        client: (link.seconds(down, "down") + link.seconds(up, "up")) * (1.0 if slowdowns is None else float(slowdowns[client]))
        for client, (down, up) in sorted(traffic.items())
    }
    slowest = max(by_client, key=lambda client: by_client[client], default=None)
    return RoundTime(by_client, slowest, 0.0 if slowest is None else by_client[slowest])


def parse_link(text: str) -> Link | None:
    """The link of a config's `wire.link`.

    Args:
        text: "" (no model: None), a name of PROFILES, or "up=...,down=..." with optional latency, loss, stragglers and
            slowdown. Rates take k, M or G (bits per second), latency ms or s. A name may be followed by keys that change it:
            "4g,stragglers=0.2,slowdown=5".

    Raises:
        ConfigError: Anything else.
    """
    if not text.strip():
        return None
    head, *rest = (part.strip() for part in text.split(","))
    base = PROFILES.get(head)
    numbers: dict[str, float] = {}
    for part in rest if base else [head, *rest]:
        key, equals, raw = (piece.strip() for piece in part.partition("="))
        if not equals or key not in Link.__dataclass_fields__ or key in numbers:
            raise ConfigError("wire.link", f"{part!r} is not understood", _FIX)
        numbers[key] = _number(key, raw)
    if base is not None:
        return replace(base, **numbers)
    if not {"up", "down"} <= numbers.keys():
        raise ConfigError("wire.link", "a custom link needs up and down", _FIX)
    return Link(**numbers)


def _number(key: str, raw: str) -> float:
    """A number with the unit that its key allows."""
    units = _UNITS if key in ("up", "down") else _TIMES if key == "latency" else {"": 1.0}
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(?:e([+-]?[0-9]{1,2}))?\s*([a-zA-Z]*)", raw)
    if match is None or match[3] not in units:
        raise ConfigError("wire.link", f"{key} = {raw!r} is not a number with a unit of its kind", _FIX)
    return float(match[1]) * 10.0 ** int(match[2] or 0) * units[match[3]]
