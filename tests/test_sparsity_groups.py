"""Granularity: what lives or dies together."""

import numpy as np
import pytest

from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.sparsity.groups import group_ids, items
from fed_dpprune.sparsity.support import Support, dense

LAYOUT = Layout(
    (Tensor("a.weight", (2, 3)), Tensor("a.bias", (2,), "bias"), Tensor("b.weight", (2, 1, 2)), Tensor("scale", (), "other"))
)


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("row", [0, 0, 0, 1, 1, 1, 2, 3, 4, 4, 5, 5, 6]),
        ("channel", [0, 0, 0, 1, 1, 1, 0, 1, 2, 2, 3, 3, 4]),
        ("layer", [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3]),
    ],
)
def test_groups_are_rows_channels_or_layers(granularity, expected):
    assert group_ids(LAYOUT, granularity).tolist() == expected


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="granularity"):
        group_ids(LAYOUT, "element")


def test_only_groups_with_a_survivor_count_and_they_are_taken_whole():
    outer = Support(np.array([1, 2, 6, 7, 12]), 13)
    among = items(outer, LAYOUT, "channel")
    assert among.count == 3
    assert among.sizes.tolist() == [3, 1, 1]
    assert among.sums(np.array([1.0, 2.0, 4.0, 8.0, 16.0])).tolist() == [7.0, 8.0, 16.0]
    assert among.take(np.array([0, 2]), "random").indices.tolist() == [1, 2, 6, 12]


def test_each_item_belongs_to_one_tensor():
    elements = items(Support(np.array([1, 2, 6, 7, 12]), 13), LAYOUT, "element")
    assert [t.tolist() for t in elements.by_tensor(LAYOUT)] == [[0, 1], [2, 3], [], [4]]
    channels = items(Support(np.array([1, 2, 6, 7, 12]), 13), LAYOUT, "channel")
    assert [t.tolist() for t in channels.by_tensor(LAYOUT)] == [[0], [1], [], [2]]
    assert items(dense(13), LAYOUT, "layer").count == 4
