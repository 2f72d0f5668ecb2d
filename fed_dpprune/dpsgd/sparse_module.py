"""SparseModule: a model whose training-mode forward ends in clipped sums, never in gradients of the batch."""

from __future__ import annotations

import hashlib
import pickle
from collections import deque
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fed_dpprune.dpsgd import loss_rules  # noqa: F401  # fills the table of operations
from fed_dpprune.dpsgd.gradient import OpenBatch, PrivateGradient
from fed_dpprune.dpsgd.tape import Tape, cut
from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Layout
from fed_dpprune.models.flat import Tensor as FlatTensor
from fed_dpprune.sparsity.support import Support, frozen_count, random_subset

if TYPE_CHECKING:
    from fed_dpprune.dpsgd.poisson_loader import Ticket
    from fed_dpprune.dpsgd.sparse_optimizer import SparseOptimizer, Terms

AGAIN = "call make_private again after such a change"


class SupportPlan:
    """Which coordinates live at which step; a function of public things alone.

    Args:
        layout: Of the model.
        sparsity: Fraction of the trainable coordinates frozen at random, in [0, 1), or the support of every step.
        every: Steps after which a random support is drawn anew; 0 for never.
        seed: Of random supports.
    """

    def __init__(self, layout: Layout, sparsity: float | Support, every: int, seed: int) -> None:
        self.layout, self._every, self._seed = layout, every, seed
        spans = [np.arange(s.start, s.stop, dtype=np.int64) for t, s in layout.spans() if not t.frozen]
        self._trainable = Support(np.concatenate([np.zeros(0, dtype=np.int64), *spans]), layout.d)
        self._own = sparsity if isinstance(sparsity, Support) else None
        self._keep = self._trainable.k
        if not isinstance(sparsity, Support):
            if not 0.0 <= sparsity < 1.0:
                raise ConfigError("sparsity", f"{sparsity} is outside [0, 1)", "give the fraction to freeze")
            self._keep -= frozen_count(sparsity, self._trainable.k)

    def at(self, step: int) -> Support:
        """The support of a step, counted from 0."""
        if self._own is not None:
            return self._own
        number = step // self._every if self._every else 0
        return random_subset(self._trainable, self._keep, self._seed, "support", number)


