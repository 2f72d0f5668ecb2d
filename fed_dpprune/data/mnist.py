"""MNIST: 28 x 28 grey handwritten digits, 10 classes, 60,000 + 10,000 (LeCun, Cortes, Burges, from NIST SD-3 and SD-1)."""

from __future__ import annotations

from fed_dpprune import config
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.data.idx import Source

# md5 of each .gz as torchvision publishes it, and of its content.
SOURCE = Source(
    "mnist",
    "MNIST",
    {
        "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
        "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
        "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
        "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
    },
)


def load(data: config.Data, seed: int) -> Dataset:
    """The data set with its own test split."""
    return SOURCE.load()


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes, without the images."""
    return SOURCE.labels()
