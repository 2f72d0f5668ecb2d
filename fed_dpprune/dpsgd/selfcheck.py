"""What a module has to prove before a private value goes through it, on made-up examples, in the mode that it will run in.

- `check_forward`: it leaves no trace of a batch (buffers, weights), draws no random numbers, and neither it nor the loss lets
  the examples of a batch see each other. Else it is refused: no clipping bounds such a thing.
- `agrees`: an engine gives its true per-example gradients.
- `invariant`: an engine gives the same bits for an example at every place and whatever its neighbours are.

No private value is looked at: shapes and types are all that is taken from the examples given.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.grad_sample.contribution import Contribution
from fed_dpprune.dpsgd.live import LiveTensor, live_tensors
from fed_dpprune.dpsgd.operations import row_by_row
from fed_dpprune.dpsgd.reference import Loss
from fed_dpprune.dpsgd.sums import clipped_sum
from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.support import Support

EXAMPLES = 3
TOLERANCE = 1e-3  # float32 in two orders of summation stays far below; a lost tensor or cross term is far above
ALL_UP_TO = 1 << 20  # coordinates up to which bits are compared with all of them live, not with a tenth alone
# How far the examples are moved (None: in reverse order), and what every second one is replaced by.
ARRANGEMENTS = ((0, None), (7, 1e3), (1, -3e38), (16, float("nan")), (3, 1e-42), (5, 0.0))
FIX = "let every layer and the loss treat each example by itself"


class Engine(Protocol):
    """What gives per-example gradients of a micro-batch."""

    def micro_batch(self, live: tuple[LiveTensor, ...], x: Tensor, y: Tensor) -> tuple[list[Contribution], Tensor]:
        """Contributions, one per live tensor, and losses, shape (n,)."""


def made_up(like: Tensor, rows: int, seed: int) -> Tensor:
    """Normal values, or zeros and ones for whole numbers, shape (rows, ...); never from the global random state."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, *like.shape[1:])
    if like.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(like.device, like.dtype)


def made_up_labels(like: Tensor, rows: int) -> Tensor:
    """As `made_up`, but whole numbers are all 0: a class that every model has."""
    return made_up(like, rows, seed=2) if like.is_floating_point() else like.new_zeros(rows, *like.shape[1:])


