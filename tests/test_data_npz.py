from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fed_dpprune import config
from fed_dpprune.data import npz, registry
from fed_dpprune.errors import DataError


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {
        "x_train": rng.integers(0, 256, (12, 5, 4, 3)).astype(np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 5, 4, 3)).astype(np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def write(folder: Path, *, save=np.savez, **changes) -> config.Data:
    save(folder / "own.npz", **arrays(**changes))
    return config.Data(dataset=str(folder / "own.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_colour_images_come_out_channels_first_and_scaled(tmp_path, save):
    dataset = registry.load(write(tmp_path, save=save), 0)
    assert dataset.input_shape == (3, 5, 4) and dataset.classes == 3 and len(dataset.test) == 6
    x, y = dataset.train.take(np.array([7]))
    expected = arrays()["x_train"][7].astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(x[0], expected.transpose(2, 0, 1), atol=1e-6)
    assert y[0] == 7 % 3


def test_uncompressed_features_are_mapped_not_read(tmp_path):
    data = write(tmp_path)
    assert isinstance(registry.load(data, 0).train.x.base, np.memmap)


@pytest.mark.parametrize(
    ("features", "shape"), [(np.zeros((12, 7), np.uint8), (7,)), (np.zeros((12, 6, 8), np.uint8), (1, 6, 8))]
)
def test_flat_rows_and_grey_images_keep_their_shape(tmp_path, features, shape):
    dataset = registry.load(write(tmp_path, x_train=features, x_test=features[:6]), 0)
    assert dataset.input_shape == shape


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(tmp_path, dtype):
    values = np.linspace(-3, 3, 24).reshape(12, 2).astype(dtype)
    dataset = registry.load(write(tmp_path, x_train=values, x_test=values[:6]), 0)
    np.testing.assert_array_equal(dataset.train.take(np.arange(12))[0], values.astype(np.float32))


def test_columns_stored_in_fortran_order_read_the_same(tmp_path):
    values = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(12, 2))
    dataset = registry.load(write(tmp_path, x_train=values, x_test=values[:6]), 0)
    np.testing.assert_array_equal(dataset.train.x, values)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_labels_agree_with_the_loaded_set(tmp_path, save):
    data = write(tmp_path, save=save)
    labels, dataset = registry.labels(data, 0), registry.load(data, 0)
    np.testing.assert_array_equal(labels.y, dataset.train.y)
    assert (labels.classes, labels.input_shape, labels.test_size) == (3, (3, 5, 4), 6)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_labels_read_nothing_of_the_features_but_their_header(tmp_path, monkeypatch, save):
    data = write(tmp_path, save=save)
    read = npz.read_member
    seen = []
    monkeypatch.setattr(npz, "read_member", lambda path, key: seen.append(key) or read(path, key))
    registry.labels(data, 0)
    assert sorted(seen) == ["y_test", "y_train"]


def test_a_path_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(registry.load(config.Data(dataset="own.npz"), 0).train) == 12
    assert registry.absolute(config.Data(dataset="own.npz")).dataset == str((tmp_path / "own.npz").resolve())


@pytest.mark.parametrize("read", [registry.load, registry.labels])
def test_the_number_of_classes_may_be_declared(tmp_path, read):
    assert read(write(tmp_path, classes=7), 0).classes == 7
    assert read(write(tmp_path, classes=np.array([3])), 0).classes == 3
    for wrong in (2, 7.0, np.array([7, 7])):
        with pytest.raises(DataError, match="above the highest label 2"):
            read(write(tmp_path, classes=wrong), 0)


MALFORMED = {
    "missing key": ({"y_test": None}, "holds no y_test"),
    "integer features": ({"x_train": np.zeros((12, 2), np.int32)}, "int32"),
    "text features": ({"x_train": np.full((12, 2), "a")}, "x_train is of type"),
    "float labels": ({"y_train": np.zeros(12)}, "y_train is of type float64"),
    "boolean labels": ({"y_train": np.zeros(12, bool)}, "y_train is of type bool"),
    "negative labels": ({"y_train": np.arange(12) - 1}, "negative"),
    "labels in two columns": ({"y_train": np.zeros((12, 2), int)}, "y_train has shape"),
    "rows without a label": ({"y_train": np.zeros(11, int)}, "12 rows but y_train has 11"),
    "test rows of another shape": ({"x_test": np.zeros((6, 5, 5, 3), np.uint8)}, "shape"),
    "channels first": ({"x_train": np.zeros((12, 3, 5, 9), np.uint8)}, "channels"),
    "five axes": ({"x_train": np.zeros((12, 1, 1, 1, 1), np.uint8)}, "shape"),
    "one axis": ({"x_train": np.zeros(12, np.uint8)}, "shape"),
    "no features": ({"x_train": np.zeros((12, 0), np.uint8)}, "shape"),
    "no training rows": ({"x_train": np.zeros((0, 5, 4, 3), np.uint8), "y_train": np.zeros(0, int)}, "no rows"),
    "no test rows": ({"x_test": np.zeros((0, 5, 4, 3), np.uint8), "y_test": np.zeros(0, int)}, "no rows"),
    "not a number": ({"x_train": np.full((12, 2), np.nan), "x_test": np.zeros((6, 2))}, "not finite"),
    "beyond float32": ({"x_train": np.full((12, 2), 1e300), "x_test": np.zeros((6, 2))}, "not finite"),
    "one class": ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "single class"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_malformed_file_is_one_clear_line(tmp_path, case, save):
    changes, text = MALFORMED[case]
    data = write(tmp_path, save=save, **changes)
    with pytest.raises(DataError, match=text) as caught:
        registry.load(data, 0)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("key", ["x_train", "y_train"])  # both are looked at by both
@pytest.mark.parametrize("read", [registry.load, registry.labels])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pickled_objects_are_refused_and_never_run(tmp_path, key, read, save):
    marker = tmp_path / "ran"
    objects = np.empty(12, object)
    objects[:] = [Bomb(marker)] * 12
    data = write(tmp_path, save=save, **{key: objects})
    with pytest.raises(DataError, match="pickled"):
        read(data, 0)
    assert not marker.exists()


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    (tmp_path / "own.npz").write_bytes(pickle.dumps({"x_train": 1}))
    with pytest.raises(DataError, match="cannot be read"):
        registry.load(config.Data(dataset=str(tmp_path / "own.npz")), 0)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        registry.labels(config.Data(dataset=str(tmp_path / "none.npz")), 0)


def test_a_file_cut_short_is_refused(tmp_path):
    data = write(tmp_path)
    whole = Path(data.dataset).read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 30):
        Path(data.dataset).write_bytes(whole[:length])
        with pytest.raises(DataError):
            registry.load(data, 0)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    data = write(tmp_path, x_train=np.zeros((12, 2), np.uint8), x_test=np.zeros((6, 2), np.uint8))
    blob = Path(data.dataset).read_bytes()
    lying = blob.replace(b"'shape': (12, 2), }    ", b"'shape': (9912345, 2)} ", 1)
    assert lying != blob and len(lying) == len(blob)
    Path(data.dataset).write_bytes(lying)
    with pytest.raises(DataError, match="cut short"):
        registry.load(data, 0)


def test_the_members_may_be_padded_in_the_archive(tmp_path):
    write(tmp_path)
    with zipfile.ZipFile(tmp_path / "own.npz") as source, zipfile.ZipFile(tmp_path / "padded.npz", "w") as target:
        for name in source.namelist():
            info = zipfile.ZipInfo(name)
            info.extra = b"\x99\x99\x04\x00abcd"
            target.writestr(info, source.read(name))
    padded = registry.load(config.Data(dataset=str(tmp_path / "padded.npz")), 0)
    np.testing.assert_array_equal(padded.train.x, arrays()["x_train"].transpose(0, 3, 1, 2))
