"""A script's loss function, run on each example alone in place of the script's call on the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fed_dpprune.dpsgd.loss_rules import WEIGHTED
from fed_dpprune.dpsgd.tape import Cut, Taped, Values, shown
from fed_dpprune.errors import ConfigError


class OwnCriterion:
    """A loss function run on each example alone, in place of the script's call: exact whatever is in it.

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
        buffers = list(self.criterion.buffers()) if isinstance(self.criterion, nn.Module) else []
        before = [buffer.clone() for buffer in buffers]

        def own(i: int) -> Tensor:
            row = outputs.own.rows[i]
            assert row is not None
            with _NoWeightedMean():
                made = self.criterion(row, *(tape.own(value, i) for value in labels))
            if not isinstance(made, Tensor) or made.numel() != 1:
                raise ConfigError("criterion", "gives more than one number for one example", "reduce it to one")
            return made.reshape(())

        rows = tape.each(outputs.own.rows, own, "criterion")
        if not all(map(torch.equal, before, buffers)):
            raise ConfigError("criterion", "changes its buffers, so it would keep traces of examples", "leave that out")
        structure = ("criterion", outputs.own.structure)
        return shown(Values(tape, rows, structure, outputs.own.constants, 1 if tape.mean else 0))


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
