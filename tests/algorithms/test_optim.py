"""Optimisers by name, and state that exists before the first step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bpfree.algorithms._optim import OPTIMIZERS, make_optimizer, materialize_state
from bpfree.errors import UsageError


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 5, generator=generator)).square().sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_made_beforehand_changes_nothing(name: str) -> None:
    plain = nn.Linear(5, 3)
    prepared = copy.deepcopy(plain)
    start = [parameter.detach().clone() for parameter in prepared.parameters()]
    optimizer = make_optimizer(prepared.parameters(), name, lr=0.05, weight_decay=0.1)
    materialize_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(start, prepared.parameters(), strict=True))
    assert len(optimizer.state) == (0 if name == "gd" else 2)  # plain descent has none
    expected = train(plain, make_optimizer(plain.parameters(), name, lr=0.05, weight_decay=0.1))
    assert all(torch.equal(a, b) for a, b in zip(expected, train(prepared, optimizer), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_a_resumed_run_is_left_alone(name: str) -> None:
    model = nn.Linear(5, 3)
    optimizer = make_optimizer(model.parameters(), name, lr=0.05)
    train(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    materialize_state(optimizer)
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, before[index][key])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=0.9, nesterov=True)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=0.9)),
    ],
)
def test_names_mean_what_pytorch_means(name: str, reference: object) -> None:
    named, plain = (model := nn.Linear(5, 3)), copy.deepcopy(model)
    got = train(named, make_optimizer(named.parameters(), name, lr=0.05, weight_decay=0.1))
    expected = train(plain, reference(plain.parameters()))  # type: ignore[operator]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_any_optimizer_can_be_handed_in() -> None:
    model = nn.Linear(5, 3)
    optimizer = make_optimizer(model.parameters(), lambda p: torch.optim.RMSprop(p, lr=0.3), lr=1.0)
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize(
    ("wrong", "got"),
    [(lambda p: list(p), "one that returns a list"), (3, "3"), (None, "None"), (["sgd"], r"\['sgd'\]")],
)
def test_what_makes_no_optimizer_is_refused(wrong: Any, got: str) -> None:
    with pytest.raises(UsageError, match=f"from parameters to an optimiser, got {got}$"):
        make_optimizer(nn.Linear(5, 3).parameters(), wrong, lr=1.0)


@pytest.mark.parametrize(
    ("name", "lr", "decay", "message"),
    [
        ("adamm", 0.1, 0.0, "did you mean adam"),
        ("adam", 0.0, 0.0, "lr must be positive"),
        ("adam", float("nan"), 0.0, "lr must be positive"),
        ("adam", 0.1, -1.0, "weight_decay not negative"),
    ],
)
def test_bad_values(name: str, lr: float, decay: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_optimizer(nn.Linear(2, 2).parameters(), name, lr=lr, weight_decay=decay)


def test_momentum_is_for_optimizers_that_have_one() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert make_optimizer([parameter], "momentum", lr=1.0, momentum=0.8).param_groups[0]["momentum"] == 0.8
    assert make_optimizer([parameter], "sgd", lr=1.0).param_groups[0]["momentum"] == 0.9
    with pytest.raises(UsageError, match="momentum"):
        make_optimizer([parameter], "adam", lr=1.0, momentum=0.8)
