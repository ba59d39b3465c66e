"""The made-up source against integrals done by hand."""

from __future__ import annotations

import math

import pytest

from bpfree.energy import SimulatedSource
from bpfree.errors import UsageError

from .fakes import FakeClock


def test_constant(clock: FakeClock) -> None:
    clock.advance(1e6)  # only the time since creation counts
    source = SimulatedSource(200.0, clock=clock)
    clock.advance(7)
    assert source.energy_j() == pytest.approx(1400)
    assert source.power_w() == 200


def test_points_are_joined_by_lines_and_held_at_the_ends(clock: FakeClock) -> None:
    source = SimulatedSource([(2, 100), (4, 200), (5, 0)], clock=clock)
    expected = {1.0: 100, 2.0: 200, 3.0: 325, 4.0: 500, 4.5: 575, 5.0: 600, 9.0: 600}
    for t, joules in expected.items():
        clock.now = t
        assert source.energy_j() == pytest.approx(joules)
    clock.now = 3.0
    assert source.power_w() == 150


def test_function_of_time(clock: FakeClock) -> None:
    source = SimulatedSource(lambda t: 100 + 50 * math.sin(t), clock=clock)
    for t in (0.3337, 0.3338, 2.0, 10.0):
        clock.now = t
        assert source.energy_j() == pytest.approx(100 * t + 50 * (1 - math.cos(t)), rel=1e-6)


def test_quantised_counter_shows_the_last_refresh(clock: FakeClock) -> None:
    source = SimulatedSource(100.0, update_period_s=0.1, clock=clock)
    seen = []
    for t in (0.0, 0.099, 0.1, 0.25, 0.3, 0.7):
        clock.now = t
        seen.append(source.energy_j())
    assert seen == pytest.approx([0, 0, 10, 20, 30, 70])


@pytest.mark.parametrize("points", [[], [(0, 1), (0, 2)], [(1, 1), (0, 2)]])
def test_points_must_go_forward(points: list[tuple[float, float]]) -> None:
    with pytest.raises(UsageError, match="increasing"):
        SimulatedSource(points)
