"""What the fit loop needs to know of the processes that train together: `Team`, and `Alone` for one process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

from torch import Tensor

from bpfree.algorithms.learner import Learner, Stage


class Team(ABC):
    """The processes that train one learner, as each of them sees it.

    Every process runs the same fit loop on the same data in the same order, and takes the same decisions. Methods that
    exchange something are called by all of them, in the same order.

    Attributes:
        rank: number of this process.
        size: number of processes.
        captures: whether stages capture their own CUDA graphs, so that the loop must not.
        whole: whether every process holds the whole learner on its device.
    """

    rank: int = 0
    size: int = 1
    captures: bool = False
    whole: bool = True

    @property
    @final
    def leader(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @abstractmethod
    def stages(self, learner: Learner) -> tuple[Stage, ...]:
        """What this process trains in which order; the learner's own stages, or a part of them."""

    @abstractmethod
    def assembled(self, learner: Learner) -> AbstractContextManager[None]:
        """Within it, all of the learner's frozen parts are on this process's device, to look at the data with."""

    @abstractmethod
    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""

    @abstractmethod
    def expect(self, steps: int) -> None:
        """This many steps follow each other now, without anything between them."""

    @abstractmethod
    def share_metrics(self, rows: Tensor) -> Tensor:
        """(steps, metrics) of this process -> those of all."""

    @abstractmethod
    def share_rating(self, rating: Tensor) -> Tensor:
        """A rating that all processes are to agree on, from the one that knows it."""

    @abstractmethod
    def decide(self, *wishes: bool) -> tuple[bool, ...]:
        """What the leader wishes: clocks and signals differ between processes, decisions must not."""

    @abstractmethod
    def add(self, numbers: Iterable[float | None]) -> list[float | None]:
        """Sums over the processes; None where one of them does not know its number."""

    @abstractmethod
    def owns(self, tensor: Tensor) -> bool:
        """Whether a parameter or buffer of the learner is this process's to train and to remember."""

    @abstractmethod
    def collect(self, learner: Learner) -> None:
        """Make the leader's learner whole."""

    @abstractmethod
    def collect_copies(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
        """Copies of some of the learner's tensors, from the processes that own these.

        Args:
            tensors: parameters and buffers of the learner.
            copies: of those of `tensors` that this process owns, in their order.

        Returns:
            On the leader a copy of each of `tensors`, wherever it may lie; elsewhere `copies`.
        """

    @abstractmethod
    def settle(self, learner: Learner) -> None:
        """Let go of what belongs to other processes, after a whole state has been loaded."""

    @abstractmethod
    def keep_metrics(self, rows: Tensor) -> Tensor:
        """(steps, metrics) of all, from a checkpoint -> what this process contributes to `share_metrics`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """For the run's record."""


class Alone(Team):
    """One process."""

    def stages(self, learner: Learner) -> tuple[Stage, ...]:
        return learner.stages()

    def assembled(self, learner: Learner) -> AbstractContextManager[None]:
        return nullcontext()

    def least(self, number: int) -> int:
        return number

    def expect(self, steps: int) -> None:
        pass

    def share_metrics(self, rows: Tensor) -> Tensor:
        return rows

    def share_rating(self, rating: Tensor) -> Tensor:
        return rating

    def decide(self, *wishes: bool) -> tuple[bool, ...]:
        return wishes

    def add(self, numbers: Iterable[float | None]) -> list[float | None]:
        return list(numbers)

    def owns(self, tensor: Tensor) -> bool:
        return True

    def collect(self, learner: Learner) -> None:
        pass

    def collect_copies(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
        return list(copies)

    def settle(self, learner: Learner) -> None:
        pass

    def keep_metrics(self, rows: Tensor) -> Tensor:
        return rows

    def describe(self) -> dict[str, Any]:
        return {"form": "none", "ranks": 1}
