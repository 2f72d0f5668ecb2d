"""One file per codec: k released float values to bytes and back. numpy only.

Lives here: the codecs, their table (`table.py`: the interface and the names), the bit packing they share (`packing.py`).
Does not live here: which coordinates the values belong to (`comm.masks`, `sparsity.support`).
A new codec is one file and one line in the table; tests/test_comm_codecs.py runs over the table.
Read first: `table.py`.
"""
