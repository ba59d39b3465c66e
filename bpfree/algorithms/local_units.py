"""What a rule is cut into when its blocks are spread over processes: units that learn from what comes before them.

A rule whose blocks all learn on every batch is a chain of units. Each takes a signal from the unit before it, learns
from that signal and the batch alone, and hands a signal on; no gradient goes back. So units may live on different
devices and learn at the same time, and what each computes stays the same, bit for bit. The rule's own update is the
same chain run in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from bpfree.algorithms.learner import Batch, Metrics
from bpfree.networks.blocks import Shape

Signal = tuple[Any, ...]
"""What one unit hands to the next: detached tensors (graphs, where the network is one of graphs)."""


@dataclass(frozen=True, eq=False)
class LocalUnit:
    """What learns in one place.

    Attributes:
        name: shown in messages.
        modules: all parameters and buffers that belong to this unit and to no other.
        learn: from the signal and the step's context to the signal for the next unit, and metrics. It sets gradients,
            and may step optimisers that hold parameters of this unit only.
        forward: from the signal and the context of a question to the signal for the next unit, without learning.
        borrows: parameters of the next unit that the end of a step reads, as they were when the step began: the one
            message that goes backwards. A process that holds only this unit must be sent them.
    """

    name: str
    modules: tuple[nn.Module, ...]
    learn: Callable[[Signal, Any], tuple[Signal, Metrics]]
    forward: Callable[[Signal, Any], Signal]
    borrows: tuple[nn.Parameter, ...] = ()


def _nothing(step: Any) -> None:
    """For rules that have nothing to wait for."""


def _no_learning(unit: LocalUnit) -> None:
    """For callers that do not need to hear of each unit."""


@dataclass(frozen=True, eq=False)
class FrozenParts:
    """What units learn from, where parts that do not learn make it of network inputs.

    It is computed once where inputs are not augmented, and a process needs it of its own units only.

    Attributes:
        modules: the part of each unit.
        outputs: from network inputs, the numbers of some consecutive units, and what the part before theirs has made
            (None: all parts before theirs are run), to what these units learn from, as one tensor, and what the last
            one's part has made.
        input_shape: shape of one sample of what some consecutive units learn from.
        narrowed: the same chain for a process that has what these units learn from, and nothing of the others.
    """

    modules: tuple[nn.Module, ...]
    outputs: Callable[[Any, range, Signal | None], tuple[Tensor, Signal]]
    input_shape: Callable[[range], Shape]
    narrowed: Callable[[range], LocalUnits]


@dataclass(frozen=True, eq=False)
class LocalUnits:
    """A rule as a chain of units.

    What belongs to no unit (random streams of the whole, a read-out that every process trains alike) is held by every
    process.

    Attributes:
        units: in forward order.
        begin: from a checked batch to the context of a step: whatever the units need besides their signals.
        enter: from that context to the signal for the first unit.
        end: the step's end for some of the units (optimisers); it returns metrics of no single unit.
        ask: from network inputs to the context of a question.
        offer: from that context to the first unit's signal.
        answer: from the last unit's signal and the context to (B, C) scores.
        join: waits for work that `begin` and the units have put on side streams.
        independent: whether units learn without any signal from each other: then they hand on an empty one.
        frozen: what makes batches and questions of network inputs; None where they are network inputs.
    """

    units: tuple[LocalUnit, ...]
    begin: Callable[[Batch], Any]
    enter: Callable[[Any], Signal]
    end: Callable[[Any, range], Metrics]
    ask: Callable[[Any], Any]
    offer: Callable[[Any], Signal]
    answer: Callable[[Signal, Any], Tensor]
    join: Callable[[Any], None] = _nothing
    independent: bool = False
    frozen: FrozenParts | None = None

    @property
    def all(self) -> range:
        """The numbers of all units."""
        return range(len(self.units))

    def learn(
        self,
        batch: Batch,
        members: range,
        signal: Signal | None = None,
        learnt: Callable[[LocalUnit], None] = _no_learning,
    ) -> tuple[Any, Signal, Metrics]:
        """The learning of some consecutive units, up to the step's end.

        Args:
            batch: as for `Stage.update`.
            members: numbers of the units.
            signal: what the unit before them handed on; None for what enters the chain.
            learnt: called after each unit has set its gradients.

        Returns:
            The step's context, for `end`; the signal for the next unit; metrics by name, 0-d.
        """
        step = self.begin(batch)
        signal = self.enter(step) if signal is None else signal
        metrics: Metrics = {}
        for number in members:
            signal, found = self.units[number].learn(signal, step)
            metrics.update(found)
            learnt(self.units[number])
        self.join(step)
        return step, signal, metrics

    def update(self, batch: Batch, learnt: Callable[[LocalUnit], None] = _no_learning) -> Metrics:
        """One update of all units in this process; arguments as for `learn`."""
        step, _, metrics = self.learn(batch, self.all, learnt=learnt)
        metrics.update(self.end(step, self.all))
        return metrics

    def forward(self, question: Any, members: range, signal: Signal | None = None) -> Signal:
        """The signal behind some consecutive units; arguments as for `learn`."""
        signal = self.offer(question) if signal is None else signal
        for number in members:
            signal = self.units[number].forward(signal, question)
        return signal

    def scores(self, inputs: Any) -> Tensor:
        """(B, *input_shape) -> (B, C) scores of all units in this process."""
        question = self.ask(inputs)
        return self.answer(self.forward(question, self.all), question)


@runtime_checkable
class HasLocalUnits(Protocol):
    """A learner that can be cut into units."""

    def local_units(self) -> LocalUnits:
        """The units, in forward order.

        Raises:
            UsageError: not with the options that this learner was made with; the message says why.
        """
