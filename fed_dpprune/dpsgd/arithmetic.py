"""The arithmetic that a private step runs under, whatever the program around it has chosen.

Rounding to nearest, denormals kept, one thread in torch's own products, no reduced precision in them: with anything that
varies from call to call the same example could get other bits, and chosen weights turn a bit into an activation.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

_TO_NEAREST = 0  # FE_TONEAREST on every platform with IEEE arithmetic


@functools.cache
def _rounding() -> tuple[Callable[[], int], Callable[[int], int]] | None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        return library.fegetround, library.fesetround
    return None


@contextmanager
def pinned(device: torch.device) -> Iterator[None]:
    """Pin it inside the `with`, put back what was there afterwards.

    The number of threads is 1 inside: how a product is split among threads decides how it is rounded. The compiled kernel
    has threads of its own, whose number changes no bit.

    Args:
        device: Where the products run; on CUDA, TF32 is off as well.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    attention = torch.backends.mha.get_fastpath_enabled()
    rounding = _rounding()
    mode = rounding[0]() if rounding else _TO_NEAREST
    torch.set_flush_denormal(False)
    torch.backends.mha.set_fastpath_enabled(False)  # it looks at the whole batch's mask, and at which weights are live
    try:
        if mode != _TO_NEAREST and rounding:
            rounding[1](_TO_NEAREST)
        if threads != 1:
            torch.set_num_threads(1)
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        if device.type != "cuda":
            yield
            return
        torch.use_deterministic_algorithms(True, warn_only=True)
        with _without_tf32():
            yield
    finally:
        if device.type == "cuda":
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.mha.set_fastpath_enabled(attention)
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        if threads != 1:
            torch.set_num_threads(threads)
        if mode != _TO_NEAREST and rounding:
            rounding[1](mode)


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
