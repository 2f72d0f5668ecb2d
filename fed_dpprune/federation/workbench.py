"""What a client process builds once and keeps warm: layout, net, gradient engine. Shared by all clients it plays.

Nothing here belongs to one client; the data of a client is handed in with each request.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fed_dpprune import config as cfg
from fed_dpprune.errors import ConfigError
from fed_dpprune.models import registry
from fed_dpprune.models.flat import Layout
from fed_dpprune.models.spec import ModelSpec, from_config

if TYPE_CHECKING:
    from fed_dpprune.dpsgd.gradient import PrivateGradient


@dataclass(frozen=True)
class Workbench:
    """A net with its gradient engine.

    Attributes:
        spec: Which net, for which input.
        layout: Its coordinate order.
        gradient: Sets weights and support at every use.
    """

    spec: ModelSpec
    layout: Layout
    gradient: PrivateGradient


REMEMBERED = 256
_Key = tuple[cfg.Model, cfg.Engine, tuple[int, ...], int]
_refused: dict[_Key, tuple[str, str, str]] = {}


def workbench(model: cfg.Model, engine: cfg.Engine, input_shape: tuple[int, ...], classes: int) -> Workbench:
    """The process's workbench for this net; built at the first call. That a net is refused is remembered as well.

    Raises:
        ConfigError: The net is not fit for private steps.
    """
    key = (model, engine, input_shape, classes)
    if key in _refused:
        raise ConfigError(*_refused[key])
    try:
        return _built(*key)
    except ConfigError as error:
        if error.what.startswith("model"):  # not a kernel that could not be built: that may be tried again
            _refused[key] = (error.what, error.why, error.fix)
            while len(_refused) > REMEMBERED:
                del _refused[next(iter(_refused))]
        raise


@lru_cache(maxsize=2)
def _built(model: cfg.Model, engine: cfg.Engine, input_shape: tuple[int, ...], classes: int) -> Workbench:
    """A net with its engine, proven.

    One thread: a client is one of many on its machine, and sums must not depend on how many cores it finds.
    """
    import torch

    from fed_dpprune.dpsgd.gradient import PrivateGradient

    torch.set_num_threads(1)
    spec = from_config(model, input_shape, classes)
    layout = registry.layout(spec)
    gradient = PrivateGradient(registry.build(spec), layout, backend=engine.backend, micro_batch=engine.micro_batch)
    # Before any charge: a net that is not fit is refused for what it is, never for what a batch holds.
    gradient.prove(torch.zeros(1, *input_shape, dtype=torch.float32), torch.zeros(1, dtype=torch.int64))
    return Workbench(spec, layout, gradient)
