"""What happens on side streams, told on the CPU: nobody reads what is freed or what another lane may be writing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bpfree.algorithms import (
    CompetitiveForward,
    CounterCurrent,
    ForwardForward,
    Learner,
    LocalLearning,
    MonoForward,
    NoProp,
    NoPropBackprop,
    _lanes,
)
from bpfree.networks import build_network, cnn, mlp


class Watch(TorchDispatchMode):
    """Stands in for the device: notes which stream makes and reads which memory, and how much a stream knows of others.

    The allocator gives memory back to the stream that asked for it. So a stream must not read or change what another
    has written without having waited for it, and memory must not be changed, or taken after it was given back, while
    another stream may still be reading it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.main = FakeStream(self)
        self.current = self.main
        self.side: dict[int, FakeStream] = {}
        self.owner: dict[StorageWeakRef, FakeStream] = {}
        self.wrote: dict[StorageWeakRef, tuple[FakeStream, int]] = {}
        self.read: list[tuple[StorageWeakRef, FakeStream, int, str]] = []
        self.races: list[str] = []
        self.forks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, here = kwargs or {}, self.current
        here.time += 1
        given, changed = memories((args, kwargs)), changed_memories(func, args, kwargs)
        for memory in given:
            writer, time = self.wrote.get(memory, (self.main, 0))
            if not here.knows(writer, time):
                self.races.append(f"{func} in {here} reads what {writer} writes")
        taken = {memory for memory, *_ in self.read if memory.expired() and self.owner.get(memory, self.main) is here}
        for memory, reader, time, who in self.read:
            if memory in taken | changed and not here.knows(reader, time):
                self.races.append(f"{func} in {here} {'takes' if memory in taken else 'changes'} what {who} reads")
        self.read = [entry for entry in self.read if entry[0] not in taken]
        self.read += [(memory, here, here.time, f"{func} in {here}") for memory in given]
        found = func(*args, **kwargs)
        made = memories(found) - given
        self.owner |= dict.fromkeys(made, here)
        self.wrote |= dict.fromkeys(made | changed, (here, here.time))
        return found

    def streams(self, _: torch.device, count: int) -> list[FakeStream]:
        return [self.side.setdefault(index, FakeStream(self)) for index in range(count)] if count > 1 else []

    @contextmanager
    def enter(self, stream: FakeStream) -> Iterator[None]:
        assert self.current is self.main
        self.current, self.forks = stream, self.forks + 1
        yield
        self.current = self.main


class FakeStream:
    """What a stream has waited for, by a clock of each."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.time = watch, 0
        self.waited: dict[FakeStream, int] = {}

    def __repr__(self) -> str:
        return next((f"lane {index}" for index, stream in self.watch.side.items() if stream is self), "the main stream")

    def knows(self, other: FakeStream, time: int) -> bool:
        return other is self or self.waited.get(other, 0) >= time

    def record_event(self) -> dict[FakeStream, int]:
        return {**self.waited, self: self.time}

    def wait_event(self, event: dict[FakeStream, int]) -> None:
        self.waited = {key: max(time, self.waited.get(key, 0)) for key, time in {**self.waited, **event}.items()}
        if self is self.watch.main:  # whatever it knows, lanes will know when they begin
            self.watch.read = [entry for entry in self.watch.read if not self.knows(*entry[1:3])]

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())


def memories(tree: Any) -> set[StorageWeakRef]:
    return {StorageWeakRef(leaf.untyped_storage()) for leaf in tree_iter(tree) if isinstance(leaf, Tensor)}


def changed_memories(func: Any, args: Any, kwargs: Any) -> set[StorageWeakRef]:
    """Of the arguments that an operator writes to."""
    names = [argument.name for argument in func._schema.arguments]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return memories([values.get(name) for name in written])


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
    "cwc": lambda: CompetitiveForward(cnn((3, 8, 8), (6, 6, 6)), 3, lanes=2, input_shape=(3, 8, 8)),
    "dff": lambda: CompetitiveForward(
        build_network("deeper", (3, 16, 16)), 3, lanes=2, inference="readout", input_shape=(3, 16, 16)
    ),
    "sff": lambda: CompetitiveForward(
        cnn((3, 32, 32), (6,) * 5), 3, lanes=3, goodness="auxiliary", normalizer="channels", input_shape=(3, 32, 32)
    ),
    "dgl": lambda: LocalLearning(dense(), 3, host="greedy", lanes=2),
    "man": lambda: LocalLearning(
        cnn((3, 32, 32), (6,) * 5), 3, ema=True, bias="twin", lanes=3, input_shape=(3, 32, 32)
    ),
    "infopro": lambda: LocalLearning(cnn((3, 8, 8), (6, 6, 6)), 3, host="infopro", lanes=2, input_shape=(3, 8, 8)),
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
def test_streams_share_no_memory_without_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    learner, watch = LEARNERS[name](), Watch()
    inputs = torch.rand(6, *learner.input_shape)
    batch = inputs, inputs if learner.task == "autoencode" else torch.randint(3, (6,))
    alone = copy.deepcopy(learner)
    for _ in range(2):
        alone.step(batch)
    monkeypatch.setattr(_lanes, "side_streams", watch.streams)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: watch.current)
    monkeypatch.setattr(torch.cuda, "stream", watch.enter)
    for _ in range(2):
        with watch:
            learner.step(batch)
    assert watch.forks > 2
    assert not watch.races
    for mine, other in zip(learner.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_turns_overlap_and_wait_for_what_was_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    monkeypatch.setattr(_lanes, "side_streams", watch.streams)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: watch.current)
    monkeypatch.setattr(torch.cuda, "stream", watch.enter)
    lanes = _lanes.Lanes(torch.device("cpu"), 2)
    learnt, handed = [], []
    with watch:
        for _ in range(4):
            with lanes.turn():
                torch.zeros(1)
                lanes.hand_on()
                handed.append((watch.current, watch.current.time))
                torch.zeros(1)
                learnt.append((watch.current, watch.current.time))
                first, second = watch.side[0], watch.side[1]
                assert watch.current is (first, second)[(len(learnt) - 1) % 2]
                assert all(watch.current.knows(*moment) for moment in handed)
                others = learnt[:-1][::-1]  # the last one's learning goes on meanwhile, those before are over
                assert [watch.current.knows(*moment) for moment in others] == [False, True, True][: len(others)]
        with lanes.turn():
            torch.zeros(1)
            learnt.append((watch.current, watch.current.time))
        with lanes.turn():  # a part that has not handed on is waited for
            assert watch.current.knows(*learnt[-1])
    assert not watch.main.knows(*learnt[-1])
    lanes.join()
    assert all(watch.main.knows(*moment) for moment in learnt)
