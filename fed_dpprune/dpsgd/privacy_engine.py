"""SparsePrivacyEngine: opacus.PrivacyEngine's arguments and return values, on a support. For centralised training scripts.

An Opacus script becomes sparse by changing the import and adding `sparsity=`. What is done otherwise than in Opacus 1.6:

- Each example's gradient is masked before it is clipped, noise is drawn for live coordinates only, and frozen coordinates keep
  their value to the bit, whatever momentum or weight decay the optimiser has.
- The divisor of the mean is the loader's declared batch size, not int(len(dataset) / len(loader)), which tells the data's size.
- An example with a NaN or infinite loss or gradient adds nothing, where Opacus' sum turns NaN as a whole.
- Noise is float64 from a generator of the engine's own, seeded by the operating system, which torch.manual_seed does not reach;
  `secure_mode=True` takes every value from the operating system's entropy (slower).
- An empty Poisson batch is a step like any other; a step is charged before its noise is drawn.
- Not offered, and refused: `poisson_sampling=False` (Opacus charges it as if it were Poisson), `clipping="adaptive"`, the ghost
  modes (their second pass is not needed here), several devices.

Examples are one tensor, the first argument of the model, with the batch in front.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fed_dpprune.dpsgd.clipping import FLOAT32_SLACK, Clipping
from fed_dpprune.dpsgd.grad_sample.contribution import Unfit
from fed_dpprune.dpsgd.gradient import PrivateGradient
from fed_dpprune.dpsgd.layered import Pass, weighted_sums
from fed_dpprune.dpsgd.noise import OsNoise
from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Layout
from fed_dpprune.models.flat import Tensor as FlatTensor
from fed_dpprune.sparsity.support import Support, frozen_count, random_subset

CLIPPING = {"flat": "flat", "per_layer": "per-layer", "automatic": "automatic"}
REFRESH = ("run", "epoch", "step")


class SparsePrivacyEngine(PrivacyEngine):  # type: ignore[misc]  # opacus has no types
    """opacus.PrivacyEngine with a support; accountants, `get_epsilon`, checkpoints and loaders are Opacus' own.

    Args:
        accountant: As in Opacus ("prv" or "rdp"; "gdp" under-reports and is refused).
        secure_mode: All noise from the operating system's entropy.

    Raises:
        ConfigError: The accountant is gdp.
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        if accountant == "gdp":
            raise ConfigError("accountant", "gdp under-reports epsilon", "use prv or rdp")
        super().__init__(accountant=accountant, secure_mode=False)
        self._secure = secure_mode

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        sparsity: float | Support = 0.0,
        refresh: str = "epoch",
        support_seed: int = 0,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        backend: str = "auto",
        **kwargs: Any,
    ) -> tuple[SparseModule, SparseOptimizer, DataLoader[Any]]:
        """Wrap a model, its optimiser and its loader, as opacus.PrivacyEngine.make_private does.

        Args:
            module: Model in training mode; parameters with requires_grad=False are frozen as a whole.
            optimizer: Any torch optimiser of its parameters.
            criterion: Ignored, as in Opacus' default mode.
            data_loader: Its batch_size is the expected batch and the public divisor.
            noise_multiplier: Noise std on the sum over max_grad_norm.
            max_grad_norm: Clip norm over all live coordinates; one number in every clipping mode.
            sparsity: Fraction of the trainable coordinates frozen at random, in [0, 1), or a Support of your own. A support must
                not be chosen by looking at the private data.
            refresh: When a random support is drawn anew: never (`run`), every len(data_loader) steps (`epoch`), every `step`.
            support_seed: Seed of the random supports; public.
            batch_first: Only True.
            loss_reduction: What the script's criterion does, "mean" or "sum".
            poisson_sampling: Only True.
            clipping: "flat", "per_layer" (max_grad_norm over the root of the number of live tensors each) or "automatic".
            noise_generator: Source of the noise instead of the engine's own; for tests, never for a release.
            grad_sample_mode: "hooks", "functorch" or "ew"; all mean this engine.
            wrap_model: Only True.
            rand_on_empty: As in Opacus.
            backend: As engine.backend: auto, torch, compiled or reference.
            kwargs: Must be empty.

        Returns:
            (module, optimizer, data_loader), used as Opacus' are.

        Raises:
            ConfigError: An argument that is not offered, or a model that mixes examples; says what to do.
            ValueError: The optimiser has parameters that are not the module's (as in Opacus).
        """
        self._refuse(batch_first, poisson_sampling, clipping, noise_generator, grad_sample_mode, wrap_model, refresh, kwargs)
        known = {id(p) for p in module.parameters()}
        if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("Module parameters are different than optimizer Parameters")
        if data_loader.batch_size is None:
            raise ConfigError("data_loader", "has no batch_size to declare the expected batch by", "pass a DataLoader with one")
        plan = _SupportPlan(_layout(module), sparsity, refresh, support_seed, len(data_loader))
        loader = self._prepare_data_loader(
            data_loader, distributed=False, poisson_sampling=True, batch_first=batch_first, rand_on_empty=rand_on_empty
        )
        wrapped = SparseModule(module, plan, Clipping(float(max_grad_norm), CLIPPING[clipping]), loss_reduction, backend)
        private = SparseOptimizer(
            optimizer,
            wrapped,
            noise_multiplier=noise_multiplier,
            expected_batch_size=int(data_loader.batch_size),
            loss_reduction=loss_reduction,
            generator=noise_generator,
            secure_mode=self._secure,
        )
        private.attach_step_hook(self.accountant.get_optimizer_hook_fn(sample_rate=1 / len(data_loader)))
        return wrapped, private, loader

    def make_private_with_epsilon(
        self,
        *,
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        data_loader: DataLoader[Any],
        **arguments: Any,
    ) -> tuple[SparseModule, SparseOptimizer, DataLoader[Any]]:
        """As `make_private`, with the noise multiplier that spends at most `target_epsilon` in `epochs` epochs.

        The steps are counted exactly, epochs * len(data_loader); Opacus rounds them down.
        """
        noise_multiplier = get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=1 / len(data_loader),
            steps=epochs * len(data_loader),
            accountant=self.accountant.mechanism(),
        )
        return self.make_private(data_loader=data_loader, noise_multiplier=noise_multiplier, **arguments)

    def _refuse(
        self,
        batch_first: bool,
        poisson_sampling: bool,
        clipping: str,
        noise_generator: torch.Generator | None,
        grad_sample_mode: str,
        wrap_model: bool,
        refresh: str,
        unknown: dict[str, Any],
    ) -> None:
        if not batch_first:
            raise ConfigError("batch_first", "only models with the examples in front are offered", "move the batch to the front")
        if not poisson_sampling:
            raise ConfigError("poisson_sampling", "other batches would be charged as if they were Poisson", "leave it True")
        if clipping not in CLIPPING:
            raise ConfigError("clipping", f"{clipping!r} is not offered", f"use one of {', '.join(CLIPPING)}")
        if noise_generator is not None and self._secure:
            raise ConfigError("noise_generator", "secure_mode takes its noise from the operating system", "pass one of the two")
        if grad_sample_mode not in ("hooks", "functorch", "ew"):
            raise ConfigError("grad_sample_mode", f"{grad_sample_mode!r} is not needed here", 'use "hooks"')
        if not wrap_model:
            raise ConfigError("wrap_model", "only wrapped models are offered", "leave it True")
        if refresh not in REFRESH:
            raise ConfigError("refresh", f"{refresh!r} is not offered", f"use one of {', '.join(REFRESH)}")
        if unknown:
            raise ConfigError(sorted(unknown)[0], "no such argument", "see SparsePrivacyEngine.make_private")


