"""Phases: pieces of a window that nobody waits for, on a device that runs behind the host."""

from __future__ import annotations

import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpfree.energy import EnergyMeter, NvmlSource, SimulatedSource
from bpfree.energy.counter import CounterCourse, Reading
from bpfree.errors import UsageError

from .fakes import FakeBoard, FakeClock, FakeNvml

TRAIN_W, VALIDATION_W = 400.0, 200.0


class FakeGpu:
    """A device with a queue: work takes device time, the host goes on; time moves when the host waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
        self.clock = clock
        self.done_at = clock.now
        monkeypatch.setattr(
            torch.cuda, "is_initialized", mock.create_autospec(torch.cuda.is_initialized, return_value=True)
        )
        monkeypatch.setattr(
            torch.cuda, "synchronize", mock.create_autospec(torch.cuda.synchronize, side_effect=self.wait)
        )
        monkeypatch.setattr(
            torch.cuda,
            "current_stream",
            mock.create_autospec(torch.cuda.current_stream, return_value=SimpleNamespace()),
        )
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))

    def launch(self, seconds: float) -> None:
        self.done_at = max(self.done_at, self.clock.now) + seconds

    def wait(self, device: object = None) -> None:
        self.clock.advance(max(self.done_at - self.clock.now, 0.0))


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.at = 0.0

    def record(self, stream: object) -> None:
        self.at = max(self._gpu.done_at, self._gpu.clock.now)

    def query(self) -> bool:
        return self._gpu.clock.now >= self.at

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.at - self.at)


def alternating(epochs: int, train_s: float, validation_s: float) -> list[tuple[float, float]]:
    """The power of epochs of training and validation as points (s, W), with edges of a microsecond."""
    points, t = [], 0.0
    for _ in range(epochs):
        points += [(t + 1e-6, TRAIN_W), (t + train_s, TRAIN_W)]
        t += train_s
        points += [(t + 1e-6, VALIDATION_W), (t + validation_s, VALIDATION_W)]
        t += validation_s
    return points


def test_the_device_decides_when_a_phase_ends_not_the_host(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    gpu = FakeGpu(monkeypatch, clock)
    source = SimulatedSource(alternating(5, 2.0, 0.5), clock=clock)
    meter = EnergyMeter(source, device="cuda", clock=clock, poll_hz=10, min_window_s=0.5)
    with meter.window("total"):
        for _ in range(5):
            with meter.phase("train"):
                gpu.launch(2.0)
            with meter.phase("validation"):
                gpu.launch(0.5)
        assert clock.now == 0.0  # nobody has waited
    totals = meter.totals()
    # the counter is sampled at multiples of 0.1 s, where the phases have their edges
    assert totals["train"].gross_j == pytest.approx(5 * 2.0 * TRAIN_W, rel=1e-5)
    assert totals["validation"].gross_j == pytest.approx(5 * 0.5 * VALIDATION_W, rel=1e-5)
    assert (totals["train"].seconds, totals["validation"].seconds) == pytest.approx((10.0, 2.5))
    assert (totals["train"].windows, totals["train"].flags) == (5, ("SIMULATED",))
    assert totals["total"].gross_j == pytest.approx(4500, rel=1e-5)


def test_edges_between_samples_cost_at_most_a_sample(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    gpu = FakeGpu(monkeypatch, clock)
    generator = random.Random(0)
    for _ in range(50):
        train_s, validation_s = generator.uniform(1, 3), generator.uniform(0.3, 1)
        clock.now = gpu.done_at = 0.0
        source = SimulatedSource(alternating(1, train_s, validation_s), clock=clock)
        meter = EnergyMeter(source, device="cuda", clock=clock, poll_hz=10)
        with meter.window("total"):
            with meter.phase("train"):
                gpu.launch(train_s)
            with meter.phase("validation"):
                gpu.launch(validation_s)
        measured = meter.totals()["validation"].gross_j
        assert measured == pytest.approx(validation_s * VALIDATION_W, abs=(TRAIN_W - VALIDATION_W) * 0.1)
        parts = [meter.totals()[name].gross_j for name in ("train", "validation")]
        assert sum(part for part in parts if part) == pytest.approx(meter.totals()["total"].gross_j)


def test_a_pause_in_a_phase_is_left_out(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    gpu = FakeGpu(monkeypatch, clock)
    meter = EnergyMeter(SimulatedSource(100.0, clock=clock), device="cuda", clock=clock, poll_hz=10)
    with meter.window("total"), meter.phase("train"):
        gpu.launch(3)
        with meter.paused():
            assert meter.totals()["train"].gross_j == pytest.approx(300)  # what a checkpoint holds
            clock.advance(50)
        gpu.launch(4)
    assert meter.totals()["train"].seconds == pytest.approx(7)
    assert meter.totals()["train"].gross_j == pytest.approx(700)
    assert meter.totals()["total"].gross_j == pytest.approx(700)


def test_a_window_in_a_phase_does_not_end_it(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    gpu = FakeGpu(monkeypatch, clock)
    meter = EnergyMeter(SimulatedSource(100.0, clock=clock), device="cuda", clock=clock, poll_hz=10)
    with meter.window("total"), meter.phase("train"):
        with meter.window("prefix"):
            gpu.launch(2)
        gpu.launch(3)
    assert meter.totals()["train"].gross_j == pytest.approx(500)


def test_phases_below_the_update_period_come_from_the_power(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    gpu = FakeGpu(monkeypatch, clock)
    FakeNvml(monkeypatch, [FakeBoard(millijoules=lambda: 30_000 * int(clock.now / 0.1), milliwatts=lambda: 300_000)])
    meter = EnergyMeter(NvmlSource("cuda"), device="cuda", clock=clock, poll_hz=10)
    with meter.window("total"):
        for _ in range(200):
            with meter.phase("train"):
                gpu.launch(0.09)
            with meter.phase("validation"):
                gpu.launch(0.01)
    validation = meter.totals()["validation"]
    assert validation.method == "nvml-power-instant"
    assert validation.gross_j == pytest.approx(200 * 0.01 * 300)
    assert "SHORT_WINDOW" in validation.flags
    assert meter.totals()["total"].method == "nvml-counter"


def test_a_phase_that_an_exception_cut_off_is_dropped(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    gpu = FakeGpu(monkeypatch, clock)
    meter = EnergyMeter(SimulatedSource(100.0, clock=clock), device="cuda", clock=clock, poll_hz=10)

    def fail_in_training() -> None:
        with meter.window("total"):
            with meter.phase("validation"):
                gpu.launch(2)
            gpu.wait()
            with meter.phase("train"):
                gpu.launch(5)
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_training()
    assert meter.totals()["validation"].gross_j == pytest.approx(200)
    assert "train" not in meter.totals()


def test_on_the_host_a_phase_is_exact(clock: FakeClock) -> None:
    points = [(0.0, 100.0), (100.0, 1100.0)]
    meter = EnergyMeter(SimulatedSource(points, clock=clock), device="cpu", clock=clock)
    with meter.window("total"):
        clock.advance(1.23)
        with meter.phase("train"):
            clock.advance(4.56)
    expected = 100 * 4.56 + 5 * (5.79**2 - 1.23**2)
    assert meter.totals()["train"].gross_j == pytest.approx(expected)


def test_a_resumed_run_adds_its_phases(clock: FakeClock) -> None:
    meter = EnergyMeter(SimulatedSource(100.0, clock=clock), clock=clock, device="cpu")
    with meter.window("total"), meter.phase("train"):
        clock.advance(3)
    again = EnergyMeter(SimulatedSource(100.0, clock=clock), clock=clock, device="cpu", earlier=meter.totals())
    with again.window("total"), again.phase("train"):
        clock.advance(4)
    assert again.totals()["train"].gross_j == pytest.approx(700)


def test_wrong_use_is_told(clock: FakeClock) -> None:
    meter = EnergyMeter(SimulatedSource(100.0, clock=clock), clock=clock, device="cpu")
    with pytest.raises(UsageError, match="must lie in a window"), meter.phase("train"):
        pass
    with (
        meter.window("total"),
        meter.phase("train"),
        pytest.raises(UsageError, match="in no other phase"),
        meter.phase("validation"),
    ):
        pass


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=20, unique=True), st.floats(0, 1))
def test_the_course_joins_readings_in_any_order(times: list[float], place: float) -> None:
    course = CounterCourse()
    for t in times:
        course.add(Reading(t, 7 + 3 * t))
    t = min(times) + place * (max(times) - min(times))
    assert course.at(min(t, max(times))).joules == pytest.approx(7 + 3 * t, rel=1e-9)


def test_the_course_does_not_go_beyond_its_readings() -> None:
    course = CounterCourse()
    assert course.at(1.0).joules is None
    course.add(Reading(1.0, 5.0))
    course.add(Reading(2.0, None))  # a failed reading is no point of it
    assert [course.at(t).joules for t in (0.9, 1.0, 1.1, 2.0)] == [None, 5.0, None, None]
