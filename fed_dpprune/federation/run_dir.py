"""The run directory of the contract: prepared once, written after every round, readable at any moment.

It is made for its owner alone (0700), and one that others can write, or that lies where others could rename it, is refused:
the ledger, the models between rounds, the partition and the checkpoint in it are believed.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

from fed_dpprune import config as cfg
from fed_dpprune import places
from fed_dpprune.errors import BadInput
from fed_dpprune.federation.terms import config_digest
from fed_dpprune.records import ClientRecord, RoundRecord, append_lines, keep_rounds, to_json, write_atomically

OURS = (
    "config.toml",
    "summary.json",
    "rounds.jsonl",
    "clients.jsonl",
    "ledger.sqlite",
    "ledger.sqlite-wal",
    "ledger.sqlite-shm",
    "ledger.sqlite.lock",
    "model.safetensors",
    "checkpoint",
    "curves.png",
    "log.txt",
)


class RunDir:
    """One run's files.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log.txt"
        self.ledger = path / "ledger.sqlite"
        self.checkpoint = path / "checkpoint"
        self.models = path / "checkpoint" / "clients"
        self.model = path / "model.safetensors"
        self.curves = path / "curves.png"
        self.rounds = path / "rounds.jsonl"
        self.clients = path / "clients.jsonl"
        self.summary = path / "summary.json"

    def check(self, config: cfg.Config, *, resume: bool, force: bool) -> None:
        """Refuse a folder that a run must not write to; writes nothing.

        Raises:
            BadInput: Others can write it; it is not empty and neither `resume` nor `force` is given; it is not a folder; it
                belongs to another config; there is nothing to resume; with `force`, it holds what no run of ours wrote.
        """
        if self.path.exists() and not self.path.is_dir():
            raise BadInput(str(self.path), "is a file", "choose another --out")
        _refuse_others(self.path)
        filled = self.path.is_dir() and any(path.name != "log.txt" for path in self.path.iterdir())
        if resume:
            self._check_resumable(config, filled)
        elif filled and not force:
            raise BadInput(str(self.path), "is not empty", "use --resume to continue it or --force to overwrite it")
        elif filled:
            self._refuse_foreign()

    def prepare(self, config: cfg.Config, *, resume: bool, force: bool) -> None:
        """Make the folder ready for a new or a resumed run; nothing is written when it is refused.

        Raises:
            BadInput: See `check`; or it cannot be written.
        """
        self.check(config, resume=resume, force=force)
        if not resume:
            self._clear()
        try:
            places.make_folder(self.path)
            _refuse_others(self.path)
            write_atomically(self.path / "config.toml", cfg.to_toml(config))
            for lines in (self.rounds, self.clients):
                lines.touch(mode=0o600)
        except OSError as error:
            raise BadInput(str(self.path), f"cannot be written ({error.strerror})", "choose another --out") from None

    def _check_resumable(self, config: cfg.Config, filled: bool) -> None:
        stored = self.path / "config.toml"
        if not filled or not stored.exists():
            raise BadInput(str(self.path), "holds no run to resume", "leave --resume out to start one")
        for name in OURS:
            _refuse_others(self.path / name)
        try:
            previous = cfg.build(cfg.flatten(tomllib.loads(stored.read_text())))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise BadInput(str(stored), f"cannot be read ({error})", "start anew with --force") from None
        if config_digest(previous) != config_digest(config):
            theirs, ours = cfg.to_flat(previous), cfg.to_flat(config)
            changed = [key for key in cfg.KEYS if theirs[key] != ours[key]]
            raise BadInput(str(self.path), f"was started with another {changed[0]}", "resume with its own config.toml")

    def _refuse_foreign(self) -> None:
        """`--force` removes the files of an earlier run, and nothing that is not ours.

        Raises:
            BadInput: The folder holds something that no run of ours wrote.
        """
        foreign = sorted(p.name for p in self.path.iterdir() if p.name not in OURS and not p.name.startswith("."))
        if foreign:
            raise BadInput(str(self.path), f"holds {foreign[0]!r}, which is not of a run", "choose another --out")

    def _clear(self) -> None:
        """Remove the files of an earlier run; the log stays, somebody may be writing it."""
        for name in OURS:
            path = self.path / name
            if path == self.log:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def rewind(self, last_round: int) -> None:
        """Drop the lines after the last checkpointed round: they will be written again."""
        keep_rounds(self.rounds, last_round)
        keep_rounds(self.clients, last_round)

    def append(self, record: RoundRecord, clients: list[ClientRecord]) -> None:
        """The clients' lines, then the round's: a round line means that its client lines are there."""
        append_lines(self.clients, clients)
        append_lines(self.rounds, [record])

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace summary.json."""
        write_atomically(self.summary, to_json(summary, indent=2) + "\n")


def _refuse_others(path: Path) -> None:
    """Refuse a folder that is not this user's alone. Where it is missing, what exists of its path decides.

    Raises:
        BadInput: With the component and its owner or mode.
    """
    try:
        places.require_alone(path)
    except FileNotFoundError:
        return  # it will be made, and looked at again
    except places.NotAlone as refusal:
        raise BadInput(str(path), f"is not this user's alone: {refusal}", "choose another --out") from None
    except OSError as error:
        raise BadInput(str(path), f"cannot be made or reached ({error.strerror})", "choose another --out") from None


def default_path(config: cfg.Config, config_file: Path) -> Path:
    """A folder of its own for a run without --out: runs/<name>, then runs/<name>-2, ..."""
    name = config.name or config_file.stem
    path, number = Path("runs") / name, 1
    while path.exists() and (not path.is_dir() or any(path.iterdir())):
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def latest_path(config: cfg.Config, config_file: Path) -> Path:
    """The newest folder that `default_path` has made for this config: what --resume without --out means."""
    path, following = default_path(config, config_file), Path("runs") / (config.name or config_file.stem)
    number = 1
    newest = following
    while following != path:
        newest, number = following, number + 1
        following = Path("runs") / f"{config.name or config_file.stem}-{number}"
    return newest
