"""Layer-energy odds: how likely a coordinate of each tensor is to live, from gradients on made-up inputs. Data-free.

The odds of a tensor are the square root of its gradient energy per coordinate, at the released weights, on seeded
synthetic inputs with random labels. The server computes them (floating point) and puts the integers in the terms; only
these enter the draw. Nothing private is read: the weights are released, the inputs are noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import randomness
from fed_dpprune.sparsity.criteria.table import CriterionContext

EXAMPLES = 128
SCALE = 65535
BLOB = 7
CHUNK_VALUES = 2**25


def synthetic_inputs(count: int, input_shape: tuple[int, ...], seed: int, round: int) -> NDArray[np.float32]:
    """Uniform inputs in [-1, 1), shape (count, *input_shape); images are patches of BLOB x BLOB equal pixels, not white noise."""
    if len(input_shape) != 3:
        size = count * int(np.prod(input_shape))
        return randomness.uniform_f32(size, seed, "synthetic", round, "inputs").reshape(count, *input_shape)
    channels, height, width = input_shape
    coarse = (count, channels, -(-height // BLOB), -(-width // BLOB))
    patches = randomness.uniform_f32(int(np.prod(coarse)), seed, "synthetic", round, "inputs").reshape(coarse)
    pixels = patches.repeat(BLOB, axis=2).repeat(BLOB, axis=3)[:, :, :height, :width]
    return np.ascontiguousarray(pixels)


def quantise(energy: NDArray[np.float64]) -> NDArray[np.int64]:
    """Odds 1..SCALE, shape (tensors,), proportional to the square root of the energy, the largest at SCALE.

    Raises:
        ValueError: An energy is negative or not finite.
    """
    if not np.isfinite(energy).all() or (energy < 0).any():
        raise ValueError("gradient energies must be finite and not negative")
    root = np.sqrt(energy)
    top = float(root.max(initial=0.0))
    if top == 0.0:
        return np.ones(energy.shape, dtype=np.int64)
    return np.maximum(1, np.rint(SCALE * (root / top))).astype(np.int64)


def layer_odds(context: CriterionContext, round: int, examples: int = EXAMPLES) -> NDArray[np.int64]:
    """The odds of a round, one positive integer per tensor, shape (tensors,).

    Args:
        context: The released weights are its `weights`; its public data is not looked at.
        round: Fresh inputs every round.
        examples: Synthetic inputs to average over.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch.func import functional_call, grad, vmap

    from fed_dpprune.sparsity.criteria import net

    layout = context.layout
    model = net.loaded(context, torch.float32)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    inputs = torch.from_numpy(synthetic_inputs(examples, context.input_shape, context.seed, round))
    words = randomness.raw_u64(examples, context.seed, "synthetic", round, "labels")

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(model, {**weights, **buffers}, (x.unsqueeze(0),))
        return F.cross_entropy(outputs, y.unsqueeze(0))

    with net.one_thread():
        with torch.no_grad():
            classes = model(inputs[:1]).shape[-1]
        labels = torch.from_numpy((words % np.uint64(classes)).astype(np.int64))
        gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=max(1, CHUNK_VALUES // layout.d))
        found = gradients(parameters, inputs, labels)
        energy = [float(found[t.name].double().square().mean()) if t.size else 0.0 for t in layout.tensors]
    return quantise(np.asarray(energy))
