"""Gradient magnitude on PUBLIC labelled data: the `public` of freezing and dropping (2303.04612).

It reads labels: on private data it would be a release that nobody charged, so without public data it is refused.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fed_dpprune.errors import ConfigError
from fed_dpprune.sparsity.criteria import net
from fed_dpprune.sparsity.criteria.table import CriterionContext

NAME = "gradient"
NEEDS = "public-data"
PROVENANCE = "public"
BATCH = 256


def gradient(context: CriterionContext) -> NDArray[np.float64]:
    """The gradient of the summed cross-entropy over all public examples, shape (d,), batch by batch in their order.

    Raises:
        ConfigError: There is no public data.
    """
    public = context.public
    if public is None or len(public) == 0:
        raise ConfigError(
            "data.public",
            "scores from labelled data need public examples and none are declared",
            'name them, for example data.public = "mnist[0:1000]", or choose a method that reads no data',
        )
    model = net.loaded(context, torch.float32)
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    with net.one_thread():
        for start in range(0, len(public), BATCH):
            inputs, labels = public.take(np.arange(start, min(start + BATCH, len(public))))
            loss = F.cross_entropy(model(torch.from_numpy(inputs)), torch.from_numpy(labels), reduction="sum")
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
    return net.gathered(context.layout, totals)


def scores(context: CriterionContext) -> NDArray[np.float64]:
    """|g|, shape (d,)."""
    return np.abs(gradient(context))
