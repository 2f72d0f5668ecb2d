"""Per-example gradients by layer rules: one forward, one backward that stops at the layers' outputs, no gradient of the batch.

While the pass runs no parameter asks for a gradient, so autograd has none to compute; a tap behind each live layer hands the
gradient of its output to the layer's rule as soon as the backward pass gets there. Layers before the first live
one keep no graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.allocator import keep_freed_memory
from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.grad_sample import fallback
from fed_dpprune.dpsgd.grad_sample.contribution import Call, Contribution, Rule, Shared, Unfit
from fed_dpprune.dpsgd.grad_sample.table import rule_for
from fed_dpprune.dpsgd.live import LiveTensor
from fed_dpprune.dpsgd.reference import Loss

ALIGNED = 4  # values, from which on rows of a matrix begin at addresses that libraries treat alike
APART = 16  # values of a cache line


@dataclass(eq=False)
class Site:
    """A layer with live parameters, and what it did in the pass under way.

    Attributes:
        layer: The module.
        rule: Its rule.
        live: Its live tensors, by parameter name inside the layer.
        open: Calls whose gradient has not come back yet.
        calls: Calls whose gradient has.
        found: Contributions, one per live tensor, once the layer is through.
    """

    layer: nn.Module
    rule: Rule
    live: dict[str, LiveTensor]
    open: int = 0
    calls: list[Call] = field(default_factory=list)
    found: dict[str, Contribution] = field(default_factory=dict)


class LayerEngine:
    """Per-example gradients of one module through the rules of `grad_sample/`.

    Args:
        module: The model; parameters are read at every call.
        loss: Per-example losses, (logits, y) -> shape (n,).
        kernel: The compiled kernel, or None for the torch rules.
        autocast: Run forward and backward in bfloat16 autocast; norms and sums stay in float32.
    """

    def __init__(self, module: nn.Module, loss: Loss, kernel: Kernel | None, autocast: bool = False) -> None:
        self.module, self.loss, self.kernel, self.autocast = module, loss, kernel, autocast
        keep_freed_memory()
        self._held: dict[str, bool] = {}  # whether a tensor's per-example gradients are kept until the sum
        names: dict[int, str] = {id(p): name for name, p in module.named_parameters()}
        self.parameters = list(module.parameters())
        self.uneven = [layer for layer in module.modules() if type(layer) is nn.Linear and layer.in_features % ALIGNED]
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {}
        for layer in module.modules():
            for own, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
                self._owners.setdefault(names[id(parameter)], []).append((layer, own))

    def example_bytes(self, live: tuple[LiveTensor, ...]) -> int:
        """Memory that one example's contributions hold until the sum, as far as `learn` knows."""
        return 4 * sum(t.count for t in live if self._held.get(t.name, True))

    def learn(self, live: tuple[LiveTensor, ...], contributions: list[Contribution]) -> None:
        """Remember of which tensors the gradients are kept until the sum. Asked once, so that it is the same in every process."""
        self._held = {tensor.name: part.held > 0 for tensor, part in zip(live, contributions, strict=True)}

    def micro_batch(self, live: tuple[LiveTensor, ...], x: Tensor, y: Tensor) -> tuple[list[Contribution], Tensor]:
        """Per-example gradients of one micro-batch of n examples.

        Returns:
            One contribution per live tensor, and the losses, shape (n,).

        Raises:
            Unfit: A layer is used in a way that no rule does exactly.
        """
        with torch.enable_grad(), Pass(self, live, len(x)) as tapped:
            losses = self._losses(x, y)
            if losses.shape != (len(x),):
                raise ValueError(f"the loss gave shape {tuple(losses.shape)} for {len(x)} examples; it must give one loss each")
            if losses.requires_grad:
                torch.autograd.grad(losses.sum(), tapped.anchor, allow_unused=True)
        return tapped.contributions(), losses.detach()

    def _losses(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.autocast:
            return self.loss(self.module(x), y)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):  # not around the backward pass: the rules work in float32
            return self.loss(self.module(x), y)

    def sites(self, live: tuple[LiveTensor, ...]) -> list[Site]:
        """The layers that own live tensors."""
        sites: dict[int, Site] = {}
        for tensor in live:
            for layer, own in self._owners[tensor.name]:
                site = sites.setdefault(id(layer), Site(layer, rule_for(layer), {}))
                site.live[own] = tensor
        return list(sites.values())


