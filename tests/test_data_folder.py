from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fed_dpprune import config
from fed_dpprune.data import cached, registry
from fed_dpprune.errors import DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path / "cache"))


def write(folder, mode: str = "RGB"):
    """Two classes, 3 + 2 training and 1 + 2 test images of 4 x 6 pixels."""
    for part, counts in (("train", {"cat": 3, "dog": 2}), ("test", {"cat": 1, "dog": 2})):
        for name, count in counts.items():
            (folder / part / name).mkdir(parents=True)
            for row in range(count):
                colour = 40 * row if mode == "L" else (40 * row, 1, 2)
                Image.new(mode, (6, 4), colour).save(folder / part / name / f"{row}.png")
    return folder


def load(folder):
    return registry.load(config.Data(dataset=str(folder)), 0)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_folder_gives_its_classes_in_the_order_of_their_names(tmp_path, mode, channels):
    dataset = load(write(tmp_path / "own", mode))
    assert dataset.train.y.tolist() == [0, 0, 0, 1, 1] and dataset.test.y.tolist() == [0, 1, 1]
    assert dataset.input_shape == (channels, 4, 6)
    assert dataset.train.x[2, 0].tolist() == [[80] * 6] * 4


def test_labels_agree_with_the_loaded_folder(tmp_path):
    data = config.Data(dataset=str(write(tmp_path / "own")))
    labels = registry.labels(data, 0)
    np.testing.assert_array_equal(labels.y, registry.load(data, 0).train.y)
    assert (labels.classes, labels.input_shape, labels.test_size) == (2, (3, 4, 6), 3)


def test_a_changed_folder_is_read_again(tmp_path):
    folder = write(tmp_path / "own")
    load(folder)
    Image.new("RGB", (6, 4), (9, 9, 9)).save(folder / "train" / "cat" / "0.png")
    Image.new("RGB", (6, 4), (7, 7, 7)).save(folder / "train" / "dog" / "9.png")
    dataset = load(folder)
    assert len(dataset.train) == 6 and dataset.train.x[0, 0, 0, 0] == 9


def test_files_that_are_no_images_are_passed_over(tmp_path):
    folder = write(tmp_path / "own")
    (folder / "train" / "cat" / "notes.txt").write_text("x")
    assert len(load(folder).train) == 5


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda f: Image.new("RGB", (5, 4)).save(f / "train" / "dog" / "z.png"), "has shape"),
        (lambda f: Image.new("L", (6, 4)).save(f / "train" / "dog" / "z.png"), "has shape"),
        (lambda f: (f / "train" / "dog" / "z.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish"), "not a readable image"),
        (lambda f: (f / "test" / "eel").mkdir(), "train/ lacks: eel"),
        (lambda f: (f / "test").rename(f / "other"), "no folders train and test"),
        (lambda f: [path.unlink() for path in (f / "test").rglob("*.png")], "holds no images"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line_and_leaves_no_file(tmp_path, spoil, text):
    folder = write(tmp_path / "own")
    spoil(folder)
    with pytest.raises(DataError, match=text):
        load(folder)
    assert not list(cached.path("x").parent.glob("*"))
