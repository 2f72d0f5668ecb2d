"""Nets that come as torch modules: `torchvision:<name>` and a user's `package.module:factory`, made ready for private steps.

Protocol of a factory: `factory(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module`, taking batches of shape
(n, *input_shape) to scores of shape (n, classes). Whatever mixes examples or draws its own random numbers is replaced:
batch norm by group norm and the like (Opacus' ModuleValidator.fix), dropout and stochastic depth by nothing, in-place
activations by ordinary ones. What cannot be replaced is refused. Imports torch and opacus, so it takes seconds.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fed_dpprune import dotted
from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Tensor, Work
from fed_dpprune.models.spec import TORCHVISION, ModelSpec

AUXILIARY = ("googlenet", "inception_v3")  # classifiers with side outputs, which are left out
RANDOM = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "StochasticDepth")
MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, ZeroDivisionError)  # of a net for its input
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm, nn.modules.batchnorm._BatchNorm)


def build(spec: ModelSpec) -> nn.Module:
    """The net, private-ready, float32, on the CPU, in eval mode.

    Raises:
        ConfigError: No such net, a part that cannot be made private-ready, or a net that does not fit the data.
    """
    module = _torchvision(spec) if spec.name.startswith(TORCHVISION) else _user(spec)
    module = private_ready(module, spec.name).float().cpu().eval()
    _try(module, spec)
    return module


class _Unfilled(TorchFunctionMode):
    """Parameters without values: what `torch.empty` makes is on torch's meta device, which has shapes and no memory.

    Not `with torch.device("meta")`: some of torchvision's nets (regnet) compute their widths with small tensors.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        return func(*args, **({**named, "device": "meta"} if func is torch.empty else named))


def coordinates(spec: ModelSpec) -> int:
    """How many parameters a net of torchvision's has for this input; no memory is spent on them, and no product computed.

    What `private_ready` changes keeps the number.

    Raises:
        ConfigError: No such net, or one that does not fit the input.
    """
    with _Unfilled():
        module = _torchvision(spec)
    module = module.to("meta").eval()
    _try(module, spec, "meta")
    return sum(parameter.numel() for parameter in module.parameters())


