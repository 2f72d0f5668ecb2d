"""How an operation on a private model's output is run for each example alone; see `tape.py`.

An operation stands in the table at the end when it treats the examples in the first dimension each by itself. No row, no loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fed_dpprune.dpsgd.tape import FIX, RULES, SCALAR, Constant, Cut, Rule, Taped, Values, flat, resolved
from fed_dpprune.errors import ConfigError

WEIGHTED = (
    "divides by the weights of all labels in the batch, so one example's gradient depends on the others",
    'use reduction="sum" and loss_reduction="sum"',
)
NORMALISED = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")  # their mean divides by the sum of given weights
FACTORS = ("mul", "div", "true_divide", "multiply", "divide", "__rtruediv__")


def _per_example(
    name: str, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], same_shape: bool
) -> Values:
    """Run an operation for each example alone.

    Args:
        name: For messages.
        func: The operation.
        args: Its arguments. A tensor with as many dimensions as the outputs among them and the examples in front is the
            examples' own; other tensors and all numbers are constants.
        kwargs: Likewise.
        same_shape: Whether the result must keep the shape, so that nothing is spread over the batch.
    """
    outputs = [value for value in flat((args, kwargs)) if isinstance(value, Taped)]
    tape, dimensions = outputs[0].own.tape, max(value.ndim for value in outputs)
    if len({value.ndim for value in outputs if value.own.power is None}) > 1:
        shapes = " and ".join(str(tuple(value.shape)) for value in outputs)
        raise ConfigError("loss", f"{name} of shapes {shapes} pairs every example with every other one", "make the shapes equal")
    structure: list[object] = [name]
    constants: list[Constant] = []
    factor = name in FACTORS

    def pick(value: Any) -> Callable[[int], Any]:
        if isinstance(value, Taped):
            if value.own.power is not None:
                raise ConfigError("loss", f"{name} mixes a loss that is summed up with single examples", FIX)
            rows = value.own.rows
            structure.append(value.own.structure)
            constants.extend(value.own.constants)
            return lambda i: rows[i]
        if isinstance(value, Tensor):
            _fit_constant(name, value)
            if value.ndim == dimensions and len(value) == tape.n:
                tape.refuse_returned(name, value)
                structure.append("own")
                return lambda i: tape.own(value, i)
            if value.ndim == dimensions and len(value) != 1:
                raise ConfigError("loss", f"{name} takes a tensor of {len(value)} rows for {tape.n} examples", FIX)
            kept = tape.constant(name, value)
            constants.append(Constant(kept, factor))
            return lambda i: kept
        if isinstance(value, (tuple, list)):
            parts = [pick(part) for part in value]
            return lambda i: type(value)(part(i) for part in parts)
        constants.append(Constant(value, factor))
        return lambda i: value

    chosen = [pick(value) for value in args]
    named = {key: pick(value) for key, value in kwargs.items()}
    gone = [any(value.own.rows[i] is None for value in outputs) for i in range(tape.n + 1)]
    rows = tape.each(
        [None if away else tape.leaves[i] for i, away in enumerate(gone)],
        lambda i: func(*(part(i) for part in chosen), **{key: part(i) for key, part in named.items()}),
        name,
    )
    made = rows[-1]
    assert made is not None
    wanted = max(outputs, key=lambda value: value.ndim).shape[1:]
    if not made.ndim or len(made) != 1 or (same_shape and made.shape[1:] != wanted):
        shapes = " and ".join(str(tuple(v.shape)) for v in flat((args, kwargs)) if isinstance(v, Tensor))
        raise ConfigError("loss", f"{name} spreads shapes {shapes} over the batch", "make the shapes equal")
    return Values(tape, rows, tuple(structure), constants)


def _fit_constant(name: str, value: Tensor) -> None:
    if isinstance(value, Cut):
        raise ConfigError("loss", f"{name} takes a result of {value.cut_by}, which is not known to keep examples apart", FIX)
    if value.requires_grad:
        raise ConfigError("loss", f"{name} takes a term with gradients of its own", "use the optimizer's weight_decay for it")


def _elementwise(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    if any(isinstance(value, Taped) and value.own.power is not None for value in flat((args, kwargs))):
        return _of_loss(name, func, args, kwargs)
    return _per_example(name, func, args, kwargs, same_shape=True)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], key: str, place: int, default: Any) -> Any:
    return kwargs.get(key, args[place] if len(args) > place else default)


def _along(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    """Operations along one dimension, which must not be the examples'."""
    dim, ndim = _argument(args, kwargs, "dim", 1, None), args[0].ndim
    inside = isinstance(dim, int) and ndim and dim % ndim != 0 and args[0].own.power is None
    return _per_example(name, func, args, kwargs, same_shape=False) if inside else None


