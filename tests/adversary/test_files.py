"""Files that another user of the machine planted or can write: never run, never believed, never continued.

The adversary here has an account beside the operator's. Each case plants what he would gain most from: a library, a smaller
epsilon, other data, a journal beside the ledger.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fed_dpprune import config as cfg
from fed_dpprune import dotted, places
from fed_dpprune.console import quiet_screen
from fed_dpprune.data import cached, torchvision_sets
from fed_dpprune.dpsgd import compiled
from fed_dpprune.errors import BadInput, ConfigError, DataError, LedgerError
from fed_dpprune.federation import checkpoint, simulation
from fed_dpprune.federation.model_store import SharedStore, model_digest
from fed_dpprune.federation.run_dir import RunDir
from fed_dpprune.federation.start import Start
from fed_dpprune.models import layout_cache
from fed_dpprune.models.flat import Tensor
from fed_dpprune.models.spec import ModelSpec
from fed_dpprune.privacy import locks
from fed_dpprune.privacy.cache import Figures
from fed_dpprune.privacy.ledger import DEPLOYMENT, SIMULATION, Ledger
from fed_dpprune.sparsity.support import dense

SOMEBODY = 54321
CONFIG = cfg.build({"privacy.noise-multiplier": 1.0})
IS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache; no group counts as ours, so that a group's write bit is another user's."""
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "_is_private_group", lambda gid: False)
    return tmp_path / "cache"


def others_can_write(path: Path) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o022)


def give_away(path: Path) -> None:
    """Make a file somebody else's; where only root could, one that others can write, which is refused alike."""
    if IS_ROOT:
        os.chown(path, SOMEBODY, SOMEBODY)
    else:
        others_can_write(path)


# --- the kernel -----------------------------------------------------------------------------------------------------------

BUILT = compiled.load()
needs_kernel = pytest.mark.skipif(BUILT is None, reason="no C++ compiler")


@pytest.fixture
def compiler(monkeypatch) -> Iterator[SimpleNamespace]:
    """A compiler that hands out this process's own kernel and counts; nothing is remembered; and what was loaded."""
    seen = SimpleNamespace(builds=0, loaded=[])

    def call(_: str, arguments: list[str]) -> str:
        if "-shared" in arguments:
            seen.builds += 1
            shutil.copyfile(BUILT.path, arguments[-1])
        return ""

    real = ctypes.CDLL

    def load(name, *rest, **keywords):
        seen.loaded.append((name, Path(name).read_bytes()))
        return real(name, *rest, **keywords)

    monkeypatch.setattr(compiled, "_call", call)
    monkeypatch.setattr(compiled, "_outcome", compiled._outcome.__wrapped__)
    monkeypatch.setattr(compiled.ctypes, "CDLL", load)
    return seen


