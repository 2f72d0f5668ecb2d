"""What a resumed run needs, written after every round: the server's state, never a client's secret.

`checkpoint/state.json` names the array file that belongs to it and is replaced last, so a crash at any moment leaves
one complete pair. No random state is stored: every stream is made anew from its purpose and ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fed_dpprune.errors import BadInput
from fed_dpprune.federation.terms import blake
from fed_dpprune.places import make_folder, read_alone
from fed_dpprune.records import to_json, write_atomically

STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """The server after `round` rounds.

    Attributes:
        round: Rounds aggregated so far.
        config: Digest of the shared config; a run resumes under the same one only.
        state: JSON values of the server's parts, by part.
        arrays: Their arrays.
    """

    round: int
    config: str
    state: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the previous one stays whole until this one is."""
    make_folder(folder)
    blob = save({name: np.ascontiguousarray(array) for name, array in checkpoint.arrays.items()})
    name = f"arrays-{checkpoint.round}.safetensors"
    write_atomically(folder / name, blob)
    head = {
        "round": checkpoint.round,
        "config": checkpoint.config,
        "arrays": name,
        "arrays_digest": blake(blob),
        "state": checkpoint.state,
    }
    write_atomically(folder / STATE, to_json(head))
    for old in folder.glob("arrays-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def read(folder: Path, config: str) -> Checkpoint | None:
    """The folder's checkpoint, or None where a run was interrupted before its first.

    Raises:
        BadInput: The checkpoint is damaged, could have been written by others, or belongs to another config.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        head = json.loads(read_alone(path))
        blob = read_alone(folder / head["arrays"])
        if blake(blob) != head["arrays_digest"]:
            raise BadInput(str(path), "its arrays are damaged", "start anew with --force")
        arrays = load(blob)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(str(path), f"cannot be read ({error})", "start anew with --force") from None
    if head["config"] != config:
        raise BadInput(str(folder.parent), "was made with another config", "resume with its own config.toml")
    return Checkpoint(head["round"], head["config"], head["state"], arrays)
