"""Losses of single examples, taken out of the loss that a training script computes for its batch.

The output of a private model is a `Taped` tensor. Each operation on it is run again for every example alone, in tensors whose
first dimension is 1, and for one made-up example beside them; `backward()` then differentiates each example's own loss by
itself. So no gradient depends on another example, on a place, or on the size of the batch: a mean over n is never a division
that has to be multiplied away again.

Only operations of the table in `loss_rules.py` are taken: they treat each example by itself. The result of any other one is
`Cut`: good for a metric, refused by name as soon as it enters a loss. Numbers of the script are constants, refused when they
change from step to step; tensors with the examples in front (labels) are the examples' own, others must have been declared.

Outputs stay recognisable: a write of them into a tensor of the script is refused, a training-mode forward pass under `no_grad`
is `Cut`, and once floating point outputs left by `numpy()`, `tolist()`, `torch.tensor()` and the like, floating point tensors
of the script are refused in losses. A model has one loss: other operations than at an earlier step are refused.

Known limits. The bound on what one example moves does not hold for a script that does one of these, and nothing notices it:

- its loss takes a tensor with a row for each example that it made from several of them: targets standardised by the batch
  (`(y - y.mean()) / y.std()`), weights from the batch's class counts (`w[y] / w[y].mean()`), mixup, or a model's input so made;
- it assigns `plain.data = z`, which torch does not report, or takes outputs out as single numbers (`.item()`, `float()`) or
  whole ones (`argmax(1).numpy()`), and makes targets or weights of rows from them;
- it makes targets or weights of rows from outputs of `module.eval()`, which are plain tensors, on private examples;
- it decides by a private value (`loss.item() > 1`) which rows or targets go into a loss of the same operations, whether it
  runs `backward()`, or whether it steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from fed_dpprune.dpsgd.arithmetic import pinned
from fed_dpprune.errors import ConfigError

FIX = 'write the loss as a function and pass it as make_private(criterion=..., grad_sample_mode="ghost")'
WRITING = "make a new tensor (total = total + ...), or add up numbers by .item()"
IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ipow__")
SCALAR = ("add", "sub", "mul", "div", "neg", "rsub", "__rsub__", "true_divide", "multiply", "divide")
REFUSED = ("register_hook", "retain_grad", "requires_grad_", "register_post_accumulate_grad_hook")
CLOSE = 1e-6  # a number this near to the batch's size, relatively, is taken for it
# What hands the numbers of an output to numpy or Python, where nobody can follow them.
LEAVING = ("numpy", "tolist", "__array__", "__dlpack__", "storage", "untyped_storage", "_typed_storage", "__reduce_ex__")
LEFT = "left"  # key of a tape's memory: the operation by which floating point outputs left
SMALLEST_SIZE = 3  # below, constants of the script (2, 0.5) would too often be taken for the batch's size

Row = Tensor | None  # None: an example whose own loss could not be computed; it counts as absent


@dataclass(frozen=True, eq=False)
class Constant:
    """A number or tensor that the script brings into its loss; `factor` where it multiplies or divides."""

    value: object
    factor: bool = False


@dataclass
class Tape:
    """One forward pass, from the outputs of the model to the gradient of each example's own loss.

    Args:
        outputs: Shape (n, ...), without a graph.
        made_up: Output of a made-up example, shape (1, ...): shows shapes where there is no example, and errors of the script.
        mean: Whether the script's loss is declared to be a mean over examples (else a sum).
        memory: Constants of earlier steps by the loss's structure, and notes under words; lives as long as the model.
        declared: Tensors that the script declared before it saw data: weights of its criterion.
        arrive: Is handed the gradients, shape of `outputs`; the row of an absent example is NaN.
    """

    outputs: Tensor
    made_up: Tensor
    mean: bool
    memory: dict[object, Any]
    declared: Sequence[Tensor]
    arrive: Callable[[Tensor], None]
    leaves: list[Tensor] = field(init=False)
    closed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """One leaf an example, and half everywhere for the made-up one: every loss of the table takes it."""
        rows = [self.outputs[i : i + 1].clone() for i in range(self.n)]
        self.leaves = [row.requires_grad_() for row in (*rows, torch.full_like(self.made_up, 0.5))]

    @property
    def n(self) -> int:
        """Examples."""
        return len(self.outputs)

    def refuse_returned(self, name: str, value: Tensor) -> None:
        """Refuse a floating point tensor of the script once outputs have left: it may have been made from all of them.

        Raises:
            ConfigError: Names the operation by which they left.
        """
        if LEFT in self.memory and value.is_floating_point():
            raise ConfigError(
                "loss",
                f"{name} takes a floating point tensor of the script after {self.memory[LEFT]}() of the model's output",
                "compute such metrics in eval mode, or take loss.item() and whole numbers (argmax) alone",
            )

    def own(self, value: Tensor, i: int) -> Tensor:
        """Example i's part of a tensor with the examples in front; a made-up one for the made-up example."""
        if i < self.n:
            return value[i : i + 1].clone()
        return value.new_full((1, *value.shape[1:]), 0.5 if value.is_floating_point() else 0)

    def constant(self, name: str, value: Tensor) -> Tensor:
        """A tensor that is no example's: a declared one, for any other may have been made from the batch."""
        for one in self.declared:
            if one.shape == value.shape and torch.equal(one.to(value), value):
                return value.detach().clone()
        raise ConfigError(
            "loss",
            f"{name} takes a tensor of shape {tuple(value.shape)} that has no row for each example",
            "use a number, or pass the criterion that holds the tensor to make_private(criterion=...)",
        )

    def root(self) -> Taped:
        """What the script gets as the model's output."""
        return _taped(self.outputs, Values(self, list(self.leaves), ("outputs",)))

    def each(self, rows: Sequence[Row], run: Callable[[int], Tensor], name: str) -> list[Row]:
        """Run something for each example alone, and for the made-up one, where an error is the script's."""
        made: list[Row] = []
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad(), pinned(self.outputs.device):
            for i, row in enumerate(rows):
                try:
                    made.append(None if row is None else run(i))
                except ConfigError:
                    raise
                except Exception as error:  # a label out of range, for one: that example is absent
                    if i == self.n:
                        line = (str(error).strip().splitlines() or [""])[0][:150]
                        raise ConfigError("loss", f"{name} fails on a made-up example ({line})", FIX) from error
                    made.append(None)
        return made

    def gradients(self, rows: Sequence[Row], scale: float) -> Tensor:
        """Gradient of each own loss times `scale`, in the outputs; NaN for an absent example."""
        made = torch.full_like(self.outputs, math.nan)
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad(), pinned(made.device):
            for i, (row, leaf) in enumerate(zip(rows[: self.n], self.leaves, strict=False)):
                if row is None or not bool(torch.isfinite(row).all()):
                    continue
                made[i] = 0.0
                if row.requires_grad:
                    (found,) = torch.autograd.grad(row.sum() * scale, leaf, allow_unused=True)
                    made[i] = 0.0 if found is None else found[0]
        return made