def planted(folder: Path) -> Path:
    """Another library under the name that ours would have, with the digest that would vouch for it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"sampled-{compiled._key()}.so"
    target.write_bytes(b"somebody's library")
    target.with_suffix(".sha256").write_text(compiled._digest(b"somebody's library"))
    for path in (target, target.with_suffix(".sha256")):
        path.chmod(0o600)
    return target


@needs_kernel
def test_a_library_of_another_user_is_not_loaded_but_built_again(cache, compiler):
    target = planted(cache / "kernels")
    give_away(target)
    kernel, reason = compiled._outcome()
    assert kernel is not None and reason == "" and compiler.builds == 1
    assert [blob for _, blob in compiler.loaded] == [BUILT.path.read_bytes()]
    assert places.why_not_alone(target, secret=True) == "", "what was built is ours again"


@needs_kernel
def test_a_digest_of_another_user_vouches_for_nothing(cache, compiler):
    target = planted(cache / "kernels")
    give_away(target.with_suffix(".sha256"))
    assert compiled._outcome()[0] is not None and compiler.builds == 1
    assert all(blob != b"somebody's library" for _, blob in compiler.loaded)


@needs_kernel
@pytest.mark.parametrize("folder", ["cache", "cache/kernels"])
def test_nothing_is_loaded_from_or_built_into_a_folder_that_others_can_write(cache, compiler, folder):
    planted(cache / "kernels")
    others_can_write(cache.parent / folder)
    kernel, reason = compiled._outcome()
    assert kernel is None and (compiler.builds, compiler.loaded) == (0, [])
    assert str(cache.parent / folder) in reason and "chmod go-w" in reason
    assert compiled.kernel_status()["reason"] == reason


@needs_kernel
def test_the_library_is_the_one_that_was_built_byte_for_byte(cache, compiler):
    """A key says what should have been built, not what lies there; a cut file would end the process when it is mapped."""
    target = compiled._outcome()[0].path
    assert compiled._outcome()[0].path == target and compiler.builds == 1, "built once, found again"
    blob = target.read_bytes()
    target.unlink()
    target.write_bytes(blob[: len(blob) // 2])
    target.chmod(0o700)
    assert compiled._outcome()[0] is not None and compiler.builds == 2
    target.with_suffix(".sha256").unlink()
    assert compiled._outcome()[0] is not None and compiler.builds == 3
    assert {blob for _, blob in compiler.loaded} == {BUILT.path.read_bytes()}


@needs_kernel
def test_a_linker_that_follows_a_wide_umask_makes_no_library_that_others_can_write(cache, compiler):
    before = os.umask(0)
    try:
        target = compiled._outcome()[0].path
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) & 0o077 for p in (target, target.parent, cache)] == [0, 0, 0]


# --- figures, layouts, data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "folder", "above"])
def test_a_smaller_epsilon_in_a_file_that_others_could_write_is_not_believed(cache, where):
    figures = Figures(cache / "accounting")
    figures.add("family", {"100": 2.5})
    assert figures.read("family") == {"100": 2.5}
    path = figures._path("family")
    forged = json.loads(path.read_text())
    forged["values"]["100"] = 0.0
    from fed_dpprune.privacy.cache import _checksum

    forged["checksum"] = _checksum("family", forged["values"])
    path.write_text(json.dumps(forged))
    assert figures.read("family") == {"100": 0.0}, "the forger knows the form"
    if where == "file":
        give_away(path)
    else:
        others_can_write(path.parent if where == "folder" else cache)
    assert figures.read("family") == {}
    figures.add("family", {"7": 1.0})
    assert figures.read("family") == ({"7": 1.0} if where == "file" else {}), "no forged figure is carried on"


def test_figures_in_a_sticky_folder_are_not_believed(cache):
    figures = Figures(cache / "accounting")
    figures.add("family", {"100": 2.5})
    (cache / "accounting").chmod(0o1777)
    assert figures.read("family") == {}


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_layout_that_others_could_write_is_made_again(cache, where):
    spec = ModelSpec(name="net", input_shape=(4,), classes=2, hidden=(), activation="tanh")
    made = ((Tensor("ours", (3,)),), None)
    path = layout_cache._path(spec)
    layout_cache.parts(spec, lambda: made)
    assert path.is_file() and layout_cache.parts(spec, lambda: pytest.fail("it was remembered")) == made
    path.write_text(path.read_text().replace("ours", "theirs"))
    if where == "file":
        give_away(path)
    else:
        others_can_write(path.parent)
    assert layout_cache.parts(spec, lambda: made) == made


def arrays(value: int) -> dict[str, np.ndarray]:
    return {name: np.full((2, 2), value) for name in cached_names()}


def cached_names() -> tuple[str, ...]:
    return ("x_train", "y_train", "x_test", "y_test")


def test_unpacked_data_of_another_user_are_unpacked_again(cache):
    path = cached.npz("set", lambda: arrays(1))
    assert cached.npz("set", lambda: pytest.fail("they were there")) == path
    np.savez(path, **arrays(666))
    give_away(path)
    with np.load(cached.npz("set", lambda: arrays(1))) as file:
        assert (file["x_train"] == 1).all()
    assert places.why_not_alone(path) == ""


def test_unpacked_data_with_a_second_name_are_unpacked_again(cache, tmp_path):
    path = cached.npz("set", lambda: arrays(1))
    os.link(path, tmp_path / "kept-by-somebody")
    np.savez(path, **arrays(666))
    with np.load(cached.npz("set", lambda: arrays(1))) as file:
        assert (file["x_train"] == 1).all()


def test_a_data_cache_that_others_can_write_is_refused_with_the_reason(cache):
    path = cached.npz("set", lambda: arrays(1))
    others_can_write(path.parent)
    with pytest.raises(DataError, match=r"chmod go-w .*FED_DPPRUNE_CACHE"):
        cached.npz("set", lambda: arrays(1))


def test_pickles_that_others_can_write_are_not_opened(tmp_path, monkeypatch):
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    (batches / "data_batch_1").write_bytes(b"a pickle")
    monkeypatch.setenv("FED_DPPRUNE_DATA", str(tmp_path / "data"))
    asked: list[Path] = []

    def parts(name, entry, root, extra):
        asked.append(root)
        raise DataError(name, "not read in this test")

    monkeypatch.setattr(torchvision_sets, "_parts", parts)
    monkeypatch.setattr(torchvision_sets, "_fetching", lambda entry: {})
    own = [tmp_path / "data", torchvision_sets.downloads()]
    for spoil, expected in ((None, own), (batches / "data_batch_1", own[1:]), (batches, own[1:])):
        asked.clear()
        if spoil:
            others_can_write(spoil)
        with pytest.raises(DataError):
            torchvision_sets._arrays("cifar10")
        assert asked == expected
        if spoil:
            spoil.chmod(0o700)


@pytest.mark.parametrize("arguments", [{"download": True}, {}])
def test_downloads_lie_where_nobody_else_can_write(cache, monkeypatch, arguments):
    torchvision = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(torchvision, "MNIST", lambda root, **_: root)
    ask = lambda: torchvision_sets._open("mnist", "MNIST", torchvision_sets.downloads(), arguments, "")  # noqa: E731
    assert ask() == str(cache / "torchvision")
    others_can_write(cache / "torchvision")
    with pytest.raises(DataError, match="chmod go-w"):
        ask()


def test_weights_are_cached_where_nobody_else_can_write(cache, monkeypatch):
    from fed_dpprune.models import weights

    models = pytest.importorskip("torchvision.models")
    entry = SimpleNamespace(url="https://example.org/w.pth", get_state_dict=lambda **given: given)
    monkeypatch.setattr(models, "get_model_weights", lambda name: SimpleNamespace(DEFAULT=entry))
    monkeypatch.setattr(weights, "_arrays", lambda state: state)
    spec = ModelSpec("torchvision:resnet18", (), "tanh", (3, 8, 8), 2, weights="torchvision")
    assert weights._torchvision(spec)["model_dir"] == str(cache / "weights")
    others_can_write(cache / "weights")
    with pytest.raises(DataError, match="chmod go-w"):
        weights._torchvision(spec)


# --- the ledger -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path) -> Path:
    path = tmp_path / "private" / "client.sqlite"
    Ledger.create(path, "clinic", mode=DEPLOYMENT, delta=1e-5).close()
    return path


def reopened(path: Path) -> None:
    Ledger.open(path, "clinic", mode=DEPLOYMENT).close()


def test_a_ledger_in_a_sticky_folder_is_refused_for_others_may_plant_a_journal_there(ledger):
    reopened(ledger)
    ledger.parent.chmod(0o1777)
    with pytest.raises(LedgerError, match="everybody can write it"):
        reopened(ledger)
    for mode in (DEPLOYMENT, SIMULATION):
        with pytest.raises(LedgerError, match="everybody can write it"):
            Ledger.create(ledger.with_name("new.sqlite"), "clinic", mode=mode, delta=1e-5)
    assert not ledger.with_name("new.sqlite").exists()


def test_a_ledger_below_a_folder_that_others_can_write_is_refused(ledger, tmp_path):
    others_can_write(tmp_path)
    with pytest.raises(LedgerError, match="chmod go-w"):
        reopened(ledger)


@pytest.mark.parametrize("ending", ["-journal", "-wal", "-shm", ".mark", ".lock"])
def test_what_another_user_put_beside_a_ledger_is_refused(ledger, ending):
    beside = ledger.with_name(ledger.name + ending)
    beside.touch(mode=0o600)
    give_away(beside)
    with pytest.raises(LedgerError, match="is not this user's alone"):
        reopened(ledger)


def test_a_ledger_of_another_user_or_with_a_second_name_is_refused(ledger, tmp_path):
    os.link(ledger, tmp_path / "kept-by-somebody")
    with pytest.raises(LedgerError, match="2 names"):
        reopened(ledger)
    (tmp_path / "kept-by-somebody").unlink()
    reopened(ledger)
    give_away(ledger)
    with pytest.raises(LedgerError, match="is not this user's alone"):
        reopened(ledger)


def test_the_lock_and_the_mark_are_written_through_no_link_and_no_name_that_could_be_guessed(ledger, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    for name in (f"{ledger.name}.mark.{os.getpid()}.tmp", f"{ledger.name}.{os.getpid()}.tmp"):
        ledger.with_name(name).symlink_to(victim)
    locks.write_durably(ledger.with_name("client.sqlite.mark"), "mark")
    lock = ledger.with_name("other.sqlite.lock")
    lock.symlink_to(tmp_path / "made-elsewhere")
    with pytest.raises(OSError):
        locks.Lock(ledger.with_name("other.sqlite")).acquire()
    assert victim.read_text() == "whole" and not (tmp_path / "made-elsewhere").exists()
    assert stat.S_IMODE(ledger.with_name("client.sqlite.mark").stat().st_mode) == 0o600


def test_looking_at_a_ledger_drops_no_lock_of_this_process(ledger):
    import subprocess

    lock = locks.Lock(ledger)
    assert lock.acquire()
    try:
        locks.check_private(ledger)
        code = (
            "import sys, pathlib; from fed_dpprune.privacy.locks import Lock;sys.exit(Lock(pathlib.Path(sys.argv[1])).acquire())"
        )
        held = subprocess.run([sys.executable, "-c", code, str(ledger)], check=False).returncode
    finally:
        lock.release()
    assert held == 0, "another process got the lock"


# --- a run's files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_run_directory_is_made_for_its_owner_alone(tmp_path, wide_umask):
    run = RunDir(tmp_path / "runs" / "one")
    run.prepare(CONFIG, resume=False, force=False)
    checkpoint.write(run.checkpoint, checkpoint.Checkpoint(1, "c", {}, {"a": np.zeros(3)}))
    simulation.write_parts(run.checkpoint / "partition.npz", [np.arange(3)])
    SharedStore(run.models, 4).save("d", Start(np.zeros(4, np.float32), dense(4)), 1)
    with quiet_screen(run.log):
        print("to the log")
    found = [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]
    assert len(found) > 9
    assert {path: oct(stat.S_IMODE(path.stat().st_mode)) for path in found if path.stat().st_mode & 0o077} == {}


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_directory_that_others_can_write_is_refused_before_anything_is_written(tmp_path, above, resume):
    run = RunDir(tmp_path / "runs" / "one")
    run.prepare(CONFIG, resume=False, force=False)
    before = sorted(run.path.iterdir())
    others_can_write(run.path.parent if above else run.path)
    for act in (run.check, run.prepare):
        with pytest.raises(BadInput, match="--out"):
            act(CONFIG, resume=resume, force=not resume)
    assert sorted(run.path.iterdir()) == before


def test_a_run_below_a_folder_that_others_can_write_is_refused_before_it_is_made(tmp_path):
    others_can_write(tmp_path)
    run = RunDir(tmp_path / "runs" / "one")
    with pytest.raises(BadInput, match="chmod go-w"):
        run.prepare(CONFIG, resume=False, force=False)


def test_a_run_directory_that_somebody_makes_first_in_a_sticky_folder_is_refused(tmp_path, monkeypatch):
    tmp_path.chmod(0o1777)
    run, real = RunDir(tmp_path / "one"), places.make_folder

    def late(path):
        path.mkdir()
        others_can_write(path)
        return real(path)

    monkeypatch.setattr(places, "make_folder", late)
    with pytest.raises(BadInput, match="is not this user's alone"):
        run.prepare(CONFIG, resume=False, force=False)
    assert list(run.path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.toml", "ledger.sqlite", "ledger.sqlite-wal", "rounds.jsonl", "checkpoint"])
def test_a_run_with_a_file_of_another_user_is_not_resumed(tmp_path, name):
    run = RunDir(tmp_path / "runs" / "one")
    run.prepare(CONFIG, resume=False, force=False)
    run.checkpoint.mkdir()
    (run.path / name).touch()
    run.check(CONFIG, resume=True, force=False)
    give_away(run.path / name)
    with pytest.raises(BadInput, match="is not this user's alone"):
        run.check(CONFIG, resume=True, force=False)


@pytest.mark.parametrize("name", ["state.json", "arrays-1.safetensors"])
def test_a_checkpoint_of_another_user_is_not_resumed(tmp_path, name):
    checkpoint.write(tmp_path / "checkpoint", checkpoint.Checkpoint(1, "c", {}, {"a": np.zeros(3)}))
    assert checkpoint.read(tmp_path / "checkpoint", "c").round == 1
    give_away(tmp_path / "checkpoint" / name)
    with pytest.raises(BadInput, match="cannot be read"):
        checkpoint.read(tmp_path / "checkpoint", "c")


def test_a_model_of_another_user_counts_as_absent(tmp_path):
    weights = np.arange(4, dtype=np.float32)
    name = model_digest(weights)
    SharedStore(tmp_path / "models", 4).save(name, Start(weights, dense(4)), 1)
    assert SharedStore(tmp_path / "models", 4).load(name) is not None
    give_away(tmp_path / "models" / f"{name}.model")
    assert SharedStore(tmp_path / "models", 4).load(name) is None


def test_a_partition_of_another_user_is_not_read_but_drawn_again(tmp_path, monkeypatch):
    path = tmp_path / "partition.npz"
    digest = simulation.write_parts(path, [np.arange(3)])
    drawn: list[bool] = []
    config = SimpleNamespace(model_copy=lambda update: None)
    monkeypatch.setattr(simulation, "gather", lambda _: drawn.append(True) or SimpleNamespace(parts=[np.arange(3)]))
    clients = SimpleNamespace(partition=path, partition_digest=digest, config=config, data=None)
    read = simulation._parts.__wrapped__
    assert np.array_equal(read(clients)[0], np.arange(3)) and not drawn
    give_away(path)
    assert np.array_equal(read(clients)[0], np.arange(3)) and drawn


# --- modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_no_module_is_imported_from_a_working_directory_that_others_can_write(tmp_path, monkeypatch, mode):
    place = tmp_path / "place"
    place.mkdir()
    (place / "left_by_somebody.py").write_text("def net(): return 1\n")
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    place.chmod(mode)
    with pytest.raises(ConfigError, match=r"left_by_somebody.*not searched.*chmod go-w"):
        dotted.resolve("left_by_somebody:net", "model.name")
    assert "left_by_somebody" not in sys.modules
    place.chmod(0o755)
    assert dotted.resolve("left_by_somebody:net", "model.name")() == 1
    sys.modules.pop("left_by_somebody")


def test_an_actor_searches_no_home_that_others_can_write(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    context = SimpleNamespace(node_config={"partition-id": 0})
    home = tmp_path / "home"
    home.mkdir()

    def asked(folder: Path) -> bool:
        with pytest.raises(AttributeError):  # the double has nothing more than a home
            simulation.SimulatedClients.runtime(SimpleNamespace(home=str(folder)), context)
        return str(folder) in sys.path

    others_can_write(home)
    assert not asked(home) and not asked(tmp_path / "missing")
    home.chmod(0o700)
    assert asked(home)
