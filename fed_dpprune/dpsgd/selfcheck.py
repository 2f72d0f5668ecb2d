"""Does a layer engine give this module's true per-example gradients? Asked once, on made-up examples, before it is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.layered import LayerEngine
from fed_dpprune.dpsgd.live import LiveTensor, live_tensors
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.support import Support

EXAMPLES = 3
TOLERANCE = 1e-3  # float32 in two orders of summation stays far below; a lost tensor or cross term is far above


def agrees(engine: LayerEngine, layout: Layout, x: Tensor, y: Tensor) -> bool:
    """Compare the engine's clipped sum with plain autograd, one example at a time, on every tensor that may live.

    Args:
        engine: To be proven.
        layout: Of its module.
        x: A batch, read for shape and type only; no private value is looked at.
        y: Its labels, likewise.

    Returns:
        False when a tensor differs, or when the engine or the module fails on made-up examples.
    """
    live = live_tensors(layout, Support(_trainable(layout), layout.d))
    made_x, made_y = _made_up(x, seed=1), _made_up(y, seed=2)
    if not y.is_floating_point():
        made_y.zero_()
    with _plain_state(engine):
        try:
            clipping = Clipping(1e-3, "flat")
            got = engine.clipped_sum(live, made_x, made_y, clipping, 0.0)
            rows = [_gradient(engine, live, made_x[i : i + 1], made_y[i : i + 1]) for i in range(EXAMPLES)]
        except Exception:  # whatever a model does on odd inputs: then the layer rules are not proven
            return False
    grads = np.stack(rows)
    squared = np.stack([np.square(grads[:, t.start : t.stop]).sum(1) for t in live])
    factors = clipping.factors(squared)
    for tensor, factor in zip(live, factors, strict=True):
        part = slice(tensor.start, tensor.stop)
        true = factor @ grads[:, part]
        allowed = TOLERANCE * (np.linalg.norm(true) + 1e-4 * clipping.clip_norm)
        if not np.linalg.norm(got[part] - true) <= allowed:
            return False
    return True


def _trainable(layout: Layout) -> NDArray[np.int64]:
    spans = [np.arange(span.start, span.stop, dtype=np.int64) for tensor, span in layout.spans() if not tensor.frozen]
    return np.concatenate([np.zeros(0, dtype=np.int64), *spans])


def _made_up(like: Tensor, seed: int) -> Tensor:
    """Normal values, or zeros and ones for whole numbers; never from the global random state."""
    generator = torch.Generator().manual_seed(seed)
    shape = (EXAMPLES, *like.shape[1:])
    if like.is_floating_point():
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(like.device, like.dtype)


def _gradient(engine: LayerEngine, live: tuple[LiveTensor, ...], x: Tensor, y: Tensor) -> NDArray[np.float64]:
    named = dict(engine.module.named_parameters())
    with torch.enable_grad():
        loss = engine.loss(engine.module(x), y).sum()
        grads = torch.autograd.grad(loss, [named[t.name] for t in live], allow_unused=True)
    zeros = (torch.zeros(t.shape) if g is None else g for t, g in zip(live, grads, strict=True))
    return torch.cat([g.detach().flatten().double().cpu() for g in zeros]).numpy()


@contextmanager
def _plain_state(engine: LayerEngine) -> Iterator[None]:
    """Eval mode, float32, weights that make every gradient matter, random state untouched; all put back."""
    module = engine.module
    kept = [(p, p.detach().clone(), p.requires_grad) for p in module.parameters()]
    autocast, engine.autocast = engine.autocast, False
    modes = [(m, m.training) for m in module.modules()]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        try:
            module.eval()
            with torch.no_grad():
                for p, value, _ in kept:
                    drawn = torch.rand(value.shape, generator=generator).to(value)
                    fan_in = max(1, value[0].numel()) if value.ndim > 1 else 1
                    p.copy_((2 * drawn - 1) * (3 / fan_in) ** 0.5 if value.ndim > 1 else 0.5 + drawn)
            for p, _, _ in kept:
                p.requires_grad_(True)
            yield
        finally:
            engine.autocast = autocast
            with torch.no_grad():
                for p, value, asked in kept:
                    p.copy_(value)
                    p.requires_grad_(asked)
            for m, mode in modes:
                m.training = mode
