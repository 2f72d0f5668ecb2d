"""What a private step costs, as a ratio to the ordinary step of the same net, in one run.

    python benchmarks/dpsgd_step.py [--models tanh-cnn,mlp] [--fractions 1.0,0.1] [--repeats 5] [--threads 1] [--json]

A step is: forward, backward (or the engine), clip, noise, update of the weights. Noise is what each system draws: Opacus
and vmap float32 by torch, this project float64 as a simulation does (`SeededNoise`), on live coordinates only. Systems take
turns inside every repetition, and a ratio is formed inside the repetition, so that drift of the machine cancels. Times are
CPU time of the process at `--threads` threads. `floor` is forward plus gradients of the layers' outputs: no engine of this
design gets below it. `non-private-turned` is the ordinary step of a net with max pooling whose pools hand
their gradients on in the usual order of dimensions, which suits the weight gradients that only this step takes. Opacus and
plain vmap know no support; they are measured dense. `peak_mb` is the rise of the resident set over two steps at batch
`--memory-batch`, after all freed memory was handed back. The default run takes about 20 minutes
on two cores.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from fed_dpprune.dpsgd import compiled
from fed_dpprune.dpsgd.allocator import keep_freed_memory
from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.descent import Descent
from fed_dpprune.dpsgd.gradient import PrivateGradient
from fed_dpprune.dpsgd.layered import LayerEngine, Pass
from fed_dpprune.dpsgd.live import live_tensors
from fed_dpprune.dpsgd.noise import SeededNoise
from fed_dpprune.models import registry
from fed_dpprune.models.flat import Layout
from fed_dpprune.models.modules import MaxPool
from fed_dpprune.sparsity.support import Support, dense, from_mask, random_subset

INPUTS = {"mlp": (1, 28, 28), "tanh-cnn": (1, 28, 28), "dp-cnn": (3, 32, 32), "resnet20": (3, 32, 32), "wrn16-4": (3, 32, 32)}
REPEATS = {"mlp": 9, "tanh-cnn": 15, "dp-cnn": 7, "resnet20": 7, "wrn16-4": 2}
FRACTIONS = (1.0, 0.3, 0.1, 0.01)
GRANULARITIES = ("element", "channel")
OPACUS = ("hooks", "functorch", "ew", "ghost")
RATE, SIGMA, CLIP_NORM = 0.01, 1.0, 1.0
Key = tuple[str, float, str]  # engine, fraction, granularity
Step = Callable[[], object]


class Workbench:
    """One net, one batch, and a step for each system."""

    def __init__(self, name: str, batch: int) -> None:
        spec = registry.ModelSpec(name, (1000, 1000), "tanh", INPUTS[name], 10)
        torch.manual_seed(0)
        self.module, self.layout = registry.build(spec), registry.layout(spec)
        for parameter in self.module.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_uniform_(parameter, a=5**0.5)
            else:
                nn.init.uniform_(parameter, 0.1, 1.0)
        self.module.train()
        self.x, self.y = torch.randn(batch, *INPUTS[name]), torch.randint(0, 10, (batch,))
        self.batch = batch

    def steps(
        self, fractions: tuple[float, ...], granularities: tuple[str, ...], engines: tuple[str, ...], *, alone: bool = False
    ) -> dict[Key, Step]:
        """All systems, the non-private one first; `alone`: without Opacus and vmap."""
        found: dict[Key, Step] = {("non-private", 1.0, "element"): self.non_private(), ("floor", 1.0, "element"): self.floor()}
        if any(isinstance(layer, MaxPool) for layer in self.module.modules()):
            found["non-private-turned", 1.0, "element"] = self.non_private(turned=True)
        for mode in () if alone else OPACUS:
            found[f"opacus-{mode}", 1.0, "element"] = self.opacus(mode)
        if not alone:
            found["vmap", 1.0, "element"] = self.vmap()
        for engine in engines:
            for granularity in granularities:
                for fraction in fractions:
                    if fraction < 1 or granularity == "element":
                        support = make_support(self.layout, fraction, granularity)
                        found[engine, fraction, granularity] = self.ours(engine, support)
        return found

    def non_private(self, *, turned: bool = False) -> Step:
        """Mean loss, backward, SGD; `turned`: gradients leave the pools in the usual order of dimensions."""
        module = copy.deepcopy(self.module)
        for layer in module.modules():
            if turned and isinstance(layer, MaxPool):
                layer.register_forward_pre_hook(lambda _, inputs: inputs[0].register_hook(torch.Tensor.contiguous) and None)
        optimizer = torch.optim.SGD(module.parameters(), lr=RATE)

        def step() -> None:
            nn.functional.cross_entropy(module(self.x), self.y).backward()
            optimizer.step()
            optimizer.zero_grad()  # last, so that gradients count as memory of the step

        return step

    def floor(self) -> Step:
        """Forward and the gradients of every layer's output, nothing else."""
        engine = LayerEngine(copy.deepcopy(self.module), nn.functional.cross_entropy, None)
        live = live_tensors(self.layout, dense(self.layout.d))

        def step() -> None:
            with Pass(engine, live, self.batch) as tapped:
                for site in tapped._sites:
                    site.rule = lambda *_: {}
                loss = nn.functional.cross_entropy(engine.module(self.x), self.y, reduction="sum")
            torch.autograd.grad(loss, tapped.anchor, allow_unused=True)

        return step

    def opacus(self, mode: str) -> Step:
        """A step of opacus.PrivacyEngine on the same fixed batch."""
        from opacus import PrivacyEngine
        from torch.utils.data import DataLoader, TensorDataset

        module = copy.deepcopy(self.module)
        made = PrivacyEngine(accountant="rdp").make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=RATE),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(TensorDataset(self.x, self.y), batch_size=self.batch),
            noise_multiplier=SIGMA,
            max_grad_norm=CLIP_NORM,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        wrapped, optimizer = made[0], made[1]
        criterion = made[2] if mode == "ghost" else nn.functional.cross_entropy

        def step() -> None:
            criterion(wrapped(self.x), self.y).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def vmap(self) -> Step:
        """torch.func per-example gradients of the whole net, clipped, summed, noised."""
        module = copy.deepcopy(self.module)
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(torch.func.functional_call(module, values, (x[None],)), y[None])

        gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

        def step() -> None:
            grads = gradient(parameters, self.x, self.y)
            norms = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
            factors = (CLIP_NORM / norms.clamp(min=CLIP_NORM)) / self.batch
            for name, g in grads.items():
                total = torch.einsum("n,n...->...", factors, g) + SIGMA * CLIP_NORM / self.batch * torch.randn(g.shape[1:])
                parameters[name].sub_(total, alpha=RATE)

        return step

    def ours(self, backend: str, support: Support) -> Step:
        """A local step of this project, as `federation.local_train` takes it: clipped sum on the support, noise, live weights."""
        gradient = PrivateGradient(copy.deepcopy(self.module), self.layout, backend=backend)
        gradient.set_support(support)
        noise, clipping = SeededNoise(0, "benchmark"), Clipping(CLIP_NORM)
        x, y = self.x.numpy(), self.y.numpy()

        def step() -> None:
            total = gradient.clipped_sum(x, y, clipping)
            with gradient.live_values() as values:
                Descent(SIGMA * CLIP_NORM, self.batch, RATE).step(values, total, noise)

        return step


