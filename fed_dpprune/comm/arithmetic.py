"""Payload bytes before anything is encoded, for `plan`: equal to len(encode(...)) wherever marked exact.

Baselines of a study are counted by the same functions, so that like is compared with like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fed_dpprune.comm.codecs.table import codec
from fed_dpprune.comm.masks import packed_size_bound


@dataclass(frozen=True)
class Count:
    """Bytes, and whether they are exact or an upper bound (a packed mask's length depends on the mask)."""

    payload: int
    exact: bool


def dense_float32(d: int) -> int:
    """4d: what a dense float32 message of d values carries."""
    return 4 * d


def uplink_payload(codec_name: str, k: int, *, public_scale: bool = False) -> int:
    """Bytes of k values on a support that both ends know; also dense (k = d) and random-k baselines. Exact."""
    return codec(codec_name, public_scale=public_scale).size(k)


def sync_payload(codec_name: str, k: int) -> int:
    """Bytes of the values on a union of k missed coordinates. Exact."""
    return codec(codec_name).size(k)


def replay_payload(codec_name: str, counts: Sequence[int]) -> int:
    """Bytes of the releases of several missed rounds, one after the other, with counts[i] values each. Exact."""
    return sum(codec(codec_name).size(k) for k in counts)


def join_payload(codec_name: str, n: int, k: int, *, with_mask: bool, with_values: bool) -> Count:
    """Bytes of a pruned model of k survivors among n; an upper bound when the mask travels and leaves a choice."""
    values = codec(codec_name).size(k) if with_values else 0
    mask = packed_size_bound(n, k) if with_mask else 0
    return Count(mask + values, exact=mask == 0)


def selected_payload(codec_name: str, n: int, k: int) -> Count:
    """Bytes of the baseline that sends its own choice of k among n (top-k of the noised update): positions and values."""
    return join_payload(codec_name, n, k, with_mask=True, with_values=True)


def seeded_payload(codec_name: str, n: int, k: int) -> int:
    """Bytes of k among n values drawn from a seed of the client's own: 8 bytes of seed after the tag, and values. Exact."""
    return (9 if 0 < k < n else 0) + codec(codec_name).size(k)
