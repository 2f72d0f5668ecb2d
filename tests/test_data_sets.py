"""Every named data set against a small fixture that is made here, and against the real files where FED_DPPRUNE_DATA is set."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fed_dpprune import config
from fed_dpprune.data import (
    adult,
    cached,
    cifar10_jpeg,
    digits,
    fashion_mnist,
    heart_disease,
    idx,
    mnist,
    registry,
    torchvision_sets,
)
from fed_dpprune.errors import ConfigError, DataError

REAL = os.environ.get("FED_DPPRUNE_DATA")
needs_real_files = pytest.mark.skipif(not REAL, reason="FED_DPPRUNE_DATA is not set: no real files to read")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data folder and an empty cache."""
    monkeypatch.setenv("FED_DPPRUNE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def load(name: str, seed: int = 0, **keys):
    return registry.load(config.Data(dataset=name, **keys), seed)


def labels(name: str, seed: int = 0, **keys):
    return registry.labels(config.Data(dataset=name, **keys), seed)


def agree(name: str, seed: int = 0, **keys) -> None:
    """`labels` must say what `load` says, row by row."""
    quick, full = labels(name, seed, **keys), load(name, seed, **keys).labels()
    np.testing.assert_array_equal(quick.y, full.y)
    assert (quick.classes, quick.input_shape, quick.test_size) == (full.classes, full.input_shape, full.test_size)
    assert (quick.natural is None) == (full.natural is None)
    if quick.natural is not None:
        np.testing.assert_array_equal(quick.natural, full.natural)


# digits


def test_digits_hold_a_stratified_quarter_out():
    dataset = load("digits")
    assert (len(dataset.train), len(dataset.test), dataset.input_shape, dataset.classes) == (1348, 449, (64,), 10)
    whole = np.bincount(np.concatenate([dataset.train.y, dataset.test.y]))
    assert np.all(np.abs(np.bincount(dataset.test.y) - whole * 0.25) < 1)
    x, _ = dataset.train.take(np.arange(len(dataset.train)))
    assert x.min() == -1 and x.max() == 1


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    table = digits._table()
    np.testing.assert_array_equal(table[:, :64], images)
    np.testing.assert_array_equal(table[:, 64], targets)


def test_digits_test_rows_follow_the_seed_and_the_fraction():
    assert not np.array_equal(load("digits", 0).test.x, load("digits", 1).test.x)
    np.testing.assert_array_equal(load("digits", 5).test.x, load("digits", 5).test.x)
    assert len(load("digits", test_fraction=0.1).test) == 180
    agree("digits", 3, test_fraction=0.4)


def test_no_test_row_of_digits_is_a_training_row():
    dataset = load("digits")
    rows = np.concatenate([dataset.train.x, dataset.test.x])
    everything = digits._table()[:, :64]
    assert sorted(map(bytes, rows)) == sorted(map(bytes, everything))


# adult

ROW = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, United-States, {}"
)
MISSING = "25, ?, 226802, 11th, 7, Never-married, ?, Own-child, Black, Male, 0, 0, 40, ?, {}"


def write_adult(root: Path, train: list[str], test: list[str], packed: bool = True) -> None:
    (root / "adult").mkdir(exist_ok=True)
    for name, lines in (("data", [*train, ""]), ("test", ["|1x3 Cross validator", *test, ""])):
        blob = "\n".join(lines).encode()
        path = root / "adult" / f"adult.{name}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(blob) if packed else blob)


@pytest.mark.parametrize("packed", [True, False])
def test_adult_is_one_hot_with_public_constants(root, packed):
    write_adult(root, [ROW.format("<=50K"), MISSING.format(">50K")], [ROW.format(">50K."), MISSING.format("<=50K.")], packed)
    dataset = load("adult")
    assert dataset.input_shape == (adult.FEATURES,) == (88,)
    assert dataset.train.y.tolist() == [0, 1] and dataset.test.y.tolist() == [1, 0]
    x, _ = dataset.train.take(np.array([0, 1]))
    assert x[0, 0] == np.float32((39 - 40) / 15)
    assert x[0, 1:9].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]  # State-gov
    assert not x[1, 1:9].any()  # a missing category is a block of zeros
    assert (x[0] == 1).sum() == 7 and (x[1] == 1).sum() == 4
    agree("adult")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (ROW.format("maybe"), "income class"),
        (ROW.replace("State-gov", "Pirate").format("<=50K"), "column 2"),
        (ROW.replace("39", "old").format("<=50K"), "column 1"),
        ("1, 2, <=50K", "15 columns"),
    ],
)
def test_a_damaged_adult_row_is_one_line(root, line, text):
    write_adult(root, [line], [ROW.format(">50K.")])
    with pytest.raises(DataError, match=text):
        load("adult")


