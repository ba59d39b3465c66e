"""What a window has added up to: differences of the counter, integrals of the trace, states of the device.

A tally keeps raw sums, without judgement. They add up over spans (a window without pauses is one span) and
over the windows of one name, including those too short to mean anything by themselves; what may be said of
the sums is for `judge` to tell.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bpfree.energy.counter import Reading
from bpfree.energy.flags import Flag
from bpfree.energy.result import Regime, add_known
from bpfree.energy.sources import Status
from bpfree.energy.trace import PowerTrace


@dataclass
class Mean:
    """A running mean of the values that are known."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float | None) -> None:
        if value is not None:
            self.total += value
            self.count += 1

    def merge(self, other: Mean) -> None:
        self.total += other.total
        self.count += other.count

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class Tally:
    """Raw sums over the spans of one window, or over the windows of one name.

    Attributes:
        seconds: length of all spans, s.
        counter_j: differences of the counter, J; None once a difference is not to be had.
        trace_j: integrals of sampled power, J; None without a trace, or once it has a gap.
        spans: pieces that do not share a reading: each has two ends as uncertain as the counter is stale.
        windows: number of windows.
        flags: what the raw readings showed.
        first, last: the readings at the two ends.
    """

    seconds: float = 0.0
    counter_j: float | None = 0.0
    trace_j: float | None = 0.0
    spans: int = 0
    windows: int = 0
    flags: set[Flag] = field(default_factory=set)
    first: Reading | None = None
    last: Reading | None = None
    utilisation: Mean = field(default_factory=Mean)
    sm_clock_mhz: Mean = field(default_factory=Mean)
    power_limit_w: float | None = None
    temperature_start_c: float | None = None
    temperature_end_c: float | None = None

    def add_span(self, start: Reading, end: Reading, trace: PowerTrace | None) -> None:
        """Add what lies between two readings."""
        self.seconds += end.seconds - start.seconds
        self.spans += start is not self.last
        self.first, self.last = self.first or start, end
        if start.joules is None or end.joules is None:
            self.flags.add(Flag.SENSOR_LOST)
            self.counter_j = None
        elif end.joules < start.joules:
            self.flags.add(Flag.COUNTER_WENT_BACK)
            self.counter_j = None
        else:
            self.counter_j = add_known(self.counter_j, end.joules - start.joules)
        if trace is None:
            self.trace_j = None
            return
        traced = trace.energy_j(start.seconds, end.seconds)
        if traced is None:
            self.flags.add(Flag.MISSING_SAMPLES)
        self.trace_j = add_known(self.trace_j, traced)

    def add_status(self, status: Status, *, at_edge: bool) -> None:
        """Add a state of the device. Rates at the edges of a window belong half to its surroundings."""
        if not at_edge:
            self.utilisation.add(status.utilisation)
            self.sm_clock_mhz.add(status.sm_clock_mhz)
        if status.throttled:
            self.flags.add(Flag.THROTTLED)
        if status.foreign_processes:
            self.flags.add(Flag.FOREIGN_PROCESS)
        if status.temperature_c is not None:
            if self.temperature_start_c is None:
                self.temperature_start_c = status.temperature_c
            self.temperature_end_c = status.temperature_c
        if status.power_limit_w is not None:
            self.power_limit_w = status.power_limit_w

    def with_span(self, start: Reading, end: Reading, trace: PowerTrace | None) -> Tally:
        """A copy with one more span."""
        tally = replace(self, flags=set(self.flags))
        tally.add_span(start, end, trace)
        return tally

    def merge(self, later: Tally) -> None:
        """Add a later window of the same name."""
        self.seconds += later.seconds
        self.counter_j = add_known(self.counter_j, later.counter_j)
        self.trace_j = add_known(self.trace_j, later.trace_j)
        touching = self.last is not None and later.first is self.last
        self.spans += later.spans - touching
        self.windows += later.windows
        self.flags |= later.flags
        self.utilisation.merge(later.utilisation)
        self.sm_clock_mhz.merge(later.sm_clock_mhz)
        self.first, self.last = self.first or later.first, later.last
        if later.power_limit_w is not None:
            self.power_limit_w = later.power_limit_w
        if self.temperature_start_c is None:
            self.temperature_start_c = later.temperature_start_c
        if later.temperature_end_c is not None:
            self.temperature_end_c = later.temperature_end_c

    def regime(self) -> Regime:
        return Regime(
            utilisation=self.utilisation.value,
            sm_clock_mhz=self.sm_clock_mhz.value,
            power_limit_w=self.power_limit_w,
            temperature_start_c=self.temperature_start_c,
            temperature_end_c=self.temperature_end_c,
        )
