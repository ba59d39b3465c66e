"""Calibration against sensors of known worth, and its use by later sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from bpfree.energy import EnergyMeter, NullSource, NvmlSource, SimulatedSource, SourceUnavailableError, choose_source
from bpfree.energy.calibration import Calibration, calibrate, calibration_path, observe
from bpfree.energy.choose import choose_for_program
from bpfree.errors import DataError

from .fakes import FakeBoard, FakeClock, FakeNvml

TICK_S = 1e-3


class TickingClock(FakeClock):
    """Each look at the time takes a millisecond, so that a loop that polls comes to an end."""

    def __call__(self) -> float:
        self.now += TICK_S
        return self.now


@pytest.fixture
def ticking() -> TickingClock:
    return TickingClock()


def calibrated(ticking: TickingClock, power: float = 100.0) -> Calibration:
    """A board of 100 W idle; the load, which begins after 3 + 20 s, takes 600 W."""
    source = SimulatedSource([(0, power), (23.5, power), (23.6, 600)], update_period_s=0.1, clock=ticking)
    return calibrate(source, nullcontext(), seconds=20, clock=ticking, sleep=ticking.advance)


def test_idle_and_loaded(ticking: TickingClock) -> None:
    states: list[str] = []
    source = SimulatedSource([(0, 100), (23.5, 100), (23.6, 600)], update_period_s=0.1, clock=ticking)
    calibration = calibrate(
        source, nullcontext(), seconds=20, clock=ticking, sleep=ticking.advance, on_state=states.append
    )
    assert states == ["idle", "loaded"]
    assert calibration.idle_w == pytest.approx(100, rel=1e-3)
    assert calibration.loaded.sensors["counter"].mean_w == pytest.approx(600, rel=1e-3)
    assert calibration.update_period_s == pytest.approx(0.1, abs=4 * TICK_S)
    assert calibration.idle.counter_over_trapezoid == {"simulated": pytest.approx(1, abs=1e-3)}
    assert calibration.loaded.seconds == pytest.approx(20, abs=0.3)


def staircase(clock: FakeClock, period_s: float, value: Callable[[int], float]) -> Callable[[], int]:
    return lambda: round(1000 * value(int(clock.now / period_s)))


def test_each_sensor_has_its_own_rate_and_gain(monkeypatch: pytest.MonkeyPatch, ticking: TickingClock) -> None:
    board = FakeBoard(
        millijoules=staircase(ticking, 0.05, lambda n: 300 * 0.05 * n),
        milliwatts=staircase(ticking, 0.1, lambda n: 200 + n % 2),  # misses a third of the load
        milliwatts_average=staircase(ticking, 1.0, lambda n: 300 + n % 2),
        milliwatts_usage=lambda: 300_000,
    )
    FakeNvml(monkeypatch, [board])
    seen = observe(NvmlSource("cuda"), 20, ticking)
    assert list(seen.sensors) == ["counter", "nvml-power-instant", "nvml-power-average", "nvml-power-usage"]
    updates = [sensor.update_ms for sensor in seen.sensors.values()]
    assert updates[:3] == [pytest.approx(ms, abs=10) for ms in (50, 100, 1000)]
    assert updates[3] is None  # never changed
    ratios = seen.counter_over_trapezoid
    assert ratios["nvml-power-instant"] == pytest.approx(300 / 200.5, rel=1e-2)
    assert ratios["nvml-power-average"] == pytest.approx(300 / 300.5, rel=1e-2)
    assert seen.sensors["counter"].mean_w == pytest.approx(300, rel=1e-2)


def test_rare_updates_show_in_the_95_percent_and_not_in_the_median(
    monkeypatch: pytest.MonkeyPatch, ticking: TickingClock
) -> None:
    def millijoules() -> int:
        """Of ten steps nine come after 50 ms and one after 200."""
        cycles, rest = divmod(ticking.now, 0.65)
        return 1000 * (10 * int(cycles) + min(int(rest / 0.05), 9))

    FakeNvml(monkeypatch, [FakeBoard(millijoules=millijoules)])
    counter = observe(NvmlSource("cuda"), 20, ticking).sensors["counter"]
    assert counter.update_ms == pytest.approx(50, abs=10)
    assert counter.update_p95_ms == pytest.approx(200, abs=10)
    assert counter.read_ms == pytest.approx(1e3 * TICK_S)


def test_without_counter_power_is_the_baseline(monkeypatch: pytest.MonkeyPatch, ticking: TickingClock) -> None:
    board = FakeBoard(milliwatts=staircase(ticking, 0.1, lambda n: 120 + n % 2))
    board.errors["nvmlDeviceGetTotalEnergyConsumption"] = 3
    FakeNvml(monkeypatch, [board])
    calibration = calibrate(NvmlSource("cuda"), nullcontext(), seconds=5, clock=ticking, sleep=ticking.advance)
    assert calibration.idle_w == pytest.approx(120.5, abs=0.2)
    assert calibration.update_period_s == pytest.approx(0.1, abs=0.01)
    assert calibration.idle.counter_over_trapezoid == {}


def test_later_sources_use_it(ticking: TickingClock, clock: FakeClock) -> None:
    calibration = calibrated(ticking)
    assert Calibration.load(calibration.save()) == calibration
    source = choose_source("simulated")
    assert source.update_period_s == pytest.approx(0.1, abs=4 * TICK_S)
    assert source.calibrated == calibration.date
    meter = EnergyMeter(source, clock=clock, sync=lambda: None)
    with meter.window("run") as window:
        pass
    assert window.result.idle_w == calibration.idle_w
    assert (meter.info()["idle_from"], meter.info()["calibration"]) == ("calibration", calibration.date)


def test_a_baseline_of_the_run_itself_comes_first(ticking: TickingClock) -> None:
    calibrated(ticking).save()
    meter = EnergyMeter(choose_source("simulated"), idle_w=[77.0], sync=lambda: None)
    with meter:
        pass
    assert meter.result.idle_w == 77
    assert meter.info()["idle_from"] == "measured"


def test_another_board_or_driver_has_no_use_for_it(monkeypatch: pytest.MonkeyPatch, ticking: TickingClock) -> None:
    def moving(uuid: str) -> FakeBoard:
        return FakeBoard(uuid=uuid, millijoules=staircase(ticking, 0.05, lambda n: 5.0 * n))

    first, second = moving("GPU-1"), moving("GPU-2")
    FakeNvml(monkeypatch, [first, second])
    source = choose_source("nvml", "cuda:0")
    calibration = calibrate(source, nullcontext(), seconds=2, clock=ticking, sleep=ticking.advance)
    calibration.save()
    assert choose_source("nvml", "cuda:0").idle_w == pytest.approx(100, rel=0.02)
    other = choose_source("nvml", "cuda:1")
    assert (other.idle_w, other.calibrated) == (None, None)
    both = choose_source("nvml", ["cuda:0", "cuda:1"])
    assert both.idle_w is None
    path = calibration_path(source.info())
    record = json.loads(path.read_text())
    record["device"]["driver"] = "525.1"
    path.write_text(json.dumps(record))
    late = choose_source("nvml", "cuda:0")
    assert late.idle_w is None
    assert late.calibrated is not None
    assert "driver was 525.1, is 580.159.04" in late.calibrated


def test_two_calibrated_boards_add_up(monkeypatch: pytest.MonkeyPatch, ticking: TickingClock) -> None:
    boards = [
        FakeBoard(uuid=f"GPU-{n}", millijoules=staircase(ticking, 0.05, lambda k, n=n: 5.0 * n * k)) for n in (1, 2)
    ]
    FakeNvml(monkeypatch, boards)
    for n in (0, 1):
        source = choose_source("nvml", f"cuda:{n}")
        calibrate(source, nullcontext(), seconds=2, clock=ticking, sleep=ticking.advance).save()
    assert choose_source("nvml", ["cuda:0", "cuda:1"]).idle_w == pytest.approx(100 + 200, rel=0.02)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"device": {}, "date": "x", "idle": 3, "loaded": {}}'])
def test_a_damaged_file_is_told_and_harms_no_run(text: str) -> None:
    path = calibration_path({"method": "simulated"})
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(DataError, match=r"is not a calibration .* make it again with `bpfree energy calibrate`"):
        Calibration.load(path)
    source = choose_source("simulated")
    assert source.idle_w is None
    assert source.calibrated is not None
    assert "is not a calibration" in source.calibrated


def test_nothing_to_calibrate() -> None:
    with pytest.raises(SourceUnavailableError, match="no sensor to calibrate: the board is gone"):
        calibrate(NullSource("the board is gone"), nullcontext(), seconds=1)


def test_a_place_that_cannot_be_written(ticking: TickingClock, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write the calibration"):
        calibrated(ticking).save(tmp_path / "file" / "x.json")


def test_a_board_without_context_idles_below_its_calibration(
    monkeypatch: pytest.MonkeyPatch, ticking: TickingClock
) -> None:
    FakeNvml(monkeypatch, [FakeBoard(millijoules=staircase(ticking, 0.05, lambda n: 5.0 * n))])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    source = choose_source("nvml", "cuda")
    calibrate(source, nullcontext(), seconds=2, clock=ticking, sleep=ticking.advance).save()
    program = choose_for_program("nvml")
    assert program.idle_w is None
    assert program.update_period_s == pytest.approx(0.05, abs=0.01)
