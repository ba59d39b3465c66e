"""Sums over spans and windows, by hand."""

from __future__ import annotations

import pytest

from bpfree.energy.counter import Reading
from bpfree.energy.flags import Flag
from bpfree.energy.sources import Status
from bpfree.energy.tally import Tally
from bpfree.energy.trace import PowerTrace


def trace(watts: float, seconds: int) -> PowerTrace:
    course = PowerTrace(1.0)
    for second in range(seconds + 1):
        course.add(second, watts)
    return course


def window(*statuses: Status, start: Reading, end: Reading) -> Tally:
    tally = Tally(windows=1)
    tally.add_span(start, end, None)
    for status in statuses:
        tally.add_status(status, at_edge=False)
    return tally


def test_spans_that_touch_are_one() -> None:
    readings = [Reading(0, 10.0), Reading(2, 50.0), Reading(3, 60.0), Reading(5, 65.0)]
    tally = Tally()
    tally.add_span(readings[0], readings[1], trace(7, 5))
    tally.add_span(readings[1], readings[2], trace(7, 5))
    assert (tally.seconds, tally.counter_j, tally.trace_j, tally.spans) == (3, 50, 21, 1)
    tally.add_span(readings[2]._replace(), readings[3], trace(7, 5))  # another reading at the same moment
    assert (tally.seconds, tally.counter_j, tally.trace_j, tally.spans) == (5, 55, 35, 2)
    assert (tally.first, tally.last, tally.flags) == (readings[0], readings[3], set())


@pytest.mark.parametrize("lost", [(None, 5.0), (5.0, None), (None, None)])
def test_a_reading_without_joules_leaves_none(lost: tuple[float | None, float | None]) -> None:
    tally = Tally()
    tally.add_span(Reading(0, lost[0]), Reading(1, lost[1]), trace(7, 1))
    tally.add_span(Reading(2, 5.0), Reading(3, 6.0), trace(7, 3))
    assert (tally.counter_j, tally.trace_j, tally.flags) == (None, 14, {Flag.SENSOR_LOST})


def test_a_counter_that_goes_back_is_no_difference() -> None:
    tally = Tally()
    tally.add_span(Reading(0, 5.0), Reading(1, 4.0), trace(7, 1))
    assert (tally.counter_j, tally.flags) == (None, {Flag.COUNTER_WENT_BACK})
    level = Tally()
    level.add_span(Reading(0, 5.0), Reading(1, 5.0), trace(7, 1))
    assert (level.counter_j, level.flags) == (0, set())


def test_a_gap_of_the_trace_leaves_none() -> None:
    tally = Tally()
    tally.add_span(Reading(0, 5.0), Reading(9, 6.0), trace(7, 2))
    assert (tally.trace_j, tally.flags) == (None, {Flag.MISSING_SAMPLES})
    assert Tally().with_span(Reading(0, 5.0), Reading(9, 6.0), None).trace_j is None


def test_states_inside_are_averaged_and_those_at_the_edges_are_not() -> None:
    tally = Tally()
    tally.add_status(Status(utilisation=0.1, sm_clock_mhz=100, temperature_c=30), at_edge=True)
    tally.add_status(Status(utilisation=0.5, sm_clock_mhz=1000, temperature_c=40), at_edge=False)
    tally.add_status(Status(sm_clock_mhz=1600, power_limit_w=700), at_edge=False)
    tally.add_status(Status(utilisation=0.9, sm_clock_mhz=1900, temperature_c=50), at_edge=False)
    tally.add_status(Status(utilisation=0.0), at_edge=True)
    regime = tally.regime()
    assert regime.utilisation == pytest.approx(0.7)
    assert regime.sm_clock_mhz == pytest.approx(1500)
    assert (regime.temperature_start_c, regime.temperature_end_c, regime.power_limit_w) == (30, 50, 700)
    assert Tally().regime().utilisation is None


def test_windows_of_a_name_add_up() -> None:
    shared = Reading(2, 30.0)
    first = window(Status(utilisation=0.2, temperature_c=30, power_limit_w=600), start=Reading(0, 10.0), end=shared)
    later = window(
        Status(utilisation=0.4, temperature_c=44, throttled=True), Status(utilisation=0.9),
        start=shared, end=Reading(3, 35.0),
    )  # fmt: skip
    apart = window(Status(temperature_c=41, power_limit_w=500, foreign_processes=1),
                   start=Reading(7, 90.0), end=Reading(8, 91.0))  # fmt: skip
    first.merge(later)
    assert (first.seconds, first.counter_j, first.spans, first.windows) == (3, 25, 1, 2)
    first.merge(apart)
    assert (first.seconds, first.counter_j, first.spans, first.windows) == (4, 26, 2, 3)
    assert first.flags == {Flag.THROTTLED, Flag.FOREIGN_PROCESS}
    regime = first.regime()
    assert regime.utilisation == pytest.approx(0.5)
    assert (regime.temperature_start_c, regime.temperature_end_c, regime.power_limit_w) == (30, 41, 500)
    first.merge(Tally(windows=1))  # one that knows nothing
    assert first.regime() == regime
