"""Reading the counter at the ends of windows, in an order and at moments that lose as little as possible.

A counter is refreshed only now and then, so that each reading is stale by up to one period tau, and a window
of T seconds is uncertain by tau / T. Hence three rules: at a start the clock is read first and at an end the
counter first; windows that touch share one reading; and, if wanted, a reading waits for the counter to
change.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

from bpfree.energy.sources import PowerSource

TOUCHING_S = 1e-3
"""Windows this close share a reading, s: else what the counter adds between them would be nobody's."""

CLOCKS_APART_S = 0.01
"""How far a time told by the device may lie beyond the readings, s: its clock is not quite ours."""

EDGE_PERIODS = 2
"""Longest wait for the counter to change, in its update periods."""


class Reading(NamedTuple):
    """The counter at one time: s, and J or None when it could not be read."""

    seconds: float
    joules: float | None


class CounterCourse:
    """The counter over time: the readings of every thread, joined by straight lines."""

    def __init__(self) -> None:
        self._times = array("d")
        self._joules = array("d")
        self._lock = threading.Lock()

    def add(self, reading: Reading) -> None:
        """Take a reading into the course; one without joules is passed over."""
        if reading.joules is None:
            return
        with self._lock:
            place = bisect_right(self._times, reading.seconds)  # another thread may have been quicker
            self._times.insert(place, reading.seconds)
            self._joules.insert(place, reading.joules)

    def at(self, seconds: float) -> Reading:
        """The counter at a time between readings; well before the first and after the last it is not known."""
        with self._lock:
            if not self._times:
                return Reading(seconds, None)
            inside = min(max(seconds, self._times[0]), self._times[-1])
            if abs(seconds - inside) > CLOCKS_APART_S:
                return Reading(seconds, None)
            place = min(bisect_right(self._times, inside), len(self._times) - 1)
            t0, j0 = self._times[place - 1], self._joules[place - 1]
            t1, j1 = self._times[place], self._joules[place]
        share = (inside - t0) / (t1 - t0) if t1 > t0 else 1.0
        return Reading(seconds, j0 + (j1 - j0) * share)


class CounterReader:
    """Takes readings; the device must have been waited for by the caller.

    Args:
        source: the power source.
        clock: a time in s that never goes back.
        align: wait for the counter to change before each reading.

    Attributes:
        course: all readings so far, but those of a wait for a change.
    """

    def __init__(self, source: PowerSource, clock: Callable[[], float], *, align: bool) -> None:
        self._source = source
        self._clock = clock
        self._align = align
        self._latest: Reading | None = None
        self.course = CounterCourse()

    def at_start(self) -> Reading:
        """The reading that begins a span: the latest one, if it is that of a moment ago."""
        if self._latest is not None and self._clock() - self._latest.seconds <= TOUCHING_S:
            return self._latest
        if self._align:
            self._latest = self._at_change()
        else:
            now = self._clock()
            self._latest = Reading(now, self._source.energy_j())
        self.course.add(self._latest)
        return self._latest

    def at_end(self) -> Reading:
        """The reading that ends a span."""
        self._latest = self._at_change() if self._align else self._read()
        self.course.add(self._latest)
        return self._latest

    def now(self) -> Reading:
        """A reading in passing, which waits for nothing and is shared with nobody."""
        reading = self._read()
        self.course.add(reading)
        return reading

    def _read(self) -> Reading:
        joules = self._source.energy_j()
        return Reading(self._clock(), joules)

    def _at_change(self) -> Reading:
        """The first reading after a change of the counter, which is not stale, or the last of a vain wait."""
        first = reading = self._read()
        deadline = first.seconds + EDGE_PERIODS * self._source.update_period_s
        while reading.joules is not None and reading.joules == first.joules and reading.seconds < deadline:
            reading = self._read()
        return reading
