"""How long packing takes: gather and encode, decode and scatter, of k live values out of d, by codec.

    python benchmarks/codec.py [--dimension 11000000] [--live 1000000] [--repeats 15] [--json]

`encode` is what a sender does: take the live values out of the flat vector, make bytes. `decode` is what a receiver
does: make values, put them into the flat vector. `ratio` is payload bytes / dense float32 bytes of the whole vector,
`time_ratio` encode plus decode against float32's. CPU time of one core: other work on the machine costs caches, not turns.
The last row packs and unpacks the positions themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fed_dpprune import randomness
from fed_dpprune.comm.codecs.table import NAMES, codec
from fed_dpprune.comm.masks import entropy_bound_bytes, pack_positions, unpack_positions
from fed_dpprune.sparsity.support import draw_positions


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU time of `work`, which runs on one thread, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def measure(d: int, k: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each codec and one for the positions."""
    vector = np.random.default_rng(0).standard_normal(d).astype(np.float32)
    target = np.zeros(d, dtype=np.float32)
    indices = draw_positions(d, k, 0, "support")
    words = randomness.raw_u32(k, 0, "codec")
    rows: list[dict[str, Any]] = []

    def add(name: str, blob: bytes, encode: Callable[[], object], decode: Callable[[], object], bound: int | None = None) -> None:
        rows.append({"codec": name, "dimension": d, "live": k, "payload": len(blob), "ratio": len(blob) / (4 * d)})
        rows[-1] |= {"encode_ms": milliseconds(encode, repeats), "decode_ms": milliseconds(decode, repeats)}
        rows[-1]["time_ratio"] = (rows[-1]["encode_ms"] + rows[-1]["decode_ms"]) / (rows[0]["encode_ms"] + rows[0]["decode_ms"])
        if bound is not None:
            rows[-1]["entropy_bound"] = bound

    for name in NAMES:
        chosen = codec(name)
        for source in (None, lambda count: words[:count]) if name.startswith("int") else (None,):
            blob = chosen.encode(vector[indices], bits=source)

            def encode(chosen: Any = chosen, source: Any = source) -> object:
                return chosen.encode(vector[indices], bits=source)

            def decode(chosen: Any = chosen, blob: bytes = blob) -> None:
                target[indices] = chosen.decode(blob, k)

            add(name + ("" if source is None else " stochastic"), blob, encode, decode)
    packed = pack_positions(indices, d)
    bound = entropy_bound_bytes(d, k)
    add("positions", packed, lambda: pack_positions(indices, d), lambda: unpack_positions(packed, d, k), bound)
    return rows


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=11_000_000)
    parser.add_argument("--live", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = measure(given.dimension, given.live, given.repeats)
    if given.json:
        machine = {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        print(json.dumps({"machine": machine, "rows": rows}))
        return
    print(f"{'codec':<16}{'payload':>10}{'1/ratio':>9}{'encode ms':>11}{'decode ms':>11}{'time ratio':>12}")
    for row in rows:
        print(
            f"{row['codec']:<16}{row['payload']:>10}{1 / row['ratio']:>9.1f}"
            f"{row['encode_ms']:>11.2f}{row['decode_ms']:>11.2f}{row['time_ratio']:>12.2f}"
        )
    print(f"entropy bound of the positions: {rows[-1]['entropy_bound']} bytes")


if __name__ == "__main__":
    main()
