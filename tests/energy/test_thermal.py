"""Start temperatures, on a board that heats under load and cools without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bpfree.energy.simulated import SimulatedSource
from bpfree.energy.sources import Status
from bpfree.energy.thermal import ThermalStart
from tests.energy.fakes import FakeClock


class Board(SimulatedSource):
    """A board that gains 4 °C/s under load up to 80 °C, and loses 1 °C/s down to 30 °C without."""

    def __init__(self, temperature_c: float) -> None:
        self.clock = FakeClock()
        super().__init__(100.0, clock=self.clock)
        self.temperature_c = temperature_c
        self.loaded = False
        self.load_s = 0.0

    def status(self) -> Status:
        return Status(temperature_c=self.temperature_c)

    def sleep(self, seconds: float) -> None:
        self.clock.advance(seconds)
        rate = 4.0 if self.loaded else -1.0
        self.temperature_c = min(80.0, max(30.0, self.temperature_c + rate * seconds))
        self.load_s += seconds if self.loaded else 0.0

    @contextmanager
    def load(self) -> Iterator[None]:
        self.loaded = True
        yield
        self.loaded = False


def start(board: Board, **options: Any) -> ThermalStart:
    return ThermalStart(board, "cpu", load=board.load, clock=board.clock, sleep=board.sleep, **options)


def test_the_target_is_what_a_warmed_up_board_has_after_a_rest() -> None:
    board = Board(30.0)
    assert start(board).target_c == 70.0  # 80 °C, less 10 s of rest
    assert board.load_s == 30.0


@pytest.mark.parametrize("temperature_c", [35.0, 50.0, 79.0])
def test_runs_start_near_the_target(temperature_c: float) -> None:
    board = Board(temperature_c)
    reached = start(board, target_c=50.0, warm_up_s=0.0).settle()
    assert reached is not None
    assert abs(reached - 50.0) <= 2.0
    assert reached == board.temperature_c


def test_a_board_that_does_not_cool_is_not_waited_for_forever() -> None:
    board = Board(60.0)
    assert start(board, target_c=20.0, warm_up_s=0.0, wait_s=40.0).settle() == 30.0
    assert board.clock.now == pytest.approx(40.0)


def test_a_device_without_thermometer_is_neither_loaded_nor_waited_for() -> None:
    board = Board(40.0)
    board.status = Status  # type: ignore[assignment,method-assign]
    thermal = start(board)
    assert (thermal.target_c, thermal.settle(), board.load_s, board.clock.now) == (None, None, 0.0, 0.0)
