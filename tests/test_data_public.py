from __future__ import annotations

import numpy as np
import pytest

from fed_dpprune import config
from fed_dpprune.data import public, registry
from fed_dpprune.data.dataset import PIXELS, Dataset, Examples
from fed_dpprune.errors import ConfigError, DataError


def write(path, features: int, y_train):
    x = np.zeros((len(y_train), features), np.float32)
    np.savez(path, x_train=x, y_train=y_train, x_test=x[:2], y_test=[0, 1])


def load(seed: int = 0, **keys):
    return registry.load(config.Data(**keys), seed)


def images(shape: tuple[int, ...], rows: int = 6, classes: int = 3) -> Dataset:
    x = np.random.default_rng(1).integers(0, 256, (rows, *shape)).astype(np.uint8)
    part = Examples(x, np.arange(rows) % classes, PIXELS)
    return Dataset("made", part, part, classes, shape)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mnist", ("mnist", 0, None)),
        ("mnist[0:5000]", ("mnist", 0, 5000)),
        ("a/b c.npz[10:]", ("a/b c.npz", 10, None)),
        ("digits[:7]", ("digits", 0, 7)),
        ("own.data:load[1:2]", ("own.data:load", 1, 2)),
    ],
)
def test_a_spec_reads_as_a_set_and_a_range(text, expected):
    assert public.parse(text) == public.Public(*expected)


@pytest.mark.parametrize("text", ["mnist[5:5]", "mnist[7:3]", "mnist[a:b]", "mnist[1]", "[0:5]", "mnist[0:5", "mnist[-1:5]"])
def test_a_spec_that_cannot_be_read_names_the_key(text):
    with pytest.raises(ConfigError, match=r"data\.public"):
        public.parse(text)


@pytest.mark.parametrize(("span", "start", "stop"), [("[0:100]", 0, 100), ("[1200:]", 1200, 1348), ("[50:60]", 50, 60)])
def test_a_slice_of_the_private_set_is_taken_out_of_its_training_rows(span, start, stop):
    whole, private = load(), load(public=f"digits{span}")
    held_out = public.load_public(f"digits{span}", private, 0)
    np.testing.assert_array_equal(held_out.x, whole.train.x[start:stop])
    kept = np.concatenate([whole.train.x[:start], whole.train.x[stop:]])
    np.testing.assert_array_equal(private.train.x, kept)
    np.testing.assert_array_equal(private.test.x, whole.test.x)
    labels = registry.labels(config.Data(public=f"digits{span}"), 0)
    np.testing.assert_array_equal(labels.y, private.train.y)


def test_the_natural_clients_lose_the_same_rows():
    labels = registry.labels(config.Data(), 0)
    natural = np.arange(labels.y.size) % 4
    with_clients = Dataset("digits", load().train, load().test, 10, (64,), natural)
    data = config.Data(public="digits[10:20]")
    kept = np.delete(natural, np.arange(10, 20))
    np.testing.assert_array_equal(public.without_public(data, with_clients).natural, kept)
    np.testing.assert_array_equal(public.labels_without_public(data, with_clients.labels()).natural, kept)


def test_the_same_file_by_another_path_is_the_same_set(tmp_path, monkeypatch):
    np.savez(
        tmp_path / "own.npz",
        x_train=np.zeros((6, 2), "f4"),
        y_train=np.arange(6) % 2,
        x_test=np.zeros((2, 2), "f4"),
        y_test=[0, 1],
    )
    monkeypatch.chdir(tmp_path)
    assert len(load(dataset="own.npz", public=f"{tmp_path}/./own.npz[0:2]").train) == 4


def test_another_set_takes_nothing_away():
    assert len(load(public="mnist[0:5]").train) == 1348


@pytest.mark.parametrize("text", ["digits", "digits[0:]", "digits[0:99999]"])
def test_a_private_set_that_is_public_as_a_whole_is_refused(text):
    with pytest.raises(ConfigError, match="all of the private"):
        load(public=text)


def test_a_range_behind_the_last_row_is_refused():
    with pytest.raises(ConfigError, match="1348 training rows"):
        load(public="digits[5000:5001]")
    with pytest.raises(ConfigError, match="1348 training rows"):
        public.load_public("digits[5000:5001]", images((64,)), 0)


def test_public_rows_are_training_rows_only():
    whole = load()
    rows = public.load_public("digits", images((64,), classes=10), 0)
    assert len(rows) == len(whole.train)
    np.testing.assert_array_equal(rows.x, whole.train.x)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32), (1, 4, 6)])
def test_public_images_take_the_private_shape_and_keep_their_range(shape):
    rows = public.load_public("digits[0:50]", images(shape, classes=10), 0)
    x, y = rows.take(np.arange(50))
    assert x.shape == (50, *shape) and y.shape == (50,)
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.1


def test_a_constant_image_stays_constant_in_any_size():
    grey = Examples(np.full((2, 3, 7, 9), 77, np.uint8), np.zeros(2, np.int64), PIXELS)
    assert np.unique(public.adapt(grey, (1, 13, 5), "x").x).tolist() == [77]


def test_resizing_keeps_a_linear_ramp_linear_inside():
    ramp = np.tile(np.arange(8, dtype=np.float32), (1, 1, 8, 1))
    wide = public._resize(ramp, 8, 16)[0, 0, 0]
    np.testing.assert_allclose(wide[1:-1], np.arange(0.25, 7, 0.5), atol=1e-5)


def test_colour_becomes_grey_by_its_mean_and_grey_is_repeated():
    colour = Examples(np.array([[[[0]], [[30]], [[90]]]], np.uint8), np.zeros(1, np.int64), PIXELS)
    assert public.adapt(colour, (1, 1, 1), "x").x.ravel().tolist() == [40]
    grey = Examples(np.array([[[[7]]]], np.uint8), np.zeros(1, np.int64), PIXELS)
    assert public.adapt(grey, (3, 1, 1), "x").x.ravel().tolist() == [7, 7, 7]


def test_features_of_another_number_are_refused():
    table = Examples(np.zeros((2, 31), np.float32), np.zeros(2, np.int64))
    for shape in ((64,), (88,), (1, 8, 8)):
        with pytest.raises(DataError, match="cannot become"):
            public.adapt(table, shape, "x")


def test_rows_of_classes_that_the_private_task_lacks_are_left_out():
    rows = public.load_public("digits", images((64,), classes=3), 0)
    assert set(rows.y.tolist()) == {0, 1, 2} and 0 < len(rows) < 1348


def test_a_public_set_without_a_common_class_is_refused(tmp_path):
    np.savez(
        tmp_path / "own.npz",
        x_train=np.zeros((4, 64), "f4"),
        y_train=np.full(4, 5),
        x_test=np.zeros((2, 64), "f4"),
        y_test=[0, 1],
    )
    with pytest.raises(DataError, match="3 private classes"):
        public.load_public(str(tmp_path / "own.npz"), images((64,)), 0)