def check_forward(module: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> tuple[int, bool]:
    """Run the module on made-up examples, together and one by one.

    Args:
        module: To be proven, in the mode in which it will run.
        loss: Per-example losses.
        x: Examples, for their shape and type.
        y: Labels, likewise.

    Returns:
        Values that its layers put out for one example, and whether several examples may go through it at once: every operation
        is known to go row by row, and none of its code looks at a value.

    Raises:
        ConfigError: It fails on them, changes its buffers or weights, draws random numbers, or mixes examples; says which layer.
    """
    made_x, made_y = made_up(x, EXAMPLES + 1, seed=1), made_up_labels(y, EXAMPLES + 1)
    try:
        with plain_state(module), torch.no_grad():
            before, state = random_state(), _tensors(module)
            together, outputs = _traced(module, made_x)
            losses = loss(outputs, made_y)
            _refuse_traces(module, state)
            if not _same_state(before, random_state()):
                raise ConfigError("model", "draws random numbers in its forward pass", "remove the dropout, or set it to 0")
            for place in range(EXAMPLES):
                own = slice(place, place + 1)
                alone, output = _traced(module, made_x[own])
                _refuse_mixing(together, alone, outputs, output, place)
                if not _close(losses[own], loss(output, made_y[own])):
                    raise ConfigError("loss", "mixes the examples of a batch", FIX)
            return sum(value.numel() for _, value in alone), row_by_row(
                module, loss, lambda n: (made_up(x, n, seed=1), made_up_labels(y, n))
            )
    except ConfigError:
        raise
    except Exception as error:
        raise failed(error) from error


def failed(error: Exception) -> ConfigError:
    """A module that cannot be run, or not be differentiated, on made-up examples."""
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return ConfigError("model", f"fails on a made-up batch ({type(error).__name__}: {line})", "run a training step of it alone")


def _tensors(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensor each buffer and parameter is, and how often it was written to: a write of the same value counts."""
    return {name: (id(value), value._version) for name, value in (*module.named_buffers(), *module.named_parameters())}


def _refuse_traces(module: nn.Module, before: dict[str, tuple[int, int]]) -> None:
    after = _tensors(module)
    changed = [name for name, state in after.items() if before.get(name) != state]
    if changed or len(after) != len(before):
        name = changed[0] if changed else "a buffer"
        raise ConfigError("model", f"{name} changes in the forward pass, so it would keep traces of the batch", "leave that out")


def random_state() -> tuple[object, ...]:
    """The states of all generators that a module's code may use, to be compared."""
    cuda = [s.tolist() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    numbers = np.random.get_state(legacy=False)
    return torch.get_rng_state().tolist(), cuda, random.getstate(), repr(numbers)


def _same_state(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    return a == b


def _traced(module: nn.Module, x: Tensor) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Outputs of all layers without layers inside, in the order in which they ran, and the module's."""
    ran: list[tuple[str, Tensor]] = []
    taken = []
    for name, layer in module.named_modules():
        if not list(layer.children()):

            def note(layer: nn.Module, args: object, output: object, name: str = name) -> None:
                kind = type(layer).__name__
                if isinstance(output, Tensor):
                    ran.append((f"layer {name} ({kind})" if name else kind, output.detach().clone()))

            taken.append(layer.register_forward_hook(note))
    try:
        return ran, module(x)
    finally:
        for handle in taken:
            handle.remove()


def _refuse_mixing(
    together: list[tuple[str, Tensor]], alone: list[tuple[str, Tensor]], outputs: Tensor, output: Tensor, place: int
) -> None:
    if outputs.ndim and len(outputs) > place and _close(outputs[place : place + 1], output):
        return
    where = ""
    for (name, whole), (_, single) in zip(together, alone, strict=False):
        in_front = whole.ndim and single.ndim and len(single) == 1 and len(whole) > place
        if in_front and not _close(whole[place : place + 1], single):
            where = f" at or before {name}"
            break
    raise ConfigError("model", f"mixes the examples of a batch{where}, so no example's gradient exists", FIX)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool(((a - b).abs() <= TOLERANCE * (1e-6 + b.abs().max())).all()) if a.numel() else True


def agrees(engine: Engine, module: nn.Module, loss: Loss, layout: Layout, x: Tensor, y: Tensor) -> bool:
    """Compare an engine's clipped sum with plain autograd, one example at a time, on every tensor that may live.

    Args:
        engine: To be proven.
        module: Whose gradients it claims to give.
        loss: Per-example losses.
        layout: Of the module.
        x: Examples, for their shape and type.
        y: Labels, likewise.

    Returns:
        False when a tensor differs, or when the engine fails on made-up examples.
    """
    live = live_tensors(layout, Support(_trainable(layout), layout.d))
    made_x, made_y = made_up(x, EXAMPLES + 1, seed=1), made_up_labels(y, EXAMPLES + 1)
    present = np.arange(EXAMPLES + 1) < EXAMPLES
    clipping = Clipping(1e-3, "flat")
    with plain_state(module):
        try:
            contributions, _ = engine.micro_batch(live, made_x, made_y)
            if learn := getattr(engine, "learn", None):
                learn(live, contributions)
            got = clipped_sum(live, [contributions], present, clipping)
            one = [slice(i, i + 1) for i in range(EXAMPLES)]
            grads = np.stack([_gradient(module, loss, live, made_x[i], made_y[i]) for i in one])
        except Exception:  # whatever a layer does on odd inputs: then the layer rules are not proven
            return False
    squared = np.stack([np.square(grads[:, t.start : t.stop]).sum(1) for t in live])
    factors = clipping.factors(squared)
    for tensor, factor in zip(live, factors, strict=True):
        part = slice(tensor.start, tensor.stop)
        true = factor @ grads[:, part]
        allowed = TOLERANCE * (np.linalg.norm(true) + 1e-4 * clipping.clip_norm)
        if not np.linalg.norm(got[part] - true) <= allowed:
            return False
    return True


def runs(engine: Engine, module: nn.Module, layout: Layout, x: Tensor, y: Tensor, rows: int) -> bool:
    """Whether an engine takes made-up examples; arguments as for `invariant`, and raises what it raises."""
    live = live_tensors(layout, Support(_trainable(layout), layout.d))
    with plain_state(module):
        engine.micro_batch(live, made_up(x, rows, seed=3), made_up_labels(y, rows))
    return True


def invariant(engine: Engine, module: nn.Module, layout: Layout, x: Tensor, y: Tensor, rows: int) -> bool:
    """Whether an example has the same bits at every place of a micro-batch, whatever its neighbours are.

    Libraries choose routines by shape, alignment and place, and some by the values beside, never by an example's own secret:
    so made-up examples tell. Neighbours are tried of every kind: absent, ordinary, huge, infinite, not a number, denormal.

    Args:
        engine: To be proven; other arguments as for `agrees`.
        module: Its module.
        layout: Of the module.
        x: Examples, for their shape and type.
        y: Labels, likewise.
        rows: Examples of a micro-batch; with one it is asked whether the same example gives the same bits twice.

    Raises:
        Exception: Whatever the engine raises on made-up examples.
    """
    trainable = _trainable(layout)
    if not trainable.size:
        return True
    chosen = np.random.default_rng(0).random(trainable.size) < 0.1
    chosen[0] = True
    supports = [(trainable[chosen], ARRANGEMENTS), *([(trainable, ARRANGEMENTS[:2])] if trainable.size <= ALL_UP_TO else [])]
    made_x, made_y = made_up(x, rows, seed=3), made_up_labels(y, rows)
    with plain_state(module):
        return all(
            _same_bits(engine, live_tensors(layout, Support(indices, layout.d)), made_x, made_y, tried)
            for indices, tried in supports
        )


def _same_bits(
    engine: Engine, live: tuple[LiveTensor, ...], x: Tensor, y: Tensor, tried: Sequence[tuple[int, float | None]]
) -> bool:
    rows = len(x)
    first = _bits(engine, live, x, y)
    for shift, wild in tried if rows > 1 else tried[:1]:
        order = np.roll(np.arange(rows), shift)[:: -1 if wild is None else 1].copy()
        place = torch.from_numpy(order).to(x.device)
        moved_x, moved_y = x[place].clone(), y[place].clone()
        compared = np.ones(rows, dtype=bool)
        if wild is not None and x.is_floating_point():
            compared[1::2] = False
            moved_x[1::2] = wild
        elif wild is not None:
            compared[1:] = False
            moved_x[1:] = 0
        where = torch.from_numpy(np.flatnonzero(compared)).to(x.device)
        for old, new in zip(first, _bits(engine, live, moved_x, moved_y), strict=True):
            if not torch.equal(_integers(old[place[where]]), _integers(new[where])):
                return False
    return True


def _bits(engine: Engine, live: tuple[LiveTensor, ...], x: Tensor, y: Tensor) -> list[Tensor]:
    contributions, losses = engine.micro_batch(live, x, y)
    return [losses, *(c.squared for c in contributions), *(bits for c in contributions for bits in c.bits())]


def _integers(value: Tensor) -> Tensor:
    """The bits; every NaN counts as one."""
    value = torch.where(value.isnan(), torch.full_like(value, float("nan")), value).contiguous()
    return value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def _trainable(layout: Layout) -> NDArray[np.int64]:
    spans = [np.arange(span.start, span.stop, dtype=np.int64) for tensor, span in layout.spans() if not tensor.frozen]
    return np.concatenate([np.zeros(0, dtype=np.int64), *spans])


def _gradient(module: nn.Module, loss: Loss, live: Sequence[LiveTensor], x: Tensor, y: Tensor) -> NDArray[np.float64]:
    named = dict(module.named_parameters())
    with torch.enable_grad():
        total = loss(module(x), y).sum()
        grads = torch.autograd.grad(total, [named[t.name] for t in live], allow_unused=True)
    zeros = (torch.zeros(t.shape) if g is None else g for t, g in zip(live, grads, strict=True))
    return torch.cat([g.detach().flatten().double().cpu() for g in zeros]).numpy()


@contextmanager
def plain_state(module: nn.Module) -> Iterator[None]:
    """Weights that make every gradient matter; weights, buffers and random states are put back."""
    kept = [(p, p.detach().clone(), p.requires_grad) for p in module.parameters()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    generator = torch.Generator().manual_seed(0)
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), torch.autocast("cpu", enabled=False):
        try:
            with torch.no_grad():
                for p, value, _ in kept:
                    drawn = torch.rand(value.shape, generator=generator, dtype=torch.float32).to(value)
                    fan_in = max(1, value[0].numel()) if value.ndim > 1 else 1
                    p.copy_((2 * drawn - 1) * (3 / fan_in) ** 0.5 if value.ndim > 1 else 0.5 + drawn)
            for p, _, _ in kept:
                p.requires_grad_(True)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
            with torch.no_grad():
                for p, value, asked in kept:
                    p.copy_(value)
                    p.requires_grad_(asked)
                for b, value in buffers:
                    b.copy_(value)
