"""PrivateGradient: clipped sums of per-example gradients on a support, one interface over all backends.

The order is fixed here and nowhere else: mask first, then clip per example over all live coordinates, then sum (arXiv 2112.00845,
Algorithm 1). Noise is added by the caller (`noise.py`), on the k values that come out, so frozen coordinates are never released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fed_dpprune.dpsgd import compiled
from fed_dpprune.dpsgd.clipping import FLOAT32_SLACK, Clipping
from fed_dpprune.dpsgd.grad_sample.contribution import Unfit
from fed_dpprune.dpsgd.layered import LayerEngine
from fed_dpprune.dpsgd.live import LiveTensor, live_tensors
from fed_dpprune.dpsgd.reference import MEMORY_BYTES, VmapEngine
from fed_dpprune.dpsgd.selfcheck import agrees
from fed_dpprune.dpsgd.validate import check_module
from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.support import Support, dense

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
        micro_batch: Examples held in memory at once; 0 chooses by memory. The result does not depend on it but for rounding.
        loss: Losses of single examples, (logits, y) -> shape (n,).
        precision: `float32`; `float64` (backend reference) for tests; `bfloat16` runs forward and backward in autocast, norms
            and sums in float32.

    Raises:
        ConfigError: The model mixes examples (names the layer and the fix).
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
        self._checked: set[object] = set()
        self._copies: list[NDArray[np.float32] | None] = []  # by live tensor; see `live_values`
        self._outputs: dict[object, Tensor] = {}
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

    def clipped_sum(self, x: NDArray[np.float32] | Tensor, y: NDArray[np.int64] | Tensor, clipping: Clipping) -> NDArray[Any]:
        """Sum over examples of the clipped gradient of each on the support.

        Adding or removing one example, of whatever content, moves the result by at most `clipping.clip_norm` in L2.

        Args:
            x: Examples, shape (n, ...). n = 0 is legal: an empty Poisson batch still gets its noise.
            y: Labels, shape (n,).
            clipping: The bound.

        Returns:
            Shape (k,), ordered as the support's indices; float32, or float64 when the precision is. A sum, not a mean.

        An example whose loss or live gradient is not finite adds nothing; it never raises.
        """
        inputs, labels = self._to_device(x), self._to_device(y)
        if self._live and len(inputs):
            self._prove(inputs, labels)
        size = self.micro_batch or self._micro_batch()
        slack = 0.0 if self._dtype == torch.float64 else FLOAT32_SLACK
        starts = range(0, len(inputs) if self._live else 0, size)
        parts = (self._one_sum(inputs[s : s + size], labels[s : s + size], clipping, slack) for s in starts)
        if len(starts) == 1:
            total = next(parts)
        else:
            total = np.zeros(self._wide.k, dtype=np.float64)
            for part in parts:
                total += part
        if self._place is not None:
            total = total[self._place]
        return total.astype(np.float64 if self._dtype == torch.float64 else np.float32, copy=False)

    @property
    def live(self) -> tuple[LiveTensor, ...]:
        """The live tensors of the support in use."""
        return self._live

    def proven_layers(self, x: Tensor, module: nn.Module) -> LayerEngine | None:
        """The layer engine once it has proven itself on inputs like `x`, with labels shaped like outputs; None if it has not."""
        if self._layers is not None:
            signature = (x.shape[1:], x.dtype)
            if signature not in self._outputs:
                with torch.no_grad():
                    self._outputs[signature] = module(x[:1]).detach()
            self._prove(x, self._outputs[signature])
        return self._layers

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

    def _one_sum(self, x: Tensor, y: Tensor, clipping: Clipping, slack: float) -> NDArray[Any]:
        total: NDArray[Any]
        if self._layers is not None:
            try:
                total = self._layers.clipped_sum(self._live, x, y, clipping, slack)
            except Unfit:
                self._layers = None
                return self._one_sum(x, y, clipping, slack)
        else:
            total = self._whole.clipped_sum(self._live, x, y, clipping, slack)
        if np.isfinite(total.sum()):
            return total
        # Finite gradients whose products left float32's range on the way: once more in float64, a sum is never let out broken.
        exact = VmapEngine(self.module, self._loss, torch.float64)
        return np.nan_to_num(exact.clipped_sum(self._live, x, y, clipping, slack), nan=0.0, posinf=0.0, neginf=0.0)

    def _prove(self, x: Tensor, y: Tensor) -> None:
        """Once per input shape, on made-up examples: the layer rules must agree with plain autograd, or they are not used.

        Catches what no list of layers can: weights used outside their layer, examples that see each other in the model's own
        code, a dimension order that only looks like examples first.
        """
        signature = (x.shape[1:], x.dtype, y.shape[1:], y.dtype)
        if self._layers is None or signature in self._checked:
            return
        self._checked.add(signature)
        if not agrees(self._layers, self.layout, x, y):
            self._layers = None

    def _micro_batch(self) -> int:
        engine = self._layers or self._whole
        return max(1, MEMORY_BYTES // max(1, engine.example_bytes(self._live)))

    def _to_device(self, value: NDArray[np.float32] | NDArray[np.int64] | Tensor) -> Tensor:
        """A tensor in torch's own aligned memory: matrix libraries may round differently on odd addresses."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensor.to(self._parameters[0].device) if self._parameters else tensor


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
