"""`fed-dpprune doctor`: what is installed, what a run would use, which data is found, what to do about what is missing.

Looks and never changes anything; nothing heavy is imported (versions come from the packages' metadata, GPUs from the
driver's own tool), so it answers within seconds also where a package is broken.
"""

from __future__ import annotations

import importlib.metadata as metadata
import math
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fed_dpprune
from fed_dpprune.console import Screen
from fed_dpprune.places import cache_root, data_root, why_not_alone
from fed_dpprune.records import to_json

PYTHON_FROM = (3, 11)
SHARED_MEMORY_WANTED = 10**9
MEMORY_WANTED = 4 * 10**9
TOOL_PATIENCE_S = 1.5
DOWNLOADABLE = " (or have a network)"

Report = dict[str, Any]


def _output(*command: str) -> str:
    """What a small tool prints; empty when it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _requirements(package: str, extra: str) -> Iterator[tuple[str, str, bool]]:
    """(name, wanted versions, whether the installed one fits) of what a package asks for on this machine with an extra."""
    from packaging.requirements import Requirement

    for line in metadata.requires(package) or []:
        requirement = Requirement(line)
        asked_by_extra = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if asked_by_extra and (not extra or "extra" in str(requirement.marker)):
            try:
                fits = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
            except metadata.PackageNotFoundError:
                fits = False
            yield requirement.name, str(requirement.specifier), fits


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Report:
    if _version("fed-dpprune") is None:
        return {}
    return {
        name: {"version": _version(name), "wanted": wanted, "fits": fits}
        for name, wanted, fits in _requirements("fed-dpprune", "")
    }


def _ray() -> Report:
    """Flower pins the one ray it was tested with, in its extra `simulation`."""
    pinned = [] if _version("flwr") is None else [item for item in _requirements("flwr", "simulation") if item[0] == "ray"]
    wanted = pinned[0][1] if pinned else ""
    fits = bool(pinned) and pinned[0][2]
    return {"version": _version("ray"), "flwr": _version("flwr"), "flwr_wants": wanted, "fits": fits}


def cpus() -> int:
    """Cores that a run may use: those of the machine, less what affinity or a container's quota takes away."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs that are visible to this process, from the driver's tool."""
    names = [
        line.strip() for line in _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines() if line.strip()
    ]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return names
    return [names[int(part)] for part in chosen.split(",") if part.strip().isdigit() and int(part) < len(names)]


def _memory() -> tuple[int | None, int | None]:
    """(all, available) bytes of memory; a container's limit counts as all."""
    lines = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
    total: int | None = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        total = min(total or int(limit), int(limit))
        available = min(available, total) if available is not None else None
    return total, available


def _machine() -> Report:
    total, available = _memory()
    shared = Path("/dev/shm")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "cpus_used": cpus(),
        "gpus": gpus(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "shared_memory_bytes": shutil.disk_usage(shared).total if shared.is_dir() else None,
    }


def _sqlite() -> Report:
    from fed_dpprune.privacy.ledger import DEPLOYMENT, SIMULATION, Ledger

    return {
        "version": sqlite3.sqlite_version,
        "journal": {mode: Ledger.settings(mode)[0] for mode in (SIMULATION, DEPLOYMENT)},
    }


