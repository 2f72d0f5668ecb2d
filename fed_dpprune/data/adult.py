"""Adult (census income): does a person earn more than 50,000 dollars a year? 88 features, 32,561 + 16,281 rows.

Source: Becker and Kohavi, 1994 US census extract, UCI repository. Files FED_DPPRUNE_DATA/adult/adult.data and adult.test,
packed (.gz) or not. `fnlwgt` (a survey weight) and `education` (repeats education-num) are left out. A missing category
("?") is a block of zeros.

Every constant here is public: categories are the code book's (adult.names), numbers are centred and scaled by round
figures for working adults in the US (age 40 +- 15 years, 40 +- 12 hours a week, the middle and half the range of the
education scale 1..16, capital on a log scale up to the survey's top code 99,999). None was computed from the rows.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data import lines
from fed_dpprune.data.dataset import Dataset, Examples, Labels
from fed_dpprune.errors import DataError
from fed_dpprune.places import data_root

COLUMNS = 15
MISSING = "?"
TOP_CODE = 99_999.0


def _capital(dollars: float) -> float:
    """0 to -1 and the top code to 1."""
    return 2.0 * math.log1p(max(0.0, dollars)) / math.log1p(TOP_CODE) - 1.0


NUMBERS: dict[int, Callable[[float], float]] = {
    0: lambda age: (age - 40.0) / 15.0,
    4: lambda education: (education - 8.5) / 7.5,
    10: _capital,
    11: _capital,
    12: lambda hours: (hours - 40.0) / 12.0,
}

CATEGORIES: dict[int, tuple[str, ...]] = {
    column: tuple(words.split())
    for column, words in {
        1: "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay Never-worked",
        5: "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent Married-AF-spouse",
        6: "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty Handlers-cleaners Machine-op-inspct "
        "Adm-clerical Farming-fishing Transport-moving Priv-house-serv Protective-serv Armed-Forces",
        7: "Wife Own-child Husband Not-in-family Other-relative Unmarried",
        8: "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
        9: "Female Male",
        13: "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) India Japan Greece South China "
        "Cuba Iran Honduras Philippines Italy Poland Jamaica Vietnam Mexico Portugal Ireland France Dominican-Republic Laos "
        "Ecuador Taiwan Haiti Columbia Hungary Guatemala Nicaragua Scotland Thailand Yugoslavia El-Salvador Trinadad&Tobago "
        "Peru Hong Holand-Netherlands",
    }.items()
}
FEATURES = len(NUMBERS) + sum(map(len, CATEGORIES.values()))
CLASSES = {"<=50K": 0, ">50K": 1}
ADVICE = "use the files of the UCI repository"
WANTED = "put adult.data and adult.test (or their .gz) into FED_DPPRUNE_DATA/adult"


def load(data: config.Data, seed: int) -> Dataset:
    """The data set with its own test split."""
    train, test = (_examples(part) for part in ("data", "test"))
    return Dataset("adult", train, test, len(CLASSES), (FEATURES,))


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes; the other columns are not looked at."""
    y_train, y_test = (_labels([row.rpartition(",")[2].strip() for row in _rows(part)], part) for part in ("data", "test"))
    return Labels(y_train, len(CLASSES), (FEATURES,), None, int(y_test.size))


def node_rows() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The people of adult.data for a node, each line read by itself; -1 as the label of a line that does not read."""
    features: list[NDArray[np.float32]] = []
    found: list[int] = []
    for line in _node_lines(_file("data")):
        try:
            one = _table_examples([[cell.strip() for cell in line.split(",")]], "data")
            features.append(one.x[0])
            found.append(int(one.y[0]))
        except Exception:  # whatever a line makes its reader raise, it is one person who is absent
            features.append(np.zeros(FEATURES, dtype=np.float32))
            found.append(-1)
    return np.array(features, dtype=np.float32).reshape(-1, FEATURES), np.array(found, dtype=np.int64)


def _node_lines(path: Path) -> Iterator[str]:
    """The lines of adult.data, packed or not, read one by one."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from (line for line in lines.lines(file) if not line.startswith("|"))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(str(path), f"cannot be read ({error})") from None


def find(part: str) -> Path | None:
    """adult.data or adult.test, packed or not; None when it is not there."""
    root = data_root()
    for name in (f"adult.{part}.gz", f"adult.{part}"):
        if root is not None and (root / "adult" / name).is_file():
            return root / "adult" / name
    return None


def _file(part: str) -> Path:
    path = find(part)
    if path is None:
        raise DataError("data.dataset = adult", f"adult.{part} not found", WANTED)
    return path


def _rows(part: str) -> list[str]:
    """Lines with data: adult.test opens with a comment, adult.data ends with an empty line."""
    path = _file(part)
    try:
        blob = path.read_bytes()
        text = (gzip.decompress(blob) if path.suffix == ".gz" else blob).decode("ascii")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(str(path), f"cannot be read ({error})") from None
    return [line for line in text.splitlines() if line.strip() and not line.startswith("|")]


def _labels(words: list[str], part: str) -> NDArray[np.int64]:
    try:
        return np.array([CLASSES[word.removesuffix(".")] for word in words], dtype=np.int64)
    except KeyError as error:
        raise DataError(f"adult.{part}", f"{error} is not an income class", ADVICE) from None


def _examples(part: str) -> Examples:
    return _table_examples([[cell.strip() for cell in row.split(",")] for row in _rows(part)], part)


def _table_examples(table: list[list[str]], part: str) -> Examples:
    if any(len(row) != COLUMNS for row in table):
        raise DataError(f"adult.{part}", f"a row has not {COLUMNS} columns", ADVICE)
    columns = list(zip(*table, strict=True))
    y = _labels(list(columns[-1]), part)
    blocks = [_column(number, columns[number], part) for number in sorted({**NUMBERS, **CATEGORIES})]
    return Examples(np.concatenate(blocks, axis=1), y)


def _column(number: int, cells: tuple[str, ...], part: str) -> NDArray[np.float32]:
    """One column of the file as features, shape (rows, 1) or (rows, categories)."""
    try:
        if number in NUMBERS:
            return np.array([NUMBERS[number](float(cell)) for cell in cells], dtype=np.float32)[:, None]
        code = {word: place for place, word in enumerate(CATEGORIES[number])}
        places = np.array([code[cell] if cell != MISSING else len(code) for cell in cells])
        one_hot: NDArray[np.float32] = np.eye(len(code) + 1, len(code), dtype=np.float32)[places]
        return one_hot
    except (KeyError, ValueError) as error:
        raise DataError(f"adult.{part}", f"column {number + 1}: {error}", ADVICE) from None