def make_support(layout: Layout, fraction: float, granularity: str) -> Support:
    """A random support: coordinates of the whole net, or whole output channels of every tensor."""
    if fraction == 1:
        return dense(layout.d)
    if granularity == "element":
        return random_subset(dense(layout.d), max(1, round(fraction * layout.d)), 0, "support", 1)
    generator = np.random.default_rng(0)
    masks = []
    for tensor in layout.tensors:
        rows = np.zeros(tensor.shape[0], dtype=np.bool_)
        rows[generator.choice(tensor.shape[0], max(1, round(fraction * tensor.shape[0])), replace=False)] = True
        masks.append(np.repeat(rows, tensor.size // tensor.shape[0]))
    return from_mask(np.concatenate(masks))


def timed(name: str, steps: dict[Key, Step], repeats: int) -> dict[Key, list[float]]:
    """CPU milliseconds of every step, in turns; a first round warms up and is thrown away."""
    times: dict[Key, list[float]] = {key: [] for key in steps}
    turns = [(repeat, key) for repeat in range(repeats + 1) for key in steps]
    for repeat, key in track(turns, f"{name}: time", console=Console(stderr=True)):
        start = time.process_time()
        steps[key]()
        if repeat:
            times[key].append(1e3 * (time.process_time() - start))
    return times


def peak_mb(step: Step) -> float | None:
    """Rise of the resident set over two steps, MiB; None where Linux' /proc is missing."""
    step()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        step()
        step()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def rows_of(name: str, times: dict[Key, list[float]], memory: dict[Key, float | None]) -> list[dict[str, Any]]:
    """Rows of the JSON: ratios are medians of ratios formed inside a repetition, the spread their quartiles."""
    base = times["non-private", 1.0, "element"]
    rows = []
    for (engine, fraction, granularity), found in times.items():
        ratios = [t / b for t, b in zip(found, base, strict=True)]
        spread = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else [ratios[0], ratios[0]]
        peak = memory.get((engine, fraction, granularity))
        rows.append(
            {
                "model": name,
                "fraction": fraction,
                "granularity": granularity,
                "engine": engine,
                "median_ms": round(statistics.median(found), 3),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_spread": [round(s, 4) for s in spread],
                "peak_mb": None if peak is None else round(peak, 1),
            }
        )
    return rows


def machine(threads: int) -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": compiled.load() is not None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per model, engine and granularity, a column per fraction."""
    fractions = sorted({row["fraction"] for row in rows}, reverse=True)
    lines = [
        "| model | engine | granularity | " + " | ".join(f"{f:g} live" for f in fractions) + " | peak MiB |",
        "|---" * (len(fractions) + 4) + "|",
    ]
    groups: dict[tuple[str, str, str], dict[float, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["engine"], row["granularity"]), {})[row["fraction"]] = row
    for (model, engine, granularity), found in groups.items():
        cells = []
        for fraction in fractions:
            row = found.get(fraction)
            cells.append(f"{row['ratio']:.2f} ({row['ratio_spread'][0]:.2f}-{row['ratio_spread'][1]:.2f})" if row else "")
        if engine == "non-private":
            cells[0] = f"{found[1.0]['median_ms']:.1f} ms"
        peaks = " / ".join(f"{found[f]['peak_mb']:.0f}" for f in fractions if f in found and found[f]["peak_mb"] is not None)
        lines.append(f"| {model} | {engine} | {granularity} | " + " | ".join(cells) + f" | {peaks} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(INPUTS))
    parser.add_argument("--fractions", default=",".join(map(str, FRACTIONS)))
    parser.add_argument("--granularities", default=",".join(GRANULARITIES))
    parser.add_argument(
        "--engines", default="", help="of this project: compiled, torch, auto (default: compiled where it builds, and torch)"
    )
    parser.add_argument("--alone", action="store_true", help="without Opacus and vmap, whose gigabytes cool everybody's caches")
    parser.add_argument("--repeats", type=int, default=0, help="0: by model")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-batch", type=int, default=256, help="0: no memory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--table", type=Path, help="write the Markdown table here as well")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # for every system alike
    models = [name for name in arguments.models.split(",") if name in INPUTS]
    if len(models) != len(arguments.models.split(",")):
        parser.error(f"models are {', '.join(INPUTS)}")
    fractions = tuple(float(f) for f in arguments.fractions.split(","))
    engines = (
        tuple(arguments.engines.split(",")) if arguments.engines else (("compiled",) if compiled.load() else ()) + ("torch",)
    )
    granularities = tuple(arguments.granularities.split(","))

    rows: list[dict[str, Any]] = []
    for name in models:
        repeats = arguments.repeats or REPEATS[name]
        times = timed(
            name, Workbench(name, arguments.batch).steps(fractions, granularities, engines, alone=arguments.alone), repeats
        )
        gc.collect()
        memory: dict[Key, float | None] = {}
        if arguments.memory_batch:
            bench = Workbench(name, arguments.memory_batch)
            wanted = bench.steps(fractions, ("element",), engines, alone=arguments.alone)
            for key in track(list(wanted), f"{name}: memory", console=Console(stderr=True)):
                memory[key] = peak_mb(wanted.pop(key))
        rows += rows_of(name, times, memory)
        if not arguments.json:
            print(table(rows_of(name, times, memory)), flush=True)
    if arguments.table:
        arguments.table.write_text(table(rows), encoding="utf-8")
    if arguments.json:
        json.dump({"machine": machine(arguments.threads), "rows": rows}, sys.stdout)
        print()


if __name__ == "__main__":
    main()
