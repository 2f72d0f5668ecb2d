"""A node's rows against its declaration: each is decided by itself, and belongs to one node by its own content."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFile

from fed_dpprune.data import folder, lines, node_rows
from fed_dpprune.data.node_rows import Declared
from fed_dpprune.errors import ConfigError, DataError

DECLARED = Declared((3,), 4)


def kept(rows: node_rows.Rows, indices: Any = None) -> list[tuple[bytes, int]]:
    """What a node trains on, as bits: (features, label) of each row, in order."""
    x, y = rows.examples.take(rows.fitting if indices is None else indices)
    return [(row.tobytes(), int(label)) for row, label in zip(x, y, strict=True)]


def save(path: Path, x: Any, y: Any, **more: Any) -> str:
    np.savez(path, x_train=x, y_train=y, **more)
    return str(path)


# --- shape ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape"), [("13", (13,)), (13, (13,)), ("28x28", (1, 28, 28)), ("32x16x3", (3, 32, 16)), ("28x28x1", (1, 28, 28))]
)
def test_a_shape_reads_as_the_file_has_it_and_comes_out_channels_first(text, shape):
    assert node_rows.parse_shape(text) == shape
    assert node_rows.parse_shape(node_rows.shape_text(shape)) == shape


@pytest.mark.parametrize(
    "value", ["", "0", "28x", "x28", "28 x 28", "28,28", "-3", "3.0", 3.0, True, None, "2x2x2x2", "8x8x9", "٣"]
)
def test_what_is_no_shape_is_refused(value):
    with pytest.raises(ConfigError, match="node-config shape"):
        node_rows.parse_shape(value)


@pytest.mark.parametrize("data", ["", "digit", "mine.csv", "folder/of/images", "os:system()", "mnist "])
def test_a_name_that_is_no_data_is_refused_before_anything_is_opened(data):
    with pytest.raises(ConfigError, match="node-config data"):
        node_rows.check_name(data)


# --- rows that do not fit ---------------------------------------------------------------------------------------------

BAD_ROWS: dict[str, tuple[list[float], float]] = {
    "nan": ([0.0, np.nan, 0.0], 1),
    "infinite": ([np.inf, 0.0, 0.0], 1),
    "beyond float32": ([0.0, 0.0, 1e39], 1),
    "label past the classes": ([0.0, 0.0, 0.0], 4),
    "negative label": ([0.0, 0.0, 0.0], -1),
    "half a label": ([0.0, 0.0, 0.0], 1.5),
    "no label": ([0.0, 0.0, 0.0], np.nan),
    "huge label": ([0.0, 0.0, 0.0], 1e300),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_row_that_does_not_fit_is_absent_and_changes_no_other_rows_bits(tmp_path, bad, at):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(5, 3)), np.array([0, 1, 2, 3, 0], dtype=np.float64)
    with_bad = save(tmp_path / "with.npz", np.insert(x, at, BAD_ROWS[bad][0], axis=0), np.insert(y, at, BAD_ROWS[bad][1]))
    without = node_rows.read(save(tmp_path / "without.npz", x, y), DECLARED)
    found = node_rows.read(with_bad, DECLARED)
    assert kept(found) == kept(without)
    assert (found.total, found.fitting.size, without.fitting.size) == (6, 5, 5)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((6, 4), "f4"), np.zeros(6, int)),
        (np.zeros((6, 3, 3), "f4"), np.zeros(6, int)),
        (np.zeros((6, 3), "i8"), np.zeros(6, int)),
        (np.zeros((6, 3), "c8"), np.zeros(6, int)),
        (np.zeros((6, 3), "f4"), np.zeros(6, bool)),
        (np.zeros((6, 3), "f4"), np.array(["0"] * 6)),
        (np.zeros((0, 3), "f4"), np.zeros(0, int)),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_a_file_of_another_shape_or_type_has_no_row_that_fits(tmp_path, x, y):
    found = node_rows.read(save(tmp_path / "other.npz", x, y), DECLARED)
    assert found.fitting.size == 0
    assert found.examples.shape == (3,) or found.total == 0


def test_a_file_whose_labels_and_features_do_not_pair_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="belong together"):
        node_rows.read(save(tmp_path / "x.npz", np.zeros((5, 3), "f4"), np.zeros(4, int)), DECLARED)


def test_nothing_of_a_file_but_its_training_rows_matters(tmp_path):
    x, y = np.ones((4, 3), "f4"), np.arange(4)
    plain = kept(node_rows.read(save(tmp_path / "a.npz", x, y), DECLARED))
    more = save(tmp_path / "b.npz", x, y, classes=99, x_test=np.full((2, 9), np.nan), y_test=[77, 78])
    assert kept(node_rows.read(more, DECLARED)) == plain


def test_uint8_is_scaled_by_public_constants_and_floats_are_left_alone(tmp_path):
    pixels = np.array([[[0, 255], [51, 204]]], dtype=np.uint8)
    found = node_rows.read(save(tmp_path / "p.npz", pixels, [1]), Declared((1, 2, 2), 2))
    assert found.examples.take(found.fitting)[0].ravel().tolist() == pytest.approx([-1, 1, -0.6, 0.6])
    big = node_rows.read(save(tmp_path / "f.npz", np.array([[3e38, -7.0, 1e-40]]), [1]), DECLARED)
    assert big.examples.take(big.fitting)[0].tolist() == [np.array([3e38, -7.0, 1e-40], dtype=np.float32).tolist()]


# --- whose row it is --------------------------------------------------------------------------------------------------

ROW = st.tuples(
    arrays.arrays(np.float32, 3, elements=st.floats(width=32, allow_nan=True, allow_infinity=True)), st.integers(-2, 6)
)


def shares(rows: list[tuple[Any, int]], partitions: int) -> list[list[tuple[bytes, int]]]:
    x = np.array([row for row, _ in rows], dtype=np.float32).reshape(-1, 3)
    found = node_rows.fit(x, np.array([label for _, label in rows], dtype=np.int64), None, DECLARED)
    return [sorted(kept(found, node_rows.owned(found, part, partitions))) for part in range(partitions)]


@given(rows=st.lists(ROW, max_size=12), added=ROW, data=st.data(), partitions=st.integers(1, 5))
def test_one_row_more_anywhere_moves_one_share_by_that_row_and_no_other(rows, added, data, partitions):
    at = data.draw(st.integers(0, len(rows)))
    before, after = shares(rows, partitions), shares([*rows[:at], added, *rows[at:]], partitions)
    fits = bool(np.isfinite(added[0]).all()) and 0 <= added[1] < 4
    moved = [part for part in range(partitions) if before[part] != after[part]]
    assert len(moved) == (1 if fits else 0)
    for part in moved:
        assert sorted([*before[part], (added[0].tobytes(), added[1])]) == after[part]


@given(rows=st.lists(ROW, min_size=1, max_size=8), data=st.data())
def test_equal_rows_go_to_one_node_and_every_row_to_exactly_one(rows, data):
    again = [*rows, *data.draw(st.lists(st.sampled_from(rows), max_size=6))]
    parts = shares(data.draw(st.permutations(again)), 3)
    owners: dict[tuple[bytes, int], set[int]] = {}
    for part, held in enumerate(parts):
        for row in held:
            owners.setdefault(row, set()).add(part)
    assert all(len(found) == 1 for found in owners.values())
    assert sum(map(len, parts)) == sum(map(len, shares(again, 1)))


def test_shares_are_of_nearly_equal_size():
    rng = np.random.default_rng(0)
    found = node_rows.fit(rng.normal(size=(4000, 3)).astype("f4"), rng.integers(0, 4, 4000), None, DECLARED)
    sizes = [node_rows.owned(found, part, 4).size for part in range(4)]
    assert sum(sizes) == 4000
    assert all(abs(size - 1000) < 5 * np.sqrt(1000) for size in sizes)


# --- the kinds of data ------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path / "cache"))
    for name in ("cat", "dog"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        for number in range(3):
            grey = np.full((4, 5), 40 * number + len(name), dtype=np.uint8)
            Image.fromarray(grey).save(tmp_path / "set" / "train" / name / f"{number}.png")
    return tmp_path / "set"


PICTURES = Declared((1, 4, 5), 2, ("cat", "dog"))


def padded(path: Path) -> None:
    """A picture that fits, in a file of a gigabyte (of zeros that take no room)."""
    Image.new("L", (5, 4)).save(path)
    os.truncate(path, 2**30)


def tiled(path: Path, side: int) -> None:
    """A TIFF of 5 x 4 grey pixels in one tile of so many rows and columns."""
    values = {256: 5, 257: 4, 258: 8, 259: 1, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: side * side}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    where = 8 + side * side
    with open(path, "wb") as file:
        file.write(b"II*\0" + struct.pack("<I", where))
        file.seek(where)  # the tile is a hole
        file.write(struct.pack("<H", len(values)) + entries + struct.pack("<I", 0))


@pytest.mark.parametrize(("side", "rows"), [(16, 7), (2**12 + 16, 6)])
def test_a_picture_in_tiles_far_larger_than_itself_is_absent(images, side, rows, monkeypatch):
    monkeypatch.setattr(folder, "HEADERS", 2**30)  # packed, such a tile takes a few bytes of a file
    tiled(images / "train" / "cat" / "9.tif", side)
    assert node_rows.read(str(images), PICTURES).fitting.size == rows


@contextlib.contextmanager
def in_time(seconds: int = 20) -> Iterator[None]:
    """Fails where the block waits for ever; the failure is no `Exception`, which a reader may take for a damaged row."""

    def late(*_: Any) -> None:
        pytest.fail(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("mode", "size"), [("L", (3000, 3000)), ("L", (5, 5)), ("RGB", (5, 4)), ("RGB", (4, 1))], ids=str)
def test_a_picture_of_another_shape_is_not_decoded(images, mode, size, monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append((image.mode, image.size)) or load(image))
    Image.new(mode, size).save(images / "train" / "cat" / "9.png")
    assert node_rows.read(str(images), PICTURES).fitting.size == 6
    assert set(decoded) == {("L", (5, 4))}


def test_a_pipe_in_the_place_of_a_file_is_an_error_and_no_wait(images, tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    with in_time(), pytest.raises(DataError, match="no regular file"):
        node_rows.read(str(tmp_path / "pipe.npz"), PICTURES)
    os.mkfifo(images / "train" / "cat" / "pipe.png")
    with in_time():
        assert node_rows.describe(str(images)).declared == PICTURES


def test_a_pipe_is_no_picture_though_somebody_writes_one_into_it(images):
    pipe = images / "train" / "cat" / "9.png"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(held, (images / "train" / "cat" / "1.png").read_bytes())
        with in_time():
            with pytest.raises(DataError, match="no regular file"):
                folder._pixels(pipe, (1, 4, 5))
            assert node_rows.read(str(images), PICTURES).fitting.size == 6
    finally:
        os.close(held)


def test_a_picture_beyond_the_bound_is_not_decoded_without_a_declaration(images, monkeypatch):
    monkeypatch.setattr(folder, "LARGEST", 19)
    with pytest.raises(DataError, match="5 x 4 pixels are more than 19 values"):
        folder._pixels(images / "train" / "cat" / "1.png")
    monkeypatch.setattr(folder, "LARGEST", 20)
    assert folder._pixels(images / "train" / "cat" / "1.png").shape == (4, 5)


def test_a_line_takes_bounded_memory_whatever_its_length():
    file = io.BytesIO(b"a\x0cb\r\n" + b"1" * 2**26 + b"\n \nc" + b"\xff\n" + b"2" * 2 * lines.LONGEST)
    tracemalloc.start()
    try:
        found = list(lines.lines(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [line.strip() for line in found] == ["a\x0cb", "?", "c\ufffd", "?"]
    assert peak < 2**20


@pytest.mark.parametrize(
    "spoil",
    [
        lambda train: Image.new("L", (9, 9)).save(train / "cat" / "0-other-size.png"),
        lambda train: Image.new("RGB", (5, 4)).save(train / "cat" / "0-colour.png"),
        lambda train: (train / "cat" / "0-broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot"),
        lambda train: (train / "cat" / "0-nowhere.png").symlink_to(train / "gone.png"),
        lambda train: [(train / "aardvark").mkdir(), Image.new("L", (5, 4)).save(train / "aardvark" / "1.png")],
        lambda train: os.mkfifo(train / "cat" / "0-pipe.png"),
        lambda train: (train / "cat" / "0-folder.png").mkdir(),
        lambda train: (train / "cat" / "0-device.png").symlink_to("/dev/zero"),
        lambda train: Image.new("L", (5, 4)).save(train / "cat" / "0-other-format.png", format="PCX"),
        lambda train: padded(train / "cat" / "0-padded.png"),
        lambda train: tiled(train / "cat" / "0-tile.tif", 2**13),
    ],
    ids=["size", "colour", "broken", "link", "new class", "pipe", "folder", "device", "format", "padded", "tile"],
)
def test_one_image_or_class_that_does_not_fit_changes_nothing_about_the_others(images, spoil):
    before = kept(node_rows.read(str(images), PICTURES))
    spoil(images / "train")
    with in_time():
        assert kept(node_rows.read(str(images), PICTURES)) == before
    assert [label for _, label in before] == [0, 0, 0, 1, 1, 1]


def test_a_folder_of_another_shape_or_without_images_has_no_row_that_fits(images, tmp_path):
    assert node_rows.read(str(images), Declared((1, 9, 9), 2, ("cat", "dog"))).fitting.size == 0
    assert node_rows.read(str(images), Declared((20,), 2, ("cat", "dog"))).fitting.size == 0
    assert node_rows.read(str(images), Declared((1, 4, 5), 2)).fitting.size == 0  # names that are no numbers are no classes
    with pytest.raises(DataError, match="no folder train"):
        node_rows.read(str(tmp_path), PICTURES)


@pytest.mark.parametrize("line", ["garbage", "?, ?", "39, State-gov", "\xff" * 5, "39" + ", x" * 14, "9" * 10**7])
def test_a_line_of_adult_that_does_not_read_is_absent_alone(tmp_path, monkeypatch, line):
    monkeypatch.setenv("FED_DPPRUNE_DATA", str(tmp_path))
    (tmp_path / "adult").mkdir()
    good = (
        "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
        "United-States, <=50K"
    )
    file = tmp_path / "adult" / "adult.data"
    found = []
    for content in ([good, good.replace("39", "50")], [good, line, good.replace("39", "50")]):
        file.write_bytes("\n".join(content).encode("latin-1"))
        found.append(kept(node_rows.read("adult", Declared((88,), 2))))
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_line_of_heart_disease_that_does_not_read_is_absent_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FED_DPPRUNE_DATA", str(tmp_path))
    (tmp_path / "heart_disease").mkdir()
    good = "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0"
    for name in ("cleveland", "hungarian", "switzerland", "va"):
        (tmp_path / "heart_disease" / f"processed.{name}.data").write_text(good + "\n")
    before = kept(node_rows.read("heart-disease", Declared((31,), 2)))
    (tmp_path / "heart_disease" / "processed.hungarian.data").write_text(
        f"nonsense\n{good}\n1,2\n{good[:-1]}?\n{'1,' * 10**6}0\n"
    )
    assert kept(node_rows.read("heart-disease", Declared((31,), 2))) == before
    assert len(before) == 4


def test_the_digits_of_a_node_are_all_of_them_without_a_split():
    found = node_rows.read("digits", Declared((64,), 10))
    assert (found.total, found.fitting.size) == (1797, 1797)


OWN = """
import numpy as np
from fed_dpprune.data.dataset import Examples