@needs_real_files
def test_the_real_adult_has_its_published_counts():
    dataset = load("adult")
    assert (len(dataset.train), len(dataset.test)) == (32_561, 16_281)
    assert (int(dataset.train.y.sum()), int(dataset.test.y.sum())) == (7_841, 3_846)
    x, _ = dataset.train.take(np.arange(len(dataset.train)))
    assert np.isfinite(x).all() and np.abs(x).max() < 5
    agree("adult")


# heart disease

PATIENT = "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,{}"
SICK = "65,1,4,0,0,?,1,?,?,-2.6,?,?,?,{}"


def write_hospitals(root: Path, rows: list[str]) -> None:
    (root / "heart_disease").mkdir(exist_ok=True)
    for name in heart_disease.HOSPITALS:
        (root / "heart_disease" / f"processed.{name}.data").write_text("\n".join(rows) + "\n")


def test_heart_disease_knows_its_hospitals_and_fills_in_public_constants(root):
    write_hospitals(root, [PATIENT.format(0), SICK.format(3)] * 8)
    dataset = load("heart-disease")
    assert dataset.input_shape == (heart_disease.FEATURES,) == (31,)
    assert dataset.natural is not None and np.bincount(dataset.natural).tolist() == [12, 12, 12, 12]
    assert np.bincount(dataset.train.y).tolist() == [24, 24]
    sick, _ = dataset.train.take(np.flatnonzero(dataset.train.y == 1)[:1])
    numbers = sick[0, : 2 * len(heart_disease.NUMBERS)].reshape(-1, 2)
    assert numbers[:, 1].tolist() == [0, 1, 1, 1, 0, 1]  # pressure, cholesterol, heart rate and vessels are missing
    assert not numbers[numbers[:, 1] == 1, 0].any()
    assert numbers[4, 0] == -3.0  # cut
    agree("heart-disease", test_fraction=0.5)


@pytest.mark.parametrize("line", ["1,2,3", PATIENT.format("?"), PATIENT.replace("63.0", "old").format(0)])
def test_a_damaged_patient_is_one_line(root, line):
    write_hospitals(root, [line])
    with pytest.raises(DataError, match="processed"):
        load("heart-disease")


def test_filling_in_never_looks_at_other_rows(root):
    write_hospitals(root, [PATIENT.format(0), SICK.format(1)] * 4)
    before = load("heart-disease", test_fraction=0.25)
    write_hospitals(root, [PATIENT.replace("233.0", "600.0").format(0), SICK.format(1)] * 4)
    after = load("heart-disease", test_fraction=0.25)
    np.testing.assert_array_equal(before.train.x[before.train.y == 1], after.train.x[after.train.y == 1])


@needs_real_files
def test_the_real_hospitals_have_their_published_counts():
    dataset = load("heart-disease")
    assert dataset.natural is not None
    assert len(dataset.train) + len(dataset.test) == 920 and np.unique(dataset.natural).tolist() == [0, 1, 2, 3]
    _, y, hospital = heart_disease._table()
    assert np.bincount(hospital).tolist() == [303, 294, 123, 200]
    assert [int(y[hospital == h].sum()) for h in range(4)] == [139, 106, 115, 149]
    agree("heart-disease")


