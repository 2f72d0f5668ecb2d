"""Fashion-MNIST: 28 x 28 grey clothing, 10 classes, 60,000 + 10,000 (Xiao, Rasul, Vollgraf 2017; MIT licence)."""

from __future__ import annotations

from fed_dpprune import config
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.data.idx import Source

# md5 of each .gz as torchvision publishes it, and of its content.
SOURCE = Source(
    "fashion-mnist",
    "FashionMNIST",
    {
        "train-images-idx3-ubyte": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
        "train-labels-idx1-ubyte": ("25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
        "t10k-images-idx3-ubyte": ("bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
        "t10k-labels-idx1-ubyte": ("bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
    },
)


def load(data: config.Data, seed: int) -> Dataset:
    """The data set with its own test split."""
    return SOURCE.load()


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes, without the images."""
    return SOURCE.labels()