class _SupportPlan:
    """Which coordinates live at which step; a function of public things alone."""

    def __init__(self, layout: Layout, sparsity: float | Support, refresh: str, seed: int, steps_per_epoch: int) -> None:
        self.layout, self._seed = layout, seed
        spans = [np.arange(span.start, span.stop, dtype=np.int64) for tensor, span in layout.spans() if not tensor.frozen]
        self._trainable = Support(np.concatenate([np.zeros(0, dtype=np.int64), *spans]), layout.d)
        self._own = sparsity if isinstance(sparsity, Support) else None
        self._keep = self._trainable.k
        if not isinstance(sparsity, Support):
            if not 0.0 <= sparsity < 1.0:
                raise ConfigError("sparsity", f"{sparsity} is outside [0, 1)", "give the fraction to freeze")
            self._keep -= frozen_count(sparsity, self._trainable.k)
        self._every = {"run": 0, "epoch": steps_per_epoch, "step": 1}[refresh]

    def at(self, step: int) -> Support:
        """The support of a step, counted from 0."""
        if self._own is not None:
            return self._own
        number = step // self._every if self._every else 0
        return random_subset(self._trainable, self._keep, self._seed, "support", number)


class SparseModule(nn.Module):
    """The wrapped model: runs as before; in training mode a backward pass leaves clipped sums for the optimiser, no `.grad`.

    Its state_dict carries the prefix `_module.`, as that of Opacus' GradSampleModule does.
    """

    def __init__(self, module: nn.Module, plan: _SupportPlan, clipping: Clipping, loss_reduction: str, backend: str) -> None:
        super().__init__()
        self._module = module
        self.plan, self.clipping, self.loss_reduction = plan, clipping, loss_reduction
        self.gradient = PrivateGradient(module, plan.layout, backend=backend, loss=_against_output_gradient)
        self._open: list[_Backward] = []
        self.steps = 0
        self.use_support(0)

    def use_support(self, step: int) -> None:
        """Take the support of a step."""
        self.steps = step
        self.support = self.plan.at(step)
        self.gradient.set_support(self.support)

    def forward(self, x: Tensor) -> Tensor:
        """The model's output; in training mode with gradients on, tapped."""
        if not (self.training and torch.is_grad_enabled()):
            plain: Tensor = self._module(x)
            return plain
        backward = _Backward(self, x)
        self._open.append(backward)
        return backward.output()

    def take_sum(self) -> NDArray[Any] | None:
        """Clipped sum of all backward passes since the last call, shape (k,); None when there was none."""
        sums = [backward.clipped_sum() for backward in self._open]
        self._open.clear()
        return np.sum(sums, axis=0) if sums else None

    def drop(self) -> None:
        """Forget backward passes that no step used."""
        self._open.clear()

    def forbid_grad_accumulation(self) -> None:
        """Part of Opacus' interface; several backward passes between two steps are refused by the optimiser."""

    def to_standard_module(self) -> nn.Module:
        """The wrapped model."""
        return self._module

    def cleanup(self) -> None:
        """Part of Opacus' interface; no hook stays behind between two forward passes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_module"), name)


def _against_output_gradient(outputs: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose output gradient is `gradient`: replays a backward pass whose own loss is gone."""
    return (outputs * gradient).flatten(1).sum(1)


