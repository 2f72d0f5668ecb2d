from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpprune import config
from fed_dpprune.data import partition, picture, split
from fed_dpprune.errors import ConfigError

Y = np.repeat(np.arange(10), 120)


def draw(scheme: str, clients: int = 10, seed: int = 0, y=Y, alpha: float = 0.5, natural=None):
    return partition.draw(config.Data(partition=scheme, alpha=alpha), clients, y, natural, seed)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards"])
@settings(max_examples=10, deadline=None)
@given(clients=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_every_row_belongs_to_exactly_one_client(scheme, clients, seed):
    parts = draw(scheme, clients, seed)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(Y.size))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards"])
def test_the_seed_decides_the_partition(scheme):
    same, again, other = draw(scheme, seed=3), draw(scheme, seed=3), draw(scheme, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(same, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(same, other, strict=True))


def test_iid_parts_differ_by_one_row_at_most_and_mix_the_classes():
    parts = draw("iid", 7)
    sizes = [part.size for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(np.bincount(Y[part], minlength=10).min() > 0 for part in parts)


def test_shards_give_few_classes_to_each_client():
    assert max(np.unique(Y[part]).size for part in draw("shards", 10)) <= 4


def test_dirichlet_is_the_more_skewed_the_smaller_alpha():
    def skew(alpha: float) -> float:
        return float(picture.counts(draw("dirichlet", alpha=alpha), Y, 10).std())

    assert skew(0.1) > 2 * skew(10.0)


@given(seed=st.integers(0, 500))
@settings(max_examples=25, deadline=None)
def test_dirichlet_leaves_no_client_with_fewer_than_ten_rows(seed):
    assert min(part.size for part in draw("dirichlet", 10, seed, alpha=0.1)) >= 10


def test_a_dirichlet_that_cannot_be_drawn_names_alpha():
    with pytest.raises(ConfigError, match=r"data\.alpha.*100 draws"):
        draw("dirichlet", 200, alpha=0.01)


def test_natural_follows_the_data_set_whatever_number_of_clients_is_asked():
    natural = np.array([2, 0, 1, 0, 2])
    parts = draw("natural", 10, y=np.zeros(5, np.int64), natural=natural)
    assert [part.tolist() for part in parts] == [[1, 3], [2], [0, 4]]


def test_natural_without_clients_names_the_key():
    with pytest.raises(ConfigError, match=r"data\.partition"):
        draw("natural")


@pytest.mark.parametrize(("scheme", "clients"), [("iid", 6), ("dirichlet", 6), ("shards", 3)])
def test_more_clients_than_rows_names_the_key(scheme, clients):
    with pytest.raises(ConfigError, match=r"federation\.clients"):
        draw(scheme, clients, y=np.arange(5))


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=8),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_the_test_split_holds_exact_counts_of_every_class_and_no_training_row(sizes, fraction, seed):
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    train, test = split.stratified(groups, fraction, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(groups.size))
    counts = np.bincount(groups[test], minlength=len(sizes))
    assert test.size == round(groups.size * fraction)
    assert np.all(np.abs(counts - np.array(sizes) * fraction) < 1 + 1e-9)


def test_the_test_split_is_the_same_on_every_machine():
    _, test = split.stratified(np.tile(np.arange(4), 10), 0.25, 7)
    assert test.tolist() == [0, 4, 15, 17, 18, 22, 27, 33, 36, 37]


def test_the_picture_is_written(tmp_path):
    parts = draw("dirichlet")
    path = tmp_path / "partition.png"
    picture.draw(parts, Y, 10, path, "dirichlet 0.5")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.counts(parts, Y, 10).sum() == Y.size