class Pass:
    """One forward and one backward. Taps are in place inside the `with`, which holds the forward; the backward may come later.

    Args:
        engine: Whose module is about to run.
        live: The live tensors.
        n: Examples in the batch, at least one.

    Attributes:
        anchor: The only leaf that asks for a gradient; every live layer's output hangs on it.
    """

    def __init__(self, engine: LayerEngine, live: tuple[LiveTensor, ...], n: int) -> None:
        self._engine, self._live, self._n = engine, live, n
        self._sites = engine.sites(live)
        self._taken: list[Callable[[], None]] = []  # what takes the hooks off

    def __enter__(self) -> Pass:
        parameters = self._engine.parameters
        self._asked = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self._asked:
            parameter.requires_grad = False
        self.anchor = torch.zeros((), requires_grad=True, dtype=torch.float32, device=parameters[0].device)
        for layer in self._engine.uneven:
            self._taken.append(layer.register_forward_pre_hook(_rows_apart).remove)
        for site in self._sites:
            hook = _Hook(site, self.anchor, self._n, self._engine.kernel)
            if site.rule is fallback.contributions:
                self._taken.append(site.layer.register_forward_pre_hook(hook.before, with_kwargs=True).remove)
            self._taken.append(site.layer.register_forward_hook(hook.after, with_kwargs=True).remove)
        return self

    def __exit__(self, *error: object) -> None:
        for take_off in self._taken:
            take_off()
        for parameter in self._asked:
            parameter.requires_grad = True

    def contributions(self) -> list[Contribution]:
        """What the backward pass brought, one per live tensor.

        Raises:
            Unfit: A live layer did not run, or its output does not reach the loss.
        """
        parts: dict[str, list[Contribution]] = {tensor.name: [] for tensor in self._live}
        for site in self._sites:
            if site.open or not site.found:
                raise Unfit(f"{type(site.layer).__name__} was not run, or its output does not reach the loss")
            for own, part in site.found.items():
                parts[site.live[own].name].append(part)
        return [found[0] if len(found) == 1 else Shared(found) for found in parts.values()]


def _rows_apart(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Lay a linear layer's input out so that every row begins on a cache line: MKL rounds a row by where it begins."""
    if not args or not isinstance(args[0], Tensor) or not args[0].ndim:
        return None
    features = args[0].shape[-1]
    return (nn.functional.pad(args[0], (0, -features % APART))[..., :features], *args[1:])


class _Hook:
    """Sits around one layer for one pass: keeps its arguments, taps its output."""

    def __init__(self, site: Site, anchor: Tensor, n: int, kernel: Kernel | None) -> None:
        self.site, self.anchor, self.n, self.kernel = site, anchor, n, kernel
        self._busy = False  # the fallback runs the layer again
        self._random: Tensor | None = None

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the random state: a second run of the layer would have to draw the same numbers."""
        if not self._busy:
            self._random = torch.get_rng_state()

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Tap the output."""
        if self._busy:
            return None
        batched = all(isinstance(a, Tensor) and a.ndim and a.shape[0] == self.n for a in (*args, output))
        if not args or kwargs or not batched:
            raise Unfit(f"{type(layer).__name__} takes or returns something other than tensors with the examples in front")
        if self._random is not None and not torch.equal(self._random, torch.get_rng_state()):
            raise Unfit(f"{type(layer).__name__} draws random numbers")
        arguments = tuple(a.detach() for a in args)
        versions = tuple(a._version for a in arguments)
        self.site.open += 1

        def arrive(gradient: Tensor) -> None:
            if tuple(a._version for a in arguments) != versions:
                raise Unfit(f"the input of {type(layer).__name__} was changed in place after it was used")
            self.site.calls.append(Call(arguments, gradient))
            self.site.open -= 1
            if not self.site.open:
                self._busy = True
                with torch.no_grad():
                    self.site.found = self.site.rule(layer, self.site.live, self.site.calls, self.kernel)
                self.site.calls.clear()
                self._busy = False

        tapped: Tensor = _Tap.apply(output, self.anchor, arrive)
        return tapped


class _Tap(torch.autograd.Function):
    """The identity; its backward hands the gradient to a callback. Marked as in-place so that later in-place layers are safe."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, arrive: Any) -> Tensor:
        ctx.arrive = arrive
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        arrive, ctx.arrive = ctx.arrive, None  # lets go of the layer's input now, not when the whole graph goes
        arrive(gradient)
        return gradient if ctx.needs_input_grad[0] else None, None, None
