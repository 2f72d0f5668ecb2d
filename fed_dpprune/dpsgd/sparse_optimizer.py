"""SparseOptimizer: one set of numbers for clipping, noise, divisor and charge of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.noise import OS_ENTROPY, SEEDED, OsNoise
from fed_dpprune.dpsgd.poisson_loader import DrawnBatches
from fed_dpprune.dpsgd.sparse_module import AGAIN, SparseModule
from fed_dpprune.errors import ConfigError
from fed_dpprune.sparsity.support import Support


@dataclass(frozen=True)
class Terms:
    """What a step is taken under: read once, before the first sum of the step is clipped, and charged as it stands.

    Attributes:
        clipping: The bound.
        noise_multiplier: Std of the noise over the sensitivity.
        std: Of the noise on the sum.
        sample_rate: Of the Poisson batches.
        divisor: Of the mean; 1 for a sum.
        mean: Whether losses are declared to be means.
        support: The live coordinates.
        generator: Of the noise; None takes the operating system's entropy.
    """

    clipping: Clipping
    noise_multiplier: float
    std: float
    sample_rate: float
    divisor: float
    mean: bool
    support: Support
    generator: torch.Generator | None

    @property
    def noise_source(self) -> str:
        """OS_ENTROPY or SEEDED."""
        return OS_ENTROPY if self.generator is None else SEEDED


class SparseOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus has no types
    """A DPOptimizer that takes clipped sums from the SparseModule instead of per-example gradients from the parameters.

    `max_grad_norm`, `noise_multiplier`, `expected_batch_size` and `loss_reduction` may be changed between two steps, by Opacus'
    schedulers or by hand: the next step clips, adds noise and charges by the new ones.

    Args:
        optimizer: The script's.
        module: Its model.
        mode: Clipping mode of `Clipping`.
        sample_rate: Gives the rate of the batches in use.
        batches: The drawn Poisson batches: a step is of one of them.
        charge: Is told the terms of a step before its noise is drawn.
        settings: As of DPOptimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: SparseModule,
        *,
        mode: str,
        sample_rate: Callable[[], float],
        batches: DrawnBatches,
        charge: Callable[[Terms], None],
        **settings: Any,
    ) -> None:
        super().__init__(optimizer, **settings)
        self.module, self.batches = module, batches
        batches.new_pass = self._new_pass
        self._mode, self._sample_rate, self._charge = mode, sample_rate, charge
        self._sum: NDArray[np.float64] | None = None
        self._terms: Terms | None = None
        self._written: dict[int, tuple[Tensor, int]] = {}
        self.check()
        self._read()

    @property
    def accumulated_iterations(self) -> int:
        """Always 1: the physical batches of one logical batch are one step."""
        return 1

    @property
    def _step_supports_amp_scaling(self) -> bool:
        raise ConfigError("GradScaler", "scales losses of a batch", "call optimizer.step() without it")

    def check(self) -> None:
        """Whether the optimiser still moves exactly the model's trainable parameters.

        Raises:
            ConfigError: It moves fewer, or others.
        """
        moved = [id(p) for group in self.param_groups for p in group["params"]]
        named = {id(p): (name, p) for name, p in self.module._module.named_parameters()}
        if any(one not in named for one in moved):
            raise ConfigError("optimizer", "moves parameters that are not the model's", AGAIN)
        for one, (name, parameter) in named.items():
            if parameter.requires_grad and one not in moved:
                raise ConfigError("optimizer", f"leaves out {name}, which asks for a gradient", "set requires_grad_(False) first")

    def terms_in_force(self) -> Terms:
        """The terms of the step under way; fixed by the first call since the last step."""
        if self._terms is None:
            self._terms = self._read()
        return self._terms

    def _read(self) -> Terms:
        norm, noise = _number("max_grad_norm", self.max_grad_norm), _number("noise_multiplier", self.noise_multiplier)
        if self.loss_reduction not in ("mean", "sum"):
            raise ConfigError("loss_reduction", f"{self.loss_reduction!r} is not offered", "use mean or sum")
        mean = self.loss_reduction == "mean"
        divisor = _number("expected_batch_size", self.expected_batch_size) if mean else 1.0
        if not (norm > 0 and noise >= 0 and divisor > 0):
            raise ConfigError("optimizer", "max_grad_norm, noise_multiplier or batch size is not positive", "give another one")
        clipping = Clipping(norm, self._mode)
        std = noise * clipping.sensitivity(self.module.plan.layout)
        rate = self._sample_rate()
        return Terms(clipping, noise, std, rate, divisor, mean, self.module.support, self.generator)

    def clip_and_accumulate(self) -> None:
        """Add the clipped sum of the last backward pass to that of the logical batch."""
        taken = self.module.take_sum()
        if taken is None:
            raise ConfigError("optimizer.step()", "no backward pass since the last step", "call loss.backward() first")
        total, self._terms = taken
        self._sum = total if self._sum is None else self._sum + total

    def add_noise(self) -> None:
        """Noise on the live coordinates; spreads the result over the parameters' `.grad`, zero where frozen."""
        total, terms = self._sum, self._terms
        if total is None or terms is None:
            raise ConfigError("optimizer.step()", "nothing was accumulated", "call loss.backward() first")
        k = terms.support.k
        if terms.generator is None:
            noise = OsNoise().normal(k)
        else:
            drawn = torch.randn(k, dtype=torch.float64, generator=terms.generator, device=terms.generator.device)
            noise = drawn.cpu().numpy()
        most = float(np.finfo(np.float32).max)
        noised = np.clip((total + terms.std * noise) / terms.divisor, -most, most).astype(np.float32)
        flat = np.zeros(self.module.plan.layout.d, dtype=np.float32)
        flat[terms.support.indices] = noised
        spans = self.module.plan.layout.spans()
        for parameter, (tensor, span) in zip(self.module._module.parameters(), spans, strict=True):
            part = torch.from_numpy(flat[span]).view(parameter.shape)
            parameter.grad = None if tensor.frozen else part.to(parameter)
            if parameter.grad is not None:
                self._written[id(parameter)] = (parameter.grad, parameter.grad._version)

    def _refuse_other_gradients(self) -> None:
        """A backward pass beside the private one (a regulariser's) would be overwritten without a word."""
        for name, parameter in self.module._module.named_parameters():
            there = parameter.grad
            written, version = self._written.get(id(parameter), (None, 0))
            if there is None or (there is written and there._version == version) or not there.any():
                continue
            why = "has a gradient that is not of the private backward pass, and would be lost"
            raise ConfigError(f"parameter {name}", why, "call zero_grad() before it, and put all terms into the one loss")

    def scale_grad(self) -> None:
        """Part of Opacus' interface; `add_noise` has divided by the declared batch size already."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients and backward passes that no step used."""
        self.module.drop()
        if not self._is_last_step_skipped:
            self._forget()
        self.original_optimizer.zero_grad(set_to_none)

    def _forget(self) -> None:
        self._sum = self._terms = None

    def _new_pass(self) -> None:
        """What a pass over the loader left unfinished when a new one begins belongs to no step."""
        self.module.drop()
        self._forget()
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip and accumulate; on the last physical batch charge, then noise. False when the step is skipped."""
        self.module.check()
        self.check()
        self._refuse_other_gradients()
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        terms = self._terms
        assert terms is not None
        self.batches.close()
        try:
            self._charge(terms)
            self.add_noise()
        finally:  # a sum that fails here must not wait for the next batch's step
            self._forget()
        if self.step_hook:
            self.step_hook(self)
        self._is_last_step_skipped = False
        return True

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One private step; frozen coordinates come out bit-identical. A closure is run once, as by Opacus."""
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
        spans = self.module.plan.layout.spans()
        for parameter, old, (_, span) in zip(parameters, before, spans, strict=True):
            live = mask[span].view(parameter.shape).to(parameter.device)
            parameter.copy_(torch.where(live, parameter, old))

    def __reduce_ex__(self, protocol: Any) -> Any:  # deepcopy, copy and pickle ask it
        raise ConfigError("copy of a private optimizer", "would spend what nobody charges", "use its state_dict()")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ConfigError(name, f"{value!r} is not a finite number", "give one number")
    return float(value)
