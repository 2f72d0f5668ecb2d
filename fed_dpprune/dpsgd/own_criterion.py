"""A script's loss function, run on each example alone in place of the script's call on the batch."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fed_dpprune.dpsgd.loss_rules import WEIGHTED
from fed_dpprune.dpsgd.selfcheck import random_state
from fed_dpprune.dpsgd.tape import Cut, Row, Taped, Values, shown
from fed_dpprune.errors import ConfigError

PURE = "make it a function of outputs and labels alone"


class OwnCriterion:
    """A loss function run on each example alone, in place of the script's call.

    It must be a function of its arguments: one that draws random numbers, changes an attribute or buffer of its own or a
    variable that it closes over, or gives a made-up example another loss than before is refused. Not noticed is what it keeps
    elsewhere (a module's global, a file) and uses for no made-up example.

    Args:
        criterion: (outputs, labels, ...) -> one number; what it gives for a batch of one is that example's own loss.

    Raises:
        ConfigError: It has weights to be trained.
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
            raise ConfigError("criterion", "has parameters of its own to train", "make them part of the model")
        self.criterion = criterion

    def __call__(self, outputs: Tensor, *labels: Tensor) -> Tensor:
        """The loss of the batch, by the declared reduction; its `backward()` is taken apart."""
        if not isinstance(outputs, Taped):
            plain: Tensor = self.criterion(outputs, *labels)
            return plain
        tape = outputs.own.tape
        bad = [v for v in labels if not isinstance(v, Tensor) or isinstance(v, Cut) or len(v) != tape.n]
        if outputs.own.power is not None or bad:
            raise ConfigError("criterion", "takes the model's output and tensors with the examples in front", "pass those")
        before = (random_state(), frozen(self.criterion))

        def alone(row: Row, i: int) -> Tensor:
            with _NoWeightedMean():
                made = self.criterion(row, *(tape.own(value, i) for value in labels))
            if not isinstance(made, Tensor) or made.numel() != 1:
                raise ConfigError("criterion", "gives more than one number for one example", "reduce it to one")
            return made.reshape(())

        like = tape.leaves[-1] if outputs.own.rows[-1] is None else outputs.own.rows[-1]
        assert like is not None
        # Different numbers in (0, 1), which every loss takes: equal ones would hide a factor from a softmax.
        made_up = torch.linspace(0.25, 0.75, like.numel(), device=like.device).reshape(like.shape)

        def probe() -> object:
            only: list[Row] = [*([None] * tape.n), made_up]
            return frozen(tape.each(only, lambda i: alone(made_up.clone(), i), "criterion")[-1])

        first = probe()
        self._refuse_traces(before)  # before it has seen any example
        rows = tape.each(outputs.own.rows, lambda i: alone(outputs.own.rows[i], i), "criterion")
        self._refuse_traces(before)
        shapes = tuple((tuple(value.shape[1:]), value.dtype) for value in (outputs, *labels))
        if not first == probe() == tape.memory.setdefault(f"made-up loss of {shapes}", first):
            raise ConfigError("criterion", "changes from call to call for the same made-up example", PURE)
        structure = ("criterion", outputs.own.structure)
        return shown(Values(tape, rows, structure, outputs.own.constants, 1 if tape.mean else 0))

    def _refuse_traces(self, before: tuple[object, object]) -> None:
        state, kept = before
        if random_state() != state:
            raise ConfigError("criterion", "draws random numbers, which tell one batch from another", PURE)
        if frozen(self.criterion) != kept:
            raise ConfigError("criterion", "changes its attributes or buffers, so it would keep traces of examples", PURE)


def frozen(value: object, seen: frozenset[int] = frozenset()) -> object:
    """What an object holds, by value, to be compared: attributes, items, closed-over variables, bits of tensors."""
    if isinstance(value, Tensor):
        plain = value.detach().as_subclass(Tensor).cpu().contiguous()
        return str(value.dtype), tuple(value.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if id(value) in seen or isinstance(value, (type, ModuleType)):
        return id(value)
    seen |= {id(value)}
    if isinstance(value, Mapping):
        return tuple((repr(key), frozen(part, seen)) for key, part in value.items())
    inside = [getattr(value, name, None) for name in ("__self__", "__func__", "__defaults__", "__kwdefaults__", "func", "args")]
    inside += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    if isinstance(value, (list, tuple, set, deque)):
        inside += list(value)
    inside.append(dict(getattr(value, "__dict__", {})))
    return id(value), tuple(frozen(part, seen) for part in inside)


class _NoWeightedMean(TorchFunctionMode):
    """For one example alone a class-weighted mean forgets the weight without a word."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.cross_entropy, functional.nll_loss):
            given = inspect.signature(func).bind(*args, **(kwargs or {})).arguments
            if given.get("weight") is not None and given.get("reduction", "mean") == "mean":
                raise ConfigError("criterion", f"a class-weighted mean {WEIGHTED[0]}", WEIGHTED[1])
        return func(*args, **(kwargs or {}))


def check_criterion(criterion: object, loss_reduction: str) -> None:
    """Refuse a criterion that is known to couple examples, or reduces in another way than declared, before training.

    Raises:
        ConfigError: Says which and what to do.
    """
    reduction = getattr(criterion, "reduction", None)
    weighted = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) and criterion.weight is not None
    if weighted and reduction == "mean":
        raise ConfigError("criterion", f"a class-weighted mean {WEIGHTED[0]}", WEIGHTED[1])
    if reduction in ("mean", "sum") and reduction != loss_reduction:
        raise ConfigError("criterion", f"reduces by {reduction}, loss_reduction says {loss_reduction}", "make them equal")
