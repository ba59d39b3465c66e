"""Steps that cannot be CUDA graphs run eagerly. What CUDA does is made up here."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from bpfree import MonoForward, build_network
from bpfree.algorithms._captures import captured, walked
from bpfree.data.batches import Batches
from bpfree.experiments.stepper import Stepper


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The current stream, as PyTorch keeps it."""
    current = ["main"]

    class Stream(nullcontext[None]):
        def __init__(self, stream: str) -> None:
            super().__init__()
            self.stream = stream

        def __exit__(self, *exception: object) -> None:
            current[0] = self.stream

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", Stream)
    return current


def test_what_is_captured_is_returned() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    assert captured(lambda: "graph", [parameter]) == "graph"
    assert parameter.grad is not None


def test_a_broken_capture_says_why_and_leaves_nothing_behind(streams: list[str]) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))

    def broken() -> None:
        streams[0] = "capture"  # on which PyTorch stays
        parameter.grad = torch.ones(1)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.warns(UserWarning, match=r"runs eagerly \(operation not permitted when stream is capturing\)$"):
        assert captured(broken, [parameter]) is None
    assert parameter.grad is None
    assert streams == ["main"]


def test_other_errors_are_not_taken_for_a_broken_capture() -> None:
    def defect() -> None:
        raise TypeError

    with pytest.raises(TypeError):
        captured(defect, [])


def test_one_process_goes_on_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nullcontext[None]):
        def __init__(self, graph: object, **options: Any) -> None:
            raise RuntimeError("no such kernel in a graph")

    monkeypatch.setattr(torch.cuda, "graph", Broken)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Stepper, "_warm_up", lambda stepper: None)
    learner = MonoForward(build_network("mlp:1x8", (4,)), classes=2, lr=0.1)
    train = Batches(torch.randn(40, 4), torch.arange(40) % 2)
    stepper = Stepper(
        learner,
        learner.stages()[0],
        train,
        live_prefix=None,
        batch_size=10,
        precision="fp32",
        scheduled=False,
        graph=True,
    )
    stepper.use_graph = True  # as on CUDA
    with pytest.warns(UserWarning, match="no such kernel in a graph"):
        stepper.rehearse(train.draw(0, 0, 0))
    assert not stepper.use_graph
    before = [parameter.clone() for parameter in learner.parameters()]
    rows = stepper.run(4, lambda: False)
    assert rows.shape == (4, 1)
    assert any(not torch.equal(was, now) for was, now in zip(before, learner.parameters(), strict=True))


def test_a_walk_hands_on_the_state_and_counts_its_steps() -> None:
    def advance(state: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return step * 10, 2 * state + step

    found, states = zip(*walked(advance, torch.tensor([1.0, -1.0]), 4), strict=True)
    assert [int(number) for number in found] == [0, 10, 20, 30]
    assert torch.equal(torch.stack(states), torch.tensor([[2.0, -2.0], [5.0, -3.0], [12.0, -4.0], [27.0, -5.0]]))
