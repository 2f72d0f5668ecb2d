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

EXAMPLES = 32
SCALE = 65535
BLOB = 7


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

    from fed_dpprune.sparsity.criteria import net

    model = net.loaded(context, torch.float32)
    parameters = dict(model.named_parameters())
    inputs = torch.from_numpy(synthetic_inputs(examples, context.input_shape, context.seed, round))
    words = randomness.raw_u64(examples, context.seed, "synthetic", round, "labels")
    energy = np.zeros(len(context.layout.tensors))
    with net.one_thread():
        for example, word in zip(inputs, words, strict=True):
            outputs = model(example.unsqueeze(0))
            label = torch.tensor([int(word) % outputs.shape[-1]])
            gradients = torch.autograd.grad(F.cross_entropy(outputs, label), list(parameters.values()), allow_unused=True)
            found = dict(zip(parameters, gradients, strict=True))
            energy += [net.energy(found[tensor.name]) for tensor in context.layout.tensors]
    return quantise(energy / examples)
