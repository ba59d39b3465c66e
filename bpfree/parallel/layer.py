"""Consecutive blocks on each rank: activations go forward, nothing but what a rule declares goes back.

Rank r holds some consecutive units of the rule (`algorithms.local_units`). In every step it receives the signal of the
unit before its first one, lets its units learn, hands the last one's signal to rank r + 1 and ends the step; rank r + 1
works on step k while rank r works on step k + 1. Signals are received into two buffers in turn, the next one while a
step computes, and sent without waiting, so that only the first step of an epoch and its validation find ranks idle.
Inputs and targets are not sent: every rank has the data, in the same order. Where a unit reads parameters of the next
one (`LocalUnit.borrows`) that lives on rank r + 1, rank r + 1 sends them as they are when its step begins; then both
messages are exchanged between two steps, and none is under way while ranks learn.

A rule whose units learn independently sends nothing while it learns, and is validated the same way. If frozen parts
make what they learn from, a rank runs those of its own units, whose outputs are handed on as signals are ("layer"), or
all up to its last unit's ("block"). What can be kept is made once.

On CUDA a rank's step is two graphs: the units' learning, and the end of the step; signals are sent between the two.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._captures import captured
from bpfree.algorithms._lanes import side_stream
from bpfree.algorithms._optim import parameters_of
from bpfree.algorithms.learner import Batch, Learner, Metrics, Stage
from bpfree.algorithms.local_units import FrozenParts, HasLocalUnits, LocalUnit, LocalUnits, Signal
from bpfree.errors import UsageError
from bpfree.networks.partition import balanced_ends
from bpfree.networks.timing import least_seconds
from bpfree.parallel.ranks import Ranks
from bpfree.parallel.team import Team

SLOTS: Final = 2
EAGER_STEPS: Final = 3  # before capture: libraries load, optimisers make their state
TIMED_STEPS: Final = 3


@dataclass(frozen=True)
class Layout:
    """How one tensor of a signal lies in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a tensor that is contiguous in one way or the other."""
        last = tensor.ndim == 4 and not tensor.is_contiguous()
        return cls(tuple(tensor.shape), tensor.dtype, last and tensor.is_contiguous(memory_format=torch.channels_last))

    def empty(self, device: torch.device) -> Tensor:
        """A tensor of this layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=layout)


def flat(tensor: Tensor) -> Tensor:
    """A tensor's memory as it lies, contiguous."""
    return tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)


def own_memory(signal: Signal, reused: Iterable[Tensor]) -> Signal:
    """A signal to send, in memory that nothing is written to while it is under way.

    Args:
        signal: what a unit hands on; it may pass on what it was given.
        reused: what lies in memory that is filled anew: the loop's staging buffer, buffers of received messages.
    """
    taken = {tensor.untyped_storage().data_ptr() for tensor in reused}
    return tuple(t.clone() if t.untyped_storage().data_ptr() in taken else t for t in signal)