class _Backward:
    """One forward pass in training mode and the backward pass that follows it."""

    def __init__(self, owner: SparseModule, x: Tensor) -> None:
        self._owner, self._x, self._gradient = owner, x.detach(), owner.gradient
        self._tapped: Pass | None = None
        self._arrived: Tensor | None = None
        self._live = owner.gradient.live

    def output(self) -> Tensor:
        module, x = self._owner._module, self._x
        if not len(x):  # a Poisson batch may be empty; layers need not like that
            with torch.no_grad():
                made: Tensor = module(x.new_zeros(1, *x.shape[1:]))[:0]
            return self._tap(made, torch.zeros((), requires_grad=True, device=made.device))
        layers = self._gradient.proven_layers(x, module)
        if layers is None or not self._live:
            with torch.no_grad():
                made = module(x)
            return self._tap(made, torch.zeros((), requires_grad=True, device=made.device))
        with Pass(layers, self._live, len(x)) as tapped:
            made = module(x)
        self._tapped = tapped
        return self._tap(made, tapped.anchor)

    def _tap(self, made: Tensor, anchor: Tensor) -> Tensor:
        tapped: Tensor = _KeepGradient.apply(made, anchor, self)
        return tapped

    def arrive(self, gradient: Tensor) -> None:
        if self._arrived is not None:
            raise ConfigError("backward", "ran twice through one forward pass", "run the model again")
        self._arrived = gradient

    def clipped_sum(self) -> NDArray[Any]:
        if self._arrived is None:
            raise ConfigError("optimizer.step()", "a training-mode forward has no backward", "use model.eval() or no_grad")
        n, clipping = len(self._x), self._owner.clipping
        if not n:
            return np.zeros(self._owner.support.k, dtype=np.float32)
        scale = float(n) if self._owner.loss_reduction == "mean" else 1.0  # gradients of single losses, not of their mean
        if self._tapped is not None:
            try:
                contributions = self._tapped.contributions()
            except Unfit:
                contributions = []
            squared = torch.stack([part.squared for part in contributions]).cpu().numpy() * scale**2 if contributions else None
            ended = torch.isfinite(self._arrived.flatten(1)).all(1).cpu().numpy()
            if squared is not None and np.isfinite(squared.sum(0)).all() and ended.all():
                factors = clipping.factors(squared, FLOAT32_SLACK) * scale
                weights = torch.from_numpy(factors).to(self._x.device, torch.float32)
                total = weighted_sums(self._live, contributions, weights).cpu().numpy()
                if np.isfinite(total.sum()):
                    return total
        return self._gradient.clipped_sum(self._x, self._arrived * scale, clipping)