# MNIST and its relatives


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(root: Path, monkeypatch, packed: bool = True) -> dict[str, np.ndarray]:
    """A tiny MNIST with checksums of its own."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 28, 28)).astype(np.uint8),
        "y_train": np.arange(30, dtype=np.uint8) % 10,
        "x_test": rng.integers(0, 256, (20, 28, 28)).astype(np.uint8),
        "y_test": np.arange(20, dtype=np.uint8) % 10,
    }
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for key, file in idx.FILES.items():
        blob = idx_bytes(arrays[key])
        zipped = gzip.compress(blob)
        monkeypatch.setitem(mnist.SOURCE.md5, file, (hashlib.md5(zipped).hexdigest(), hashlib.md5(blob).hexdigest()))
        (folder / f"{file}{'.gz' if packed else ''}").write_bytes(zipped if packed else blob)
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_or_not_and_mapped_from_the_cache(root, monkeypatch, packed):
    arrays = write_idx(root, monkeypatch, packed)
    quick = labels("mnist")
    assert not cached.path("mnist").exists()  # labels alone unpack nothing
    dataset = load("mnist")
    np.testing.assert_array_equal(dataset.train.x[:, 0], arrays["x_train"])
    np.testing.assert_array_equal(quick.y, arrays["y_train"])
    assert isinstance(dataset.train.x.base, np.memmap) and dataset.input_shape == (1, 28, 28)
    agree("mnist")


def test_the_data_folder_is_never_written_to(root, monkeypatch):
    write_idx(root, monkeypatch)
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    load("mnist")
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == before


def test_a_damaged_file_fails_its_checksum(root, monkeypatch):
    write_idx(root, monkeypatch)
    path = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    blob = bytearray(path.read_bytes())
    blob[-20] ^= 1
    path.write_bytes(blob)
    with pytest.raises(DataError, match="checksum"):
        load("mnist")
    assert not list((root.parent / "cache").rglob("*.npz"))


def test_several_processes_may_unpack_at_once(root, monkeypatch):
    write_idx(root, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda _: len(load("mnist").train), range(8)))
    assert sizes == [30] * 8
    assert [path.name for path in (root.parent / "cache" / "data").iterdir()] == [cached.path("mnist").name]


@pytest.mark.parametrize(
    "blob", [b"", b"\x00\x00\x08", b"\x00\x00\x09\x01\x00\x00\x00\x01a", idx_bytes(np.zeros((3, 2), np.uint8))[:-1]]
)
def test_bytes_that_are_no_idx_file_are_refused(blob):
    with pytest.raises(DataError, match="IDX"):
        idx.parse(blob, "x")


@pytest.mark.parametrize("name", sorted(set(registry.TABLE) - {"digits"}))
def test_a_missing_set_is_one_line_that_says_what_to_put_where(root, offline, name):
    for read in (load, labels):
        with pytest.raises(DataError) as caught:
            read(name)
        assert name in caught.value.what and "FED_DPPRUNE_DATA" in caught.value.fix and "\n" not in str(caught.value)


def test_an_unwritable_cache_says_which_variable_to_set(root, monkeypatch):
    write_idx(root, monkeypatch)
    (root.parent / "file").write_text("")
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(root.parent / "file"))
    with pytest.raises(DataError, match="FED_DPPRUNE_CACHE"):
        load("mnist")


@needs_real_files
@pytest.mark.parametrize(("source", "mean"), [(mnist.SOURCE, 0.1307), (fashion_mnist.SOURCE, 0.2860)])
def test_the_real_images_have_their_published_mean(source, mean, tmp_path, monkeypatch):
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path))
    start = time.perf_counter()
    quick = labels(source.name)
    assert time.perf_counter() - start <= 0.3
    dataset = load(source.name)
    np.testing.assert_array_equal(quick.y, dataset.train.y)
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert float(dataset.train.x.mean()) / 255 == pytest.approx(mean, abs=1e-4)
    if source.name == "mnist":
        assert np.bincount(dataset.train.y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


# torchvision


class Fake:
    """Stands for one of torchvision's classes: finds its file or not, downloads or not."""

    def __init__(self, root: str, train: bool, download: bool = False) -> None:
        if not (Path(root) / "fake.bin").is_file():
            raise RuntimeError("Dataset not found or corrupted.\nYou can use download=True to download it")
        rows = 6 if train else 4
        self.data = np.arange(rows * 48, dtype=np.uint8).reshape(rows, 4, 4, 3)
        self.targets = [row % 2 for row in range(rows)]


@pytest.fixture
def fake(monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    monkeypatch.setitem(torchvision_sets.TABLE, "cifar10", torchvision_sets.Entry("CIFAR10", files=("fake.bin",)))


def test_a_torchvision_set_is_read_once_and_then_without_torchvision(root, fake, monkeypatch):
    (root / "fake.bin").write_text("")
    assert load("cifar10").input_shape == (3, 4, 4)
    (root / "fake.bin").unlink()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(load("cifar10").train) == 6
    agree("cifar10")


def test_an_archive_alone_is_unpacked_outside_the_data_folder(root, monkeypatch):
    import torchvision.datasets

    class Packed(Fake):
        def __init__(self, root: str, train: bool, download: bool = False) -> None:
            if download and (Path(root) / "fake.tar").is_file():
                (Path(root) / "fake.bin").write_text("")
            super().__init__(root, train)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Packed)
    monkeypatch.setitem(torchvision_sets.TABLE, "cifar10", torchvision_sets.Entry("CIFAR10", files=("fake.tar", "fake.bin")))
    (root / "fake.tar").write_text("")
    assert len(load("cifar10").train) == 6
    assert [path.name for path in root.iterdir()] == ["fake.tar"]