class Link:
    """Messages from one rank to a neighbour, in order.

    Args:
        ranks: the processes.
        group: the number of that of the two of them.
        peer: the other one, by its number among all processes.
    """

    def __init__(self, ranks: Ranks, group: int, peer: int) -> None:
        self._ranks, self._group, self._peer = ranks, group, peer
        self._layouts: dict[Any, list[Layout]] = {}
        self._buffers: dict[Any, list[Signal]] = {}
        self._turn = 0
        self._sent: deque[tuple[list[Any], Signal]] = deque()

    @classmethod
    def to(cls, ranks: Ranks, groups: Sequence[int | None], neighbour: int) -> Link:
        """To the rank before or behind this one.

        Args:
            ranks: the processes.
            groups: their numbers, by the lower of the two ranks that each joins.
            neighbour: the other rank.
        """
        group = groups[min(ranks.rank, neighbour)]
        assert group is not None
        return cls(ranks, group, ranks.among_all(neighbour))

    def declare(self, kind: Any, layouts: list[Layout]) -> None:
        """What messages of a kind look like, where both sides know that; otherwise the first one is announced."""
        self._layouts[kind] = layouts
        self._buffers[kind] = [tuple(layout.empty(self._ranks.device) for layout in layouts) for _ in range(SLOTS)]

    def send(self, kind: Any, signal: Signal) -> None:
        """Send without waiting.

        Args:
            kind: what the message is: equal kinds have equal layouts, and both sides meet the kinds in the same order.
            signal: detached tensors; they must not change before `room` has made room for the next message but one.
        """
        signal = tuple(t if t.is_contiguous() or Layout.of(t).channels_last else t.contiguous() for t in signal)
        if kind not in self._layouts:
            self._layouts[kind] = [Layout.of(tensor) for tensor in signal]
            dist.send_object_list([self._layouts[kind]], self._peer)
        group = self._ranks.group(self._group)
        works = [dist.isend(flat(tensor), self._peer, group=group) for tensor in signal]
        self._sent.append((works, signal))

    def room(self, most: int = SLOTS - 1) -> None:
        """Wait until at most this many messages are under way."""
        while len(self._sent) > most:
            works, _ = self._sent.popleft()
            for work in works:
                work.wait()

    def receive(self, kind: Any) -> tuple[list[Any], Signal]:
        """Begin to receive; the signal is there once the works have been waited for, until the next message but one."""
        if kind not in self._layouts:
            box: list[Any] = [None]
            dist.recv_object_list(box, self._peer)
            self.declare(kind, box[0])
        self._turn += 1
        signal = self._buffers[kind][self._turn % SLOTS]
        group = self._ranks.group(self._group)
        return [dist.irecv(flat(tensor), self._peer, group=group) for tensor in signal], signal


def arrived(pending: tuple[list[Any], Signal]) -> Signal:
    """Wait for a message (on CUDA the current stream waits, not the host)."""
    works, signal = pending
    for work in works:
        work.wait()
    return signal