def _unsqueeze(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    dim = _argument(args, kwargs, "dim", 1, 0)
    inside = args[0].own.power is None and dim % (args[0].ndim + 1) != 0
    return _per_example(name, func, args, kwargs, same_shape=False) if inside else None


def _squeeze(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    """Without a dimension all but the first one, also when there is one example."""
    value = args[0]
    if value.own.power is not None:
        return _of_loss(name, func, args, kwargs)
    dim = _argument(args, kwargs, "dim", 1, None)
    dims = tuple(range(1, value.ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    if any(d % value.ndim == 0 for d in dims):
        return None
    return _per_example(name, lambda row: row.squeeze(dims), (value,), {}, same_shape=False)


def _reshape(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    """New shapes with the examples still in front."""
    value, shape = args[0], args[1:]
    if value.own.power is not None or kwargs:
        return None
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
    if name == "flatten":
        start = shape[0] if shape else 0
        shape = (value.shape[0], -1) if start == 1 and len(shape) == 1 else (-1,) if start == 0 else ()
    rest, size = shape[1:], math.prod(value.shape[1:])
    if not shape or not all(isinstance(part, int) for part in shape):
        return None
    if shape[0] not in (-1, len(value)) or (-1 not in rest and math.prod(rest) != size):
        return None
    if -1 in rest and (shape[0] == -1 or size % max(1, -math.prod(rest)) != 0):
        return None
    fixed = tuple(size // max(1, -math.prod(rest)) if part == -1 else part for part in rest)
    return _per_example(name, lambda row: row.reshape(1, *fixed), (value,), {}, same_shape=False)


def _swap(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    dims = args[1:] if len(args) != 2 or isinstance(args[1], int) else tuple(args[1])
    ndim = args[0].ndim
    if kwargs or args[0].own.power is not None or not all(isinstance(dim, int) for dim in dims):
        return None
    first = [dim % ndim for dim in dims]
    kept = 0 not in first if name == "transpose" else bool(first) and first[0] == 0
    return _per_example(name, func, args, kwargs, same_shape=False) if kept else None


def _index(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    """`outputs[:, 0]` and the like."""
    value, index = args
    first = isinstance(index, tuple) and index and index[0] in (slice(None), ...)
    plain = first and all(isinstance(part, (int, slice)) for part in index[1:]) and index[0] == slice(None)
    if not plain or value.own.power is not None:
        return None
    made = _per_example(name, lambda row: row[index], (value,), {}, same_shape=False)
    made.constants.append(Constant(str(index)))
    return made


def _gather(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    if len(args) != 3 or kwargs or not isinstance(args[0], Taped) or args[0].own.power is not None:
        return None
    value, dim, index = args
    own = isinstance(index, Tensor) and not isinstance(index, Cut) and index.ndim == value.ndim
    if not own or not isinstance(dim, int) or dim % value.ndim == 0 or len(index) != value.own.tape.n:
        return None
    return _per_example(name, func, args, kwargs, same_shape=False)


def _reduced(values: Values, kind: str, how: Callable[[Tensor], Tensor], power: int) -> Values:
    """Own losses of shape () from rows; `power` is 1 where the script's value is divided by n."""

    def run(i: int) -> Tensor:
        row = values.rows[i]
        assert row is not None
        return how(row).reshape(())

    rows = values.tape.each(values.rows, run, kind)
    return Values(values.tape, rows, (kind, values.structure), values.constants, power)


def _reduce(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    """`sum` and `mean`: over everything they make the loss, inside an example they are an operation like others."""
    value = args[0]
    if not isinstance(value, Taped) or set(kwargs) - {"dim", "keepdim"}:
        return None
    if value.own.power is not None:
        return value.own
    dim = _argument(args, kwargs, "dim", 1, None)
    dims = set(range(value.ndim)) if dim is None else {d % value.ndim for d in ((dim,) if isinstance(dim, int) else tuple(dim))}
    if 0 not in dims:
        return _per_example(name, func, args, kwargs, same_shape=False)
    if dims != set(range(value.ndim)) or _argument(args, kwargs, "keepdim", 2, False):
        return None
    how = torch.mean if name == "mean" else torch.sum
    return _reduced(value.own, name, how, 1 if name == "mean" else 0)


def _loss(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    """A loss function of torch: run without reduction for each example alone, then reduced inside the example."""
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
        raise ConfigError("loss", f"{name} with size_average or reduce", "use reduction= instead")
    reduction = given.pop("reduction")
    one = next(v for v in (given["input"], given["target"]) if isinstance(v, Taped))
    if one.own.power is not None:
        return None
    classes = name in ("cross_entropy", "nll_loss")
    if name in NORMALISED and given.get("weight") is not None:
        raise ConfigError("loss", f"{name} with weight= divides by the weights of the whole batch", "multiply by hand instead")
    indices = classes and not given["target"].is_floating_point()
    _check_shapes(name, given["input"], given["target"], indices)
    if indices and given["weight"] is not None and reduction == "mean":
        raise ConfigError("loss", f"a class-weighted mean {name} {WEIGHTED[0]}", WEIGHTED[1])
    target, ignored = given.pop("target"), given.get("ignore_index", -100)
    tape = one.own.tape
    if indices:  # labels have one dimension less than the outputs, so that they would pass for constants
        _fit_constant(name, target)
        target = target.reshape(len(target), 1, *target.shape[1:])

    def run(target: Tensor, **rest: Any) -> Tensor:
        made: Tensor = func(target=target[:, 0] if indices else target, reduction="none", **rest)
        return made

    values = _per_example(name, run, (target,), given, same_shape=not classes)
    if reduction == "none":
        return values
    if reduction == "mean" and indices:

        def own(i: int) -> Tensor:
            row = values.rows[i]
            assert row is not None
            counted = int((tape.own(target, i) != ignored).sum())
            return (row.sum() / max(1, counted)).reshape(())

        rows = tape.each(values.rows, own, name)
        return Values(tape, rows, ("mean", values.structure), values.constants, 1)
    inside = torch.mean if reduction == "mean" else torch.sum
    if reduction not in ("mean", "sum", *(("batchmean",) if name == "kl_div" else ())):
        raise ConfigError("loss", f"{name} with reduction {reduction!r}", "use mean or sum")
    return _reduced(values, reduction, inside, 0 if reduction == "sum" else 1)


def _check_shapes(name: str, outputs: Tensor, target: Tensor, indices: bool) -> None:
    wanted = outputs.shape[:1] + outputs.shape[2:] if indices else outputs.shape
    few = name in ("cross_entropy", "nll_loss") and outputs.ndim < 2
    if few or (indices and not isinstance(outputs, Taped)) or target.shape != wanted:
        shapes = f"{tuple(outputs.shape)} and {tuple(target.shape)}"
        raise ConfigError("loss", f"{name} takes shapes {shapes}, which do not pair examples with labels", "make them fit")


def _of_loss(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values | None:
    """Arithmetic of a loss that is summed up: numbers, and other losses of the same forward pass."""
    if name in ("clone", "contiguous", "squeeze", "float") and isinstance(args[0], Taped):
        return args[0].own
    if name not in SCALAR or kwargs or len(args) not in (1, 2):
        return None
    first, second = (_term(name, part) for part in (*args, 0.0)[:2])
    if first is None or second is None:
        return None
    if name == "neg":
        return _scaled(first, -1.0) if isinstance(first, Values) else None
    if name in FACTORS:
        turned = name not in ("mul", "multiply")
        if isinstance(second, Values):
            return None if turned or isinstance(first, Values) else _scaled(second, first)
        assert isinstance(first, Values)
        return _scaled(first, second if not turned else 1 / second if second else math.inf)
    if name in ("rsub", "__rsub__"):
        first, second = second, first
    sign = 1.0 if name == "add" else -1.0
    if isinstance(first, Values) and isinstance(second, Values):
        return _added(first, second, sign, name)
    if isinstance(first, Values):  # a number that is added has no gradient
        assert not isinstance(second, Values)
        return replace(first, shift=first.shift + sign * second)
    assert isinstance(second, Values)
    turned_round = _scaled(second, sign)
    return replace(turned_round, shift=turned_round.shift + first)


def _term(name: str, part: Any) -> Values | float | None:
    """A loss, or a number; None for what is neither."""
    if isinstance(part, Taped):
        return part.own if part.own.power is not None else None
    if not isinstance(part, Tensor):
        return part if isinstance(part, (int, float)) else None
    _fit_constant(name, part)
    if name in FACTORS:
        raise ConfigError("loss", f"{name} takes a tensor, which may have been made from the batch", "use a number")
    return float(part.item()) if part.numel() == 1 else None


def _scaled(values: Values, number: float) -> Values:
    return replace(values, scale=values.scale * number, shift=values.shift * number)


def _added(a: Values, b: Values, sign: float, name: str) -> Values:
    (x, of_a), (y, of_b) = resolved(a), resolved(b)

    def run(i: int) -> Tensor:
        one, other = a.rows[i], b.rows[i]
        assert one is not None and other is not None
        return x * one + sign * y * other

    both = [None if other is None else one for one, other in zip(a.rows, b.rows, strict=True)]
    rows = a.tape.each(both, run, name)
    power = 1 if a.tape.mean else 0
    constants = [*a.constants, *b.constants, Constant(of_a, True), Constant(of_b, True)]
    made = Values(a.tape, rows, (name, a.structure, b.structure), constants, power)
    return replace(made, shift=a.shift + sign * b.shift)


def _table(rule: Rule, names: Iterable[str]) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


RULES.update(
    {
        **_table(_elementwise, SCALAR),
        **_table(
            _elementwise,
            [
                "abs",
                "exp",
                "log",
                "log1p",
                "expm1",
                "sqrt",
                "square",
                "sigmoid",
                "tanh",
                "relu",
                "softplus",
                "logsigmoid",
                "clamp",
                "pow",
                "__pow__",
                "__rpow__",
                "float",
                "clone",
                "contiguous",
                "gelu",
                "elu",
                "silu",
                "leaky_relu",
                "maximum",
                "minimum",
                "detach",
                "__rtruediv__",
                "sign",
                "sin",
                "cos",
                "erf",
            ],
        ),
        **_table(_along, ["softmax", "log_softmax", "logsumexp"]),
        **_table(_reduce, ("sum", "mean")),
        **_table(_reshape, ("view", "reshape", "flatten")),
        **_table(_swap, ("transpose", "permute")),
        **_table(
            _loss,
            [
                "cross_entropy",
                "nll_loss",
                "mse_loss",
                "l1_loss",
                "smooth_l1_loss",
                "huber_loss",
                "binary_cross_entropy",
                "binary_cross_entropy_with_logits",
                "kl_div",
                "poisson_nll_loss",
                "soft_margin_loss",
            ],
        ),
        "squeeze": _squeeze,
        "unsqueeze": _unsqueeze,
        "__getitem__": _index,
        "gather": _gather,
    }
)
