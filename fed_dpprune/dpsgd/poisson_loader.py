"""PoissonLoader: a DataLoader of the script, with Poisson batches on coins of the operating system instead of its own.

The sample rate is 1 / len(loader), as in Opacus. Everything else of the loader is kept: workers, collate function, pinning.
What picks rows in another way than shuffling or reading all of them is refused, for no accountant covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from fed_dpprune.data.sampling import PoissonBatches
from fed_dpprune.errors import ConfigError

# Arguments of DataLoader that are taken over where this torch has them.
KEPT = (
    "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator", "prefetch_factor",
    "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip


class PoissonLoader(DataLoader[Any]):
    """Batches in which each row is by its own secret coin; may be empty, and then look like others with no rows.

    Args:
        data_loader: The script's loader.

    Attributes:
        declared_batch: Its batch size: the public divisor of a mean.

    Raises:
        ConfigError: Its rows are picked in a way that is not offered; names it.
    """

    def __init__(self, data_loader: DataLoader[Any]) -> None:
        _check(data_loader)
        self.batches: PoissonBatches
        self.declared_batch: int
        if isinstance(data_loader, PoissonLoader):
            batches: PoissonBatches = data_loader.batches
            collate: Any = data_loader.collate_fn
            self.declared_batch = data_loader.declared_batch
        else:
            steps = len(data_loader)
            batches = PoissonBatches(len(data_loader.dataset), 1 / steps, steps)  # type: ignore[arg-type]
            collate = Collate(data_loader.collate_fn, data_loader.dataset)
            self.declared_batch = int(data_loader.batch_size or 0)
        kept = {key: getattr(data_loader, key) for key in KEPT if hasattr(data_loader, key)}
        if not kept.get("pin_memory_device"):
            kept.pop("pin_memory_device", None)  # torch warns of the mere argument
        self.batches = batches
        self._fixed = (batches.count, batches.rate, batches.steps)
        super().__init__(data_loader.dataset, batch_sampler=batches, collate_fn=collate, **kept)

    @property
    def sample_rate(self) -> float:
        """The rate that is charged.

        Raises:
            ConfigError: Rate, rows or steps are not those of the beginning, so that drawn batches had another one.
        """
        found = (self.batches.count, self.batches.rate, self.batches.steps)
        if self.batch_sampler is not self.batches or found != self._fixed:
            raise ConfigError("data_loader", "was given another sample rate or sampler", "call make_private again for it")
        rate: float = self._fixed[1]
        return rate


def _check(loader: DataLoader[Any]) -> None:
    def refuse(why: str, fix: str = "pass a plain DataLoader(dataset, batch_size=..., shuffle=True)") -> ConfigError:
        return ConfigError("data_loader", why, fix)

    if isinstance(loader.dataset, IterableDataset):
        raise refuse("an IterableDataset has no rows to toss coins for", "use a dataset with __len__ and __getitem__")
    if type(loader) is PoissonLoader:
        return
    if type(loader) is not DataLoader:
        raise refuse(f"{type(loader).__name__} may pick rows in a way of its own")
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise refuse("a batch_sampler, or batches made by the dataset, is not Poisson sampling")
    if loader.drop_last:
        raise refuse("drop_last=True changes the sample rate", "leave it False: Poisson batches have no remainder")
    sampler = loader.sampler
    if type(sampler) not in (SequentialSampler, RandomSampler):
        raise refuse(f"{type(sampler).__name__} picks rows in a way that no accountant here covers")
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != len(loader.dataset)):  # type: ignore[arg-type]
        raise refuse("RandomSampler with replacement or num_samples picks rows in a way that no accountant here covers")
    if not len(loader.dataset):  # type: ignore[arg-type]
        raise refuse("the dataset is empty", "pass one with rows")


class Collate:
    """The loader's collate function; for no rows, the batch of the first row with all rows taken out.

    Args:
        collate: The loader's.
        dataset: For the shapes of its first row.

    Raises:
        ConfigError: It makes something else than tensors, or mappings and sequences of them.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], dataset: Any) -> None:
        self._collate = collate
        self._empty = _emptied(collate([dataset[0]]))

    def __call__(self, rows: list[Any]) -> Any:
        """A batch."""
        return self._collate(rows) if rows else self._empty


def _emptied(batch: Any) -> Any:
    if isinstance(batch, Tensor) and batch.ndim:
        return batch[:0].clone()
    if isinstance(batch, Mapping):
        return {key: _emptied(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_emptied(value) for value in batch))
    if isinstance(batch, (list, tuple)):
        plain = not any(isinstance(value, (Tensor, Mapping, list, tuple)) for value in batch)
        return type(batch)() if plain else type(batch)(_emptied(value) for value in batch)
    kind = type(batch).__name__
    raise ConfigError("data_loader", f"collate_fn gives {kind}, of which no empty batch can be made", "give tensors")
