"""Training on public data without privacy: the weights that a private run starts from (`model.weights`).

The public rows are those of `data.public`, shaped to the private data set's images and classes. How long and how fast is
fixed here: public examples cost nothing, and what counts is the fine-tuning that follows. No private row is trained on;
of the private data set only shape and classes are used. torch is imported when training begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune import randomness
from fed_dpprune.data import registry as datasets
from fed_dpprune.data import split
from fed_dpprune.data.dataset import Examples
from fed_dpprune.data.public import load_public
from fed_dpprune.errors import BadInput, ConfigError
from fed_dpprune.models import initial, registry, vector
from fed_dpprune.models.spec import ModelSpec, from_config

if TYPE_CHECKING:
    import torch
    from torch import nn

# Adam at its usual rate, falling linearly to zero, trains every net of models/ without being tuned to it.
LEARNING_RATE = 1e-3
BATCH = 64
EPOCHS = 5
LEAST_STEPS = 2_000  # a small public set is passed over more often, up to so many steps
HELD_OUT = 0.1
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Epoch:
    """Where training stands after a pass over the public rows.

    Attributes:
        number: Counts from 1.
        epochs: How many there will be.
        accuracy: On the held-out part of the public rows, 0..1.
        loss: Mean training loss of the pass, nats.
        seconds: Since the start.
    """

    number: int
    epochs: int
    accuracy: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class Pretrained:
    """What `pretrain` wrote.

    Attributes:
        path: The weights.
        trained_on: Public rows that were trained on.
        held_out: Public rows that were not.
        accuracy: On those, after the last pass.
    """

    path: Path
    trained_on: int
    held_out: int
    accuracy: float


def destination(config: cfg.Config, config_file: Path, out: Path | None) -> Path:
    """Where the weights go: `out`, else where `model.weights` will look for them, else runs/<name>-weights.safetensors.

    Raises:
        ConfigError: `model.weights` is there to be read by the run but is not a name that weights can be written under.
        BadInput: `out` has another suffix, by which no run would read it.
    """
    if out is not None:
        if out.suffix != SUFFIX:
            raise BadInput(f"--out {out}", "is not a .safetensors file", "name one")
        return out
    if not config.model.weights:
        return Path("runs") / f"{config.name or config_file.stem}-weights{SUFFIX}"
    path = Path(config.model.weights).expanduser()
    if path.suffix != SUFFIX:
        raise ConfigError("model.weights", f"{config.model.weights!r} is not a .safetensors file to write", "use --out FILE")
    return path


def pretrain(
    config: cfg.Config, out: Path, *, force: bool = False, on_epoch: Callable[[Epoch], None] | None = None
) -> Pretrained:
    """Train the config's net on its public rows and write the weights under the names of the layout.

    Every layer is trained: `model.freeze-layers` holds them in the private run that comes after. The same config, seed
    and machine give the same file.

    Args:
        config: `data.public`, `data.dataset` (its shape and classes), `model` and `seed` matter.
        out: A .safetensors file; `destination` chooses one.
        force: Overwrite it.
        on_epoch: Hears of each pass.

    Raises:
        ConfigError: No public data.
        BadInput: `out` is there already or cannot be written.
        DataError: The data is missing, or the public rows are too few to hold some out.
    """
    if not config.data.public:
        raise ConfigError("data.public", "is empty, so there is nothing to train on", "declare public data")
    if out.exists() and not force:
        raise BadInput(str(out), "exists already", "--force overwrites it, --out names another file")
    private = datasets.load(config.data, config.seed)
    rows = load_public(config.data.public, private, config.seed, config.data.test_fraction)
    spec = replace(from_config(config.model, private.input_shape, private.classes), weights="", freeze_layers=())
    training, held_out = _parts(rows, config)
    trained, accuracy = _train(spec, training, held_out, config.seed, on_epoch or (lambda epoch: None))
    _write(out, spec, trained)
    return Pretrained(out, len(training), len(held_out), accuracy)


def _parts(rows: Examples, config: cfg.Config) -> tuple[Examples, Examples]:
    """Public rows to train on, and a tenth of them that tells how well that went; classes in proportion."""
    training, held_out = split.stratified(rows.y, HELD_OUT, config.seed)
    if not held_out.size:
        raise ConfigError("data.public", f"has {len(rows)} rows, too few to hold out a tenth", "declare more")
    return _take(rows, training), _take(rows, held_out)


def _take(rows: Examples, chosen: NDArray[np.int64]) -> Examples:
    return Examples(rows.x[chosen], rows.y[chosen], rows.scale)


def _train(
    spec: ModelSpec, training: Examples, held_out: Examples, seed: int, on_epoch: Callable[[Epoch], None]
) -> tuple[nn.Module, float]:
    """The trained net and its accuracy on `held_out`. One thread: sums must not depend on the number of cores."""
    import torch

    from fed_dpprune.models.evaluate import accuracy_and_loss

    torch.set_num_threads(1)
    module = registry.build(spec)
    layout = registry.layout(spec)
    vector.load(module, layout, initial.draw(layout, seed))
    steps = math.ceil(len(training) / BATCH)
    epochs = max(EPOCHS, math.ceil(LEAST_STEPS / steps))
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (epochs * steps))
    started, accuracy = time.monotonic(), 0.0
    for number in range(1, epochs + 1):
        loss = _pass(module, training, randomness.permutation(len(training), seed, "pretrain", number), optimizer, schedule)
        accuracy = accuracy_and_loss(module, held_out)[0]
        on_epoch(Epoch(number, epochs, accuracy, loss, time.monotonic() - started))
    return module, accuracy


def _pass(
    module: nn.Module,
    training: Examples,
    order: NDArray[np.int64],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> float:
    """One pass in the given order; returns the mean loss. In eval mode, as private steps run the net (no dropout)."""
    import torch

    total = 0.0
    for start in range(0, order.size, BATCH):
        x, y = training.take(order[start : start + BATCH])
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        total += float(loss.detach()) * y.size
    return total / order.size


def _write(out: Path, spec: ModelSpec, module: nn.Module) -> None:
    layout = registry.layout(spec)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        vector.save(out, layout, vector.read(module, layout))
    except OSError as error:
        raise BadInput(str(out), f"cannot be written ({error.strerror})", "name another --out") from None
