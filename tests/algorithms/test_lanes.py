"""What happens on side streams, told on the CPU: nobody reads what is freed or what another lane may be writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bpfree.algorithms import CounterCurrent, ForwardForward, Learner, MonoForward, NoProp
from bpfree.algorithms._lanes import Lanes
from bpfree.networks import mlp

MAIN = -1


class Watch(TorchDispatchMode):
    """Notes which lane makes and reads which memory, until lanes are joined.

    The allocator gives memory back to the stream that asked for it, and a lane waits for the main stream when it is
    entered; so a lane must not read what another lane made, nor the main stream what any did, before the join, and what
    a lane reads of the main stream must live until then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lane, self.forks = MAIN, 0
        self.made: dict[StorageWeakRef, int] = {}
        self.read: list[tuple[StorageWeakRef, str]] = []
        self.races: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [StorageWeakRef(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        for memory in given:
            if self.made.get(memory, self.lane) not in (self.lane, MAIN):
                self.races.append(f"{func} in lane {self.lane} reads what lane {self.made[memory]} makes")
            if self.lane != MAIN and self.made.get(memory, MAIN) == MAIN:
                self.read.append((memory, f"{func} in lane {self.lane}"))
        found = func(*args, **kwargs)
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor) and (memory := StorageWeakRef(tensor.untyped_storage())) not in given:
                self.made[memory] = self.lane
        return found

    @contextmanager
    def enter(self, lanes: Lanes, index: int) -> Iterator[None]:
        assert self.lane == MAIN
        self.lane, self.forks = index, self.forks + 1
        yield
        self.lane = MAIN

    def join(self, lanes: Lanes) -> None:
        self.races += [f"{who} reads what is freed before the join" for memory, who in self.read if memory.expired()]
        self.read.clear()
        self.made.clear()


def dense(**options: Any) -> nn.Sequential:
    return mlp((5,), (8, 7, 6, 5), **options)


def mixed() -> nn.Sequential:
    """A block in closed form before one that is not, and behind it."""
    return nn.Sequential(*dense()[:1], nn.Sequential(nn.Linear(8, 7), nn.Tanh()), *dense()[2:])


LEARNERS: dict[str, Callable[[], Learner]] = {
    "mf": lambda: MonoForward(dense(), 3),
    "mf-dropout": lambda: MonoForward(dense(dropout=0.3), 3),
    "mf-mixed": lambda: MonoForward(mixed(), 3, input_projection=True),
    "ff-hard": lambda: ForwardForward(dense(), 3),
    "ff-random": lambda: ForwardForward(dense(), 3, negatives="random", label="concat"),
    "ff-hybrid": lambda: ForwardForward(
        nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.ReLU()), *dense()[1:]),
        3,
        negatives="hybrid",
        inference="softmax",
        input_shape=(1, 5, 5),
    ),
    "noprop": lambda: NoProp(mlp((5,), (8,)), 3, steps=4, width=6, lanes=2),
    "noprop-step": lambda: NoProp(mlp((5,), (8,)), 3, steps=4, width=6, lanes=2, shared_updates="step"),
    "ccl": lambda: CounterCurrent(dense(elu=True), 3, clip_scope="network", warmup_steps=3),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_lanes_share_no_memory_before_they_are_joined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    learner = LEARNERS[name]()
    watch = Watch()
    monkeypatch.setattr(Lanes, "lane", lambda lanes, index: watch.enter(lanes, index))
    monkeypatch.setattr(Lanes, "join", lambda lanes: watch.join(lanes))
    batch = torch.rand(6, *learner.input_shape), torch.randint(3, (6,))
    for _ in range(2):
        with watch:
            learner.step(batch)
    assert watch.forks > 2
    assert not watch.races
