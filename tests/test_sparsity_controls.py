"""Controls of a study: same size, or same size per layer, at places that chance chose."""

import numpy as np
import pytest

from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.sparsity.controls import layer_shuffled, size_matched
from fed_dpprune.sparsity.support import Support

LAYOUT = Layout((Tensor("a", (100, 3)), Tensor("b", (50,)), Tensor("c", (20, 10))))
CHOSEN = Support(np.concatenate([np.arange(0, 30), np.arange(300, 350), np.arange(350, 352)]), 550, "public")
MOVABLE = np.ones(550, dtype=bool)
MOVABLE[300:350] = False


@pytest.mark.parametrize("movable", [None, MOVABLE])
def test_a_size_matched_support_has_the_size_and_nothing_else(movable):
    control = size_matched(CHOSEN, 1, movable)
    assert control.k == CHOSEN.k
    assert control.provenance == "random"
    assert LAYOUT.counts(control.indices) != LAYOUT.counts(CHOSEN.indices)
    assert control.digest == size_matched(CHOSEN, 1, movable).digest != size_matched(CHOSEN, 2, movable).digest
    if movable is not None:
        assert control.mask[~movable].all()


@pytest.mark.parametrize("movable", [None, MOVABLE])
def test_a_layer_shuffled_support_keeps_the_counts_and_moves_the_places(movable):
    control = layer_shuffled(CHOSEN, LAYOUT, 1, movable)
    assert LAYOUT.counts(control.indices) == LAYOUT.counts(CHOSEN.indices)
    assert control.digest != CHOSEN.digest
    assert control.provenance == "public"
    assert np.array_equal(control.mask[~MOVABLE], CHOSEN.mask[~MOVABLE])


def test_a_movable_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shape"):
        size_matched(CHOSEN, 1, np.ones(3, dtype=bool))
