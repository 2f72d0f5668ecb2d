"""From per-example contributions to the clipped sum: norms, factors and sums in float64, the same numbers in all three."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fed_dpprune.dpsgd.clipping import GROUP, Clipping
from fed_dpprune.dpsgd.grad_sample.contribution import PADDING, Contribution
from fed_dpprune.dpsgd.live import LiveTensor


def clipped_sum(
    live: tuple[LiveTensor, ...],
    parts: Sequence[Sequence[Contribution]],
    present: NDArray[np.bool_],
    clipping: Clipping,
) -> NDArray[np.float64]:
    """Sum over examples of the clipped gradient of each.

    Args:
        live: The L live tensors.
        parts: For each micro-batch its contributions, one per live tensor.
        present: Shape (n,), which rows of all micro-batches are examples that count; the others are left out, whatever they hold.
        clipping: The bound.

    Returns:
        Shape (k,), float64.
    """
    joined = [tensor[0].joined(tensor[1:]) for tensor in zip(*parts, strict=True)]
    squared = torch.stack([part.squared for part in joined]).cpu().numpy()
    factors = torch.from_numpy(clipping.factors(np.where(present, squared, np.inf)))
    factors = torch.nn.functional.pad(factors, (0, -factors.shape[1] % PADDING)).to(joined[0].squared.device)
    out = torch.empty(live[-1].stop, dtype=torch.float64, device=factors.device)
    for tensor, part, factor in zip(live, joined, factors, strict=True):
        part.weighted_sum(factor, out[tensor.start : tensor.stop])
    return out.cpu().numpy()


def in_levels(sums: Iterable[NDArray[np.float64]], total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add the sums of groups to `total`, GROUP of them at a time, so that no term goes through more additions than counted.

    Args:
        sums: Of groups of at most GROUP examples; memory may make them as small as one example.
        total: Shape (k,), zeros.
    """
    level, count = np.zeros_like(total), 0
    for one in sums:
        level += one
        count += 1
        if count == GROUP:
            total += level
            level[:], count = 0.0, 0
    return total + level if count else total
