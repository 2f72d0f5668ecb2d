"""An Opacus training script made sparse: the import and one argument have changed. About ten seconds on one core.

python examples/opacus_dropin.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fed_dpprune.dpsgd.privacy_engine import SparsePrivacyEngine as PrivacyEngine  # was: from opacus import PrivacyEngine

DELTA = 1e-4


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8, every fourth one held out."""
    bunch = load_digits()
    images, labels = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(bunch.target)
    held_out = torch.arange(len(images)) % 4 == 0
    return TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out])


def main() -> None:
    """Train privately, print epsilon and the held-out accuracy."""
    torch.manual_seed(0)
    train, test = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    loader = DataLoader(train, batch_size=128)
    criterion = nn.CrossEntropyLoss()

    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=8.0,
        target_delta=DELTA,
        epochs=10,
        max_grad_norm=0.5,
        sparsity=0.7,  # the one new argument: the fraction of coordinates that is frozen, drawn anew each epoch
    )

    for _ in range(10):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    model.eval()
    with torch.no_grad():
        x, y = test.tensors
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA}, accuracy {accuracy:.3f} on held-out digits")


if __name__ == "__main__":
    main()
