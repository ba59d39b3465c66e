"""A power source that is made up: for machines without a counter, for demonstrations and for tests.

Every number it gives carries the method "simulated" and the flag SIMULATED.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

from bpfree.energy.flags import Flag
from bpfree.energy.sources import PowerSource, Status
from bpfree.errors import UsageError

Power = float | Sequence[tuple[float, float]] | Callable[[float], float]

STEP_S = 1e-3
"""Step of the midpoint rule that integrates a function of time, s."""


class SimulatedSource(PowerSource):
    """The energy of a given course of power, from the moment of creation on.

    Args:
        power: W as a constant, as a function of the time in s, or as points (s, W) joined by straight lines
            and held before the first and after the last.
        update_period_s: refresh the counter only at multiples of this, as real counters do; 0 for a perfect
            one.
        clock: the time in s.

    Raises:
        UsageError: points that do not go forward in time.
    """

    name = "simulated"
    power_name = "simulated"
    scope = "simulated"
    standing_flags = frozenset({Flag.SIMULATED})

    def __init__(
        self, power: Power, *, update_period_s: float = 0.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.update_period_s = update_period_s
        self._course = _course(power)
        self._clock = clock
        self._origin = clock()

    def energy_j(self) -> float | None:
        now = self._now()
        if self.update_period_s > 0:
            # The nudge keeps a reading taken exactly at a refresh on the right side of rounding.
            now = math.floor(now / self.update_period_s + 1e-9) * self.update_period_s
        return self._course.joules(now)

    def power_w(self) -> float | None:
        return self._course.watts(self._now())

    def powers(self) -> dict[str, Callable[[], float | None]]:
        return {self.power_name: self.power_w}

    def status(self) -> Status:
        return Status()

    def info(self) -> dict[str, Any]:
        return {"method": self.name, "scope": self.scope, "update_period_s": self.update_period_s}

    def close(self) -> None:
        pass

    def _now(self) -> float:
        return self._clock() - self._origin


class _Course(Protocol):
    """Power as a function of time, and its integral from 0."""

    def watts(self, t: float) -> float: ...
    def joules(self, t: float) -> float: ...


class _Polyline:
    """Points joined by straight lines; its integral is exact."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        if not points or any(later[0] <= earlier[0] for earlier, later in pairwise(points)):
            raise UsageError("simulated power needs points (s, W) in increasing order of time")
        # Holding the first power back to the origin makes the integral from 0 a sum over whole segments.
        self._points = [(0.0, points[0][1]), *points] if points[0][0] > 0 else list(points)
        self._times = [t for t, _ in self._points]
        self._joules = [0.0]
        for (t0, w0), (t1, w1) in pairwise(self._points):
            self._joules.append(self._joules[-1] + (t1 - t0) * (w0 + w1) / 2)

    def watts(self, t: float) -> float:
        last = max(bisect_right(self._times, t) - 1, 0)
        t0, w0 = self._points[last]
        if last + 1 == len(self._points) or t <= t0:
            return w0
        t1, w1 = self._points[last + 1]
        return w0 + (w1 - w0) * (t - t0) / (t1 - t0)

    def joules(self, t: float) -> float:
        last = max(bisect_right(self._times, t) - 1, 0)
        t0, w0 = self._points[last]
        return self._joules[last] + (t - t0) * (w0 + self.watts(t)) / 2


class _Function:
    """Any function of time, integrated by the midpoint rule on a fixed grid as far as it has been asked
    for."""

    def __init__(self, watts: Callable[[float], float]) -> None:
        self.watts = watts
        self._steps = 0
        self._joules = 0.0

    def joules(self, t: float) -> float:
        steps = max(self._steps, int(t / STEP_S))
        for step in range(self._steps, steps):
            self._joules += self.watts((step + 0.5) * STEP_S) * STEP_S
        self._steps = steps
        rest = t - steps * STEP_S
        return self._joules + self.watts(steps * STEP_S + rest / 2) * rest


def _course(power: Power) -> _Course:
    if callable(power):
        return _Function(power)
    return _Polyline([(0.0, float(power))] if isinstance(power, (int, float)) else power)
