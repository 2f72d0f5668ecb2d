"""The slow truth for the tests of the private step: one example at a time, ordinary backward, float64."""

import copy

import numpy as np
import torch
from torch import nn

from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.sparsity.support import Support, from_mask


def layout_of(module: nn.Module, frozen: tuple[str, ...] = ()) -> Layout:
    return Layout(tuple(Tensor(n, tuple(p.shape), frozen=n in frozen) for n, p in module.named_parameters()))


def weighted_outputs(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A loss with any output gradient: y has the outputs' shape."""
    return (outputs * y.to(outputs.dtype)).flatten(1).sum(1)


def loop_gradients(module: nn.Module, x: np.ndarray, y: np.ndarray, loss=nn.functional.cross_entropy) -> np.ndarray:
    """Per-example gradients, shape (n, d), float64."""
    double = copy.deepcopy(module).double()
    rows = []
    for xi, yi in zip(torch.tensor(x), torch.tensor(y), strict=True):
        double.zero_grad()
        loss(double(xi[None].double() if xi.is_floating_point() else xi[None]), yi[None]).sum().backward()
        rows.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in double.parameters()]).numpy()
        )
    return np.stack(rows)


def flat_clipped(gradients: np.ndarray, support: Support, clip_norm: float) -> np.ndarray:
    """Mask, clip, sum."""
    live = gradients[:, support.indices]
    return np.minimum(1, clip_norm / np.maximum(np.linalg.norm(live, axis=1), 1e-300)) @ live


def random_support(layout: Layout, fraction: float, seed: int, structure: str = "element") -> Support:
    """Random elements, or random whole rows of every tensor (`row`); at least one coordinate."""
    rng = np.random.default_rng(seed)
    if structure == "element":
        mask = rng.random(layout.d) < fraction
    else:
        rows = [np.repeat(rng.random(t.shape[0]) < fraction, t.size // t.shape[0]) for t in layout.tensors]
        mask = np.concatenate(rows)
    mask[rng.integers(layout.d)] = True
    return from_mask(mask)
