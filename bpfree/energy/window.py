"""One measured piece of a run."""

from __future__ import annotations

from collections.abc import Callable

from bpfree.energy.counter import Reading
from bpfree.energy.result import EnergyResult
from bpfree.energy.tally import Tally
from bpfree.energy.trace import PowerTrace
from bpfree.errors import UsageError


class Window:
    """Made, run and ended by `EnergyMeter.window`; users look at `name` and `result`."""

    def __init__(self, name: str, judge: Callable[[Tally], EnergyResult]) -> None:
        self.name = name
        self.tally = Tally(windows=1)
        self._judge = judge
        self._start: Reading | None = None
        self._ended = False

    @property
    def result(self) -> EnergyResult:
        """What was measured, net of the idle baseline as it is known by now.

        Raises:
            UsageError: the window is still open.
        """
        if not self._ended:
            raise UsageError(f"window {self.name!r} is still open; its result comes with its end")
        return self._judge(self.tally)

    @property
    def running(self) -> bool:
        """Open and not paused."""
        return self._start is not None

    def run(self, reading: Reading) -> None:
        """Begin a span, at the beginning or after a pause. A window that has ended stays so."""
        if not self._ended:
            self._start = reading

    def pause(self, reading: Reading, trace: PowerTrace | None) -> None:
        """End the span that is running, if any."""
        if self._start is not None:
            self.tally.add_span(self._start, reading, trace)
            self._start = None

    def end(self, reading: Reading, trace: PowerTrace | None) -> None:
        """End the window."""
        self.pause(reading, trace)
        self._ended = True

    def so_far(self, reading: Reading, trace: PowerTrace | None) -> Tally:
        """The sums as if the window ended with this reading."""
        return self.tally if self._start is None else self.tally.with_span(self._start, reading, trace)
