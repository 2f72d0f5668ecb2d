"""From layer type to rule. Types are matched exactly: a subclass may compute something else."""

from __future__ import annotations

from torch import nn

from fed_dpprune.dpsgd.grad_sample import conv2d, embedding, fallback, group_norm, layer_norm, linear
from fed_dpprune.dpsgd.grad_sample.contribution import Rule

TABLE: dict[type[nn.Module], Rule] = {
    nn.Linear: linear.contributions,
    nn.Conv2d: conv2d.contributions,
    nn.Embedding: embedding.contributions,
    nn.GroupNorm: group_norm.contributions,
    nn.LayerNorm: layer_norm.contributions,
}


def rule_for(layer: nn.Module) -> Rule:
    """The rule of a layer; the fallback when it has none of its own."""
    return TABLE.get(type(layer), fallback.contributions)
