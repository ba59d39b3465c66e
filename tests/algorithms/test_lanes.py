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

from bpfree.algorithms import CounterCurrent, ForwardForward, Learner, MonoForward, NoProp, NoPropBackprop
from bpfree.algorithms._lanes import Lanes
from bpfree.networks import build_network, cnn, mlp

MAIN = -1


class Watch(TorchDispatchMode):
    """Notes which lane makes and reads which memory, until lanes are joined.

    The allocator gives memory back to the stream that asked for it, and a lane waits for the main stream, and for one
    other lane if that is named, when it is entered; so a lane must not read what another lane made, nor the main stream
    what any did, before the join, and what a lane reads of other streams must live until then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lane, self.forks = MAIN, 0
        self.waited = {MAIN}
        self.made: dict[StorageWeakRef, int] = {}
        self.owner: dict[StorageWeakRef, int] = {}  # whom the allocator gives it back to, after a join too
        self.read: list[tuple[StorageWeakRef, str]] = []
        self.races: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [StorageWeakRef(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        for memory in given:
            maker = self.made.get(memory, MAIN)
            if maker not in (self.lane, *self.waited):
                self.races.append(f"{func} in lane {self.lane} reads what lane {maker} makes")
            if self.lane not in (
                MAIN,
                self.owner.get(memory, MAIN),
            ):  # a lane waits for main before it takes memory back
                self.read.append((memory, f"{func} in lane {self.lane}"))
        found = func(*args, **kwargs)
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor) and (memory := StorageWeakRef(tensor.untyped_storage())) not in given:
                self.made[memory] = self.owner[memory] = self.lane
        return found

    @contextmanager
    def enter(self, lanes: Lanes, index: int, *, after: int | None = None) -> Iterator[None]:
        assert self.lane == MAIN
        assert 0 <= index < lanes.count
        self.lane, self.forks = index, self.forks + 1
        self.waited = {MAIN} if after is None else {MAIN, after}
        yield
        self.lane, self.waited = MAIN, {MAIN}

    def join(self, lanes: Lanes) -> None:
        self.races += [f"{who} reads what is freed before the join" for memory, who in self.read if memory.expired()]
        self.read.clear()
        self.made.clear()
        self.owner = {memory: lane for memory, lane in self.owner.items() if not memory.expired()}


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
    "noprop-bp": lambda: NoPropBackprop(mlp((5,), (8,)), 3, steps=4, width=6, lanes=2),
    "ccl": lambda: CounterCurrent(dense(elu=True), 3, clip_scope="network", warmup_steps=3),
    "ccl-layer": lambda: CounterCurrent(dense(elu=True), 3, centralize=True),
    "ccl-flood": lambda: CounterCurrent(dense(elu=True), 3, flood=0.6, clip=0.0),
    "ccl-thin": lambda: CounterCurrent(mlp((64,), (64, 64), elu=True), 3, similarity="dot", clip_scope="network"),
    "ccl-thin-layer": lambda: CounterCurrent(mlp((64,), (64, 64), elu=True), 3, weight_decay=0.1, centralize=True),
    "ccl-convolutions": lambda: CounterCurrent(cnn((1, 8, 8), (4, 6)), 3, warmup_steps=3, input_shape=(1, 8, 8)),
    "ccl-autoencoder": lambda: CounterCurrent(
        build_network("autoencoder:4x6", (2, 8, 8)), 0, clip_scope="network", input_shape=(2, 8, 8)
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_lanes_share_no_memory_before_they_are_joined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    learner = LEARNERS[name]()
    watch = Watch()
    monkeypatch.setattr(Lanes, "lane", lambda lanes, index, **waits: watch.enter(lanes, index, **waits))
    monkeypatch.setattr(Lanes, "join", lambda lanes: watch.join(lanes))
    inputs = torch.rand(6, *learner.input_shape)
    batch = inputs, inputs if learner.task == "autoencode" else torch.randint(3, (6,))
    for _ in range(2):
        with watch:
            learner.step(batch)
    assert watch.forks > 2
    assert not watch.races
