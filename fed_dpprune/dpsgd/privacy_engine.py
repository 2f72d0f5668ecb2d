"""SparsePrivacyEngine: opacus.PrivacyEngine's arguments and return values, on a support. For centralised training scripts.

An Opacus script becomes sparse by changing the import and adding `sparsity=`. What is done otherwise than in Opacus 1.6:

- *Support.* Each example's gradient is masked before it is clipped, noise is drawn for live coordinates only, and frozen
  coordinates keep their value to the bit, whatever momentum or weight decay the optimiser has.
- *Losses.* The model's output in training mode is a tensor that remembers what is done to it, and each example's own loss is
  differentiated alone; `criterion(model(x), y).backward()` with torch's usual losses, sums and means works as it stands. A loss
  that couples examples (a class-weighted mean, an unknown operation, a number that changes from step to step) is refused; any
  function of outputs and labels alone (no random numbers, nothing kept from call to call) works as `criterion=` with
  `grad_sample_mode="ghost"`, which returns it wrapped, as Opacus does. An ignored label adds
  nothing, and the mean counts it. Numbers that the script itself computes from a batch and uses in its loss are noticed where
  they change from step to step, and not at all where they come as a tensor with an entry for each example (weights by the
  labels' counts in the batch, standardised targets). Inputs and labels are taken as they come: mixing examples before the
  model (mixup) is not noticed.
- *Batches.* Each batch that the returned loader draws is good for one step and for no more rows than it has; a training-mode
  forward without a drawn batch, or with more rows, is refused, and so is a sum over two batches. A new pass over the loader
  voids what the last one left: batches, sums, skip signals. One model for a loader; two passes at once are refused.
- *One backward pass a step.* A second training-mode forward before the step or zero_grad() is refused, and a step when a
  parameter's `.grad` was filled by another backward pass (a regulariser's), which would be lost.
- *Checkpoints.* One whose account lacks steps that this engine has taken is refused: what is spent stays spent.
- *Numbers.* max_grad_norm, noise_multiplier, batch size and support are read when a step's first backward pass runs, and the
  same numbers clip, add noise and are charged; the noise's std is noise_multiplier * max_grad_norm * (1 + slack), the slack
  being what floating point may add (`Clipping.sensitivity`). The divisor of the mean is the loader's declared batch size, not
  int(len(dataset) / len(loader)), which tells the data's size. A step is charged before its noise is drawn, by the engine
  itself: `attach_step_hook` adds a hook and takes none away. `scale_grad` does nothing: `add_noise` divides.
- *Randomness.* Noise (float64) and Poisson coins come from the operating system's entropy, with or without `secure_mode`;
  torch.manual_seed and a loader's generator reach neither. A `noise_generator` is for tests: epsilons say so.
- *Bad examples.* One with a NaN or infinite loss or gradient, a label or word out of range, adds nothing, where Opacus' sum
  turns NaN or the script stops. An empty Poisson batch is a step like any other, also the first one.
- *The model* is proven on made-up examples in the mode in which it runs, again when a mode, hook, device, buffer or attribute
  of a layer changes (containers, arrays, tensors and objects by what is in them), and refused when it mixes examples, draws
  random numbers (dropout) or changes its buffers. Hooks on layers run on made-up examples and micro-batches with rows of zeros
  below; `.grad` holds nothing until a step. In eval mode or under no_grad the wrapped model is the model.
- *Speed.* Products run on one thread and in micro-batches of one shape, losses one example at a time (some 50 us each).
- *Refused by name:* `poisson_sampling=False` (Opacus charges it as if it were Poisson), `rand_on_empty=True` (a made-up example
  in place of none costs twice), `clipping="adaptive"`, `batch_first=False`, `wrap_model=False`, accountant gdp; loaders with
  drop_last, a sampler or batch_sampler of their own, or iterable datasets; several devices or ranks; optimisers over some of
  the trainable parameters, LBFGS; parameters replaced, added, frozen or thawed later, not float32, or with hooks; backward
  hooks; Embedding(max_norm); several inputs or outputs, inputs that ask for gradients; autocast, GradScaler, torch.compile
  around the wrapped model; arguments of backward(); copies and pickles of what is returned
  (state_dicts and checkpoints work). `signal_skip_step` is for Opacus' BatchMemoryManager, which splits one Poisson batch.

Known limits, which are the script's to keep:

- Rows of a drawn batch are counted, not recognised. A script that feeds other rows than those drawn, or the same row twice in
  place of another, has a sensitivity of as many times the clip norm as an example has copies, and nothing notices.
- A step that the script leaves out by looking at the batch or its loss is not charged, and that it was left out is not private.
- Under BatchMemoryManager with num_workers > 0, batches are drawn ahead: up to num_workers * prefetch_factor + 1 steps can be
  taken on one batch before the next is refused, and a batch that the script skips leaves its ticket to the one after it.
- The shape of an example is held from the first step on, and the loader's to that of its first row; the shape that the script
  itself gives to the first batch (its longest example) is taken as public.
- What a forward pass reads elsewhere than in its layers' attributes (globals, closures, files, clocks) is not compared.
- The account is kept in this process: a second engine on the same data, or an accountant that the script resets, is not seen.

Examples are one tensor, the first argument of the model, with the batch in front.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import DataLoader

from fed_dpprune.dpsgd.noise import OS_ENTROPY, SEEDED
from fed_dpprune.dpsgd.own_criterion import OwnCriterion, check_criterion
from fed_dpprune.dpsgd.poisson_loader import PoissonLoader
from fed_dpprune.dpsgd.sparse_module import SparseModule, SupportPlan, layout_of, refuse_distributed
from fed_dpprune.dpsgd.sparse_optimizer import SparseOptimizer, Terms
from fed_dpprune.errors import ConfigError
from fed_dpprune.sparsity.support import Support

CLIPPING = {"flat": "flat", "per_layer": "per-layer", "automatic": "automatic"}
REFRESH = ("run", "epoch", "step")
MODES = ("hooks", "functorch", "ew", "ghost")
NOISE_SOURCE = "noise_source"  # key in checkpoints


class SeededEpsilon(float):
    """An epsilon of steps whose noise came from a given generator; says so wherever it is printed."""

    noise_source = SEEDED

    def __str__(self) -> str:
        return self.__format__("")

    __repr__ = __str__

    def __format__(self, how: str) -> str:
        return f"{float(self):{how}} ({SEEDED}: protects nothing)"


class SparsePrivacyEngine(PrivacyEngine):  # type: ignore[misc]  # opacus has no types
    """opacus.PrivacyEngine with a support; accountants and checkpoints are Opacus' own.

    Args:
        accountant: As in Opacus ("prv" or "rdp"; "gdp" under-reports and is refused).
        secure_mode: Accepted; entropy is the operating system's in any case.

    Attributes:
        noise_source: "os-entropy", or "seeded-simulation" once a step took its noise from a given generator.

    Raises:
        ConfigError: The accountant is gdp.
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        if accountant == "gdp":
            raise ConfigError("accountant", "gdp under-reports epsilon", "use prv or rdp")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Secure RNG turned off": not here
            super().__init__(accountant=accountant, secure_mode=False)
        self._secure = secure_mode
        self.dataset: Any = None
        self.noise_source = OS_ENTROPY
        self._spent: Counter[tuple[float, float]] = Counter()

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
    ) -> Any:
        """Wrap a model, its optimiser and its loader, as opacus.PrivacyEngine.make_private does.

        Args:
            module: The model; parameters with requires_grad=False are frozen as a whole.
            optimizer: Any torch optimiser of its trainable parameters, but LBFGS.
            criterion: Loss function (outputs, labels) -> one number. Checked if given: the one place to declare tensors
                that a loss uses beside the examples' own (class weights); with `grad_sample_mode="ghost"` it is
                returned wrapped, and run on each example alone.
            data_loader: Its batch_size is the expected batch and the public divisor, 1 / its length the sample rate.
            noise_multiplier: Noise std on the sum over the sensitivity.
            max_grad_norm: Clip norm over all live coordinates; one number in every clipping mode.
            sparsity: Fraction of the trainable coordinates frozen at random, in [0, 1), or a Support of your own. A support must
                not be chosen by looking at the private data.
            refresh: When a random support is drawn anew: never (`run`), every len(data_loader) steps (`epoch`), every `step`.
            support_seed: Seed of the random supports; public.
            batch_first: Only True.
            loss_reduction: What the script's criterion does, "mean" or "sum".
            poisson_sampling: Only True.
            clipping: "flat", "per_layer" (max_grad_norm over the root of the number of live tensors each) or "automatic".
            noise_generator: Source of the noise instead of the operating system; for tests, never for a release.
            grad_sample_mode: "hooks", "functorch" or "ew"; all mean this engine. "ghost" returns the criterion too.
            wrap_model: Only True.
            rand_on_empty: Only False.
            backend: As engine.backend: auto, torch, compiled or reference.
            kwargs: Must be empty.

        Returns:
            (module, optimizer, data_loader), with "ghost" (module, optimizer, criterion, data_loader), used as Opacus' are.

        Raises:
            ConfigError: An argument that is not offered, or a model that mixes examples; says what to do.
            ValueError: The optimiser has parameters that are not the module's (as in Opacus).
        """
        only = {
            "batch_first": (batch_first, True, "only models with the examples in front are offered"),
            "poisson_sampling": (poisson_sampling, True, "other batches would be charged as if they were Poisson"),
            "wrap_model": (wrap_model, True, "only wrapped models are offered"),
            "rand_on_empty": (rand_on_empty, False, "a made-up example in place of none tells that there was none"),
        }
        for name, (value, offered, why) in only.items():
            if value is not offered:
                raise ConfigError(name, why, f"leave it {offered}")
        _one_of("clipping", clipping, CLIPPING)
        _one_of("grad_sample_mode", grad_sample_mode, MODES)
        _one_of("refresh", refresh, REFRESH)
        _one_of("loss_reduction", loss_reduction, ("mean", "sum"))
        if kwargs:
            raise ConfigError(sorted(kwargs)[0], "no such argument", "see SparsePrivacyEngine.make_private")
        self._check_noise(noise_generator)
        optimizer = _plain(module, optimizer)
        check_criterion(criterion, loss_reduction)
        own_criterion = OwnCriterion(criterion or nn.CrossEntropyLoss(reduction=loss_reduction))
        loader = self._loader(data_loader)
        if loader.batches.new_pass is not None:  # another model's steps use up its batches
            loader = PoissonLoader(loader)
        declared = list(criterion.buffers()) if isinstance(criterion, nn.Module) else []
        every = {"run": 0, "epoch": len(loader), "step": 1}[refresh]
        wrapped = SparseModule(module, SupportPlan(layout_of(module), sparsity, every, support_seed), backend, declared)
        private = SparseOptimizer(
            optimizer,
            wrapped,
            mode=CLIPPING[clipping],
            sample_rate=lambda: loader.sample_rate,
            batches=loader.batches,
            charge=self._charge,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=loader.declared_batch,
            loss_reduction=loss_reduction,
            generator=noise_generator,
            secure_mode=self._secure,
        )
        wrapped.optimizer = private
        if grad_sample_mode == "ghost":
            return wrapped, private, own_criterion, loader
        return wrapped, private, loader

    def make_private_with_epsilon(
        self,
        *,
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        data_loader: DataLoader[Any],
        **arguments: Any,
    ) -> Any:
        """As `make_private`, with the noise multiplier that spends at most `target_epsilon` in `epochs` epochs.

        The steps are counted exactly, epochs * len(data_loader); Opacus rounds them down.
        """
        loader = self._loader(data_loader)
        if len(self.accountant):
            warnings.warn("budget was spent already: what is spent from here on comes on top of it", stacklevel=2)
        noise_multiplier = get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=loader.sample_rate,
            steps=epochs * len(loader),
            accountant=self.accountant.mechanism(),
        )
        return self.make_private(data_loader=loader, noise_multiplier=noise_multiplier, **arguments)

    def get_epsilon(self, delta: float) -> float:
        """Epsilon spent so far; a `SeededEpsilon`, and a warning, when noise came from a given generator."""
        spent = float(self.accountant.get_epsilon(delta))
        if self.noise_source == OS_ENTROPY:
            return spent
        warnings.warn(f"{SEEDED}: whoever knows the generator can subtract the noise", stacklevel=2)
        return SeededEpsilon(spent)

    def save_checkpoint(self, *, checkpoint_dict: dict[str, Any] | None = None, **arguments: Any) -> None:
        """As in Opacus; the source of the noise is saved with it."""
        labelled = {**(checkpoint_dict or {}), NOISE_SOURCE: self.noise_source}
        super().save_checkpoint(checkpoint_dict=labelled, **arguments)

    def load_checkpoint(self, **arguments: Any) -> dict[str, Any]:
        """As in Opacus; steps of a checkpoint that does not say "os-entropy" count as seeded ones.

        Raises:
            ConfigError: Its account lacks steps that this engine has taken: epsilon would go down. Nothing is loaded.
        """
        self._refuse_lesser(arguments["path"], arguments.get("torch_load_kwargs") or {})
        found: dict[str, Any] = super().load_checkpoint(**arguments)
        if found.get(NOISE_SOURCE) != OS_ENTROPY:
            self.noise_source = SEEDED
        return found

    def _refuse_lesser(self, path: Any, settings: dict[str, Any]) -> None:
        start = path.tell() if hasattr(path, "tell") else None
        saved = torch.load(path, **settings, weights_only=False)["privacy_accountant_state_dict"]
        if start is not None:
            path.seek(start)
        if self._spent - _steps(saved["history"]):
            fix = "for weights alone call module.load_state_dict(checkpoint['module_state_dict'])"
            raise ConfigError("checkpoint", "lacks steps that this engine has taken since, which stay spent", fix)

    def _loader(self, data_loader: DataLoader[Any]) -> PoissonLoader:
        if self.dataset is None:
            self.dataset = data_loader.dataset
        elif self.dataset is not data_loader.dataset:
            warnings.warn("another dataset: this engine's account is of the first one", stacklevel=3)
        return data_loader if isinstance(data_loader, PoissonLoader) else PoissonLoader(data_loader)

    def _charge(self, terms: Terms) -> None:
        if self.accountant.mechanism() == "gdp":
            raise ConfigError("accountant", "gdp under-reports epsilon", "use prv or rdp")
        if terms.noise_source != OS_ENTROPY:
            self.noise_source = terms.noise_source
        self.accountant.step(noise_multiplier=terms.noise_multiplier, sample_rate=terms.sample_rate)
        self._spent[terms.noise_multiplier, terms.sample_rate] += 1

    def _check_noise(self, generator: torch.Generator | None) -> None:
        if generator is None:
            return
        if self._secure:
            raise ConfigError("noise_generator", "secure_mode takes its noise from the operating system", "pass one of the two")
        warnings.warn(f"noise_generator is for tests: every epsilon is labelled {SEEDED}", stacklevel=3)


def _steps(history: list[tuple[float, float, int]]) -> Counter[tuple[float, float]]:
    """How many steps an account holds of each (noise multiplier, sample rate), in whatever order."""
    found: Counter[tuple[float, float]] = Counter()
    for noise_multiplier, sample_rate, steps in history:
        found[float(noise_multiplier), float(sample_rate)] += steps
    return found


def _one_of(name: str, value: str, offered: Any) -> None:
    if value not in offered:
        raise ConfigError(name, f"{value!r} is not offered", f"use one of {', '.join(offered)}")


def _plain(module: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser under Opacus' own, if it is one; refuses models that are private already."""
    if isinstance(module, (SparseModule, AbstractGradSampleModule)):
        raise ConfigError("module", "is private already", "pass module.to_standard_module()")
    refuse_distributed(module)
    if isinstance(optimizer, DPOptimizer):
        optimizer = optimizer.original_optimizer
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("optimizer", "LBFGS runs the model several times a step", "use another optimizer")
    known = {id(p) for p in module.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("Module parameters are different than optimizer Parameters")
    return optimizer
