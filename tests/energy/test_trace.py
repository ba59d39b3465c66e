"""Integrals of sampled power against physics (energy_protocol, section 8: 1 to 4, 10, 11)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfree.energy.trace import PowerTrace


def trace_of(times: Iterable[float], power: Callable[[float], float], period_s: float) -> PowerTrace:
    trace = PowerTrace(period_s)
    for t in times:
        trace.add(t, power(t))
    return trace


def grid(start: float, end: float, step: float) -> list[float]:
    return [start + i * step for i in range(round((end - start) / step) + 1)]


@given(st.sets(st.floats(0.01, 9.99), max_size=30))
def test_linear_power_is_exact_on_any_grid(inner: set[float]) -> None:
    trace = trace_of([0.0, *sorted(inner), 10.0], lambda t: 100 + 10 * t, period_s=10.0)
    assert trace.energy_j(0, 10) == pytest.approx(1500, abs=1e-9)


@given(st.floats(0, 10), st.floats(0, 10))
def test_windows_need_not_end_at_samples(a: float, b: float) -> None:
    start, end = min(a, b), max(a, b)
    trace = trace_of(grid(0, 10, 0.5), lambda t: 100 + 10 * t, period_s=0.5)
    assert trace.energy_j(start, end) == pytest.approx(100 * (end - start) + 5 * (end**2 - start**2), abs=1e-9)


@given(st.integers(0, 2**32))
def test_constant_power_with_jittered_samples(seed: int) -> None:
    jitter = random.Random(seed)
    times = [min(max(t + jitter.uniform(-0.04, 0.04), 0), 7) for t in grid(0, 7, 0.1)]
    assert trace_of(times, lambda t: 200, 0.1).energy_j(0, 7) == pytest.approx(1400, abs=1e-9)


def test_sine_converges_with_the_square_of_the_step() -> None:
    # A quarter period, where the rule has its O(h^2) error; over whole periods the errors cancel.
    def power(t: float) -> float:
        return 100 + 50 * math.sin(2 * math.pi * t)

    exact = 100 * 0.25 + 50 / (2 * math.pi)
    errors = []
    for step in (1 / 40, 1 / 80):
        energy = trace_of(grid(0, 0.25, step), power, step).energy_j(0, 0.25)
        assert energy is not None
        errors.append(abs(energy - exact))
        assert errors[-1] <= step**2 / 12 * 0.25 * 50 * (2 * math.pi) ** 2
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)
    whole = trace_of(grid(0, 3, 1 / 40), power, 1 / 40).energy_j(0, 3)
    assert whole == pytest.approx(300, abs=1e-9)


def square(t: float) -> float:
    """150 W and 50 W, each for half of 0.2 s: 100 W on average."""
    return 150.0 if (t % 0.2) < 0.1 else 50.0


@pytest.mark.parametrize(("phase", "joules"), [(0.05, 1500), (0.15, 500)])
def test_sampling_at_the_period_of_the_load_aliases(phase: float, joules: float) -> None:
    times = [phase + 0.2 * i for i in range(50)]
    assert trace_of(times, square, 0.2).energy_j(0, 10) == pytest.approx(joules)


def test_random_phases_do_not_alias() -> None:
    chance = random.Random(0)
    energies = []
    for _ in range(200):
        times = sorted(chance.uniform(0, 10) for _ in range(50))
        energy = trace_of(times, square, period_s=10).energy_j(0, 10)
        assert energy is not None
        energies.append(energy)
    mean = sum(energies) / len(energies)
    variance = sum((e - mean) ** 2 for e in energies) / (len(energies) - 1)
    assert abs(mean - 1000) < 3 * math.sqrt(variance / len(energies))


def test_one_missing_sample_is_bridged_and_two_are_not() -> None:
    trace = PowerTrace(0.1)
    for i in range(21):
        trace.add(i * 0.1, None if i in (5, 12, 13) else 200.0)
    assert trace.missing == 3
    assert trace.energy_j(0, 1) == pytest.approx(200)
    assert trace.energy_j(1, 2) is None
    assert trace.energy_j(1.5, 2) == pytest.approx(100)


def test_times_that_do_not_go_forward_are_dropped_and_counted() -> None:
    trace = PowerTrace(1.0)
    for t, watts in [(0, 100), (1, 100), (1, 9999), (0.5, 9999), (2, 100)]:
        trace.add(t, watts)
    assert trace.dropped == 2
    assert trace.energy_j(0, 2) == pytest.approx(200)


def test_head_and_tail_are_extrapolated_to_the_window() -> None:
    # The load starts 0.15 s before the first sample and lasts as long after the last.
    trace = trace_of(grid(0.15, 4.85, 0.1), lambda t: 300, 0.1)
    energy = trace.energy_j(0, 5)
    assert energy is not None
    assert abs(energy - 1500) < 300 * 0.01


@pytest.mark.parametrize(("start", "end"), [(0, 5), (1, 9), (-3, -2), (20, 21)])
def test_ends_beyond_two_periods_are_not_invented(start: float, end: float) -> None:
    trace = trace_of(grid(1, 5, 0.1), lambda t: 300, 0.1)
    assert trace.energy_j(start, end) is None


def test_no_samples_no_energy() -> None:
    assert PowerTrace(0.1).energy_j(0, 1) is None
