"""Heart disease at four hospitals: Cleveland, Hungary, Switzerland, Long Beach VA. 31 features, 920 patients, 4 clients.

Source: Janosi, Steinbrunn, Pfisterer, Detrano (1988), UCI repository. Files FED_DPPRUNE_DATA/heart_disease/processed.*.data.
Class 1 is any disease (last column above 0). The test split is stratified by hospital and class.

Much is missing ("?", and a cholesterol or blood pressure of 0). Every constant below is public, none was computed from
the rows, so filling in spends nothing: a missing number becomes the constant centre (0 after scaling) and raises a flag
beside it; a missing category is a block of zeros; numbers are cut at +-3 half ranges. Centres and half ranges are round
textbook figures for adults sent to a heart clinic.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data import lines, split
from fed_dpprune.data.dataset import Dataset, Examples, Labels, Scale
from fed_dpprune.errors import DataError
from fed_dpprune.places import data_root

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
COLUMNS = 14
MISSING = "?"
CUT = 3.0

NUMBERS: dict[int, Scale] = {
    0: Scale(55.0, 10.0),  # age, years
    3: Scale(130.0, 20.0),  # blood pressure at rest, mm Hg
    4: Scale(240.0, 50.0),  # cholesterol, mg/dl
    7: Scale(140.0, 25.0),  # highest heart rate, beats per minute
    9: Scale(1.0, 1.0),  # ST depression, mm
    11: Scale(1.0, 1.0),  # vessels coloured by fluoroscopy, 0..3
}
ZERO_IS_MISSING = (3, 4)
CATEGORIES: dict[int, tuple[int, ...]] = {
    1: (0, 1),  # sex
    2: (1, 2, 3, 4),  # kind of chest pain
    5: (0, 1),  # fasting sugar above 120 mg/dl
    6: (0, 1, 2),  # electrocardiogram at rest
    8: (0, 1),  # pain under exercise
    10: (1, 2, 3),  # slope of the ST segment
    12: (3, 6, 7),  # thallium scan
}
FEATURES = 2 * len(NUMBERS) + sum(map(len, CATEGORIES.values()))
ADVICE = "use the processed files of the UCI repository"
WANTED = "put processed.{" + ",".join(HOSPITALS) + "}.data into FED_DPPRUNE_DATA/heart_disease"


def load(data: config.Data, seed: int) -> Dataset:
    """The data set with a stratified test split of `data.test-fraction`; `natural` is the hospital."""
    rows, y, hospital = _table()
    train, test = split.stratified(2 * hospital + y, data.test_fraction, seed)
    x = np.array([_features(row) for row in rows], dtype=np.float32)
    return Dataset("heart-disease", Examples(x[train], y[train]), Examples(x[test], y[test]), 2, (FEATURES,), hospital[train])


def labels(data: config.Data, seed: int) -> Labels:
    """Labels, hospitals and shapes."""
    _, y, hospital = _table()
    train, test = split.stratified(2 * hospital + y, data.test_fraction, seed)
    return Labels(y[train], 2, (FEATURES,), hospital[train], int(test.size))


def node_rows() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All patients for a node, each line read by itself: no split, and -1 as the label of a line that does not read."""
    features: list[list[float]] = []
    labels_: list[int] = []
    for name in HOSPITALS:
        with open(_found(name), "rb") as file:
            for line in lines.lines(file):
                try:
                    row = _row(line, Path(name))
                except DataError:
                    row = [math.nan] * COLUMNS
                features.append(_features(row))
                labels_.append(-1 if math.isnan(row[-1]) else int(row[-1] > 0))
    return np.array(features, dtype=np.float32).reshape(-1, FEATURES), np.array(labels_, dtype=np.int64)


def find(hospital: str) -> Path | None:
    """The file of one hospital; None when it is not there."""
    root = data_root()
    path = None if root is None else root / "heart_disease" / f"processed.{hospital}.data"
    return path if path is not None and path.is_file() else None


def _table() -> tuple[list[list[float]], NDArray[np.int64], NDArray[np.int64]]:
    """All rows with NaN for what is missing, labels, and the hospital of each row."""
    rows: list[list[float]] = []
    hospitals: list[int] = []
    for number, name in enumerate(HOSPITALS):
        path = _found(name)
        lines = _lines(path)
        rows += [_row(line, path) for line in lines]
        hospitals += [number] * len(lines)
    y = np.array([row[-1] > 0 for row in rows], dtype=np.int64)
    return rows, y, np.array(hospitals, dtype=np.int64)


def _found(name: str) -> Path:
    path = find(name)
    if path is None:
        raise DataError("data.dataset = heart-disease", f"processed.{name}.data not found", WANTED)
    return path


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="ascii", errors="replace").splitlines() if line.strip()]


def _row(line: str, path: Path) -> list[float]:
    try:
        row = [math.nan if cell.strip() == MISSING else float(cell) for cell in line.split(",")]
    except ValueError as error:
        raise DataError(str(path), str(error), ADVICE) from None
    if len(row) != COLUMNS or math.isnan(row[-1]):
        raise DataError(
            str(path), f"a row has not {COLUMNS} columns or no class", "use the processed files of the UCI repository"
        )
    return row


def _features(row: list[float]) -> list[float]:
    """One patient, FEATURES numbers: each measured number and its flag, then each category's block."""
    out: list[float] = []
    for column, scale in NUMBERS.items():
        value = row[column]
        missing = math.isnan(value) or (column in ZERO_IS_MISSING and value == 0)
        scaled = 0.0 if missing else (value - scale.center) / scale.half_range
        out += [max(-CUT, min(CUT, scaled)), float(missing)]
    for column, codes in CATEGORIES.items():
        out += [float(row[column] == code) for code in codes]
    return out
