from __future__ import annotations

import sys

import numpy as np
import pytest

from fed_dpprune import config
from fed_dpprune.data import registry
from fed_dpprune.errors import ConfigError, DataError

MODULE = """
import numpy as np
from fed_dpprune.data.dataset import Dataset, Examples, Labels
from fed_dpprune.errors import DataError

def load(data, seed):
    rng = np.random.default_rng(seed)
    part = Examples(rng.normal(size=(9, 5)).astype(np.float32), np.arange(9) % 3)
    return Dataset("own", part, part, 3, (5,), np.arange(9) // 3)

def quick(data, seed):
    raise RuntimeError("features are not needed")

quick.labels = lambda data, seed: Labels(np.arange(4) % 2, 2, (5,), None, 1)

def wrong(data, seed):
    return {"x": 1}

def broken(data, seed):
    return 1 / 0

def picky(data, seed):
    raise DataError("own", "says so itself")

number = 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_data", None)


def data(name: str) -> config.Data:
    return config.Data(dataset=f"own_data:{name}")


def test_a_users_loader_in_the_working_directory_is_found():
    before = list(sys.path)
    dataset, labels = registry.load(data("load"), 0), registry.labels(data("load"), 0)
    assert sys.path == before
    assert len(dataset.train) == 9 and dataset.input_shape == (5,)
    np.testing.assert_array_equal(labels.natural, np.arange(9) // 3)


def test_its_own_labels_spare_the_features():
    assert registry.labels(data("quick"), 0).y.tolist() == [0, 1, 0, 1]
    with pytest.raises(ConfigError, match="features are not needed"):
        registry.load(data("quick"), 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own_data:wrong", "returned dict, not Dataset"),
        ("own_data:broken", "ZeroDivisionError"),
        ("own_data:absent", "absent"),
        ("own_data:number", "not a function"),
        ("no_such_package:load", "No module named"),
    ],
)
def test_a_mistake_in_it_is_one_line_that_names_the_key(name, text):
    with pytest.raises(ConfigError, match=text) as caught:
        registry.load(config.Data(dataset=name), 0)
    assert caught.value.what == "data.dataset"


def test_its_own_errors_pass_through():
    with pytest.raises(DataError, match="says so itself"):
        registry.load(data("picky"), 0)