class LayerTeam(Team):
    """Ranks that hold consecutive units.

    Args:
        ranks: the processes.
        learner: complete, on the CPU, and the same on every rank. The rank's own part is moved to its device.
        sample: a batch to measure units with, on the rank's device.
        cut: the last unit of each rank, from 0; None balances the ranks by the measured time of each unit's step.
        graphs: on CUDA, replay steps as CUDA graphs.
        independent: the units must need nothing from each other while they learn.

    Raises:
        UsageError: the rule cannot be cut, there are more ranks than units, or the cut does not fit.
    """

    whole = False

    def __init__(
        self,
        ranks: Ranks,
        learner: Learner,
        sample: Batch,
        *,
        cut: Sequence[int] | None = None,
        graphs: bool = True,
        independent: bool = False,
    ) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._ranks, self._form = ranks, "block" if independent else "layer"
        self._chain = chain = cut_rule(learner, self._form, ranks.size)
        self.captures = graphs and ranks.device.type == "cuda" and learner.capture_safe
        self._seconds: list[float] | None = None
        if cut is None:
            costs = unit_seconds(learner, sample, ranks.device, graphs=self.captures) if ranks.rank == 0 else None
            self._seconds = ranks.from_leader(costs)
            ends = tuple(balanced_ends(self._seconds, ranks.size))
        else:
            ends = checked_cut(cut, len(chain.units), ranks.size)
        self.ends = ends
        first = [0, *(end + 1 for end in ends)]
        self.members = range(first[self.rank], first[self.rank + 1])
        self._owner = {
            id(tensor): owner
            for owner in range(self.size)
            for number in range(first[owner], first[owner + 1])
            for module in chain.units[number].modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        borrowed = chain.units[self.members[-1]].borrows if self.rank + 1 < self.size else ()
        self._borrowed = tuple(borrowed)
        frozen = chain.frozen
        if frozen is not None:
            self._chain = frozen.narrowed(self.members)
        # in blocks apart, this rank runs the frozen parts before its own too
        ahead = frozen.modules[: self.members.start] if frozen is not None and independent else ()
        self._run = {id(tensor) for part in ahead for tensor in (*part.parameters(), *part.buffers())}
        self._frozen = frozen
        self._lent = chain.units[self.members[0] - 1].borrows if self.rank else ()
        self._place(learner)
        groups = [ranks.link(lower) for lower in range(self.size - 1)]
        self._before = Link.to(ranks, groups, self.rank - 1) if self.rank else None
        self._after = Link.to(ranks, groups, self.rank + 1) if self.rank + 1 < self.size else None
        self._back_before, self._back_after = self._back_links()
        self._pending: tuple[list[Any], Signal] | None = None
        self._to_come = 0
        self._steps = 0
        self._parts: list[_Graphed | None] = [None] * SLOTS
        self._names: list[str] = []
        self._empty_scores = torch.empty(0, learner.classes, device=ranks.device)

    def _back_links(self) -> tuple[Link | None, Link | None]:
        """For what units borrow: to the rank before, from the rank behind; none where the rule borrows nothing."""
        if not any(unit.borrows for unit in self._chain.units):
            return None, None
        groups = [self._ranks.link(lower, back=True) for lower in range(self.size - 1)]
        before = Link.to(self._ranks, groups, self.rank - 1) if self.rank and self._lent else None
        after = Link.to(self._ranks, groups, self.rank + 1) if self._borrowed else None
        for link, parameters in ((before, self._lent), (after, self._borrowed)):
            if link is not None:
                # an announcement would go against the stream of those of signals, each side waiting for the other
                size = sum(parameter.numel() for parameter in parameters)
                link.declare("borrowed", [Layout((size,), parameters[0].dtype, channels_last=False)])
        return before, after

    def _place(self, learner: Learner) -> None:
        """Move what this rank computes with to its device; the rest to the host, and out of its optimisers."""
        used = {id(parameter) for parameter in self._borrowed} | self._run
        for tensor in (*learner.parameters(), *learner.buffers()):
            here = self.owns(tensor) or id(tensor) in used
            tensor.data = tensor.data.to(self._ranks.device if here else "cpu")
            if isinstance(tensor, nn.Parameter) and not self.owns(tensor):
                tensor.requires_grad_(False)
                tensor.grad = None

    # -- what the fit loop asks -------------------------------------------------------------------------------

    def stages(self, learner: Learner) -> tuple[Stage, ...]:
        (stage,) = learner.stages()
        frozen = self._frozen
        return (
            Stage(
                name=stage.name,
                modules=stage.modules,
                optimizers=stage.optimizers,
                update=self._update,
                scores=self._scores,
                input_shape=stage.input_shape if frozen is None else frozen.input_shape(self.members),
                classes=stage.classes,
                prefix=None if frozen is None else partial(self._prefix, frozen),
            ),
        )

    @contextmanager
    def assembled(self, learner: Learner) -> Iterator[None]:
        for part in self._frozen.modules if self._frozen is not None else ():
            for tensor in (*part.parameters(), *part.buffers()):  # `part.to` would make other buffers, without owner
                tensor.data = tensor.data.to(self._ranks.device)
        try:
            yield
        finally:
            self._place(learner)

    def least(self, number: int) -> int:
        return min(self._ranks.of_all(number))

    def expect(self, steps: int) -> None:
        self._to_come = steps

    def share_metrics(self, rows: Tensor) -> Tensor:
        self.drain()
        shared = rows.clone()
        dist.all_reduce(shared, group=self._ranks.everyone)  # each rank has zeros for the units of others
        return shared

    def keep_metrics(self, rows: Tensor) -> Tensor:
        return rows if self.leader else torch.zeros_like(rows)

    def share_rating(self, rating: Tensor) -> Tensor:
        self.drain()
        dist.broadcast(rating, self._ranks.among_all(self.size - 1), group=self._ranks.everyone)
        return rating

    def decide(self, *wishes: bool) -> tuple[bool, ...]:
        return self._ranks.agree(*wishes)

    def add(self, numbers: Iterable[float | None]) -> list[float | None]:
        return self._ranks.add(numbers)

    def describe(self) -> dict[str, Any]:
        measured = {} if self._seconds is None else {"unit_seconds": self._seconds}
        return {"form": self._form, "ranks": self.size, "last_units": list(self.ends), **measured}

    def owns(self, tensor: Tensor) -> bool:
        return self._owner.get(id(tensor), self.rank) == self.rank  # what no unit has is everyone's

    def collect(self, learner: Learner) -> None:
        self.drain()
        for tensor in (*learner.parameters(), *learner.buffers()):
            self._ranks.to_leader(tensor, self._owner.get(id(tensor), 0))
        for optimizer in learner.optimizers():
            self._collect_state(optimizer)

    def collect_copies(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
        own = iter(copies)
        if not self.leader:
            for tensor in filter(self.owns, tensors):
                self._ranks.to_leader(next(own), self._owner.get(id(tensor), 0))
            return list(copies)
        whole = [next(own) if self.owns(tensor) else torch.empty_like(tensor) for tensor in tensors]
        for tensor, copied in zip(tensors, whole, strict=True):
            self._ranks.to_leader(copied, self._owner.get(id(tensor), 0))
        return whole

    def _collect_state(self, optimizer: Optimizer) -> None:
        parameters = parameters_of([optimizer])
        owners = [self._owner.get(id(parameter), 0) for parameter in parameters]
        mine = {
            index: {
                name: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
                for name, value in optimizer.state[parameter].items()
            }
            for index, parameter in enumerate(parameters)
            if owners[index] == self.rank and parameter in optimizer.state
        }
        for owner, described in enumerate(self._ranks.of_all(mine)):
            for index, state in described.items() if owner else ():
                parameter = parameters[index]
                for name, value in state.items():
                    if not isinstance(value, tuple):
                        optimizer.state[parameter][name] = value
                        continue
                    if self.leader:
                        optimizer.state[parameter][name] = torch.empty(value[0], dtype=value[1])
                    if self.leader or self.rank == owner:
                        self._ranks.to_leader(optimizer.state[parameter][name], owner)

    def settle(self, learner: Learner) -> None:
        for optimizer in learner.optimizers():
            for parameter in [p for p in optimizer.state if not self.owns(p)]:
                del optimizer.state[parameter]

    # -- learning ---------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Wait until everything that was sent has arrived."""
        if self._after is not None:
            self._after.room(0)

    def _update(self, batch: Batch) -> Metrics:
        """One step of this rank's units; the metrics of others are zero."""
        signal = self._next_signal(("step", len(batch[1])))
        slot, self._steps = self._steps % SLOTS, self._steps + 1
        if self._after is not None:
            self._after.room()
        part = self._part(slot, batch, signal)
        outputs, metrics = part.learn(batch, signal)
        if self._after is not None and outputs:
            self._after.send(("step", len(batch[1])), own_memory(outputs, (batch[0], *(signal or ()))))
        self._borrow()
        shared = part.end()
        self._to_come -= 1
        return self._named({**metrics, **shared} if self.leader else metrics)

    def _prefix(self, frozen: FrozenParts, inputs: Any) -> Tensor:
        """What the units of this rank learn from."""
        handed_on = self._form == "layer"
        kind = "frozen", len(inputs)
        received = arrived(self._before.receive(kind)) if handed_on and self._before is not None else None
        made, signal = frozen.outputs(inputs, self.members, received)
        if handed_on and self._after is not None:
            self._after.room()
            self._after.send(kind, own_memory(signal, (inputs, *(received or ()))))
        return made

    def _next_signal(self, kind: tuple[str, int]) -> Signal | None:
        """What the unit before this rank's first one handed on; begins to receive the next one as well.

        Sends the rank before what it borrows, as it is now, if it does.
        """
        if self._before is None or self._chain.independent:
            return None
        if self._back_before is None:
            signal = arrived(self._pending or self._before.receive(kind))
            self._pending = self._before.receive(kind) if self._to_come > 1 else None
            return signal
        # A kernel that waits for the next signal may hold up this step's in the device's queues, and with them what is
        # lent, without which the rank before does not go on: two GPUs took turns. So both messages are exchanged
        # here, signal first as the rank before does, and are over when the step begins.
        pending = self._before.receive(kind)
        self._back_before.send("borrowed", (torch.cat([parameter.detach().flatten() for parameter in self._lent]),))
        signal = arrived(pending)
        self._back_before.room(0)
        return signal

    def _borrow(self) -> None:
        """Take what the rank behind sends into this rank's copies of its parameters."""
        if self._back_after is not None:
            (message,) = arrived(self._back_after.receive("borrowed"))
            if self._after is not None:
                self._after.room(0)
            parts = message.split([parameter.numel() for parameter in self._borrowed])
            for parameter, part in zip(self._borrowed, parts, strict=True):
                parameter.detach().copy_(part.view(parameter.shape))

    def _named(self, metrics: Metrics) -> Metrics:
        """The metrics of all ranks, in the order of the units."""
        if not self._names:
            self._names = [name for names in self._ranks.of_all(list(metrics)) for name in names]
            # those of the whole, which only the leader reports, come behind those of units
            whole = [name for name in self._names if not any(name.startswith(u.name) for u in self._chain.units)]
            self._names = [name for name in self._names if name not in whole] + whole
        zero = torch.zeros((), dtype=next(iter(metrics.values())).dtype, device=self._ranks.device)
        return {name: metrics.get(name, zero) for name in self._names}

    def _part(self, slot: int, batch: Batch, signal: Signal | None) -> _Eager | _Graphed:
        """How this step is done: as graphs, once there are some."""
        if not self.captures or self._steps <= EAGER_STEPS:
            return _Eager(self._chain, self.members)
        part = self._parts[slot]
        if part is None:
            pool = next((other.pool for other in self._parts if other is not None), None)
            hands_on = self._after is not None
            part = self._parts[slot] = captured(
                lambda: _Graphed(self._chain, self.members, batch, signal, hands_on=hands_on, pool=pool),
                _parameters(self._chain.units[number] for number in self.members),
            )
        if part is None:  # of this rank alone: what ranks send each other is the same
            self.captures, self._parts = False, [None] * SLOTS
            return _Eager(self._chain, self.members)
        return part

    def _scores(self, inputs: Any) -> Tensor:
        """(B, C) scores on the rank that holds the last unit, none elsewhere."""
        kind = "scores", len(inputs)
        question = self._chain.ask(inputs)
        received = None if self._before is None else arrived(self._before.receive(kind))
        signal = self._chain.forward(question, self.members, received)
        if self._after is None:
            return self._chain.answer(signal, question)
        self._after.room()
        self._after.send(kind, own_memory(signal, received or ()))
        return self._empty_scores


class _Eager:
    """A rank's step, launched piece by piece."""

    def __init__(self, chain: LocalUnits, members: range) -> None:
        self._chain, self._members = chain, members
        self._step: Any = None

    def learn(self, batch: Batch, signal: Signal | None) -> tuple[Signal, Metrics]:
        """The units' learning: the signal to hand on, and metrics."""
        self._step, outputs, metrics = self._chain.learn(batch, self._members, signal)
        return outputs, metrics

    def end(self) -> Metrics:
        """The end of the step."""
        return self._chain.end(self._step, self._members)


class _Graphed:
    """A rank's step as two CUDA graphs over buffers of its own, so that two steps can be under way.

    Args:
        chain: the units.
        members: which of them.
        batch: like those of the steps.
        signal: like those of the steps, or None.
        hands_on: whether the signal for the next unit is wanted.
        pool: memory of the other step's graphs, which run before or behind these, or None.
    """

    def __init__(
        self, chain: LocalUnits, members: range, batch: Batch, signal: Signal | None, *, hands_on: bool, pool: Any
    ) -> None:
        self._batch = batch[0].clone(), batch[1].clone()
        self._signal = None if signal is None else tuple(tensor.clone() for tensor in signal)
        self._learning, self._ending = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # the watchdog of NCCL asks for its events meanwhile, which only "thread_local" allows
        with torch.cuda.graph(self._learning, pool=pool, capture_error_mode="thread_local"):
            step, made, self._metrics = chain.learn(self._batch, members, self._signal)
            self._made = made if hands_on else ()
        # The other step's graphs, if they came first, compute in what was free of the pool: this graph's outputs too.
        self._outputs = tuple(torch.empty_like(tensor) for tensor in self._made)
        self.pool = self._learning.pool()
        with torch.cuda.graph(self._ending, pool=self.pool, capture_error_mode="thread_local"):
            self._shared = chain.end(step, members)

    def learn(self, batch: Batch, signal: Signal | None) -> tuple[Signal, Metrics]:
        """See `_Eager.learn`."""
        for buffer, value in zip((*self._batch, *(self._signal or ())), (*batch, *(signal or ())), strict=True):
            buffer.copy_(value)
        self._learning.replay()
        for buffer, value in zip(self._outputs, self._made, strict=True):
            buffer.copy_(value)
        return self._outputs, self._metrics

    def end(self) -> Metrics:
        """See `_Eager.end`."""
        self._ending.replay()
        return self._shared


def cut_rule(learner: Learner, form: str, ranks: int) -> LocalUnits:
    """The units of a rule that is to be spread.

    Raises:
        UsageError: why it cannot be.
    """
    rule = type(learner).__name__
    if not isinstance(learner, HasLocalUnits):
        reason = learner.undivided or "its blocks do not learn from forward activations alone"
        raise UsageError(f"{rule} cannot be spread with --parallel {form}: {reason}; use --parallel data")
    try:
        chain = learner.local_units()
    except UsageError as error:
        raise UsageError(f"{rule} cannot be spread with --parallel {form}: {error}") from None
    if form == "block" and not chain.independent:
        raise UsageError(
            f"{rule} cannot be spread with --parallel block: its blocks need each other's activations; "
            "use --parallel layer"
        )
    if ranks > len(chain.units):
        raise UsageError(f"{ranks} ranks are more than the {len(chain.units)} blocks that {rule} has here; use fewer")
    return chain


def checked_cut(cut: Sequence[int], units: int, ranks: int) -> tuple[int, ...]:
    """The last unit of each rank.

    Raises:
        UsageError: it does not fit.
    """
    ends = tuple(cut)
    if len(ends) != ranks or list(ends) != sorted(set(ends)) or ends[0] < 0 or ends[-1] != units - 1:
        raise UsageError(f"a cut for {ranks} ranks names the last block of each, rising to {units - 1}, got {ends}")
    return ends


def unit_seconds(learner: Learner, sample: Batch, device: torch.device, *, graphs: bool) -> list[float]:
    """Seconds of each unit's learning, one unit on the device at a time: the least of a few.

    Args:
        learner: on the CPU; it is copied, and stays as it is.
        sample: a batch on the device.
        device: where to measure.
        graphs: time replays of a CUDA graph, which small kernels take a fraction of their launches in.
    """
    generators = torch.get_rng_state(), torch.cuda.get_rng_state_all() if device.type == "cuda" else []
    twin = copy.deepcopy(learner)
    assert isinstance(twin, HasLocalUnits)
    chain = twin.local_units()
    owned = {id(t) for unit in chain.units for m in unit.modules for t in (*m.parameters(), *m.buffers())}
    for tensor in (*twin.parameters(), *twin.buffers()):
        if id(tensor) not in owned:
            tensor.data = tensor.data.to(device)
    for group in (group for optimizer in twin.optimizers() for group in optimizer.param_groups):
        if "capturable" in group:
            group["capturable"] = graphs  # units may step optimisers of their own
    precision = partial(  # which would keep the cast weights of all units, and of all repetitions but the first
        torch.autocast,
        device.type,
        torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
    if chain.frozen is not None:  # which run once
        for part in chain.frozen.modules:
            part.to(device)
        sample = chain.frozen.outputs(sample[0], chain.all, None)[0], sample[1]

    def timed(unit: LocalUnit, signal: Signal) -> tuple[float, Signal]:
        """Seconds of a unit, and the next one's signal; all else goes, also what a step keeps until its end."""
        step = chain.begin(sample)
        held = [t for module in unit.modules for t in (*module.parameters(), *module.buffers())]
        for tensor in held:
            tensor.data = tensor.data.to(device)
        learn = precision()(partial(unit.learn, signal, step))
        outputs, _ = learn()
        replay = captured(partial(_replayed, learn), _parameters([unit])) if graphs else None
        took = least_seconds(replay or learn, device, TIMED_STEPS)
        chain.join(step)
        for tensor in held:
            tensor.grad = None
            tensor.data = tensor.data.cpu()
        return took, outputs

    seconds = []
    signal = chain.enter(chain.begin(sample))
    for unit in chain.units:
        took, signal = timed(unit, signal)
        seconds.append(took)
    torch.set_rng_state(generators[0])
    if generators[1]:
        torch.cuda.set_rng_state_all(generators[1])
    return seconds


def _parameters(units: Iterable[LocalUnit]) -> Iterator[nn.Parameter]:
    return (parameter for unit in units for module in unit.modules for parameter in module.parameters())


def _replayed(work: Callable[[], Any]) -> Callable[[], None]:
    """The replay of `work` as a CUDA graph."""
    side = side_stream(torch.device("cuda", torch.cuda.current_device()), 0)  # of one for each unit, cuBLAS kept GiB
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(EAGER_STEPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    replay: Callable[[], None] = graph.replay
    return replay
