"""A user's own code by dotted path: `package.module:name`. Standard library only.

Whoever writes the config chooses what runs, so a client in a deployment must not take such a path from anyone but its own
operator (`is_path` tells them apart). The working directory is searched after the installed packages, and only where it is
this user's alone: in /tmp anybody could leave a module of that name.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from fed_dpprune import places
from fed_dpprune.errors import ConfigError

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_path(text: str) -> bool:
    """Whether `text` reads as package.module:name."""
    return _PATH.fullmatch(text) is not None


def resolve(path: str, key: str) -> Callable[..., Any]:
    """The callable that `path` names.

    Args:
        path: package.module:name.
        key: The config key it came from, for the error.

    Raises:
        ConfigError: The module cannot be imported, or holds no such callable.
    """
    module_name, _, name = path.partition(":")
    here = os.getcwd()
    try:
        refusal = places.why_not_alone(here)
    except OSError as error:
        refusal = str(error)
    added = here not in sys.path and not refusal
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except ImportError as error:
        unsearched = f"; the working directory is not searched: {refusal}" if refusal else ""
        raise ConfigError(key, f"{path}: {error}{unsearched}", "install the module or run where it lies") from None
    except AttributeError as error:
        raise ConfigError(key, f"{path}: {error}", "name a function of that module") from None
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise ConfigError(key, f"{path} is not a function", "name a function of that module")
    return found  # type: ignore[no-any-return]
