"""Reading the counter at the ends of windows, in an order and at moments that lose as little as possible.

A counter is refreshed only now and then, so that each reading is stale by up to one period tau, and a window
of T seconds is uncertain by tau / T. Hence three rules: at a start the clock is read first and at an end the
counter first; windows that touch share one reading; and, if wanted, a reading waits for the counter to
change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bpfree.energy.sources import PowerSource

TOUCHING_S = 1e-3
"""Windows this close share a reading, s: else what the counter adds between them would be nobody's."""

EDGE_PERIODS = 2
"""Longest wait for the counter to change, in its update periods."""


class Reading(NamedTuple):
    """The counter at one time: s, and J or None when it could not be read."""

    seconds: float
    joules: float | None


class CounterReader:
    """Takes readings; the device must have been waited for by the caller.

    Args:
        source: the power source.
        clock: a time in s that never goes back.
        align: wait for the counter to change before each reading.
    """

    def __init__(self, source: PowerSource, clock: Callable[[], float], *, align: bool) -> None:
        self._source = source
        self._clock = clock
        self._align = align
        self._latest: Reading | None = None

    def at_start(self) -> Reading:
        """The reading that begins a span: the latest one, if it is that of a moment ago."""
        if self._latest is not None and self._clock() - self._latest.seconds <= TOUCHING_S:
            return self._latest
        if self._align:
            self._latest = self._at_change()
        else:
            now = self._clock()
            self._latest = Reading(now, self._source.energy_j())
        return self._latest

    def at_end(self) -> Reading:
        """The reading that ends a span."""
        self._latest = self._at_change() if self._align else self.now()
        return self._latest

    def now(self) -> Reading:
        """A reading in passing, which waits for nothing and is shared with nobody."""
        joules = self._source.energy_j()
        return Reading(self._clock(), joules)

    def _at_change(self) -> Reading:
        """The first reading after a change of the counter, which is not stale, or the last of a vain wait."""
        first = reading = self.now()
        deadline = first.seconds + EDGE_PERIODS * self._source.update_period_s
        while reading.joules is not None and reading.joules == first.joules and reading.seconds < deadline:
            reading = self.now()
        return reading
