"""The compiled kernel: its sources travel in the package, the machine's own compiler builds them once. No torch.

The library lies in the cache folder (FED_DPPRUNE_CACHE), named after the sources, the compiler's flags and the
CPU's abilities, so that a changed kernel or another machine on a shared disk builds its own. Without a compiler everything runs
on the torch rules; `kernel_status` says so and why.

A library is code of this process, and its name can be computed by anybody. So one is loaded only from a folder that is this
user's alone up to the root (`places`): there nobody else can have put or changed it, before or while it is loaded. A folder
that is not is refused with the reason, never built into; a file in a good folder that fails (another owner, a second name) is
built again. The digest of what was built lies beside it. Whoever could write the library could write the digest, so it adds
nothing against an attacker, whom the owners keep out; it tells a cut or damaged library before the loader maps it, which
would end the process. The compiler is the one that CXX or PATH names: these are the user's own, like the interpreter.
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

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.dpsgd import ziggurat
from fed_dpprune.places import cache_root, private_folder, read_alone
from fed_dpprune.records import write_atomically

FOLDER = Path(__file__).parent / "kernels"
# Each source with flags of its own. normal.cpp rounds where numpy does: no a * b + c in one go.
SOURCES: dict[str, tuple[str, ...]] = {"sampled.cpp": (), "normal.cpp": ("-ffp-contract=off",)}
BASE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-w")
# Tried in this order; the first set that builds is used. Apple's compiler has no -fopenmp, old ones no -march=native.
FLAG_SETS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_SIZES = ("lanes", "normal_state_words", "normal_state_empty")
_SIGNATURES: dict[str, list[type]] = {
    "use_threads": [_INT],
    "conv_values": [*[_POINTER] * 5, ctypes.c_int, *[_POINTER] * 4],
    "weighted_values": [_INT, _INT, _POINTER, _POINTER, _POINTER],
    "squared_values": [_INT, _INT, _POINTER, _POINTER],
    "linear_squared": [*[_INT] * 3, *[_POINTER, _INT] * 2, *[_POINTER] * 5],
    "linear_sum": [*[_INT] * 3, _POINTER, _POINTER, _INT, *[_POINTER] * 5],
    "group_norm_values": [*[_INT] * 4, ctypes.c_double, *[_POINTER] * 4],
    "normals": [_POINTER, _POINTER, _INT, _POINTER],
    "noised_descent": [_POINTER, _POINTER, _POINTER, _INT, *[_POINTER] * 4],
    "scatter": [_INT, *[_POINTER] * 3],
}


class Kernel:
    """The loaded library; its functions are those of kernels/*.cpp, with pointers as integers.

    Attributes:
        lanes: Examples that lie side by side; batches are padded to a multiple.
        path: The library's file.
    """

    lanes: int

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for name in _SIZES:
            getattr(library, name).restype = _INT
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
        self.library, self.path, self.lanes = library, path, int(library.lanes())

    @functools.cached_property
    def draws_like_numpy(self) -> bool:
        """Whether `NormalStream` gives numpy's normals to the bit here; tried once, about a millisecond."""
        return ziggurat.agrees_with_numpy(lambda key: NormalStream(self, key).fill)


class NormalStream:
    """The standard normals of numpy's Generator on a Philox of this key at counter 0, from the kernel.

    Args:
        kernel: The library.
        key: Shape (2,), uint64.
    """

    def __init__(self, kernel: Kernel, key: NDArray[np.uint64]) -> None:
        self._kernel, self._layers = kernel, ziggurat.layers()
        room = np.zeros(kernel.library.normal_state_words() + 7, dtype=np.uint64)
        self._state = room[-room.ctypes.data // 8 % 8 :]  # on a cache line: a quarter faster, the same values
        self._state[:2], self._state[3] = key, kernel.library.normal_state_empty()

    @property
    def pointers(self) -> tuple[int, int]:
        """Addresses of the state, which every draw moves on, and of the layers; good as long as this object lives."""
        return self._state.ctypes.data, self._layers.ctypes.data

    def fill(self, out: NDArray[np.float64]) -> None:
        """Write the next values of the stream into a contiguous float64 vector."""
        self._kernel.library.normals(*self.pointers, out.size, out.ctypes.data)


def cache_folder() -> Path:
    """Where built libraries lie; may be deleted at any time."""
    return cache_root() / "kernels"


@functools.cache
def load() -> Kernel | None:
    """The kernel, built if need be; None when it cannot be (`kernel_status` has the reason). Never raises."""
    return _outcome()[0]


def kernel_status() -> dict[str, str | bool]:
    """What `doctor` shows: `available`, `path`, `compiler`, and `reason` when something is not. Builds the kernel if need be.

    `seeded_noise` is "compiled", or "numpy" where the kernel is missing or its normals are not numpy's to the bit.
    """
    kernel, reason = _outcome()
    same = kernel is not None and kernel.draws_like_numpy
    if kernel is not None and not same:
        reason = "its normals are not those of this numpy; seeded noise is numpy's own, slower"
    return {
        "available": kernel is not None,
        "seeded_noise": "compiled" if same else "numpy",
        "path": str(kernel.path) if kernel else "",
        "compiler": _compiler() or "",
        "reason": reason,
    }


@functools.cache
def _outcome() -> tuple[Kernel | None, str]:
    try:
        target = private_folder(cache_folder()) / f"sampled-{_key()}.so"
        refusal = target.with_suffix(".failed")
        if refusal.exists():
            return None, f"an earlier build failed; see {refusal}, delete it to try again"
        if _is_as_built(target):
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


def _is_as_built(target: Path) -> bool:
    """Whether the library is there, this user's alone, and byte for byte what was built."""
    try:
        return _digest(read_alone(target)) == read_alone(_beside(target)).decode("ascii", "replace")
    except OSError:
        return False


def _digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _beside(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    return next((found for name in [*named[:1], "c++", "g++", "clang++"] if (found := shutil.which(name))), None)


def _key() -> str:
    """16 hex digits over the sources, the flags and what this CPU can do."""
    abilities = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("flags", "Features", "model name", "model\t", "cpu family")
        abilities += "".join(sorted({line for line in lines if line.startswith(wanted)}))
    text = b"".join((FOLDER / name).read_bytes() for name in SOURCES)
    text += repr((SOURCES, BASE_FLAGS, FLAG_SETS)).encode() + abilities.encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _build(compiler: str, target: Path) -> str:
    """Build into a file of its own and move it into place; returns the compiler's complaint, empty when it worked."""
    problem = ""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for flags in FLAG_SETS:
            made = Path(folder) / "kernel.so"
            objects = {name: str(Path(folder) / f"{name}.o") for name in SOURCES}
            commands = [["-c", str(FOLDER / name), *own, "-o", objects[name]] for name, own in SOURCES.items()]
            commands.append(["-shared", *objects.values(), "-o", str(made)])
            problem = next(filter(None, (_call(compiler, [*BASE_FLAGS, *flags, *command]) for command in commands)), "")
            if not problem:
                made.chmod(0o700)  # a linker follows the umask
                digest = _digest(made.read_bytes())
                os.replace(made, target)
                write_atomically(_beside(target), digest)
                return ""
    return problem


def _call(compiler: str, arguments: list[str]) -> str:
    """The compiler's complaint, empty when it worked."""
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, timeout=300, check=False)
    return "" if done.returncode == 0 else done.stderr or f"{compiler} ended with {done.returncode}"
