"""What both ends say of a support: every method has a row of its own."""

from typing import get_args

import pytest

from fed_dpprune import config as cfg
from fed_dpprune.federation import supports
from fed_dpprune.sparsity.support import PROVENANCES


def test_every_method_of_the_config_has_a_best_claim_and_no_other_word_has_one():
    choices = {
        method for table in (cfg.Prune, cfg.Freeze, cfg.Drop) for method in get_args(table.model_fields["method"].annotation)
    }
    assert set(supports._BEST_CLAIM) == choices
    assert set(supports._BEST_CLAIM.values()) <= set(PROVENANCES) - {"private"}


def test_a_method_without_a_row_is_an_error(monkeypatch):
    conf = cfg.build({"privacy.epsilon": 1.0, "sparsity.freeze.method": "magnitude", "sparsity.freeze.rate": 0.5})
    assert supports.best_claim(conf) == "data-free"
    monkeypatch.delitem(supports._BEST_CLAIM, "magnitude")
    with pytest.raises(KeyError):
        supports.best_claim(conf)
