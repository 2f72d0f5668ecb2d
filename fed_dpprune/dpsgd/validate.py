"""Refuse models whose examples see each other, before any gradient is taken.

A layer that mixes examples (batch statistics) makes "the gradient of one example" meaningless: no clipping bounds it. The
known ones are refused by name with the fix; code that mixes examples elsewhere is caught by the self-check of `gradient.py`.
"""

from __future__ import annotations

from torch import nn

from fed_dpprune.errors import ConfigError

GROUP_NORM_FIX = "use torch.nn.GroupNorm, or let opacus.validators.ModuleValidator.fix(module) replace it"


def check_module(module: nn.Module) -> None:
    """Look at every layer of `module`.

    Raises:
        ConfigError: A layer mixes the examples of a batch or keeps statistics of them; names it and the fix.
    """
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        where = f"model layer {name or '(the model itself)'}"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(where, f"{kind} mixes the examples of a batch, so no example's gradient exists", GROUP_NORM_FIX)
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
            raise ConfigError(where, f"{kind} keeps statistics of the private data", "set track_running_stats=False")
        if type(layer) in (nn.LSTM, nn.GRU, nn.RNN):
            raise ConfigError(
                where, f"{kind} runs as one fused operation without per-example gradients", f"use opacus.layers.DP{kind}"
            )
