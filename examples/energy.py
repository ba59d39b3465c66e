"""Measure any PyTorch program: `python examples/energy.py`, with or without a GPU."""

from __future__ import annotations

import torch
from torch import nn

import bpfree
from bpfree.energy import explain


def train(model: nn.Module, steps: int, device: torch.device) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(256, 100, device=device), torch.randint(10, (256,), device=device)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = nn.Sequential(nn.Linear(100, 500), nn.ReLU(), nn.Linear(500, 10)).to(device)
    train(model, 10, device)  # warm up, so that set-up is not measured

    with bpfree.EnergyMeter(device=device, poll_hz=5) as meter:
        with meter.phase("training"):  # a piece, without waiting for the device
            train(model, 300, device)
        with meter.phase("inference"), torch.no_grad():
            model(torch.randn(10_000, 100, device=device))

    result = meter.result
    if result.gross_j is None:
        print(f"{result.seconds:.2f} s; energy not measured: {meter.source.reason}")
    else:
        print(f"{result.seconds:.2f} s, {result.gross_j:.1f} J by {result.method}, {result.scope}")
        for name in ("training", "inference"):
            print(f"  {name}: {meter.totals()[name].gross_j} J in {meter.totals()[name].seconds:.3f} s")
    for flag in result.flags:
        print(f"  {flag}: {explain(flag)}")


if __name__ == "__main__":
    main()
