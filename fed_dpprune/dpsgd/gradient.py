"""PrivateGradient: clipped sums of per-example gradients on a support, one interface over all backends.

The order is fixed here and nowhere else: mask first, then clip per example over all live coordinates, then sum (arXiv 2112.00845,
Algorithm 1). Noise is added by the caller (`noise.py`), on the k values that come out, so frozen coordinates are never released.

Each example is for itself: whatever the batch, examples go through the module in micro-batches of one shape, filled up with
zeros, under pinned arithmetic. Nothing that depends on an example changes what is computed for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fed_dpprune.dpsgd import compiled, selfcheck
from fed_dpprune.dpsgd.arithmetic import pinned
from fed_dpprune.dpsgd.clipping import GROUP, Clipping
from fed_dpprune.dpsgd.grad_sample.contribution import Contribution
from fed_dpprune.dpsgd.layered import LayerEngine, Pass
from fed_dpprune.dpsgd.live import LiveTensor, live_tensors
from fed_dpprune.dpsgd.reference import MEMORY_BYTES, VmapEngine
from fed_dpprune.dpsgd.sums import clipped_sum, in_levels
from fed_dpprune.dpsgd.validate import check_module
from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.support import Support, dense

# Examples of a micro-batch: none is left over in products and element-wise operations at any vector width. Nets that put
# out little for an example take the larger number, for what a pass costs in itself (benchmarks/NOTES.md). It follows from the
# net and the shape of its inputs: no message and no config key sets it.
ROWS, ROWS_OF_SMALL, SMALL = 32, 64, 1 << 16
BACKENDS = ("auto", "reference", "torch", "compiled")
PRECISIONS = ("float32", "float64", "bfloat16")


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of each example, shape (n,)."""
    return nn.functional.cross_entropy(logits, y, reduction="none")