def private_ready(module: nn.Module, name: str) -> nn.Module:
    """The same net in which every example has a gradient of its own and every call gives the same result.

    Raises:
        ConfigError: Opacus' validator still finds a part that mixes examples.
    """
    from opacus.validators import ModuleValidator

    fixed = _without_randomness(module).train()
    try:
        if ModuleValidator.validate(fixed, strict=False):
            fixed = ModuleValidator.fix(fixed).train()  # makes a copy, so only where it is needed
        errors = ModuleValidator.validate(fixed, strict=False)
    except (AttributeError, TypeError, ValueError, RuntimeError, pickle.PicklingError) as error:
        why = f"{name} cannot be made private-ready ({str(error).splitlines()[0]})"
        raise ConfigError("model.name", why, "replace its batch norms yourself, and define its classes in a module") from None
    mixing = [type(part).__name__ for part in fixed.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if errors or mixing:
        why = str(errors[0]).splitlines()[0] if errors else f"{mixing[0]} mixes the examples of a batch"
        raise ConfigError("model.name", f"{name} cannot be trained privately ({why})", "choose a net without such layers")
    return fixed


def _without_randomness(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if type(child).__name__ in RANDOM:
            setattr(module, name, nn.Identity())
        else:
            _without_randomness(child)
    if isinstance(getattr(module, "inplace", None), bool):
        module.inplace = False  # type: ignore[assignment]
    if isinstance(getattr(module, "dropout", None), float):
        module.dropout = 0.0  # type: ignore[assignment]  # nn.MultiheadAttention and recurrent layers keep a rate
    return module


def _torchvision(spec: ModelSpec) -> nn.Module:
    from torchvision import models

    name = spec.name.removeprefix(TORCHVISION)
    if len(spec.input_shape) != 3:
        raise _misfit(spec, f"it needs images, not {spec.input_shape[0]} features")
    options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name in AUXILIARY else {}
    if name.startswith("vit_"):
        options["image_size"] = spec.input_shape[1]
    if name not in models.list_models(module=models):
        raise ConfigError("model.name", f"torchvision has no classifier {name!r}", "see torchvision.models.list_models()")
    try:
        module: nn.Module = models.get_model(name, weights=None, num_classes=spec.classes, **options)
    except MISFITS as error:
        raise _misfit(spec, _first_line(error)) from None
    return _with_channels(module, spec.input_shape[0])


def _with_channels(module: nn.Module, channels: int) -> nn.Module:
    """The first convolution made to take this many channels."""
    name, first = next((name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d))
    if first.in_channels != channels:
        sizes: dict[str, Any] = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding}
        parent, _, leaf = name.rpartition(".")
        other = nn.Conv2d(channels, first.out_channels, bias=first.bias is not None, **sizes)
        setattr(module.get_submodule(parent), leaf, other)
    return module


def _user(spec: ModelSpec) -> nn.Module:
    factory = dotted.resolve(spec.name, "model.name")
    try:
        made = factory(spec.input_shape, spec.classes)
    except Exception as error:  # the user's own code may raise anything
        why = f"{spec.name} failed ({type(error).__name__}: {error})"
        raise ConfigError("model.name", why, "it is called with the input shape and the number of classes") from error
    if not isinstance(made, nn.Module):
        raise ConfigError("model.name", f"{spec.name} returned {type(made).__name__}", "return a torch.nn.Module")
    return made


def _try(module: nn.Module, spec: ModelSpec, device: str = "cpu") -> None:
    """One example of zeros must come out as one row of scores."""
    try:
        with torch.no_grad():
            scores = module(torch.zeros(1, *spec.input_shape, device=device))
    except MISFITS as error:
        raise _misfit(spec, _first_line(error)) from None
    shape = tuple(getattr(scores, "shape", ()))
    if shape != (1, spec.classes):
        raise _misfit(spec, f"one example gives {shape}, not (1, {spec.classes})")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _misfit(spec: ModelSpec, why: str) -> ConfigError:
    what = f"{spec.name} does not fit inputs of shape {spec.input_shape} ({why})"
    return ConfigError("model.name and data.dataset", what, "choose a net for such data, for example mlp")


def tensors(module: nn.Module) -> tuple[Tensor, ...]:
    """Every parameter in coordinate order with its kind and fan-in; the last linear or convolution layer is the head."""
    known: dict[int, tuple[str, int]] = {}
    head: set[int] = set()
    for part in module.modules():
        own = {name: parameter for name, parameter in part.named_parameters(recurse=False)}
        if isinstance(part, nn.Linear | nn.modules.conv._ConvNd):
            fan_in = part.weight[0].numel()
            known |= {id(parameter): ("bias" if name == "bias" else "weight", fan_in) for name, parameter in own.items()}
            head = {id(parameter) for parameter in own.values()}
        elif isinstance(part, NORMS):
            known |= {id(parameter): ("norm", 0) for parameter in own.values()}
        elif isinstance(part, nn.Embedding):
            known |= {id(parameter): ("embedding", 0) for parameter in own.values()}
    return tuple(
        Tensor(name, tuple(p.shape), *known.get(id(p), ("other", 0)), head=id(p) in head) for name, p in module.named_parameters()
    )


def work(module: nn.Module, input_shape: tuple[int, ...]) -> Work | None:
    """What the forward pass of one example takes, counted while one of zeros goes through; None where it cannot be counted.

    Every product that torch's counter knows is counted wherever the module's code makes it (linear and convolution layers,
    matmul, attention); values are those that autograd keeps for a backward pass. A recurrent layer may run as one operation
    that the counter does not know, so a net with one is not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if any(isinstance(part, nn.RNNBase) for part in module.modules()):
        return None
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage; holding them keeps an address from being used twice

    def keep(value: torch.Tensor) -> torch.Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = value
        return value

    counter = FlopCounterMode(display=False)
    try:
        with torch.enable_grad(), counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            module(torch.zeros(1, *input_shape))
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return None
    multiply_adds = counter.get_total_flops() // 2
    return Work(multiply_adds, sum(value.numel() for value in kept.values())) if multiply_adds else None
