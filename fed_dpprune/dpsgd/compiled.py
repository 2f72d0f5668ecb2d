"""The compiled kernel: its source travels in the package, the machine's own compiler builds it once. No torch.

The library lies in the cache folder (FED_DPPRUNE_CACHE), named after the source, the compiler's flags and the
CPU's abilities, so that a changed kernel or another machine on a shared disk builds its own. Without a compiler everything runs
on the torch rules; `kernel_status` says so and why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from fed_dpprune.places import cache_root

SOURCE = Path(__file__).parent / "kernels" / "sampled.cpp"
BASE_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
# Tried in this order; the first set that builds is used. Apple's compiler has no -fopenmp, old ones no -march=native.
FLAG_SETS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, list[type]] = {
    "use_threads": [_INT],
    "conv_values": [*[_POINTER] * 5, ctypes.c_int, *[_POINTER] * 4],
    "weighted_values": [_INT, _INT, _POINTER, _POINTER, _POINTER],
    "squared_values": [_INT, _INT, _POINTER, _POINTER],
    "linear_squared": [*[_INT] * 3, *[_POINTER, _INT, _POINTER] * 2, ctypes.c_float, *[_POINTER] * 5],
    "linear_sum": [_INT, _INT, _POINTER, _POINTER, _INT, *[_POINTER] * 5],
    "group_norm_values": [*[_INT] * 4, ctypes.c_double, *[_POINTER] * 4],
}


class Kernel:
    """The loaded library; its functions are those of kernels/sampled.cpp, with pointers as integers.

    Attributes:
        lanes: Examples that lie side by side; batches are padded to a multiple.
        path: The library's file.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.lanes.restype = _INT
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
        self.library, self.path, self.lanes = library, path, int(library.lanes())


def cache_folder() -> Path:
    """Where built libraries lie; may be deleted at any time."""
    return cache_root() / "kernels"


@functools.cache
def load() -> Kernel | None:
    """The kernel, built if need be; None when it cannot be (`kernel_status` has the reason). Never raises."""
    return _outcome()[0]


def kernel_status() -> dict[str, str | bool]:
    """What `doctor` shows: `available`, `path`, `compiler`, and `reason` when not available. Builds the kernel if need be."""
    kernel, reason = _outcome()
    return {
        "available": kernel is not None,
        "path": str(kernel.path) if kernel else "",
        "compiler": _compiler() or "",
        "reason": reason,
    }


@functools.cache
def _outcome() -> tuple[Kernel | None, str]:
    try:
        target = cache_folder() / f"sampled-{_key()}.so"
        refusal = target.with_suffix(".failed")
        if refusal.exists():
            return None, f"an earlier build failed; see {refusal}, delete it to try again"
        if target.exists():
            try:
                return Kernel(target), ""
            except OSError:
                target.unlink(missing_ok=True)  # damaged: build it anew
        compiler = _compiler()
        if compiler is None:
            return None, "no C++ compiler (c++, g++ or clang++, or the variable CXX)"
        problem = _build(compiler, target)
        if problem:
            refusal.write_text(problem, encoding="utf-8")
            return None, problem.strip().splitlines()[-1] if problem.strip() else "the compiler failed"
        return Kernel(target), ""
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        return None, str(error)


def _compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    return next((found for name in [*named[:1], "c++", "g++", "clang++"] if (found := shutil.which(name))), None)


def _key() -> str:
    """16 hex digits over the source, the flags and what this CPU can do."""
    abilities = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("flags", "Features", "model name", "model\t", "cpu family")
        abilities += "".join(sorted({line for line in lines if line.startswith(wanted)}))
    text = SOURCE.read_bytes() + repr((BASE_FLAGS, FLAG_SETS)).encode() + abilities.encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _build(compiler: str, target: Path) -> str:
    """Build into a file of its own and move it into place; returns the compiler's complaint, empty when it worked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    problem = ""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for flags in FLAG_SETS:
            made = Path(folder) / "kernel.so"
            command = [compiler, *BASE_FLAGS, *flags, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode == 0:
                os.replace(made, target)
                return ""
            problem = done.stderr or f"{compiler} ended with {done.returncode}"
    return problem
