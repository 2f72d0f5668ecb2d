"""PoissonLoader: a DataLoader of the script, with Poisson batches on coins of the operating system instead of its own.

The sample rate is 1 / len(loader), as in Opacus. Everything else of the loader is kept: workers, collate function, pinning.
What picks rows in another way than shuffling or reading all of them is refused, for no accountant covers it. Each drawn batch
is a ticket for one step and for no more rows than it has: see `DrawnBatches`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(eq=False)
class Ticket:
    """A drawn Poisson batch: good for one step, of its rows at most.

    Attributes:
        left: Rows of it that no step's sum holds yet.
        closed: Whether its step was taken, or its turn is over.
    """

    left: int
    closed: bool = False


class DrawnBatches(PoissonBatches):
    """Poisson batches that remember what was drawn, so that a step can be tied to one of them.

    A ticket is made where a batch is drawn, which is the main process, whatever workers collate it, and becomes the current one
    when the batch is handed to the script. Of a loader with workers that Opacus' BatchMemoryManager made of this one, only the
    draws are seen, and they run ahead: their tickets are used in the order in which they were drawn.

    Args:
        count: How many rows there are.
        rate: The sample rate that is charged.
        steps: How many batches one pass has.
        ahead: Whether workers draw batches ahead of their use.
    """

    def __init__(self, count: int, rate: float, steps: int, ahead: bool) -> None:
        super().__init__(count, rate, steps)
        self.new_pass: Callable[[], None] | None = None  # what forgets the sums and signals of the last pass
        self._ahead, self._by_loader = ahead, False
        self._passes = 0
        self._waiting: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._summed: Ticket | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """A new pass: tickets, sums and signals of the last one are gone.

        Raises:
            ConfigError: From a pass that went on after a later one had begun.
        """
        self._passes += 1
        self._by_loader = False
        self.forget()
        if self.new_pass is not None:
            self.new_pass()
        return self._pass(self._passes)

    def _pass(self, number: int) -> Iterator[list[int]]:
        for rows in super().__iter__():
            if number != self._passes:
                raise ConfigError("data_loader", "two passes over it run at once", "finish one, or make another loader")
            self._waiting.append(Ticket(len(rows)))
            if not (self._by_loader or self._ahead):
                self.hand()
            yield rows

    def forget(self) -> None:
        """Void all tickets."""
        self._waiting.clear()
        self._current = self._summed = None

    def by_loader(self) -> None:
        """The pass begun last belongs to a loader that calls `hand` for each of its batches."""
        self._by_loader = True

    def hand(self) -> None:
        """The next drawn batch is the script's; what was not used of the last one is void."""
        self._current = self._waiting.popleft() if self._waiting else None

    def admit(self, rows: int) -> Ticket:
        """The ticket under which this many rows may go through the model.

        Raises:
            ConfigError: No batch was drawn for them, or one of fewer rows, or the sum of another batch waits for its step.
        """
        over = self._current is None or self._current.closed
        if over and self._ahead and not self._by_loader:
            self.hand()
        ticket = self._current
        if ticket is None or ticket.closed:
            fix = "draw one for each step from the loader that make_private returned; use eval() or no_grad() for the rest"
            raise ConfigError("model input", "no Poisson batch was drawn for this training step", fix)
        self._check(ticket, rows)
        return ticket

    def spend(self, ticket: Ticket, rows: int) -> None:
        """Count rows whose clipped sum is taken.

        Raises:
            ConfigError: As `admit`, or the ticket is not the current one any more.
        """
        if ticket is not self._current or ticket.closed:
            raise ConfigError("optimizer.step()", "comes after the next batch was drawn", "step on a batch before the next")
        self._check(ticket, rows)
        ticket.left -= rows
        self._summed = ticket

    def _check(self, ticket: Ticket, rows: int) -> None:
        if self._summed not in (None, ticket):
            why = "the sum of another Poisson batch waits for its step, and one step is of one batch"
            raise ConfigError("model input", why, "leave signal_skip_step to Opacus' BatchMemoryManager")
        if rows > ticket.left:
            why = f"{rows} rows for a Poisson batch that has {ticket.left} left"
            raise ConfigError("model input", why, "train on the batches as drawn, each example once")

    def close(self) -> None:
        """The current batch's step is taken."""
        if self._current is not None:
            self._current.closed = True
        self._summed = None


class _Handed(Iterator[Any]):
    """A loader's iterator that says which batch the script holds."""

    def __init__(self, inner: Any, batches: DrawnBatches) -> None:
        self._inner, self._batches = inner, batches

    def __len__(self) -> int:
        return len(self._inner)

    def __next__(self) -> Any:
        batch = next(self._inner)
        self._batches.hand()
        return batch


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
        self.batches: DrawnBatches
        self.declared_batch: int
        if isinstance(data_loader, PoissonLoader):
            count, rate, steps = data_loader.batches.count, data_loader.sample_rate, data_loader.batches.steps
            collate: Any = data_loader.collate_fn
            self.declared_batch = data_loader.declared_batch
        else:
            steps = len(data_loader)
            count, rate = len(data_loader.dataset), 1 / steps  # type: ignore[arg-type]
            collate = Collate(data_loader.collate_fn, data_loader.dataset)
            self.declared_batch = int(data_loader.batch_size or 0)
        kept = {key: getattr(data_loader, key) for key in KEPT if hasattr(data_loader, key)}
        if not kept.get("pin_memory_device"):
            kept.pop("pin_memory_device", None)  # torch warns of the mere argument
        batches = DrawnBatches(count, rate, steps, ahead=data_loader.num_workers > 0)
        self.batches = batches
        self._fixed = (batches.count, batches.rate, batches.steps)
        super().__init__(data_loader.dataset, batch_sampler=batches, collate_fn=collate, **kept)

    def __iter__(self) -> Any:
        """A new pass; each batch is a ticket for one step."""
        inner = super().__iter__()
        self.batches.by_loader()
        return _Handed(inner, self.batches)

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
        """A batch.

        Raises:
            ConfigError: Its examples have another shape or type than the first row: one long example would pad all the others.
        """
        if not rows:
            return self._empty
        batch = self._collate(rows)
        _refuse_other_shapes(batch, self._empty)
        return batch


def _refuse_other_shapes(batch: Any, like: Any) -> None:
    if isinstance(batch, Tensor) and isinstance(like, Tensor):
        if (batch.shape[1:], batch.dtype) != (like.shape[1:], like.dtype):
            found, first = (f"{tuple(one.shape[1:])} of {one.dtype}" for one in (batch, like))
            why = f"collate_fn gives examples of shape {found}, and {first} for the first row alone"
            raise ConfigError("data_loader", why, "pad to a fixed length")
    elif isinstance(batch, Mapping) and isinstance(like, Mapping):
        for key, value in batch.items():
            _refuse_other_shapes(value, like.get(key))
    elif isinstance(batch, (list, tuple)) and isinstance(like, (list, tuple)):
        for value, other in zip(batch, like, strict=False):  # a list of plain values is empty in `like`
            _refuse_other_shapes(value, other)


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