def _kernel() -> Report:
    """The compiled kernel as it stands; doctor builds none, that takes seconds and is a run's work."""
    from fed_dpprune.dpsgd import compiled

    if any(compiled.cache_folder().glob("sampled-*")):
        status: Report = dict(compiled.kernel_status())
    else:
        named = next(
            filter(None, map(shutil.which, filter(None, (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")))), ""
        )
        reason = "not built yet, the first run that wants it builds it" if named else "no C++ compiler; runs use torch, slower"
        status = {"available": False, "path": "", "compiler": named, "reason": reason}
    return {**status, "compiler_version": _output(str(status["compiler"]), "--version").partition("\n")[0]}


def _data() -> Report:
    from fed_dpprune.data import registry

    root = data_root()
    found = list(registry.inventory())
    return {
        "root": None if root is None else str(root),
        "root_exists": root is not None and root.is_dir(),
        "found": {item.name: item.text for item in found if item.here},
        "missing": {item.name: item.text for item in found if not item.here},
    }


def _cache() -> Report:
    path = cache_root()
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return {
        "path": str(path),
        "writable": os.access(above, os.W_OK),
        "bytes": sum(file.stat().st_size for file in files),
        "not_alone": _whose(path),
    }


def _whose(path: Path) -> str:
    """Why what lies there could be somebody else's; empty when it is this user's alone, or not there."""
    try:
        return why_not_alone(path)
    except OSError as error:
        return "" if isinstance(error, FileNotFoundError) else str(error)


def collect() -> Report:
    """Everything that `doctor --json` prints; `advice` lists what to do, most urgent first, empty when all is well."""
    report: Report = {
        "version": fed_dpprune.__version__,
        "code": {"path": str(Path(fed_dpprune.__file__).parent), "not_alone": _whose(Path(fed_dpprune.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": _packages(),
        "ray": _ray(),
        "machine": _machine(),
        "sqlite": _sqlite(),
        "kernel": _kernel(),
        "data": _data(),
        "cache": _cache(),
        "network": "a simulation needs no open port; a deployment needs the SuperLink's (8000 by default), seen from its nodes",
    }
    return {**report, "advice": list(_advice(report))}


def _advice(report: Mapping[str, Any]) -> Iterator[str]:
    """One line for each thing that stands in the way: what, why, what to do."""
    if sys.version_info < PYTHON_FROM:
        yield f"Python {report['python']['version']}: 3.11 or newer is needed; make the environment with a newer one"
    if not report["packages"]:
        yield "fed-dpprune: is imported but not installed; run `make test` once in a checkout, or `pip install fed-dpprune`"
    for name, package in report["packages"].items():
        if not package["fits"]:
            wanted = name + package["wanted"]
            yield f"{name} {package['version'] or 'is missing'}: {wanted} is needed; pip install '{wanted}'"
    yield from _advice_on_ray(report)
    data, cache = report["data"], report["cache"]
    if data["root"] is None:
        yield "FED_DPPRUNE_DATA: is not set; set it to the folder of your data sets (digits needs none)"
    elif not data["root_exists"]:
        yield f"FED_DPPRUNE_DATA: {data['root']} is not a folder; set it to the folder of your data sets"
    if report["code"]["not_alone"]:
        yield f"the package's code: {report['code']['not_alone']}"
    if cache["not_alone"]:
        yield f"the cache, which is not used: {cache['not_alone']}"
    if not cache["writable"]:
        yield f"{cache['path']}: the cache cannot be written; set FED_DPPRUNE_CACHE to a folder that can"


def _advice_on_ray(report: Mapping[str, Any]) -> Iterator[str]:
    ray, machine = report["ray"], report["machine"]
    if not ray["flwr_wants"]:
        yield "ray: Flower offers none for this Python and system; use `--backend inline`"
    elif not ray["fits"]:
        needs = f"Flower {ray['flwr']} needs ray{ray['flwr_wants']}"
        yield f"ray {ray['version'] or 'is missing'}: {needs}; pip install 'flwr[simulation]'"
    memory, shared = machine["memory_available_bytes"], machine["shared_memory_bytes"]
    if memory is not None and memory < MEMORY_WANTED:
        free = f"{_gigabytes(memory)} are free and Ray's actors take about 1 GB each"
        yield f"memory: {free}; set federation.actors = 1 or use `--backend inline`"
    if shared is not None and shared < SHARED_MEMORY_WANTED:
        yield f"/dev/shm: only {_gigabytes(shared)}, Ray would use slower files; start the container with --shm-size=1g or more"


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as text."""
    machine, sqlite, data, cache = report["machine"], report["sqlite"], report["data"], report["cache"]
    yield f"fed-dpprune  {report['version']}"
    yield f"python       {report['python']['version']}  ({report['python']['executable']})"
    yield f"packages     {'  '.join(_package_words(report['packages']))}"
    yield f"ray          {report['ray']['version']} (Flower {report['ray']['flwr']} wants ray{report['ray']['flwr_wants']})"
    gpu_words = ", ".join(machine["gpus"]) or "none"
    yield f"machine      {machine['system']}; Ray would use {machine['cpus_used']} of {machine['cpus']} CPUs, GPUs: {gpu_words}"
    shared = _gigabytes(machine["shared_memory_bytes"])
    free, whole = _gigabytes(machine["memory_available_bytes"]), _gigabytes(machine["memory_bytes"])
    yield f"memory       {free} free of {whole}, shared memory {shared}"
    modes = ", ".join(f"{journal} in a {mode}" for mode, journal in sqlite["journal"].items())
    yield f"sqlite       {sqlite['version']}; the ledger's journal: {modes}"
    kernel = report["kernel"]
    yield f"compiler     {kernel['compiler'] or 'none found'}  {kernel['compiler_version']}".rstrip()
    yield f"kernel       {'built: ' + kernel['path'] if kernel['available'] else kernel['reason']}"
    yield f"cache        {cache['path']} ({cache['bytes'] / 1e6:.1f} MB, {'writable' if cache['writable'] else 'NOT writable'})"
    yield f"network      {report['network']}"
    yield f"data         FED_DPPRUNE_DATA = {data['root'] or '(not set)'}"
    for name, where in data["found"].items():
        yield f"  found      {name}: {where}"
    fetched = [name for name, text in data["missing"].items() if text.endswith(DOWNLOADABLE)]
    for name, text in data["missing"].items():
        if name not in fetched:
            yield f"  missing    {name}: {text}"
    if fetched:
        how = "downloaded when used, where there is a network; `--json` says which files to put where"
        yield f"  missing    {', '.join(fetched)}: {how}"
    yield from (f"to do        {advice}" for advice in report["advice"])
    if not report["advice"]:
        yield "to do        nothing; all is well"


def _package_words(packages: Mapping[str, Any]) -> Iterator[str]:
    for name, package in packages.items():
        yield f"{name} {package['version'] or 'MISSING'}" + ("" if package["fits"] else f" (wants {package['wanted']})")


def render(report: Mapping[str, Any], screen: Screen, *, json_only: bool = False) -> None:
    """Print the report as text, or as JSON."""
    if json_only:
        print(to_json(dict(report), indent=2), file=screen.out)
        return
    import textwrap

    width = screen.console().width
    for line in lines(report):
        print(
            textwrap.fill(line, width, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False),
            file=screen.out,
        )
