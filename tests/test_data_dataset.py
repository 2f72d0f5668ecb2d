from __future__ import annotations

import numpy as np
import pytest

from fed_dpprune.data.dataset import PIXELS, Dataset, Examples, Scale
from fed_dpprune.errors import DataError


def examples(rows: int = 4, shape: tuple[int, ...] = (1, 2, 2), classes: int = 2) -> Examples:
    x = (np.arange(rows * int(np.prod(shape))) % 256).astype(np.uint8).reshape(rows, *shape)
    return Examples(x, np.arange(rows, dtype=np.int64) % classes, PIXELS)


def test_pixels_go_to_minus_one_and_one_exactly():
    x, _ = Examples(np.array([[0, 255, 127, 128]], np.uint8), np.zeros(1, np.int64), PIXELS).take(np.array([0]))
    assert x[0, 0] == -1.0 and x[0, 1] == 1.0 and x[0, 2] == -x[0, 3]


def test_values_without_a_scale_are_taken_as_they_are():
    values = np.array([[1.5, -2.25]], np.float32)
    x, _ = Examples(values, np.zeros(1, np.int64)).take(np.array([0, 0]))
    assert x.tolist() == [[1.5, -2.25], [1.5, -2.25]]


def test_taken_rows_are_contiguous_float32_in_the_order_asked_for():
    stored = examples(4, (2, 3, 3))
    channels_last = np.ascontiguousarray(stored.x.transpose(0, 2, 3, 1))
    viewed = Examples(channels_last.transpose(0, 3, 1, 2), stored.y, stored.scale)
    x, y = viewed.take(np.array([3, 1, 3]))
    assert x.flags.c_contiguous and x.dtype == np.float32 and y.dtype == np.int64
    np.testing.assert_array_equal(x, stored.take(np.array([3, 1, 3]))[0])
    assert y.tolist() == [1, 1, 1]


def test_taking_nothing_gives_an_empty_batch_of_the_right_shape():
    x, y = examples().take(np.zeros(0, np.int64))
    assert x.shape == (0, 1, 2, 2) and y.shape == (0,)


def test_changing_what_was_taken_leaves_the_data_set_alone():
    data = Examples(np.ones((2, 3), np.float32), np.zeros(2, np.int64), Scale(0.0, 2.0))
    x, _ = data.take(np.array([0, 1]))
    x[:] = 9
    assert data.x.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((2, 3)), np.zeros(2, np.int64)),
        (np.zeros((2, 3), np.float32), np.zeros(2, np.int32)),
        (np.zeros((2, 3), np.float32), np.zeros(3, np.int64)),
    ],
)
def test_wrong_types_and_lengths_are_refused(x, y):
    with pytest.raises(DataError):
        Examples(x, y)


@pytest.mark.parametrize(
    "changes",
    [
        {"test": examples(0)},
        {"test": examples(4, (1, 2, 3))},
        {"classes": 1, "train": examples(classes=1), "test": examples(classes=1)},
        {"train": examples(4, classes=3)},
        {"natural": np.zeros(3, np.int64)},
    ],
)
def test_a_data_set_whose_parts_do_not_fit_is_refused(changes):
    parts = {"name": "x", "train": examples(), "test": examples(), "classes": 2, "input_shape": (1, 2, 2), **changes}
    with pytest.raises(DataError):
        Dataset(**parts)


def test_labels_say_the_same_as_the_data_set():
    labels = Dataset("x", examples(6), examples(3), 2, (1, 2, 2), np.arange(6) // 3).labels()
    assert labels.y.tolist() == [0, 1, 0, 1, 0, 1] and labels.test_size == 3
    assert labels.natural is not None and labels.natural.tolist() == [0, 0, 0, 1, 1, 1]
