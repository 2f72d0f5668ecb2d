"""Accuracy and loss of a net on held-out or public rows. Imports torch. Never called on a client's private rows."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


class Rows(Protocol):
    """What is needed of a data set's examples (data.dataset.Examples has it)."""

    def __len__(self) -> int: ...

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features and labels of the rows at `indices`."""


def accuracy_and_loss(module: nn.Module, examples: Rows, batch: int = 1000) -> tuple[float, float]:
    """Share of right answers in 0..1 and mean cross-entropy in nats.

    The same weights, rows and `batch` give the same two numbers: rows are taken in order, sums are float64. The module's
    train or eval mode and its gradients are left as they were.

    Raises:
        ValueError: No rows.
    """
    total = len(examples)
    if not total:
        raise ValueError("no rows to evaluate on")
    parameter = next(module.parameters())
    right, loss, was_training = 0, 0.0, module.training
    module.eval()
    try:
        with torch.no_grad():
            for start in range(0, total, batch):
                x, y = examples.take(np.arange(start, min(start + batch, total)))
                labels = torch.from_numpy(y).to(parameter.device)
                scores = module(torch.from_numpy(x).to(parameter.device))
                right += int((scores.argmax(dim=1) == labels).sum())
                loss += float(nn.functional.cross_entropy(scores.double(), labels, reduction="sum"))
    finally:
        module.train(was_training)
    return right / total, loss / total