@dataclass
class Values:
    """What stands behind a `Taped` tensor.

    Attributes:
        tape: Of the forward pass.
        rows: For each example, and last for the made-up one, its own tensor of shape (1, ...); of a loss, shape ().
        structure: The operations, nested; equal for the same script.
        constants: Numbers and tensors of the script that went in, in order.
        power: None before the examples are reduced; then how often the script's value was divided by n.
        scale: The number that the script has multiplied the loss with since.
        shift: The number that it has added: part of what it sees, of no gradient.
    """

    tape: Tape
    rows: list[Row]
    structure: object
    constants: list[Constant] = field(default_factory=list)
    power: int | None = None
    scale: float = 1.0
    shift: float = 0.0


class Cut(Tensor):
    """A tensor that was computed from a model's output in a way that no rule follows; fit for metrics, not for a loss."""

    cut_by = "an operation"
    memory: dict[object, Any] | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What torch does to an output without reporting the call: a copy by `torch.tensor(z)` or `torch.asarray(z)`."""
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass():
            for value in flat((args, kwargs or {})):
                if isinstance(value, Cut) and value.numel() > 1 and value.is_floating_point() and value.memory is not None:
                    value.memory[LEFT] = "torch.tensor"
            return func(*_plain(args), **_plain(kwargs or {}))


class Taped(Cut):
    """Output of a private model, or what the script made of it; `values` says what each example's own is."""

    own: Values


def _taped(value: Tensor, values: Values) -> Taped:
    made = value.detach().clone().as_subclass(Taped)
    made.own, made.memory = values, values.tape.memory
    return made