class PrivateGradient:
    """The gradient side of a private step: keep one per model, call it every step.

    Args:
        module: The model. Its parameters are overwritten by `set_weights` and inside `live_values`; nothing else of it changes.
        layout: Names and shapes of its parameters in coordinate order; tensors with `frozen=True` never get a gradient.
        backend: `reference`, `torch`, `compiled`, or `auto` (the fastest that fits the model on this machine).
        micro_batch: Examples whose gradients are held until they are added up, in whole micro-batches; 0 chooses by
            memory. It changes no bit of an example's gradient, norm or factor.
        loss: Losses of single examples, (logits, y) -> shape (n,).
        precision: `float32`; `float64` (backend reference) for tests; `bfloat16` runs forward and backward in autocast, norms
            and sums in float32.

    Raises:
        ConfigError: The model mixes examples (names the layer and the fix). `prove` and the first sum look deeper.
        ValueError: An unknown backend or precision, or a layout that is not this module's.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        *,
        backend: str = "auto",
        micro_batch: int = 0,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        precision: str = "float32",
    ) -> None:
        if backend not in BACKENDS or precision not in PRECISIONS:
            raise ValueError(f"backend {backend!r} is not one of {BACKENDS}, or precision {precision!r} not of {PRECISIONS}")
        found = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
        if found != [(t.name, t.shape) for t in layout.tensors]:
            raise ValueError("the layout does not list this module's parameters")
        check_module(module)
        self.module, self.layout, self.micro_batch = module, layout, micro_batch
        self._named = dict(module.named_parameters())
        self._parameters = list(self._named.values())
        self._dtype = torch.float64 if precision == "float64" else torch.float32
        self._loss = loss
        self._whole = VmapEngine(module, loss, self._dtype)
        self._layers = self._layer_engine(backend, precision)
        self._rows: dict[object, int] = {}  # by signature of the inputs, once they are proven
        self._autocast = precision == "bfloat16"
        self._copies: list[NDArray[np.float32] | None] = []  # by live tensor; see `live_values`
        trainable = [np.arange(s.start, s.stop, dtype=np.int64) for t, s in layout.spans() if not t.frozen]
        everything = dense(layout.d) if len(trainable) == len(layout.tensors) else None
        self._adopt(everything or Support(np.concatenate([np.zeros(0, np.int64), *trainable]), layout.d), None)

    def set_weights(self, vector: NDArray[np.float32]) -> None:
        """Copy a flat vector of shape (d,) into the module's parameters."""
        if vector.shape != (self.layout.d,):
            raise ValueError(f"weights of shape {vector.shape} do not fit a model of {self.layout.d} coordinates")
        self._copies = []  # of other values
        with torch.no_grad():
            for parameter, (_, span) in zip(self._parameters, self.layout.spans(), strict=True):
                if parameter.is_cpu:  # no copy in between, and torch does not warn of vectors that are read-only
                    np.copyto(parameter.numpy(), vector[span].reshape(parameter.shape))
                else:
                    parameter.copy_(torch.tensor(vector[span]).view(parameter.shape))

    @contextmanager
    def live_values(self) -> Iterator[list[NDArray[np.float32]]]:
        """The weights on the support in use, to be changed in place inside the `with`; no other weight can be.

        Yields:
            A contiguous vector for each live tensor, together k values in coordinate order. Of a tensor that lives entirely on
            the CPU it is the parameter's own memory; else a copy that is taken at the first step on a support, kept
            until `set_weights` or another support, and written to its places at the end of the `with`.
        """
        with torch.no_grad():
            found = [_own_memory(tensor, self._named[tensor.name]) for tensor in self._moving]
            if not self._copies:
                self._copies = [None if own is not None else self._copied(t) for own, t in zip(found, self._moving, strict=True)]
            parts = [own if own is not None else copy for own, copy in zip(found, self._copies, strict=True)]
            yield [part for part in parts if part is not None]
            for tensor, copy in zip(self._moving, self._copies, strict=True):
                if copy is not None:
                    _put(self._named[tensor.name], tensor, copy)

    def weights_on(self, support: Support) -> NDArray[np.float32]:
        """The weights on a support, shape (k,), float32."""
        with torch.no_grad():
            parts = [self._copied(tensor) for tensor in live_tensors(self.layout, support)]
        return np.concatenate([np.zeros(0, dtype=np.float32), *parts])

    def _copied(self, tensor: LiveTensor) -> NDArray[np.float32]:
        values = self._named[tensor.name].detach().to("cpu", torch.float32).numpy().reshape(-1)
        return values.copy() if tensor.full else values[tensor.positions]

    def set_support(self, support: Support, norm_over: Support | None = None) -> None:
        """Choose the live coordinates of the following calls; cheap when nothing changed.

        Args:
            support: What is released.
            norm_over: A wider support over which the clip factor is computed (clip-then-mask, an ablation: still bounded, but the
                bound is partly spent on coordinates that are thrown away). By default the support itself.

        Raises:
            ValueError: Of another length than the layout, live inside a frozen tensor, or not inside `norm_over`.
        """
        wide = norm_over or support
        if self._support.digest != support.digest or self._wide.digest != wide.digest:
            self._adopt(support, norm_over)

    def _adopt(self, support: Support, norm_over: Support | None) -> None:
        wide = norm_over or support
        self._live: tuple[LiveTensor, ...] = live_tensors(self.layout, wide)
        self._moving = self._live if wide is support else live_tensors(self.layout, support)
        self._copies = []  # of other places
        self._place = None if wide is support else support.within(wide)
        self._support, self._wide = support, wide

    def clipped_sum(
        self, x: NDArray[np.float32] | Tensor, y: NDArray[np.int64] | Tensor, clipping: Clipping
    ) -> NDArray[np.float64]:
        """Sum over examples of the clipped gradient of each on the support.

        Adding or removing one example, of whatever content, moves the result by at most `clipping.sensitivity(layout)` in L2.

        Args:
            x: Examples, shape (n, ...). n = 0 is legal: an empty Poisson batch still gets its noise. The slack is counted
                for MOST_EXAMPLES.
            y: Labels, shape (n,).
            clipping: The bound.

        Returns:
            Shape (k,), float64, ordered as the support's indices. A sum, not a mean.

        Raises:
            ConfigError: The model does not prove itself (first call for a shape of inputs); never for what an example holds: one
                whose loss or live gradient is not finite, or which the module cannot take, adds nothing.
        """
        inputs, labels = self._to_device(x), self._to_device(y)
        total = np.zeros(self._wide.k, dtype=np.float64)
        if self._live and len(inputs):
            rows = self.prove(inputs, labels)
            with self._pinned():
                sums = (self._group_sum(inputs[part], labels[part], clipping, rows) for part in self._groups(len(inputs), rows))
                total = in_levels(sums, total)
        return total if self._place is None else total[self._place]

    def prove(self, x: Tensor, y: Tensor) -> int:
        """Once per shape and type of inputs, on made-up examples: the module must be fit, and every route must prove itself.

        The layer rules must agree with plain autograd, which catches what no list of layers can: weights used outside their
        layer, a dimension order that only looks like examples first. A route must give an example the same bits wherever
        it stands; one that does not takes examples one at a time, in the same way for all.

        Args:
            x: Examples, at least one; only their shape and type are looked at.
            y: Labels, likewise.

        Returns:
            Rows of the micro-batches.

        Raises:
            ConfigError: The module mixes examples, keeps something of them, draws random numbers, fails on made-up examples, or
                gives other bits for the same example.
        """
        signature = (x.shape[1:], x.dtype, y.shape[1:], y.dtype)
        if signature not in self._rows:
            with self._pinned():
                self._rows[signature] = self._proven(x[:1], y[:1])
        return self._rows[signature]

    def _proven(self, x: Tensor, y: Tensor) -> int:
        if not self._parameters:
            return 1
        plain_x = x.to(self._parameters[0].dtype) if x.is_floating_point() else x
        values, row_by_row = selfcheck.check_forward(self.module, self._loss, plain_x, y)
        several = (ROWS_OF_SMALL if values <= SMALL else ROWS) if row_by_row else 1
        if self._layers is not None and not self._layers_fit(x, y):
            self._layers = None
        for layers, rows in self._choices(several):
            engine = layers or self._whole
            # The oracle of the tests, in float64, need only run.
            asked = selfcheck.runs if self._dtype == torch.float64 else selfcheck.invariant
            try:
                if asked(engine, self.module, self.layout, x, y, rows):
                    self._layers = layers
                    return rows
            except Exception as error:
                if layers is None:
                    raise selfcheck.failed(error) from error
        raise ConfigError("model", "gives other bits for the same example each time", "use deterministic layers")

    def _choices(self, several: int) -> list[tuple[LayerEngine | None, int]]:
        """Routes and rows, the preferred first."""
        routes = [self._layers, None] if self._layers is not None else [None]
        return [(route, rows) for route in routes for rows in dict.fromkeys((several, 1))]

    def _layers_fit(self, x: Tensor, y: Tensor) -> bool:
        layers = self._layers
        assert layers is not None
        autocast, layers.autocast = layers.autocast, False
        try:
            return selfcheck.agrees(layers, self.module, self._loss, self.layout, x, y)
        finally:
            layers.autocast = autocast

    def open(self, x: Tensor) -> OpenBatch:
        """Run the module forward on a batch whose losses, hence output gradients, are not known yet; see `OpenBatch`."""
        return OpenBatch(self, self._to_device(x))

    @contextmanager
    def _pinned(self) -> Iterator[None]:
        if self._layers is not None and self._layers.kernel is not None:
            self._layers.kernel.library.use_threads(torch.get_num_threads())
        with pinned(self._parameters[0].device if self._parameters else torch.device("cpu")):
            yield

    def _groups(self, n: int, rows: int) -> Iterator[slice]:
        """Examples that are held together until they are added up: whole micro-batches, as many as memory takes."""
        held = self.micro_batch or MEMORY_BYTES // max(1, self._engine.example_bytes(self._live))
        size = rows * max(1, min(held, GROUP) // rows)
        return (slice(start, start + size) for start in range(0, n, size))

    @property
    def _engine(self) -> LayerEngine | VmapEngine:
        return self._whole if self._layers is None else self._layers

    def _group_sum(self, x: Tensor, y: Tensor, clipping: Clipping, rows: int) -> NDArray[np.float64]:
        micro = [self._micro_batch(x[s : s + rows], y[s : s + rows], rows) for s in range(0, len(x), rows)]
        present = np.concatenate([here for _, here in micro])
        return clipped_sum(self._live, [parts for parts, _ in micro], present, clipping)

    def _micro_batch(self, x: Tensor, y: Tensor, rows: int) -> tuple[list[Contribution], NDArray[np.bool_]]:
        """Contributions of one micro-batch, and which of its rows count."""
        present = np.arange(rows) < len(x)
        x, y = filled_up(x, rows), filled_up(y, rows)
        try:
            parts, losses = self._engine.micro_batch(self._live, x, y)
        except Exception:  # whatever the module does on some example: that one is absent, the others keep their bits
            present &= self._runs(x, y)
            absent = torch.from_numpy(~present).to(x.device)
            x[absent], y[absent] = 0, 0
            parts, losses = self._engine.micro_batch(self._live, x, y)
        return parts, present & torch.isfinite(losses.double()).cpu().numpy()

    def _runs(self, x: Tensor, y: Tensor) -> NDArray[np.bool_]:
        """Which examples the module takes, each by itself in its own place."""
        found = np.zeros(len(x), dtype=bool)
        for row in range(len(x)):
            one_x, one_y = torch.zeros_like(x), torch.zeros_like(y)
            one_x[row], one_y[row] = x[row], y[row]
            with suppress(Exception):
                self._engine.micro_batch(self._live, one_x, one_y)
                found[row] = True
        return found

    @property
    def live(self) -> tuple[LiveTensor, ...]:
        """The live tensors of the support in use."""
        return self._live

    @property
    def route(self) -> str:
        """How gradients are taken: `compiled` or `torch` (layer rules), or `whole-model` (torch.func over the module)."""
        if self._layers is None:
            return "whole-model"
        return "compiled" if self._layers.kernel else "torch"

    def _layer_engine(self, backend: str, precision: str) -> LayerEngine | None:
        if backend == "reference" or precision == "float64":
            return None
        on_cpu = all(p.device.type == "cpu" for p in self._parameters)
        kernel = compiled.load() if backend in ("auto", "compiled") and on_cpu else None
        if backend == "compiled" and kernel is None:
            reason = compiled.kernel_status()["reason"] if on_cpu else "the model is not on the CPU"
            raise ConfigError("engine.backend", f"no compiled kernel: {reason}", "use engine.backend = auto")
        return LayerEngine(self.module, self._loss, kernel, autocast=precision == "bfloat16")

    def _to_device(self, value: NDArray[np.float32] | NDArray[np.int64] | Tensor) -> Tensor:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensor.to(self._parameters[0].device) if self._parameters else tensor


class OpenBatch:
    """A forward pass in micro-batches of one shape that waits for the gradient of its outputs.

    For training loops that compute the loss themselves (`privacy_engine.py`).

    Args:
        owner: Whose module, support and weights are used; both must stand still until `clipped_sum`.
        x: Examples, shape (n, ...), n >= 1.

    Attributes:
        outputs: Of the module, shape (n, ...), without a graph.
    """

    def __init__(self, owner: PrivateGradient, x: Tensor) -> None:
        self._owner, self._x, self._live = owner, x, owner._live
        with owner._pinned(), torch.no_grad():
            like = owner.module(x.new_zeros(1, *x.shape[1:])).detach()  # for its shape: no private example is run unproven
        self._rows = owner.prove(x, like)
        self._open: list[tuple[Pass | None, Tensor]] = []
        with owner._pinned():
            for start in range(0, len(x), self._rows):
                self._open.append(self._forward(filled_up(x[start : start + self._rows], self._rows)))
        self.outputs = torch.cat([output.detach() for _, output in self._open])[: len(x)]

    def _forward(self, x: Tensor) -> tuple[Pass | None, Tensor]:
        layers = self._owner._layers
        if layers is None or not self._live:
            with torch.no_grad():
                return None, self._owner.module(x)
        with torch.enable_grad(), Pass(layers, self._live, len(x)) as tapped:
            return tapped, self._owner.module(x)

    def clipped_sum(self, gradient: Tensor, clipping: Clipping) -> NDArray[np.float64]:
        """As `PrivateGradient.clipped_sum`, for losses whose gradient in each example's output is given.

        Args:
            gradient: Shape of `outputs`: row i is the gradient of example i's own loss.
            clipping: The bound.
        """
        owner, rows = self._owner, self._rows
        if not self._live:
            return np.zeros(owner._support.k, dtype=np.float64)
        finite = torch.isfinite(gradient.flatten(1)).all(1).cpu().numpy()
        parts, present = [], []
        with owner._pinned():
            for place, (tapped, output) in enumerate(self._open):
                here = slice(place * rows, (place + 1) * rows)
                given = filled_up(gradient[here].nan_to_num(0.0, 0.0, 0.0), rows)
                if tapped is None:
                    x = filled_up(self._x[here], rows)
                    found, _ = owner._whole.micro_batch(self._live, x, given)
                else:
                    if output.requires_grad:
                        torch.autograd.grad(output, tapped.anchor, given.to(output.dtype), allow_unused=True)
                    found = tapped.contributions()
                parts.append(found)
                present.append(np.pad(finite[here], (0, rows - len(finite[here]))))
            total = clipped_sum(self._live, parts, np.concatenate(present), clipping)
        return total if owner._place is None else total[owner._place]


def filled_up(value: Tensor, rows: int) -> Tensor:
    """The first rows of a fresh tensor of (rows, ...), zeros below; in torch's own aligned memory."""
    made = value.new_zeros(rows, *value.shape[1:])
    made[: len(value)] = value
    return made


def _plain(parameter: nn.Parameter) -> bool:
    return parameter.is_cpu and parameter.dtype == torch.float32 and parameter.is_contiguous()


def _own_memory(tensor: LiveTensor, parameter: nn.Parameter) -> NDArray[np.float32] | None:
    """The memory of a parameter that lives entirely, as a vector; None where only a copy will do."""
    return parameter.numpy().reshape(-1) if tensor.full and _plain(parameter) else None


def _put(parameter: nn.Parameter, tensor: LiveTensor, values: NDArray[np.float32]) -> None:
    """Write a tensor's live values to their places, on whatever device and in whatever order its memory is."""
    kernel = compiled.load() if _plain(parameter) else None
    if kernel is not None:
        arrays = (tensor.positions, values, parameter.numpy())
        kernel.library.scatter(values.size, *(array.ctypes.data for array in arrays))
        return
    key = ("positions", parameter.device)  # kept on the device as long as the support
    if key not in tensor.cache:
        tensor.cache[key] = torch.tensor(tensor.positions).to(parameter.device)
    parameter.put_(tensor.cache[key], torch.from_numpy(values).to(parameter.device, parameter.dtype))
