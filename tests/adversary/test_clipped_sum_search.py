"""The search of `clipped_sum_search.py` finds no case in which one example moves the sum by more than is declared.

What it saw while it was written, on code that scaled examples by frozen entries, rounded factors and sums to float32 and ran
batches of any size (two busy cores, seed 0; starts and mutations changed a little on the way, so that times are of their order
only): sums that rounded (1.002 C) after 0.1 s; an activation flipped by a batch of another size, 5.0 C after 3 s and 7.0 C after
12 s; squares that underflowed, 3e10 C after 5 s and 5e13 C after 9 s. It did not single out the clip factor rounded up among
denormals (2.0 C; a named case). On code mended in all of these, at seed 3 on the reference route after 15 s: a label beyond
the classes sent all later examples another way (10.0 C). A break that changes the engine for good shows in a fresh process only.
"""

import os
import time

import pytest
from clipped_sum_search import MEASURED, NETS, ROUTES, describe, search

SECONDS = float(os.environ.get("FED_DPPRUNE_SEARCH_SECONDS", "8"))
SLOW_SECONDS = float(os.environ.get("FED_DPPRUNE_SLOW_SEARCH_SECONDS", "1200"))


def _look(route: str, seed: int, seconds: float) -> None:
    nets = set()
    for found in search(route, seed, seconds, restarts=20):
        nets.add(found.case.net)
        assert found.moved <= 1 + MEASURED, describe(found)
    assert len(nets) > 5 and nets <= set(NETS)


@pytest.mark.parametrize("route", ROUTES)
def test_no_example_moves_the_sum_by_more_than_is_declared(route):
    """Seconds by the variable FED_DPPRUNE_SEARCH_SECONDS, for each route."""
    _look(route, 0, SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_an_hour_of_search_moves_no_sum_by_more_than_is_declared(route):
    """Another seed each day, printed on failure; seconds by the variable FED_DPPRUNE_SLOW_SEARCH_SECONDS, for each route."""
    _look(route, int(time.time()) // 86400, SLOW_SECONDS)