def test_pictures_without_an_array_are_stacked_and_resized():
    from PIL import Image

    pictures = [(Image.new("RGB", (70 + n, 90), (n, 0, 0)), n % 2) for n in range(3)]
    x, y = torchvision_sets._images(pictures, True, "x")
    assert x.shape == (3, 64, 64, 3) and y.tolist() == [0, 1, 0] and x[2, 0, 0].tolist() == [2, 0, 0]
    with pytest.raises(DataError, match="different sizes"):
        torchvision_sets._images(pictures, False, "x")


def test_every_torchvision_entry_names_a_class_and_arguments_it_accepts():
    import inspect

    import torchvision.datasets

    assert set(torchvision_sets.TABLE) == set(registry.TORCHVISION)
    for entry in torchvision_sets.TABLE.values():
        accepted = set(inspect.signature(getattr(torchvision.datasets, entry.cls)).parameters)
        assert "kwargs" in accepted or set(entry.train) | set(entry.test) <= accepted


# CIFAR-10 as JPEG


def packed_jpegs(images: np.ndarray, y: np.ndarray) -> bytes:
    from PIL import Image

    blobs = []
    for image in images:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG", quality=75)
        blobs.append(out.getvalue())
    shared = next(n for n in range(len(blobs[0])) if len({blob[: n + 1] for blob in blobs}) > 1)  # length of the common header
    scans = [blob[shared:] for blob in blobs]
    head = b"C10J" + struct.pack("<HI", shared, len(blobs)) + blobs[0][:shared] + y.astype(np.uint8).tobytes()
    return head + np.array([len(scan) for scan in scans], "<u2").tobytes() + b"".join(scans)


def test_the_packed_jpegs_unpack_to_what_a_jpeg_reader_sees():
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    arrays = cifar10_jpeg.unpack(packed_jpegs(images, np.arange(5)), 3)
    out = io.BytesIO()
    Image.fromarray(images[4]).save(out, "JPEG", quality=75)
    np.testing.assert_array_equal(arrays["x_test"][1], np.asarray(Image.open(out)))
    assert arrays["y_train"].tolist() == [0, 1, 2] and arrays["y_test"].tolist() == [3, 4]


def test_the_packed_jpegs_are_checked_before_they_are_read(root):
    (root / "cifar10-jpeg").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    blob = packed_jpegs(images, np.arange(2))
    (root / "cifar10-jpeg" / cifar10_jpeg.FILE).write_bytes(blob)
    with pytest.raises(DataError, match="checksum"):
        load("cifar10-jpeg")
    with pytest.raises(DataError, match="packed form"):
        cifar10_jpeg.unpack(b"other", 1)


def test_a_folder_of_jpegs_serves_as_well_and_the_note_says_lossy(root):
    from PIL import Image

    for part, rows in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            folder = root / "cifar10-jpeg" / part / name
            folder.mkdir(parents=True)
            for row in range(rows):
                Image.new("RGB", (32, 32), (row, 0, 0)).save(folder / f"{row}.jpg", quality=75)
    dataset = load("cifar10-jpeg")
    assert len(dataset.train) == 6 and dataset.input_shape == (3, 32, 32)
    assert "JPEG q75" in dataset.notes[0]


@needs_real_files
@pytest.mark.slow
def test_the_real_jpegs_are_60000_balanced_images(tmp_path, monkeypatch):
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path))
    dataset = load("cifar10-jpeg")
    assert np.bincount(dataset.train.y).tolist() == [5_000] * 10 and np.bincount(dataset.test.y).tolist() == [1_000] * 10


# names


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"data\.dataset.*did you mean 'fashion-mnist'"):
        load("fashion_mnist")
    with pytest.raises(ConfigError, match=r"\.npz"):
        labels("/nowhere/at/all")


def test_the_inventory_names_every_set_once_and_what_is_missing(root):
    found = {entry.name: entry for entry in registry.inventory()}
    assert set(found) == set(registry.TABLE)
    assert found["digits"].here and not found["mnist"].here and "FED_DPPRUNE_DATA" in found["mnist"].text


def test_reading_labels_imports_neither_torch_nor_scikit_learn():
    code = (
        "import sys; from fed_dpprune import config; from fed_dpprune.data import registry, partition;"
        "d = config.Data(); l = registry.labels(d, 0); partition.draw(d, 10, l.y, None, 0); list(registry.inventory());"
        "print(*({'torch', 'torchvision', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_digits_load_within_half_a_second():
    start = time.perf_counter()
    load("digits")
    assert time.perf_counter() - start <= 0.5
