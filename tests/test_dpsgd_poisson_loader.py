"""The drop-in loader: Poisson batches on the system's coins, everything else the script's; other ways of picking rows refused."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from fed_dpprune.dpsgd.poisson_loader import PoissonLoader
from fed_dpprune.errors import ConfigError

Pair = namedtuple("Pair", "x y")
ROWS = TensorDataset(torch.arange(60.0)[:, None], torch.arange(60))


def rows_of(loader) -> list[list[int]]:
    return [batch[1].tolist() for batch in loader]


def test_coins_are_the_systems_whatever_the_seeds():
    drawn = []
    for _ in range(2):
        loader = PoissonLoader(DataLoader(ROWS, batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(3)))
        torch.manual_seed(5)
        drawn.append(rows_of(loader))
    assert drawn[0] != drawn[1]  # 180 coins at 1/3: never the same by chance


def test_rates_are_opacus_and_what_is_counted_cannot_be_changed():
    loader = PoissonLoader(DataLoader(ROWS, batch_size=25))
    assert (len(loader), loader.sample_rate, loader.declared_batch) == (3, 1 / 3, 25)
    sizes = [len(rows) for _ in range(100) for rows in rows_of(loader)]
    assert 18.5 < sum(sizes) / 300 < 21.5 and len(set(sizes)) > 5
    again = PoissonLoader(loader)
    assert (len(again), again.sample_rate, again.declared_batch) == (3, 1 / 3, 25)
    loader.batches.rate = 0.9
    with pytest.raises(ConfigError, match="another sample rate"):
        _ = loader.sample_rate


def test_what_the_loader_has_is_kept():
    def start(worker: int) -> None:
        pass

    given = DataLoader(
        ROWS, batch_size=20, num_workers=1, timeout=7, worker_init_fn=start, prefetch_factor=3, persistent_workers=True,
        collate_fn=lambda rows: Pair(torch.stack([x for x, _ in rows]), {"label": torch.stack([y for _, y in rows])}),
        generator=torch.Generator(), multiprocessing_context="fork",
    )  # fmt: skip
    loader = PoissonLoader(given)
    for key in ("num_workers", "timeout", "worker_init_fn", "prefetch_factor", "persistent_workers", "generator"):
        assert getattr(loader, key) == getattr(given, key), key
    assert loader.multiprocessing_context.get_start_method() == "fork" and loader.dataset is ROWS
    batches = list(loader)
    assert len(batches) == 3 and all(type(batch).__name__ == "Pair" for batch in batches)


def test_an_empty_batch_looks_like_others_even_the_first_one():
    data = TensorDataset(torch.ones(3, 2, 5), torch.zeros(3, dtype=torch.int64))
    loader = PoissonLoader(DataLoader(data, batch_size=1))
    empty = loader.collate_fn([])
    assert [(tuple(part.shape), part.dtype) for part in empty] == [((0, 2, 5), torch.float32), ((0,), torch.int64)]
    with pytest.raises(ConfigError, match="collate_fn gives str"):
        PoissonLoader(DataLoader(data, batch_size=1, collate_fn=lambda rows: "rows"))


def test_a_batch_padded_to_its_longest_example_is_refused():
    data = [torch.ones(3), torch.ones(3), torch.ones(7)]

    def padded(rows):
        return {"x": [nn.utils.rnn.pad_sequence(rows, batch_first=True)]}

    loader = PoissonLoader(DataLoader(data, batch_size=1, collate_fn=padded))
    assert loader.collate_fn(data[:2])["x"][0].shape == (2, 3) and loader.collate_fn([])["x"][0].shape == (0, 3)
    with pytest.raises(ConfigError, match="pad to a fixed length"):
        loader.collate_fn(data)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Own(DataLoader):
    pass


class Nothing(Dataset):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, row: int) -> int:
        raise IndexError(row)


LOADERS = {
    "drop_last": lambda: DataLoader(ROWS, batch_size=20, drop_last=True),
    "batch_sampler": lambda: DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 20, False)),
    "dataset, is not": lambda: DataLoader(ROWS, batch_size=None),
    "WeightedRandomSampler": lambda: DataLoader(ROWS, batch_size=20, sampler=WeightedRandomSampler([1.0] * 60, 60)),
    "SubsetRandomSampler": lambda: DataLoader(ROWS, batch_size=20, sampler=SubsetRandomSampler(range(30))),
    "DistributedSampler": lambda: DataLoader(ROWS, batch_size=20, sampler=DistributedSampler(ROWS, 2, 0)),
    "replacement": lambda: DataLoader(ROWS, batch_size=20, sampler=RandomSampler(ROWS, replacement=True)),
    "num_samples": lambda: DataLoader(ROWS, batch_size=20, sampler=RandomSampler(ROWS, num_samples=30)),
    "IterableDataset": lambda: DataLoader(Stream(), batch_size=1),
    "Own": lambda: Own(ROWS, batch_size=20),
    "empty": lambda: DataLoader(Nothing(), batch_size=2),
}


@pytest.mark.parametrize("said", LOADERS)
def test_other_ways_of_picking_rows_are_refused_by_name(said):
    with pytest.raises(ConfigError, match=said):
        PoissonLoader(LOADERS[said]())
