"""Where training starts: fresh weights, a local .safetensors or .pt file, or torchvision's own. No file can run code.

A head of another size (other classes) is drawn afresh; every other tensor must be in the file with its shape. Weights are
taken as public: whoever names a file here says that it was not made from the private data without privacy.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.errors import ConfigError, DataError
from fed_dpprune.models import initial
from fed_dpprune.models.flat import Layout
from fed_dpprune.models.spec import TORCHVISION, ModelSpec
from fed_dpprune.places import cache_root, private_folder

Named = dict[str, NDArray[np.float32]]

PICKLED = (".pt", ".pth")
WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training scripts keep the weights
PREFIXES = ("module.", "_module.", "_orig_mod.")  # put before each name by DataParallel, Opacus, torch.compile


@dataclass(frozen=True)
class Start:
    """Where training starts.

    Attributes:
        vector: All parameters, shape (d,), float32.
        source: "" for fresh weights, else the value of `model.weights`.
        fresh: Names of tensors that the file did not give (a head of other classes).
    """

    vector: NDArray[np.float32]
    source: str = ""
    fresh: tuple[str, ...] = ()


def start(spec: ModelSpec, layout: Layout, seed: int) -> Start:
    """The first weights of a run; torch is imported only for .pt files and torchvision's weights.

    Raises:
        ConfigError: `model.weights` names nothing that can be read.
        DataError: The file is missing or damaged, would run code, holds values that are not finite, or lacks a tensor.
    """
    vector = initial.draw(layout, seed)
    if not spec.weights:
        return Start(vector)
    return _overlay(vector, _read(spec), layout, spec.weights)


def file(source: str) -> Path:
    """The file that `model.weights` names. Cheap, so that a missing one is found before a run writes anything.

    Raises:
        ConfigError: Not a weights file by its suffix.
        DataError: Not there.
    """
    path = Path(source).expanduser()
    if path.suffix not in (*PICKLED, ".safetensors"):
        raise ConfigError("model.weights", f"{source!r} is not a weights file", 'use .safetensors, .pt or "torchvision"')
    if not path.is_file():
        advice = "paths are relative to the working directory; `fed-dpprune pretrain` writes one from public data"
        raise DataError(f"model.weights = {source}", "no such file", advice)
    return path


def is_torchvision(source: str) -> bool:
    """Whether `model.weights` asks for torchvision's own."""
    return source.split(":")[0] == TORCHVISION.rstrip(":")


def _overlay(vector: NDArray[np.float32], named: Named, layout: Layout, source: str) -> Start:
    """Write the file's tensors over the draw; the whole head stays fresh when any part of it differs in shape."""
    head = [tensor for tensor in layout.tensors if tensor.head]
    keeps_head = all(tensor.name in named and named[tensor.name].shape == tensor.shape for tensor in head)
    for tensor, span in layout.spans():
        if tensor.head and not keeps_head:
            continue
        found = named.get(tensor.name)
        if found is None or found.shape != tensor.shape:
            has = "is missing" if found is None else f"has shape {found.shape}"
            advice = "start from weights of the same net"
            raise DataError(f"model.weights = {source}", f"{tensor.name} of shape {tensor.shape} {has}", advice)
        if not np.isfinite(found).all():
            raise DataError(f"model.weights = {source}", f"{tensor.name} holds a value that is not finite")
        vector[span] = found.reshape(-1)
    return Start(vector, source, () if keeps_head else tuple(tensor.name for tensor in head))


def _read(spec: ModelSpec) -> Named:
    if is_torchvision(spec.weights):
        return _torchvision(spec)
    path = file(spec.weights)
    return _pickled(path) if path.suffix in PICKLED else _safetensors(path)


def _safetensors(path: Path) -> Named:
    import safetensors
    import safetensors.numpy

    try:
        return {name: value.astype(np.float32) for name, value in safetensors.numpy.load_file(path).items()}
    except (OSError, safetensors.SafetensorError, TypeError, ValueError, KeyError) as error:
        raise DataError(str(path), f"cannot be read as safetensors ({error})", "save float32 tensors") from None


def _pickled(path: Path) -> Named:
    """A torch checkpoint through the restricted unpickler, which builds tensors and plain containers only."""
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(str(path), "holds more than tensors and plain values, so it is not opened", "save a state_dict") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(str(path), f"cannot be read as a torch checkpoint ({reason})", "save a state_dict") from None
    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise DataError(str(path), f"holds a {type(loaded).__name__}, not a state_dict", "save module.state_dict()")
    return _arrays(loaded)


def _arrays(state: dict[Any, Any]) -> Named:
    """The floating-point tensors of a state_dict, their names without wrappers' prefixes."""
    import torch

    named: Named = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            name = str(key)
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            named[name] = value.detach().to(torch.float32).numpy()
    return named


def _torchvision(spec: ModelSpec) -> Named:
    """`torchvision` (the newest of the net's weights) or `torchvision:<name of weights>`, from the cache or the network."""
    if not spec.name.startswith(TORCHVISION):
        raise ConfigError("model.weights", f'"{spec.weights}" needs a net of torchvision, not {spec.name}', "name a file")
    from torchvision import models

    _, _, chosen = spec.weights.partition(":")
    folder = cache_root() / "weights"
    kinds = models.get_model_weights(spec.name.removeprefix(TORCHVISION))
    try:
        entry = kinds[chosen] if chosen else kinds.DEFAULT
    except KeyError:
        raise ConfigError(
            "model.weights", f"{spec.name} has no weights {chosen!r}", f"use one of {', '.join(kinds.__members__)}"
        ) from None
    try:
        private_folder(folder)  # torch checks a digest when it downloads, never what lies there
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            state = entry.get_state_dict(model_dir=str(folder), progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = f"put {entry.url.rpartition('/')[2]} into {folder}"
        raise DataError(f"model.weights = {spec.weights}", f"not cached, and not downloaded ({reason})", advice) from None
    return _arrays(dict(state))
