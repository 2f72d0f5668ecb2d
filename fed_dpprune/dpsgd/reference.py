"""Per-example gradients the plain way: torch.func's vmap(grad), then the live coordinates. Exact for any module.

The oracle of the tests (float64), and the route for models that no layer rule fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.grad_sample.contribution import Contribution, Values
from fed_dpprune.dpsgd.live import LiveTensor

Loss = Callable[[Tensor, Tensor], Tensor]
MEMORY_BYTES = 256 * 2**20


class VmapEngine:
    """Per-example gradients through torch.func over the whole module.

    Args:
        module: The model; its parameters and buffers are read at every call.
        loss: Per-example losses, (logits, y) -> shape (n,).
        dtype: float64 for the oracle, float32 otherwise.
    """

    def __init__(self, module: nn.Module, loss: Loss, dtype: torch.dtype) -> None:
        self.module, self.loss, self.dtype = module, loss, dtype
        self._batches: bool | None = None  # whether vmap can run the module; settled by the first, made-up examples

    def example_bytes(self, live: tuple[LiveTensor, ...]) -> int:
        """Rough memory of one example's gradients, to choose a micro-batch."""
        return 3 * self.dtype.itemsize * sum(t.size for t in live)

    def live_gradients(self, live: tuple[LiveTensor, ...], x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """Per-example gradients on the support.

        Returns:
            One tensor of shape (n, m) per live tensor, and the losses, shape (n,).
        """
        named = dict(self.module.named_parameters())
        wanted = {t.name: self._cast(named[t.name]) for t in live}
        others = {name: self._cast(p) for name, p in named.items() if name not in wanted}
        others |= {name: self._cast(b) for name, b in self.module.named_buffers()}

        def one(parameters: Mapping[str, Tensor], xi: Tensor, yi: Tensor) -> tuple[Tensor, Tensor]:
            logits = torch.func.functional_call(self.module, {**others, **parameters}, (xi.unsqueeze(0),))
            loss = self.loss(logits, yi.unsqueeze(0)).sum()
            return loss, loss.detach()

        grads, losses = self._over_examples(torch.func.grad(one, has_aux=True), wanted, self._cast(x), y)
        place = {t.name: torch.from_numpy(np.array(t.positions)).to(x.device) for t in live}
        return [grads[t.name].flatten(1).index_select(1, place[t.name]) for t in live], losses

    def micro_batch(self, live: tuple[LiveTensor, ...], x: Tensor, y: Tensor) -> tuple[list[Contribution], Tensor]:
        """Per-example gradients of one micro-batch: one contribution per live tensor, and the losses, shape (n,)."""
        grads, losses = self.live_gradients(live, x, y)
        return [Values(g) for g in grads], losses

    def _over_examples(
        self, gradient: Callable[..., Any], wanted: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """vmap, or a plain loop for modules that vmap cannot run (operations without a batching rule, Python branches).

        Which of them is settled by the first call, whose examples are made up (`selfcheck.py`): were it by what a private
        example makes the module do, one example would change the way that all others take.
        """
        if self._batches is not False:
            try:
                grads, losses = torch.func.vmap(gradient, in_dims=(None, 0, 0), randomness="error")(wanted, x, y)
                self._batches = True
                return grads, losses
            except RuntimeError:
                if self._batches:
                    raise
                self._batches = False
        rows, losses = zip(*(gradient(wanted, xi, yi) for xi, yi in zip(x, y, strict=True)), strict=True)
        return {name: torch.stack([row[name] for row in rows]) for name in wanted}, torch.stack(losses)

    def _cast(self, value: Tensor) -> Tensor:
        value = value.detach()
        return value.to(self.dtype) if value.is_floating_point() else value
