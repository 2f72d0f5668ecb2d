"""Accountants: what a history costs, as epsilon at a delta; one file per accountant, one line in `table.ACCOUNTANTS`.

Every module gives `epsilons(histories, delta)` for canonical, non-empty histories, add-or-remove-one, Poisson sampling,
and `load(history, delta)`: what a figure would cost, 1 being the most that is allowed.
Does not live here: which noise meets a target (`privacy.calibration`), what was spent (`privacy.ledger`).
Read first: `table.py`.
"""
