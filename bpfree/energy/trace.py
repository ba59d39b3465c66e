"""Power over time: samples, and their integral over a window.

The integral is the trapezoidal rule on the real time stamps, however irregular they are. What lies between
two samples is taken to be a straight line, but only as far as that is believable: over a longer gap there is
no energy at all.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right

MAX_GAP_PERIODS = 2.0
"""Longest believable straight line between two samples, in sampling periods."""


class PowerTrace:
    """Samples of power in order of time.

    Args:
        period_s: the intended time between two samples, s.

    Attributes:
        times: s.
        watts: W.
        dropped: number of samples thrown away because their time did not go forward.
        missing: number of samples that could not be read.
    """

    def __init__(self, period_s: float) -> None:
        self.period_s = period_s
        self.times = array("d")
        self.watts = array("d")
        self.dropped = 0
        self.missing = 0

    def add(self, t: float, watts: float | None) -> None:
        """Append a sample; `watts` is None when it could not be read."""
        if watts is None:
            self.missing += 1
        elif self.times and t <= self.times[-1]:
            self.dropped += 1
        else:
            # A reader in another thread goes by `times`, so that its sample must be complete by then.
            self.watts.append(watts)
            self.times.append(t)

    def energy_j(self, start: float, end: float) -> float | None:
        """Energy between two times, J; None if a gap, also one at either end, is too long to bridge.

        Before the first and after the last sample the power is taken to be that of the sample.
        """
        if end <= start:
            return 0.0
        # One sample beyond either end, where there is one, so that the ends lie on a line between samples.
        count = len(self.times)
        first = max(bisect_right(self.times, start, 0, count) - 1, 0)
        last = min(bisect_left(self.times, end, 0, count) + 1, count)
        times, watts = self.times[first:last], self.watts[first:last]
        if not times:
            return None
        if times[0] > start:
            times.insert(0, start)
            watts.insert(0, watts[0])
        if times[-1] < end:
            times.append(end)
            watts.append(watts[-1])
        longest = MAX_GAP_PERIODS * self.period_s * (1 + 1e-6)
        energy = 0.0
        for i in range(len(times) - 1):
            t0, t1, w0, w1 = times[i], times[i + 1], watts[i], watts[i + 1]
            if t1 - t0 > longest:
                return None
            # The part of the segment inside the window, times its mean power.
            a, b = max(t0, start), min(t1, end)
            energy += (b - a) * (w0 + (w1 - w0) * ((a + b) / 2 - t0) / (t1 - t0))
        return energy
