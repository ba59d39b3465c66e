"""Train your own network with Mono-Forward in your own loop, in PyTorch as you know it.

python examples/embed.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bpfree


def main(epochs: int = 15) -> float:
    """Train on the packaged digits; returns the test accuracy, from 0 to 1."""
    torch.manual_seed(0)
    digits = bpfree.data.load("digits")
    train = TensorDataset(digits.train.inputs / 255, digits.train.targets)
    my_loader = DataLoader(train, batch_size=64, shuffle=True)
    x_test, y_test = digits.test.inputs / 255, digits.test.targets

    # any nn.Sequential: the layers are cut into blocks after each layer with its activation
    my_blocks = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU())

    learner = bpfree.MonoForward(my_blocks, classes=10, lr=1e-3)
    for _ in range(epochs):
        for x, y in my_loader:
            learner.step((x, y))
    accuracy = (learner.scores(x_test).argmax(1) == y_test).float().mean()

    print(f"test accuracy {100 * accuracy:.2f} %")
    return accuracy.item()


if __name__ == "__main__":
    main()
