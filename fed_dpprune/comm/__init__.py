"""What travels: bytes, how they are packed, counted, timed and checked. numpy only; no torch, no flwr.

Lives here: codecs, packed supports, downlink payloads, the meter, analytic counts, the link model, the check on receipt.
Does not live here: who sends what and when (`federation`), what a support is (`sparsity.support`), privacy (`privacy`).
Everything here works on released values, so nothing here can change an epsilon.
Read first: docs/wire.md, then `codecs/table.py`.
"""