def cut(value: Any, by: str, memory: dict[object, Any]) -> Any:
    """Tensors of private values that no tape follows: fit for metrics, refused in a loss.

    Args:
        value: A tensor, or tuples, lists and mappings of them; anything else is returned as it is.
        by: For messages: what they come from.
        memory: Of the model's tapes.
    """
    if isinstance(value, Tensor):
        made = value.detach().as_subclass(Cut)
        made.cut_by, made.memory = by, memory
        return made
    if isinstance(value, dict):
        return {key: cut(part, by, memory) for key, part in value.items()}
    if not isinstance(value, (tuple, list)):
        return value
    parts = [cut(part, by, memory) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def shown(values: Values) -> Taped:
    """The tensor that the script sees: the rows together, NaN for absent examples."""
    like = values.rows[-1]
    assert like is not None
    rows = values.rows[:-1]
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        if values.power is not None:
            total = like.new_zeros(())
            for row in rows:
                total = total if row is None else total + row.detach().reshape(())
            for _ in range(values.power):
                total = total / max(1, len(rows)) if rows else total / 0
            return _taped(total * values.scale + values.shift, values)
        filled = [torch.full_like(like, math.nan) if row is None else row.detach() for row in rows]
        return _taped(torch.cat([like.detach()[:0], *filled]), values)


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    full = resolve_name(func) or getattr(func, "__name__", str(func))
    name = full.removeprefix("torch.nn.functional.").removeprefix("torch.Tensor.").removeprefix("torch.")
    taped = [value for value in flat((args, kwargs)) if isinstance(value, Taped)]
    if name in ("backward", "_backward"):
        return _backward(args[0], *args[1:], **kwargs)
    if taped and _changes(name, args, kwargs):
        return _in_place(name, args, kwargs)
    _refuse_writing(name, args, kwargs)
    if name in LEAVING and args and isinstance(args[0], Cut) and args[0].numel() > 1 and args[0].is_floating_point():
        memory = args[0].memory
        assert memory is not None
        memory[LEFT] = name
    if name in REFUSED and taped:
        raise ConfigError(f"{name} on the model's output", "reaches past the single examples", FIX)
    if taped and args and torch.is_grad_enabled() and (rule := RULES.get(name)):
        tapes = {id(value.own.tape) for value in taped}
        made = rule(name, func, args, kwargs) if len(tapes) == 1 else None
        if made is not None:
            return shown(made)
    return _cut(name, func, args, kwargs)


def _changes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args and isinstance(args[0], Taped) and _writes(name)) or kwargs.get("out") is not None


def _writes(name: str) -> bool:
    in_place = (name.endswith("_") and not name.endswith("__")) or name.endswith(".__set__")
    return in_place or name in ("__setitem__", "__delitem__", "set_data", *IN_PLACE)


