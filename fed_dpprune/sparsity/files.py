"""Supports on disk: a packed mask with its provenance and the layout it belongs to, as .npz or .safetensors. numpy only."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fed_dpprune import records
from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.support import PROVENANCES, Support, from_mask

KEY = "sparsity.prune.file"
SUFFIXES = (".npz", ".safetensors")
# What the readers raise on a file that is cut short, changed, or of another kind.
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error, safetensors.SafetensorError)


def _refuse(path: Path, why: str) -> ConfigError:
    return ConfigError(KEY, f"{path} {why}", "save the support of this net again")


def save(path: Path, support: Support, layout: Layout) -> None:
    """Write a support, replacing the file in one step.

    Raises:
        ConfigError: The name ends in neither .npz nor .safetensors.
        ValueError: The support is not of this layout.
    """
    if support.d != layout.d:
        raise ValueError(f"the support is of {support.d} coordinates, the layout has {layout.d}")
    packed = np.packbits(support.mask, bitorder="little")
    facts = {"d": str(support.d), "provenance": support.provenance, "layout": layout.digest, "support": support.digest}
    if path.suffix == ".safetensors":
        records.write_atomically(path, safetensors.numpy.save({"mask": packed}, metadata=facts))
    elif path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, mask=packed, facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8))
        records.write_atomically(path, buffer.getvalue())
    else:
        raise ConfigError(KEY, f"{path} is no support file", f"end its name in {' or '.join(SUFFIXES)}")


def _read(path: Path) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The packed mask and the facts beside it; nothing in the file is executed."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_tensor("mask"), dict(file.metadata() or {})
    with np.load(path, allow_pickle=False) as file:
        return file["mask"], dict(json.loads(file["facts"].tobytes()))


def load(path: Path, layout: Layout) -> Support:
    """Read a support of this layout.

    Raises:
        ConfigError: The file is missing or damaged, is of another net, or does not say where its support came from.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(KEY, f"{path} is no support file", f"its name ends in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise ConfigError(KEY, f"there is no file {path}", "`fed_dpprune.sparsity.files.save` writes one")
    try:
        packed, facts = _read(path)
    except DAMAGE as error:
        raise _refuse(path, f"cannot be read ({type(error).__name__})") from None
    if facts.get("provenance") not in PROVENANCES:
        raise _refuse(path, "does not say where its support came from")
    if facts.get("layout") != layout.digest or facts.get("d") != str(layout.d):
        raise _refuse(path, "is the support of another net")
    if packed.dtype != np.uint8 or packed.shape != ((layout.d + 7) // 8,):
        raise _refuse(path, "is damaged (its mask has the wrong size)")
    mask = np.unpackbits(packed, count=layout.d, bitorder="little").astype(np.bool_)
    support = from_mask(mask, str(facts["provenance"]))
    if facts.get("support") != support.digest:
        raise _refuse(path, "is damaged (its digest does not fit)")
    return support
