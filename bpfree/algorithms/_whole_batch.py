"""What a step needs of the batch as a whole, where processes have a part of it each."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from bpfree.algorithms.learner import Processes


class WholeBatch(nn.Module):
    """For a loss that compares samples with each other, and for what is done to gradients before an optimiser's step.

    Attributes:
        processes: those that have equal parts of the batch, in their order; None where there is one.
        average: makes gradients means over the processes; None where there is one.
    """

    processes: Processes | None = None
    average: Callable[[Iterable[nn.Parameter]], None] | None = None

    @property
    def alone(self) -> bool:
        """Whether this process has all of the batch."""
        return self.processes is None

    def rows(self, own: Tensor) -> tuple[Tensor, int]:
        """The rows of all processes.

        Args:
            own: (n, d), of this process.

        Returns:
            (N, d), and the number of the first own row in it.
        """
        if self.processes is None:
            return own, 0
        first = self.processes.rank * len(own)
        whole = own.new_zeros(self.processes.size * len(own), *own.shape[1:])
        whole[first : first + len(own)] = own
        return self.processes.sum(whole), first

    def settle(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients of these parameters, which are those of a process's own rows, those of all rows."""
        if self.average is not None:
            self.average(parameters)