def _refuse_writing(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Private values written into a tensor of the script would look like the script's own afterwards."""
    target = kwargs.get("out")
    if name in ("batch_norm", "instance_norm"):
        target = [*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
    elif target is None and _writes(name):
        target = args[0] if args else kwargs.get("self", kwargs.get("input"))
    if any(isinstance(value, Tensor) and not isinstance(value, Cut) for value in flat(target)):
        raise ConfigError("model output", f"is written into a tensor of the script ({name})", WRITING)


def _in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`loss += ...`, which scripts write; anything else in place is refused."""
    target = args[0] if args else None
    plain = name.removeprefix("__i").rstrip("_").replace("truediv", "div")
    if isinstance(target, Taped) and target.own.power is not None and plain in SCALAR and not kwargs:
        made = getattr(torch, plain)(*args)
        if isinstance(made, Taped):
            with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch(), torch.no_grad():
                target.copy_(made)
            target.own = made.own
            return target
        return made
    raise ConfigError("model output", f"is changed in place ({name})", "make a new tensor instead")


def _cut(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = [value for value in flat((args, kwargs)) if isinstance(value, Tensor)]
    plain = [(value, value._version) for value in given if not isinstance(value, Cut)]
    memory = next((value.memory for value in given if isinstance(value, Cut)), None)
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch(), torch.no_grad():
        found = func(*_plain(args), **_plain(kwargs))
        shared = {value.untyped_storage().data_ptr() for value, _ in plain}
        if any(value._version != version for value, version in plain):
            raise ConfigError("model output", f"is written into a tensor of the script ({name})", WRITING)

    def wrap(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.untyped_storage().data_ptr() in shared:
                value = value.clone()  # else a write into the view would reach the script's tensor
            made = value.as_subclass(Cut)
            made.cut_by, made.memory = name, memory
            return made
        if isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
            parts = [wrap(part) for part in value]
            return type(value)(parts) if not hasattr(value, "_fields") else type(value)(*parts)
        return [wrap(part) for part in value] if isinstance(value, list) else value

    return wrap(found)


def _plain(value: Any) -> Any:
    if isinstance(value, Cut):
        return value.as_subclass(Tensor)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (tuple, list) else value


def flat(value: Any) -> Iterator[Any]:
    """All that lies in nested tuples, lists and mappings, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from flat(part)
    else:
        yield value


def resolved(values: Values) -> tuple[float, float]:
    """The number by which own losses are to be multiplied, n taken out; twice, the second one to be remembered.

    Raises:
        ConfigError: The script's loss is a sum where a mean is declared or the other way round.
    """
    n, scale, declared = values.tape.n, values.scale, 1 if values.tape.mean else 0
    if n <= 1 and not (math.isfinite(scale) and n):
        return 1.0, 1.0  # an empty batch: nothing is multiplied
    said = 'loss_reduction="mean"' if declared else 'loss_reduction="sum"'
    other = 'loss_reduction="sum"' if declared else 'loss_reduction="mean"'
    if values.power == declared:
        turned = scale * n if not declared else scale / n  # as if the script undid what is declared
        if n >= SMALLEST_SIZE and abs(turned - 1) < CLOSE:
            raise ConfigError("loss", f"is scaled by the number of examples, against {said}", f"pass {other}")
        return scale, scale
    exact = scale * n if declared else scale / n
    if abs(exact - 1) < CLOSE:
        return 1.0, 1.0
    kind = "a sum" if declared else "a mean"
    raise ConfigError("loss", f"is {kind} over the batch, against {said}", f"pass {other} or change the loss")


def _backward(loss: Any, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None) -> None:
    if not isinstance(loss, Taped):
        raise ConfigError("loss", f"comes from {loss.cut_by}, which is not known to keep examples apart", FIX)
    if gradient is not None or create_graph or inputs is not None:
        raise ConfigError("loss.backward()", "takes no arguments on a private model", "reduce the loss and call it plainly")
    values = loss.own
    if values.power is None:
        raise ConfigError("loss.backward()", "needs one number, a sum or a mean over examples", "reduce the loss first")
    if values.tape.closed:
        raise ConfigError("backward", "ran twice through one forward pass", "run the model again")
    scale, constant = resolved(values)
    if values.tape.n:
        _remember(values, [*values.constants, Constant(constant)])
    values.tape.closed = True
    values.tape.arrive(values.tape.gradients(values.rows, scale))


def _remember(values: Values, constants: list[Constant]) -> None:
    """Numbers of the script must be the same at every step, and not the batch's size: else they may carry other examples."""
    memory, n = values.tape.memory, values.tape.n
    before = memory.get(values.structure)
    if before is None:
        if any(isinstance(known, tuple) for known in memory):
            raise ConfigError(
                "loss",
                "is made of other operations than at an earlier step, and the choice may tell of other examples",
                "use one loss from the first step to the last, or call make_private again for the other",
            )
        for constant in constants:
            number = _number(constant.value) if constant.factor else None
            if n >= SMALLEST_SIZE and number and min(abs(number / n - 1), abs(number * n - 1)) < CLOSE:
                raise ConfigError("loss", "uses a number equal to the batch's size", f"leave it out, or {FIX}")
        memory[values.structure] = constants
    elif len(before) != len(constants) or not all(map(_same, before, constants)):
        raise ConfigError("loss", "uses a number or tensor that changes from step to step, which may tell of other examples", FIX)


def _number(value: object) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if whole else None  # type: ignore[arg-type]


def _same(one: Constant, other: Constant) -> bool:
    a, b = one.value, other.value
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b.to(a.device)))
    return type(a) is type(b) and (a == b or (a != a and b != b))


# By the name of an operation: how it is run for each example alone; None where it cannot be. Filled by `loss_rules.py`.
Rule = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Values | None]
RULES: dict[str, Rule] = {}
