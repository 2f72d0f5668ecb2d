"""Reading one value of a SuperNode's node-config: no conversion, and no default that the caller did not name.

Flower carries bool, int, float and str. A number as text, a boolean as text, a float where a whole number belongs and
what is not finite are refused, so that a slip of the keyboard never becomes a wider limit.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from fed_dpprune.errors import ConfigError

_WORD = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def missing(key: str) -> ConfigError:
    """The one line for a required key that is not there."""
    advice = f"add {key} to this node's file; `fed-dpprune node init` writes one with every key explained"
    return ConfigError(f"node-config {key}", "is missing, so this node does not serve", advice)


def whole(node: Mapping[str, Any], key: str, *, least: int, default: int | None = None) -> int:
    """A whole number; `true`, `3.0` and `"3"` are none.

    Raises:
        ConfigError: Missing without a default, of another type, or below `least`.
    """
    if key not in node and default is not None:
        return default
    if key not in node:
        raise missing(key)
    value = node[key]
    if type(value) is not int or value < least:
        why = f"{value!r} is not a whole number of at least {least}"
        raise ConfigError(f"node-config {key}", why, f"write {key} = {max(least, default or least)}, say, without quotes")
    return value


def number(
    node: Mapping[str, Any],
    key: str,
    *,
    default: float | None = None,
    least: float = 0.0,
    most: float = sys.float_info.max,
    below: float = math.inf,
    bound: str = "",
) -> float:
    """A finite number above 0, at least `least`, at most `most` and below `below`; text and booleans are none.

    Raises:
        ConfigError: Missing without a default, of another type, not finite, or outside.
    """
    if key not in node and default is not None:
        return default
    if key not in node:
        raise missing(key)
    value = node[key]
    if type(value) not in (int, float):
        why = f"{value!r} is not a number"
        raise ConfigError(f"node-config {key}", why, f"write {key} = 1.5, say, without quotes")
    # Written so that what is not a number is outside too.
    if not (0 < value < below and least <= value <= most):
        ends = [f"at least {least:g}"] if least else []
        ends += [f"at most {most:g}"] if most < sys.float_info.max else []
        ends += [f"below {bound} = {below:g}"] if bound else []
        wanted = " and ".join(["finite, above 0", *ends])
        raise ConfigError(f"node-config {key}", f"{value!r} is not {wanted}", f"choose another {key}")
    return float(value)


def words(
    node: Mapping[str, Any], key: str, *, default: tuple[str, ...], known: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """A list of words, or a comma string of them: Flower's own node-config carries no lists.

    Raises:
        ConfigError: Of another type, or a word that is not in `known`, or reads as none.
    """
    found = texts(node, key, default=default)
    for word in found:
        if not _WORD.fullmatch(word) or (known is not None and word not in known):
            fix = f"use {', '.join(known)}" if known else "use names in lower case with dashes"
            raise ConfigError(f"node-config {key}", f"{word!r} is not one of its words", fix)
    return found


def texts(node: Mapping[str, Any], key: str, *, default: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of a list of text or of a comma string; an empty one has none.

    Raises:
        ConfigError: Of another type.
    """
    if key not in node:
        return default
    value = node[key]
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"node-config {key}", f"{value!r} is not a list of words", 'write "first,second"')
    return tuple(part.strip() for part in parts if part.strip())