class _KeepGradient(torch.autograd.Function):
    """The identity; keeps the gradient of the model's output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, keeper: _Backward) -> Tensor:
        ctx.keeper = keeper
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.keeper.arrive(gradient.detach())
        return gradient if ctx.needs_input_grad[0] else None, None, None


class SparseOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus has no types
    """A DPOptimizer that takes clipped sums from the SparseModule instead of per-example gradients from the parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: SparseModule, **settings: Any) -> None:
        super().__init__(optimizer, max_grad_norm=module.clipping.clip_norm, **settings)
        self.module = module
        self._sum: NDArray[Any] | None = None
        if settings.get("generator") is None:
            self.generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)

    @property
    def accumulated_iterations(self) -> int:
        """Always 1: the physical batches of one logical batch are one step."""
        return 1

    def clip_and_accumulate(self) -> None:
        """Add the clipped sum of the last backward pass to that of the logical batch."""
        if len(self.module._open) > 1:
            raise ConfigError("optimizer.step()", "several backward passes since the last step", "use Opacus' BatchMemoryManager")
        taken = self.module.take_sum()
        if taken is None:
            raise ConfigError("optimizer.step()", "no backward pass since the last step", "call loss.backward() first")
        self._sum = taken.astype(np.float64) if self._sum is None else self._sum + taken

    def add_noise(self) -> None:
        """Noise on the live coordinates; spreads the result over the parameters' `.grad`, zero where frozen."""
        if self._sum is None:
            raise ConfigError("optimizer.step()", "nothing was accumulated", "call loss.backward() first")
        std = self.noise_multiplier * self.max_grad_norm
        k = self.module.support.k
        if self.secure_mode:
            noise = torch.from_numpy(OsNoise().normal(k))
        else:
            noise = torch.randn(k, dtype=torch.float64, generator=self.generator).cpu()
        noised = (torch.from_numpy(self._sum) + std * noise).float()
        self._sum = None
        flat = torch.zeros(self.module.plan.layout.d)
        flat[torch.tensor(self.module.support.indices)] = noised
        for parameter, (tensor, span) in zip(self.module._module.parameters(), self.module.plan.layout.spans(), strict=True):
            parameter.grad = None if tensor.frozen else flat[span].view(parameter.shape).to(parameter)

    def scale_grad(self) -> None:
        """Divide by the declared batch size (loss_reduction "mean")."""
        if self.loss_reduction == "mean":
            for p in self.params:
                if p.grad is not None:
                    p.grad /= self.expected_batch_size

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients and backward passes that no step used."""
        self.module.drop()
        if not self._is_last_step_skipped:
            self._sum = None
        self.original_optimizer.zero_grad(set_to_none)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip and accumulate; on the last physical batch charge, then noise. False when the step is skipped."""
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        if self.step_hook:
            self.step_hook(self)
        self.add_noise()
        self.scale_grad()
        self._is_last_step_skipped = False
        return True

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One private step; frozen coordinates come out bit-identical."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        if not self.pre_step():
            return None
        parameters = list(self.module._module.parameters())
        before = [p.detach().clone() for p in parameters]
        result = self.original_optimizer.step()
        self._put_back(parameters, before)
        self.module.use_support(self.module.steps + 1)
        return result

    @torch.no_grad()
    def _put_back(self, parameters: list[nn.Parameter], before: list[Tensor]) -> None:
        """Momentum and weight decay move coordinates whose gradient is zero; those outside the support must not move."""
        mask = torch.tensor(self.module.support.mask)
        for parameter, old, (_, span) in zip(parameters, before, self.module.plan.layout.spans(), strict=True):
            live = mask[span].view(parameter.shape).to(parameter.device)
            parameter.copy_(torch.where(live, parameter, old))


def _layout(module: nn.Module) -> Layout:
    named = module.named_parameters()
    return Layout(tuple(FlatTensor(name, tuple(p.shape), "other", frozen=not p.requires_grad) for name, p in named))
