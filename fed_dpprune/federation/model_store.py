"""The models that clients hold between rounds, by digest.

Every synchronised client holds the same vector to the bit, so simulated clients on one host share a folder of vectors
named by digest instead of keeping a copy each: at most one file per version that some client still holds. A client
whose version is gone is not lost, it asks for a resync.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np

from fed_dpprune.federation.start import Start, Vector
from fed_dpprune.federation.terms import blake
from fed_dpprune.places import make_folder, read_alone
from fed_dpprune.records import write_atomically
from fed_dpprune.sparsity.support import from_mask

IN_MEMORY = 4


def model_digest(weights: Vector) -> str:
    """32 hex digits over the vector's bytes (little-endian float32)."""
    return blake(np.ascontiguousarray(weights, dtype="<f4").tobytes())


class ModelStore(Protocol):
    """Where a client keeps the model it has; see `SharedStore` and `federation.apps.ContextStore`."""

    def load(self, digest: str) -> tuple[Start, int] | None:
        """The model of that digest with the survivors, and its version (rounds aggregated so far); or None."""

    def save(self, digest: str, begin: Start, version: int) -> None:
        """Keep a model."""


class SharedStore:
    """A folder of models shared by the simulated clients of one host, with a few held in memory.

    A file holds the version (8 bytes), the survivors' packed mask and the values (float32), little-endian.

    Args:
        folder: Created on first use (0700); every process of the host may use it at once (files appear by rename). It
            lies in a run directory, which is this user's alone.
        d: Length of the parameter vector.
    """

    def __init__(self, folder: Path, d: int) -> None:
        self.folder, self.d = folder, d
        self._memory: OrderedDict[str, tuple[Start, int]] = OrderedDict()

    def _remember(self, digest: str, held: tuple[Start, int]) -> None:
        self._memory[digest] = held
        self._memory.move_to_end(digest)
        while len(self._memory) > IN_MEMORY:
            self._memory.popitem(last=False)

    def load(self, digest: str) -> tuple[Start, int] | None:
        """From memory, else from the folder; a damaged file, or one that others could have written, counts as absent."""
        if digest not in self._memory:
            try:
                blob = read_alone(self.folder / f"{digest}.model")
            except OSError:
                return None
            held = unpack_model(blob, self.d)
            if held is None or model_digest(held[0].model) != digest:
                return None
            self._remember(digest, held)
        return self._memory[digest]

    def save(self, digest: str, begin: Start, version: int) -> None:
        """To memory, and to the folder unless another client has already put it there."""
        self._remember(digest, (begin, version))
        path = self.folder / f"{digest}.model"
        if path.exists():
            return
        make_folder(self.folder)
        write_atomically(path, pack_model(begin, version))

    def keep_only(self, digests: set[str]) -> None:
        """Delete the files of versions that no client holds any more."""
        for path in self.folder.glob("*.model"):
            if path.stem not in digests:
                path.unlink(missing_ok=True)


def pack_model(begin: Start, version: int) -> bytes:
    """A model, its survivors and its version as bytes."""
    mask = np.packbits(begin.survivors.mask, bitorder="little").tobytes()
    return version.to_bytes(8, "little") + mask + np.ascontiguousarray(begin.model, dtype="<f4").tobytes()


def unpack_model(blob: bytes, d: int) -> tuple[Start, int] | None:
    """What `pack_model` packed; None when the length does not fit a model of `d` coordinates."""
    width = (d + 7) // 8
    if len(blob) != 8 + width + 4 * d:
        return None
    mask = np.unpackbits(np.frombuffer(blob, dtype=np.uint8, count=width, offset=8), bitorder="little", count=d)
    model = np.frombuffer(blob, dtype="<f4", offset=8 + width).copy()
    return Start(model, from_mask(mask.astype(np.bool_), "data-free")), int.from_bytes(blob[:8], "little")
