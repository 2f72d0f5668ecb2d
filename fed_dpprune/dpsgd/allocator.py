"""Memory that a step frees is kept for the next one. Standard library only.

glibc hands large blocks back to the system at every free and takes them again, page by page, zeroed, in the next step; on the
small nets that was a fifth of a step's CPU time. The process stays at its peak instead of breathing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
_KEEP_BYTES = 2**31 - 1
_LARGEST_HEAP_BLOCK = 32 * 2**20  # the most that glibc accepts


@functools.cache
def keep_freed_memory() -> bool:
    """Raise the thresholds above which glibc returns memory; True when done. The user's own MALLOC_ variables win."""
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, _KEEP_BYTES) and mallopt(_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK))
