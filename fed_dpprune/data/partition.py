"""Who holds which training row: drawn once, in the driver, as indices. numpy only.

Every scheme gives disjoint parts that cover all training rows. The draw is public (stream "partition"): it stands for
how the world had shared the data out before anybody trained.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config, randomness
from fed_dpprune.errors import ConfigError

Parts = list[NDArray[np.int64]]

SMALLEST_CLIENT = 10
ATTEMPTS = 100
SHARDS_PER_CLIENT = 2


def draw(data: config.Data, clients: int, y: NDArray[np.int64], natural: NDArray[np.int64] | None, seed: int) -> Parts:
    """Sorted row numbers of each client.

    Args:
        data: `partition` and, for dirichlet, `alpha`.
        clients: How many; ignored by `natural`, where the data set sets the number.
        y: Training labels, shape (N,).
        natural: Client of each row, shape (N,), or None.
        seed: The run's root seed.

    Returns:
        One int64 array per client, disjoint, together 0..N-1.

    Raises:
        ConfigError: More clients than rows, no natural clients in this data set, or a dirichlet draw that left some
            client with fewer than 10 rows 100 times.
    """
    if data.partition == "natural":
        return _natural(data, natural)
    if clients > y.size:
        raise ConfigError("federation.clients", f"{clients} is more than the {y.size} training rows", "use fewer clients")
    if data.partition == "iid":
        parts = _iid(clients, y, seed)
    elif data.partition == "shards":
        parts = _shards(clients, y, seed)
    else:
        parts = _dirichlet(clients, y, data.alpha, seed)
    return [np.sort(part) for part in parts]


def _natural(data: config.Data, natural: NDArray[np.int64] | None) -> Parts:
    if natural is None:
        raise ConfigError(
            "data.partition", f'"natural" asks for clients that {data.dataset} does not know', "use iid, dirichlet or shards"
        )
    return [np.flatnonzero(natural == client) for client in np.unique(natural)]


def _iid(clients: int, y: NDArray[np.int64], seed: int) -> Parts:
    """Shuffled equal parts (sizes differ by one at most)."""
    return np.array_split(randomness.permutation(y.size, seed, "partition", "iid"), clients)


def _shards(clients: int, y: NDArray[np.int64], seed: int) -> Parts:
    """Rows sorted by label, cut into two shards per client, dealt at random (McMahan et al. 2017, section 3)."""
    count = SHARDS_PER_CLIENT * clients
    if count > y.size:
        raise ConfigError("federation.clients", f"{clients} clients need {count} shards of {y.size} rows", "use fewer clients")
    shuffled = randomness.permutation(y.size, seed, "partition", "shards")
    shards = np.array_split(shuffled[np.argsort(y[shuffled], kind="stable")], count)
    dealt = randomness.permutation(count, seed, "partition", "deal").reshape(clients, SHARDS_PER_CLIENT)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]


def _dirichlet(clients: int, y: NDArray[np.int64], alpha: float, seed: int) -> Parts:
    """Each class shared out by a Dirichlet(alpha) draw over clients (Hsu et al. 2019), until nobody is too small."""
    for attempt in range(ATTEMPTS):
        parts = _dirichlet_once(clients, y, alpha, randomness.generator(seed, "partition", "dirichlet", attempt))
        if min(part.size for part in parts) >= SMALLEST_CLIENT:
            return parts
    raise ConfigError(
        "data.alpha",
        f"{alpha:g} left a client with fewer than {SMALLEST_CLIENT} of {y.size} rows in each of {ATTEMPTS} draws",
        "raise it, or lower federation.clients",
    )


def _dirichlet_once(clients: int, y: NDArray[np.int64], alpha: float, rng: np.random.Generator) -> Parts:
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * rows.size).astype(np.int64)
        for part, share in zip(parts, np.split(rows, cuts), strict=True):
            part.append(share)
    return [np.concatenate(part) for part in parts]
