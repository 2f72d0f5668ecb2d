"""Privacy: what a schedule costs and who may spend it: accountants, calibration, the client's ledger and its own policy.

Does not live here: sampling, clipping and noise (`dpsgd`, `data.sampling`), and anything that needs torch.
Read first: `history.py` (what is counted), `accountants/table.py` (what it costs), `ledger.py` (what was spent).
"""