def rows(data, seed):
    assert (data.partition, data.public, data.test_fraction, seed) == ("iid", "", 0.25, 0)
    return Examples(np.array([[1, 2, 3], [4, np.nan, 6], [7, 8, 9]], dtype=np.float32), np.array([0, 1, 9]))
"""


def test_an_operators_own_function_gives_rows_that_are_decided_one_by_one(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = node_rows.read("my_rows:rows", DECLARED)
    assert found.fitting.tolist() == [0]


# --- describing -------------------------------------------------------------------------------------------------------


def test_a_description_is_of_what_most_rows_are(images, tmp_path):
    seen = node_rows.describe(str(images))
    assert (seen.declared, seen.rows, seen.total) == (PICTURES, 6, 6)
    path = save(tmp_path / "x.npz", np.array([[0.0, 1], [np.nan, 1], [2, 2]]), [0, 1, 5])
    seen = node_rows.describe(path)
    assert (seen.declared, seen.rows, seen.total) == (Declared((2,), 6), 2, 3)


def test_data_of_one_class_or_of_another_type_are_not_described(tmp_path):
    for x, y in ((np.zeros((3, 2)), [0, 0, 0]), (np.zeros((3, 2), int), [0, 1, 0])):
        with pytest.raises(DataError):
            node_rows.describe(save(tmp_path / "x.npz", x, y))
