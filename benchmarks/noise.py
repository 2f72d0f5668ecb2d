"""What the secure noise costs: drawing it, and as a share of a private step on the same support.

    python benchmarks/noise.py [--model dp-cnn] [--fraction 0.1] [--batch 64] [--repeats 15] [--json]

`ratio` is the time of `OsNoise.normal(k)` divided by that of the clipped sum of per-example gradients on k live
coordinates; `plain_ms` is what a simulation's seeded noise takes for the same count, `numpy_ms` numpy's own draw of the same
values. CPU time, CIFAR-shaped input, one core.
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

from fed_dpprune.dpsgd.noise import OsNoise, SeededNoise
from fed_dpprune.randomness import generator


def milliseconds(work: Callable[[], object], repeats: int) -> list[float]:
    """CPU times of `work`, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - start))
    return times


def measure(model: str, fraction: float, batch: int, repeats: int) -> dict[str, Any]:
    """One row: noise and step, interleaved by being measured in the same process on the same support."""
    import torch

    from fed_dpprune.dpsgd.clipping import Clipping
    from fed_dpprune.dpsgd.gradient import PrivateGradient
    from fed_dpprune.models import registry
    from fed_dpprune.models.spec import ModelSpec
    from fed_dpprune.sparsity.support import dense, random_subset

    torch.set_num_threads(1)
    spec = ModelSpec(model, (), "tanh", (3, 32, 32), 10)
    layout = registry.layout(spec)
    gradient = PrivateGradient(registry.build(spec), layout)
    support = random_subset(dense(layout.d), round(fraction * layout.d), 0, "support")
    gradient.set_support(support)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (batch, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, batch)
    step = milliseconds(lambda: gradient.clipped_sum(x, y, Clipping(1.0)), repeats)
    noise = milliseconds(lambda: OsNoise().normal(support.k), repeats)
    plain = milliseconds(lambda: SeededNoise(0).normal(support.k), repeats)
    numpys = milliseconds(lambda: generator(0, "noise").standard_normal(support.k), repeats)
    shares = sorted(n / s for n, s in zip(noise, step, strict=True))
    return {
        "model": model,
        "fraction": fraction,
        "live": support.k,
        "batch": batch,
        "engine": gradient.route,
        "step_ms": round(statistics.median(step), 3),
        "noise_ms": round(statistics.median(noise), 3),
        "plain_ms": round(statistics.median(plain), 3),
        "numpy_ms": round(statistics.median(numpys), 3),
        "ratio": round(statistics.median(noise) / statistics.median(step), 4),
        "ratio_spread": round(shares[-1] - shares[0], 4),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="dp-cnn")
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one object, for scripts")
    given = parser.parse_args()
    row = measure(given.model, given.fraction, given.batch, given.repeats)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    if given.json:
        print(json.dumps({"machine": machine, "rows": [row]}))
    else:
        print(f"{row['model']} at {row['fraction']:.0%} live ({row['live']} values), batch {row['batch']}, {row['engine']}:")
        print(f"a clipped sum {row['step_ms']} ms, its secure noise {row['noise_ms']} ms ({row['ratio']:.1%})")
        print(f"a simulation's seeded noise {row['plain_ms']} ms, the same values by numpy {row['numpy_ms']} ms")


if __name__ == "__main__":
    main()
