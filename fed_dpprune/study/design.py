"""The study file: a base config, named variants, axes, seeds; and the runs that they make.

    name = "freeze-or-prune"          # also the folder's, below runs/
    base = "../fashion-mnist.toml"    # relative to the study file; without it every key is at its default
    seeds = [1, 2, 3]
    combine = "grid"                  # or "zip": the axes' lists walk in step

    [common]                          # on top of the base, in every run; keys nested or dotted
    federation.rounds = 50

    [variants.dense]                  # named sets of keys on top of that; a study without variants has one, "run"
    [variants.freeze]
    sparsity.freeze.method = "random"
    sparsity.freeze.rate = 0.9

    [axes]                            # a list of values for each key
    privacy.epsilon = [1.0, 2.0, 4.0]

A key that a variant sets itself is not varied in that variant. Everything is validated before anything runs.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fed_dpprune import config as cfg
from fed_dpprune.errors import BadInput, ConfigError

KEYS = ("name", "base", "seeds", "combine", "common", "variants", "axes")
ONLY_VARIANT = "run"


@dataclass(frozen=True)
class Point:
    """One run of a study.

    Attributes:
        label: Names its folder; unique in the study.
        variant: The variant's name.
        settings: The axes' keys with this run's values; keys that the variant fixes hold the variant's.
        seed: Root seed.
        config: Validated; its name is the label.
    """

    label: str
    variant: str
    settings: Mapping[str, Any]
    seed: int
    config: cfg.Config


@dataclass(frozen=True)
class Study:
    """All runs of a study, in order: variants, then axes, then seeds."""

    name: str
    axes: tuple[str, ...]
    points: tuple[Point, ...]


def load(path: Path) -> Study:
    """Read a study file.

    Raises:
        BadInput: Not a study: missing, not TOML, an unknown key, axes of different lengths under "zip".
        ConfigError: A run's config is not valid; the message names the variant.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(str(path), "no such study file", "name a .toml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(str(path), f"cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(str(path), f"is not valid TOML ({error})", "see the line it names") from None
    return build(table, path)


def build(table: Mapping[str, Any], path: Path) -> Study:
    """Make the runs of a parsed study file; `path` is where it lies. Raises as `load`."""
    _check_shape(table, path)
    variants = table.get("variants") or {ONLY_VARIANT: {}}
    axes = cfg.flatten(table.get("axes", {}))
    common = {**_base(table, path), **cfg.flatten(table.get("common", {}))}
    seeds = table.get("seeds", [common.get("seed", cfg.DEFAULTS["seed"])])
    settings = list(_settings(axes, table.get("combine", "grid"), path))
    points: dict[str, Point] = {}
    for variant, changes in variants.items():
        own = cfg.flatten(changes)
        for setting in settings:
            shown = {key: own.get(key, value) for key, value in setting.items()}
            varied = {key: value for key, value in setting.items() if key not in own}
            for seed in seeds:
                label = _label(variant, varied, seed)
                config = _config({**common, **varied, **own, "seed": seed, "name": label}, variant)
                if points.setdefault(label, Point(label, variant, shown, seed, config)).config != config:
                    raise BadInput(
                        f"{path}: variants.{variant}", f"two different runs would be called {label}", "rename the variant"
                    )
    return Study(table.get("name") or path.stem, tuple(axes), tuple(points.values()))


def _check_shape(table: Mapping[str, Any], path: Path) -> None:
    kinds = {"name": str, "base": str, "seeds": list, "combine": str, "common": dict, "variants": dict, "axes": dict}
    for key, value in table.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "keys of the config go below [common], a variant or [axes]"
            raise BadInput(f"{path}: {key}", "is not a key of a study", hint)
        if not isinstance(value, kinds[key]):
            raise BadInput(f"{path}: {key}", f"{value!r} is not of the right kind", f"it is a {_KIND_WORDS[kinds[key]]}")
    seeds = table.get("seeds", [0])
    if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise BadInput(f"{path}: seeds", "must be a list of whole numbers", "for example seeds = [1, 2, 3]")
    if len(set(seeds)) != len(seeds):
        raise BadInput(f"{path}: seeds", "names a seed twice", "a repeated seed is the same run")
    for variant, changes in table.get("variants", {}).items():
        if not isinstance(changes, dict):
            raise BadInput(f"{path}: variants.{variant}", "is not a table", f"write [variants.{variant}] and keys below it")
    if re.search(r"[/\\]|^\.", table.get("name", "")):
        raise BadInput(f"{path}: name", f"{table['name']!r} cannot name a folder", "use letters, digits and hyphens")


_KIND_WORDS = {str: "text", list: "list", dict: "table"}


def _base(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The base config's keys as written; validity is judged on whole runs, where variants may complete it."""
    if not table.get("base"):
        return {}
    base = path.parent / table["base"]
    try:
        return cfg.flatten(tomllib.loads(base.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: base", f"{base} cannot be read ({error})", "it is relative to the study file") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(str(base), f"is not valid TOML ({error})", "see the line it names") from None


def _settings(axes: Mapping[str, Any], combine: str, path: Path) -> Iterator[dict[str, Any]]:
    """Every combination of the axes' values."""
    for key, values in axes.items():
        if key in ("seed", "name"):
            raise BadInput(f"{path}: axes.{key}", "is not an axis", "seeds have their own key" if key == "seed" else "")
        if not isinstance(values, list) or not values:
            raise BadInput(f"{path}: axes.{key}", "must be a list of values", f"for example {key} = [{values!r}]")
    if combine not in ("grid", "zip"):
        raise BadInput(f"{path}: combine", f"{combine!r} is not allowed", "use grid or zip")
    if combine == "zip" and len({len(values) for values in axes.values()}) > 1:
        lengths = ", ".join(f"{key} {len(values)}" for key, values in axes.items())
        raise BadInput(f"{path}: axes", f'combine = "zip" needs lists of one length, these have: {lengths}', 'or use "grid"')
    combined: Sequence[tuple[Any, ...]] = list(product(*axes.values()) if combine == "grid" else zip(*axes.values(), strict=True))
    for values in combined or [()]:
        yield dict(zip(axes, values, strict=True))


def _label(variant: str, varied: Mapping[str, Any], seed: int) -> str:
    """A folder name: `freeze_epsilon=2_seed=1`. A key goes by its last word, or all of it where two share that word."""
    tails = [key.rsplit(".", 1)[-1] for key in varied]
    words = [key if tails.count(tail) > 1 else tail for key, tail in zip(varied, tails, strict=True)]
    parts = [variant, *(f"{word}={value}" for word, value in zip(words, varied.values(), strict=True)), f"seed={seed}"]
    return re.sub(r"[^A-Za-z0-9.=_+-]+", "-", "_".join(parts))


def _config(flat: Mapping[str, Any], variant: str) -> cfg.Config:
    try:
        return cfg.build(flat)
    except ConfigError as error:
        raise ConfigError(f"variant {variant}: {error.what}", error.why, error.fix) from None