class SparseModule(nn.Module):
    """The wrapped model: runs as before; in training mode a backward pass leaves clipped sums for the optimiser, no `.grad`.

    Its state_dict carries the prefix `_module.`, as that of Opacus' GradSampleModule does.

    Args:
        module: The model.
        plan: Its supports.
        backend: As engine.backend.
        declared: Tensors that losses may use beside the examples' own.

    Raises:
        ConfigError: The model cannot be private; names the layer or parameter and what to do.
    """

    def __init__(self, module: nn.Module, plan: SupportPlan, backend: str, declared: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._module = module
        self.training = module.training
        self.plan, self._backend, self._declared = plan, backend, declared
        self.optimizer: SparseOptimizer | None = None
        self._parameters_at_first = [(p, p.requires_grad) for p in module.parameters()]
        self._open: list[_Forward] = []
        self._memory: dict[object, Any] = {}
        self._shapes: dict[object, Tensor] = {}
        self.steps = 0
        self._example: tuple[torch.Size, torch.dtype] | None = None
        self._seen: object = None
        self.check()
        self.use_support(0)

    def use_support(self, step: int) -> None:
        """Take the support of a step."""
        self.steps = step
        self.support = self.plan.at(step)
        self.gradient.set_support(self.support)

    def check(self) -> None:
        """Look whether model, mode and surroundings are what was proven; prove anew what may change.

        Raises:
            ConfigError: Parameters were replaced, added, frozen or thawed; the model is spread over devices; a layer or hook
                that is not offered.
        """
        refuse_distributed(self._module)
        now = [(p, p.requires_grad) for p in self._module.parameters()]
        before = self._parameters_at_first
        same = len(now) == len(before) and all(a is b and x == y for (a, x), (b, y) in zip(now, before, strict=True))
        if not same:
            raise ConfigError("model", "has parameters replaced, added, frozen or thawed since make_private", AGAIN)
        check_layers(self._module)
        state = modes(self._module)
        if state != self._seen:
            self.gradient = PrivateGradient(self._module, self.plan.layout, backend=self._backend, loss=_against_output_gradient)
            if self._seen is not None:
                self.gradient.set_support(self.support)
            self._seen = state
            self._shapes.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; in training mode with gradients on, taped. Then it takes one tensor, examples in front."""
        if not (self.training and torch.is_grad_enabled()):
            made = self._module(*args, **kwargs)
            return cut(made, "a training-mode forward pass under no_grad", self._memory) if self.training else made
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not args[0].ndim:
            raise ConfigError("model", "takes one tensor with the examples in front, in training mode", "pack inputs into it")
        if args[0].requires_grad:
            raise ConfigError("model input", "asks for a gradient, which would be one of the batch", "pass x.detach()")
        if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            raise ConfigError("autocast", "is not offered around a private model", "leave it out")
        if torch.compiler.is_compiling():
            raise ConfigError("torch.compile", "cannot hold a private step", "compile the model before make_private")
        if self.optimizer is None:
            raise ConfigError("model", "has no private optimizer", "use what make_private returned")
        self._check_example(args[0])
        self.check()
        self.optimizer.check()
        if self._open:
            why = "several forward passes for one step, or one without a backward pass and step"
            raise ConfigError("model", why, "step, or call zero_grad(), before the next; use eval() or no_grad() beside it")
        passed = _Forward(self, args[0], self.optimizer.batches.admit(len(args[0])))
        self._open.append(passed)
        return passed.tape.root()

    def _check_example(self, x: Tensor) -> None:
        """Refuse examples that look otherwise than those of the first step: one long one would change all the others."""
        found = (x.shape[1:], x.dtype)
        self._example = self._example or found
        if found != self._example:
            was, now = (f"{tuple(shape)} of {dtype}" for shape, dtype in (self._example, found))
            raise ConfigError("model input", f"has examples of shape {now} after {was}", "pad to a fixed length")

    def example_output(self, x: Tensor) -> Tensor:
        """Output for one example of zeros, shape (1, ...): what shapes are, from public values alone.

        Raises:
            ConfigError: It is not one tensor of float32 with the example in front.
        """
        key = (tuple(x.shape[1:]), x.dtype)
        if key not in self._shapes:
            with torch.no_grad():
                made = self._module(x.new_zeros(1, *x.shape[1:]))
            right = isinstance(made, Tensor) and made.ndim and len(made) == 1 and made.dtype == torch.float32
            if not right:
                raise ConfigError("model", "puts out something else than one float32 tensor, examples in front", "wrap it so")
            self._shapes[key] = made.detach()
        return self._shapes[key]

    def take_sum(self) -> tuple[NDArray[np.float64], Terms] | None:
        """Clipped sum of the backward pass since the last call, shape (k,), and the terms it was made under; None without.

        Raises:
            ConfigError: A forward pass without a backward pass, or several, or of another batch than the one drawn last.
        """
        if len(self._open) > 1:
            raise ConfigError("optimizer.step()", "several forward passes since the last step", "use Opacus' BatchMemoryManager")
        if not self._open:
            return None
        (passed,) = self._open
        if passed.found is None:
            raise ConfigError("optimizer.step()", "a training-mode forward has no backward", "use model.eval() or no_grad")
        self._open.clear()
        assert self.optimizer is not None
        self.optimizer.batches.spend(passed.ticket, passed.rows)
        return passed.found

    def drop(self) -> None:
        """Forget backward passes that no step used."""
        self._open.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and backward passes that no step used."""
        self.drop()
        super().zero_grad(set_to_none)

    def forbid_grad_accumulation(self) -> None:
        """Part of Opacus' interface; several backward passes between two steps are refused by the optimiser."""

    def to_standard_module(self) -> nn.Module:
        """The wrapped model."""
        return self._module

    def cleanup(self) -> None:
        """Part of Opacus' interface; no hook stays behind between two forward passes."""

    def _replicate_for_data_parallel(self) -> SparseModule:
        raise ConfigError("DataParallel", "is not offered", "train on one device")

    def __reduce_ex__(self, protocol: Any) -> Any:  # deepcopy, copy and pickle ask it
        raise ConfigError(
            "copy of a private model", "would train without its optimizer", "copy to_standard_module() or save state_dict()"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_module"), name)


def _against_output_gradient(outputs: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose output gradient is `gradient`: replays a backward pass whose own loss is gone."""
    return (outputs * gradient).flatten(1).sum(1)


class _Forward:
    """One forward pass in training mode, and the clipped sum that its backward pass leaves in `found`."""

    def __init__(self, owner: SparseModule, x: Tensor, ticket: Ticket) -> None:
        self.ticket, self.rows = ticket, len(x)
        self._owner, self._support, self._step = owner, owner.support, owner.steps
        x = x.detach()
        made_up = owner.example_output(x)
        owner.gradient.prove(x, made_up)  # before any private value goes through the model
        self._batch, self._present = self._opened(x)
        self._versions = [p._version for p in owner._module.parameters()]
        outputs = made_up[:0] if self._batch is None else self._batch.outputs
        optimizer = owner.optimizer
        assert optimizer is not None
        mean = optimizer.loss_reduction == "mean"
        self.found: tuple[NDArray[np.float64], Terms] | None = None
        self.tape = Tape(outputs, made_up, mean, owner._memory, owner._declared, self._arrive)

    def _opened(self, x: Tensor) -> tuple[OpenBatch | None, Tensor]:
        """The batch run forward; an example that the model cannot take is absent, whatever the others are."""
        gradient, present = self._owner.gradient, torch.ones(len(x), dtype=torch.bool, device=x.device)
        if not len(x):
            return None, present
        try:
            return gradient.open(x), present
        except ConfigError:
            raise
        except Exception:  # a word past the dictionary, for one
            for i in range(len(x)):
                try:
                    gradient.open(x[i : i + 1])
                except Exception:
                    present[i] = False
            x = x.clone()
            x[~present] = 0
            return gradient.open(x), present

    def _arrive(self, gradient: Tensor) -> None:
        owner, optimizer = self._owner, self._owner.optimizer
        if self._step != owner.steps:
            raise ConfigError("backward", "runs through a forward pass of an earlier step", "run the model again")
        if self not in owner._open:  # zero_grad() was called between the two, as many scripts do
            owner._open.append(self)
        if [p._version for p in owner._module.parameters()] != self._versions or owner.support is not self._support:
            raise ConfigError("backward", "runs on other weights or another support than the forward pass", "run it again")
        assert optimizer is not None
        terms = optimizer.terms_in_force()
        if terms.mean != self.tape.mean or terms.support is not self._support:
            raise ConfigError("optimizer", "changed its loss_reduction or support in a step", "change it between two steps")
        if self._batch is None:
            total = np.zeros(self._support.k, dtype=np.float64)
        else:
            gradient[~self._present] = torch.nan
            total = self._batch.clipped_sum(gradient, terms.clipping)
            self._batch = None
        self.found = (total, terms)


def modes(module: nn.Module) -> tuple[object, ...]:
    """All that decides how a model treats a batch, to be compared: layers, their attributes by value, hooks, buffers."""
    found: list[object] = []
    layers = {id(layer) for layer in module.modules()}
    for name, layer in module.named_modules():
        own = {k: v for k, v in vars(layer).items() if k not in _INNER}
        hooks = [tuple(vars(layer).get(kind, ())) for kind in _HOOKS]
        found.append((name, id(layer), _content(own, layers, ()), tuple(hooks)))
    found += [(id(p), p.requires_grad, p.dtype, p.shape, str(p.device)) for p in module.parameters()]
    found += [(name, _content(b, layers, ())) for name, b in module.named_buffers()]
    return tuple(found)


def _content(value: Any, layers: set[int], above: tuple[int, ...]) -> object:
    """A value to be compared: containers and objects part by part, tensors and arrays by digest, all else by identity."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)  # a NaN is itself, and 1 is not True
    if id(value) in above or id(value) in layers or isinstance(value, nn.Parameter):
        return id(value)  # a layer of the model is compared by itself; weights may move
    above = (*above, id(value))
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return (str(value.dtype), str(value.device), tuple(value.shape), _digest(flat.numpy().tobytes()))
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return (str(value.dtype), value.shape, _digest(value.tobytes()))
    if isinstance(value, Mapping):
        return (id(type(value)), *((_content(k, layers, above), _content(v, layers, above)) for k, v in value.items()))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return (id(type(value)), *(_content(one, layers, above) for one in value))
    inside = getattr(value, "__dict__", None)
    if isinstance(inside, dict) and not isinstance(value, (type, ModuleType)):
        return (id(value), _content(inside, layers, above))
    return (id(value), _pickled(value))


def _pickled(value: Any) -> object:
    """Digest of what has no attributes to look at (slots, ranges, counters); None where it cannot be pickled."""
    try:
        return _digest(pickle.dumps(value))
    except Exception:
        return None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


_INNER = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_layers(module: nn.Module) -> None:
    """Refuse by name what the proof on made-up examples cannot see.

    Raises:
        ConfigError: An embedding that rewrites its weights, hooks on gradients, parameters that are not plain float32.
    """
    everywhere = nn.modules.module
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        raise ConfigError("torch", "has backward hooks for all modules, and no gradient of the batch exists here", "remove them")
    for name, layer in module.named_modules():
        where = f"model layer {name or '(the model itself)'}"
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            raise ConfigError(where, "max_norm rewrites the rows that a batch reads", "set max_norm=None")
        if layer._backward_hooks or layer._backward_pre_hooks:
            raise ConfigError(where, "has backward hooks, and no gradient of the batch exists here", "remove them")
    for name, parameter in module.named_parameters():
        hooked = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooked:
            raise ConfigError(f"parameter {name}", "has hooks on its gradient", "remove them")
        if type(parameter) is not nn.Parameter or parameter.dtype != torch.float32:
            kind = f"{type(parameter).__name__} of {parameter.dtype}"
            raise ConfigError(f"parameter {name}", f"is a {kind}", "use plain float32 parameters")


def refuse_distributed(module: nn.Module) -> None:
    """Several devices: each would clip and add noise for itself.

    Raises:
        ConfigError: The model is wrapped for them, or a process group of several ranks is open.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    named = ("DPDDP", "FSDP", "DifferentiallyPrivateDistributedDataParallel", "FullyShardedDataParallel")
    for layer in module.modules():
        if isinstance(layer, wrappers) or type(layer).__name__ in named:
            raise ConfigError("model", f"{type(layer).__name__} is not offered", "train on one device")
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    if ready and torch.distributed.get_world_size() > 1:
        raise ConfigError("torch.distributed", "has several ranks, each of which would need its own account", "use one")


def layout_of(module: nn.Module) -> Layout:
    """Names and shapes in coordinate order; parameters that ask for no gradient are frozen as a whole."""
    named = module.named_parameters()
    return Layout(tuple(FlatTensor(n, tuple(p.shape), "other", frozen=not p.requires_grad) for n, p in named))
