"""Sensors that fail, lie or disagree, on fake NVML boards (energy_protocol, section 8: 5, 7 to 9, 11)."""

from __future__ import annotations

import os
from collections.abc import Callable

import pynvml
import pytest

from bpfree.energy import EnergyMeter, NvmlSource

from .fakes import FakeBoard, FakeClock, FakeNvml

UNSUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
NO_COUNTER = {"nvmlDeviceGetTotalEnergyConsumption": UNSUPPORTED}
TAU = 0.1


def steady(clock: FakeClock, watts: float = 300.0) -> FakeBoard:
    """A board at constant power, with a counter that is refreshed every 0.1 s."""
    return FakeBoard(
        millijoules=lambda: round(watts * 1000 * TAU) * int(clock.now / TAU + 1e-9),
        milliwatts=lambda: round(watts * 1000),
    )


@pytest.fixture
def meter_on(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> Callable[..., EnergyMeter]:
    def make(board: FakeBoard, **options: object) -> EnergyMeter:
        FakeNvml(monkeypatch, [board])
        return EnergyMeter(NvmlSource("cuda"), clock=clock, sleep=clock.advance, **options)  # type: ignore[arg-type]

    return make


MeterOn = Callable[..., EnergyMeter]


def test_counter_and_trace_agree_on_a_steady_board(meter_on: MeterOn, clock: FakeClock) -> None:
    meter = meter_on(steady(clock), poll_hz=10)
    with meter.window("train") as window:
        clock.advance(20)
    assert window.result.gross_j == pytest.approx(6000, abs=300 * TAU)
    assert (window.result.method, window.result.flags) == ("nvml-counter", ())
    assert meter.trace is not None
    assert len(meter.trace.times) == pytest.approx(201, abs=1)


def test_no_thread_without_need(meter_on: MeterOn, clock: FakeClock) -> None:
    meter = meter_on(steady(clock))
    with meter.window("train"):
        assert clock._timers == []
    assert meter.trace is None


def test_sampling_stops_with_the_outermost_window(meter_on: MeterOn, clock: FakeClock) -> None:
    meter = meter_on(steady(clock), poll_hz=10)
    with meter.window("train"), meter.window("epoch"):
        assert len(clock._timers) == 1
    assert clock._timers == []


@pytest.mark.parametrize(("power", "period"), [("instant", 0.1), ("average", 1.0), ("usage", 1.0)])
def test_without_counter_power_is_sampled_and_said_so(
    meter_on: MeterOn, clock: FakeClock, power: str, period: float
) -> None:
    board = FakeBoard(errors=dict(NO_COUNTER))
    only = {
        "instant": [],
        "average": [pynvml.NVML_FI_DEV_POWER_INSTANT],
        "usage": [pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_FI_DEV_POWER_AVERAGE],
    }[power]
    if only:
        board.field_return = UNSUPPORTED if power == "usage" else pynvml.NVML_SUCCESS
    meter = meter_on(board)
    if power == "average":
        meter = EnergyMeter(NvmlSource("cuda", power="average"), clock=clock)
    watts = {"instant": 100, "average": 90, "usage": 80}[power]
    with meter.window("train") as window:
        clock.advance(12.34)
        assert meter.joules() == pytest.approx(watts * 12.34)
    assert window.result.gross_j == pytest.approx(watts * 12.34)
    assert window.result.method == f"nvml-power-{power}"
    assert window.result.flags == ("COUNTER_UNSUPPORTED",)
    assert meter.source.update_period_s == period


def test_children_without_counter_reach_to_their_ends(meter_on: MeterOn, clock: FakeClock) -> None:
    # A load that jumps 0.15 s before the next sample of the child's surroundings is still seen by the edges.
    meter = meter_on(FakeBoard(errors=dict(NO_COUNTER)))
    with meter.window("run") as run:
        clock.advance(0.05)
        with meter.window("epoch") as epoch:
            clock.advance(19.9)
        clock.advance(0.05)
    assert epoch.result.gross_j == pytest.approx(1990)
    assert run.result.gross_j == pytest.approx(2000)


def test_counter_that_goes_back_is_thrown_away(meter_on: MeterOn, clock: FakeClock) -> None:
    board = FakeBoard(millijoules=lambda: 5_000_000 if clock.now < 7 else 100_000)
    meter = meter_on(board)
    with meter.window("train") as window:
        clock.advance(20)
    assert window.result.gross_j is None
    assert window.result.flags == ("COUNTER_WENT_BACK",)
    with meter.window("train"):
        clock.advance(20)
    assert meter.totals()["train"].gross_j is None


def test_the_trace_steps_in_for_a_counter_that_went_back(meter_on: MeterOn, clock: FakeClock) -> None:
    board = FakeBoard(millijoules=lambda: 5_000_000 if clock.now < 7 else 100_000)
    meter = meter_on(board, poll_hz=10)
    with meter.window("train") as window:
        clock.advance(20)
    assert window.result.gross_j == pytest.approx(100 * 20)
    assert window.result.method == "nvml-power-instant"
    assert window.result.flags == ("COUNTER_WENT_BACK",)


@pytest.mark.parametrize(("seconds", "flag"), [(0.5, "SHORT_WINDOW"), (1.0, "COUNTER_FROZEN"), (60, "COUNTER_FROZEN")])
def test_frozen_counter(meter_on: MeterOn, clock: FakeClock, seconds: float, flag: str) -> None:
    meter = meter_on(FakeBoard(millijoules=lambda: 77), min_window_s=0)
    with meter.window("train") as window:
        clock.advance(seconds)
    assert window.result.gross_j is None
    assert window.result.flags == (flag,)


def test_the_trace_steps_in_for_a_frozen_counter(meter_on: MeterOn, clock: FakeClock) -> None:
    meter = meter_on(FakeBoard(millijoules=lambda: 77), poll_hz=10)
    with meter.window("train") as window:
        clock.advance(20)
    assert (window.result.gross_j, window.result.method) == (pytest.approx(2000), "nvml-power-instant")
    assert window.result.flags == ("COUNTER_FROZEN",)


@pytest.mark.parametrize("poll_hz", [0, 10])
def test_board_lost_in_mid_window(meter_on: MeterOn, clock: FakeClock, poll_hz: float) -> None:
    board = steady(clock)
    meter = meter_on(board, poll_hz=poll_hz)
    with meter.window("run") as run:
        with meter.window("good") as good:
            clock.advance(15)
        with meter.window("bad") as bad:
            clock.advance(5)
            board.lose()
            clock.advance(10)
            assert meter.joules() is None
        with meter.window("after") as after:
            clock.advance(15)
    assert good.result.gross_j == pytest.approx(4500, abs=300 * TAU)
    expected = ("SENSOR_LOST", "MISSING_SAMPLES") if poll_hz else ("SENSOR_LOST",)
    for window in (run, bad, after):
        assert window.result.gross_j is None
        assert window.result.flags == expected
    meter.close()


def boxcar(clock: FakeClock, phase: float) -> FakeBoard:
    """A load of 150 W and 50 W in turn every 50 ms, and a sensor that sees 25 ms of every 100 ms.

    As Yang, Adamek, Armour (arXiv 2312.02741) found on A100 and H100. The counter sees everything.
    """

    def energy_mj() -> int:
        periods, rest = divmod(round(clock.now * 1000), 100)
        return periods * 10_000 + min(rest, 50) * 150 + max(rest - 50, 0) * 50

    return FakeBoard(millijoules=energy_mj, milliwatts=lambda: 150_000 if phase < 0.05 else 50_000)


@pytest.mark.parametrize(("phase", "traced_w"), [(0.0, 150), (0.06, 50)])
def test_a_blind_sensor_is_caught_by_the_counter(
    meter_on: MeterOn, clock: FakeClock, phase: float, traced_w: float
) -> None:
    meter = meter_on(boxcar(clock, phase), poll_hz=10)
    with meter.window("train") as window:
        clock.advance(20)
    assert window.result.gross_j == pytest.approx(2000)
    assert window.result.flags == ("SOURCES_DISAGREE",)
    assert meter.trace is not None
    assert meter.trace.energy_j(0, 20) == pytest.approx(traced_w * 20)


@pytest.mark.parametrize(("error", "flagged"), [(0.02, False), (-0.02, False), (0.05, True), (-0.05, True)])
def test_disagreement_means_more_than_three_percent(
    meter_on: MeterOn, clock: FakeClock, error: float, flagged: bool
) -> None:
    board = steady(clock)
    board.milliwatts = lambda: round(300_000 * (1 + error))
    meter = meter_on(board, poll_hz=10)
    with meter.window("train") as window:
        clock.advance(60)
    assert ("SOURCES_DISAGREE" in window.result.flags) == flagged


def test_a_stale_counter_is_no_disagreement(meter_on: MeterOn, clock: FakeClock) -> None:
    meter = meter_on(steady(clock), poll_hz=10, min_window_s=0)
    clock.advance(0.09)
    with meter.window("train") as window:
        clock.advance(0.92)  # shows 300 J of 276 J
    assert window.result.gross_j == pytest.approx(300)
    assert window.result.flags == ()


def test_more_than_staleness_is_a_disagreement(meter_on: MeterOn, clock: FakeClock) -> None:
    board = steady(clock)
    board.milliwatts = lambda: 252_000
    meter = meter_on(board, poll_hz=10, min_window_s=0)
    clock.advance(0.09)
    with meter.window("train") as window:
        clock.advance(0.92)  # 300 J against 232 J, of which 9 J for the sensors and 33 J for the counter
    assert window.result.flags == ("SOURCES_DISAGREE",)


def test_a_reading_that_fails_in_passing_leaves_no_mark(meter_on: MeterOn, clock: FakeClock) -> None:
    board = steady(clock)
    meter = meter_on(board)
    with meter.window("train") as window:
        clock.advance(10)
        board.errors = dict(NO_COUNTER)
        assert meter.joules() is None
        board.errors = {}
        clock.advance(10)
    assert (window.result.gross_j, window.result.flags) == (pytest.approx(6000), ())


def test_gaps_of_the_trace_are_marked_and_the_counter_stands(meter_on: MeterOn, clock: FakeClock) -> None:
    board = steady(clock)
    meter = meter_on(board, poll_hz=10)
    with meter.window("train") as window:
        clock.advance(10)
        board.errors = {"nvmlDeviceGetFieldValues": UNSUPPORTED}
        clock.advance(1)
        board.errors = {}
        clock.advance(10)
    assert window.result.gross_j == pytest.approx(6300, abs=300 * TAU)
    assert (window.result.method, window.result.flags) == ("nvml-counter", ("MISSING_SAMPLES",))


def test_the_state_of_the_board_is_watched(meter_on: MeterOn, clock: FakeClock) -> None:
    board = steady(clock)
    meter = meter_on(board, poll_hz=10)
    board.utilisation = 5  # before the run: not part of its mean
    with meter.window("train") as window:
        board.utilisation = 80
        clock.advance(10.5)
        board.utilisation = 60
        clock.advance(10)
        with meter.paused():
            board.utilisation = 0
            clock.advance(10)
        board.temperature = 66
    regime = window.result.regime
    assert regime.utilisation == pytest.approx(0.7)
    assert (regime.sm_clock_mhz, regime.power_limit_w) == (1980, 700)
    assert (regime.temperature_start_c, regime.temperature_end_c) == (40, 66)
    assert window.result.power_share == pytest.approx(300 / 700, rel=0.01)
    assert window.result.flags == ()


@pytest.mark.parametrize(("seconds", "flags"), [(9, ("SHORT_WINDOW",)), (11, ("HOST_BOUND",))])
def test_a_board_that_waits_is_host_bound_if_there_was_time_to_tell(
    meter_on: MeterOn, clock: FakeClock, seconds: float, flags: tuple[str, ...]
) -> None:
    board = steady(clock)
    board.utilisation = 20
    meter = meter_on(board, poll_hz=10)
    with meter.window("train") as window:
        clock.advance(seconds)
    assert window.result.flags == flags


def test_the_states_of_windows_of_one_name_are_joined(meter_on: MeterOn, clock: FakeClock) -> None:
    board = steady(clock)
    meter = meter_on(board, poll_hz=10)
    for utilisation in (80, 40):
        board.utilisation = utilisation
        with meter.window("train"):
            clock.advance(20.5)
            board.temperature += 10
    regime = meter.totals()["train"].regime
    assert regime.utilisation == pytest.approx(0.6)
    assert (regime.temperature_start_c, regime.temperature_end_c) == (40, 60)
    assert regime.power_limit_w == 700


def test_temperatures_are_read_at_both_ends(meter_on: MeterOn, clock: FakeClock) -> None:
    board = steady(clock)
    meter = meter_on(board)
    with meter.window("train") as window:
        clock.advance(20)
        board.temperature = 66
    regime = window.result.regime
    assert (regime.temperature_start_c, regime.temperature_end_c) == (40, 66)


@pytest.mark.parametrize(
    ("trouble", "flag"),
    [
        ({"reasons": pynvml.nvmlClocksEventReasonHwThermalSlowdown}, "THROTTLED"),
        ({"pids": [os.getpid(), 1]}, "FOREIGN_PROCESS"),
        ({"utilisation": 29}, "HOST_BOUND"),
    ],
)
def test_trouble_in_the_middle_is_seen(
    meter_on: MeterOn, clock: FakeClock, trouble: dict[str, object], flag: str
) -> None:
    board = steady(clock)
    meter = meter_on(board, poll_hz=10)
    calm = {name: getattr(board, name) for name in trouble}
    with meter.window("run") as run:
        with meter.window("before") as before:
            clock.advance(15)
        for name, value in trouble.items():
            setattr(board, name, value)
        with meter.window("during") as during:
            clock.advance(15)
        for name, value in calm.items():
            setattr(board, name, value)
    assert (before.result.flags, during.result.flags) == ((), (flag,))
    assert (flag in run.result.flags) == (flag != "HOST_BOUND")  # the mean over the run is high enough


def test_trouble_at_the_ends_is_seen_without_sampling(meter_on: MeterOn, clock: FakeClock) -> None:
    board = steady(clock)
    meter = meter_on(board)
    with meter.window("train") as window:
        clock.advance(20)
        board.pids = [os.getpid(), 1]
    assert window.result.flags == ("FOREIGN_PROCESS",)
    assert window.result.regime.utilisation is None  # two looks are no mean


@pytest.mark.parametrize(("celsius", "flagged"), [(37, True), (38, False), (42, False), (43, True)])
def test_start_temperature(meter_on: MeterOn, clock: FakeClock, celsius: int, flagged: bool) -> None:
    board = steady(clock)
    board.temperature = celsius
    meter = meter_on(board, start_temperature_c=40)
    with meter.window("train") as window:
        clock.advance(20)
    assert window.result.flags == (("HOT_START",) if flagged else ())


@pytest.mark.parametrize(("idle", "flagged"), [(229, False), (232, True)])
def test_power_near_idle_means_host_bound(meter_on: MeterOn, clock: FakeClock, idle: float, flagged: bool) -> None:
    watts = {"now": idle}
    joules = {"now": 0.0, "at": 0.0}

    def energy_mj() -> int:
        joules["now"] += watts["now"] * (clock.now - joules["at"])
        joules["at"] = clock.now
        return round(joules["now"] * 1000)

    meter = meter_on(FakeBoard(millijoules=energy_mj))
    meter.measure_idle(30)
    watts["now"] = 300.0
    with meter.window("train") as window:
        clock.advance(20)
    assert window.result.flags == (("HOST_BOUND",) if flagged else ())  # 1.3 x idle = 298 W or 302 W
