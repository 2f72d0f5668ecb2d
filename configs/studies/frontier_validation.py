"""Hold 5,000 training images of Fashion-MNIST out, to tune the frontier study without looking at the test images.

    FED_DPPRUNE_DATA=... python configs/studies/frontier_validation.py

writes `runs/fashion-validation.npz`: 55,000 images to train on, and the 5,000 held out in the place of the test images. The
choice is one draw of a fixed seed. `frontier-tuning*.toml` name the file relative to the directory they are started from.
"""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import numpy as np

HELD_OUT, SEED = 5_000, 20
FOLDERS = ("FashionMNIST/raw", "fashion-mnist", "")


def read(root: Path, name: str) -> np.ndarray:
    """One IDX file of unsigned bytes, plain or gzipped, from a torchvision-style root."""
    for folder in FOLDERS:
        for suffix in ("", ".gz"):
            path = root / folder / (name + suffix)
            if path.is_file():
                raw = gzip.decompress(path.read_bytes()) if suffix else path.read_bytes()
                dimensions = np.frombuffer(raw, ">u4", raw[3], 4)
                return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dimensions)
    sys.exit(f"{name} is not below {root}; set FED_DPPRUNE_DATA to the root of torchvision-style data")


def main() -> None:
    """Draw, split, save."""
    root = Path(os.environ.get("FED_DPPRUNE_DATA", "data"))
    images, labels = read(root, "train-images-idx3-ubyte"), read(root, "train-labels-idx1-ubyte").astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(labels))
    held, kept = np.sort(order[:HELD_OUT]), np.sort(order[HELD_OUT:])
    out = Path("runs/fashion-validation.npz")
    out.parent.mkdir(exist_ok=True)
    np.savez(out, x_train=images[kept], y_train=labels[kept], x_test=images[held], y_test=labels[held])
    print(f"{out}: {len(kept)} images to train on, {len(held)} to validate")


if __name__ == "__main__":
    main()
