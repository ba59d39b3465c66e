"""Windows of the meter against made-up power (energy_protocol, section 8: 6, 12, 13, 14)."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpfree.energy import EnergyMeter, NullSource, SimulatedSource
from bpfree.errors import UsageError

from .fakes import FakeClock

spans = st.floats(0.01, 30)


def ramp(t: float) -> float:
    return 100 + 10 * t


def ramp_joules(start: float, end: float) -> float:
    return 100 * (end - start) + 5 * (end**2 - start**2)


def simulated_meter(clock: FakeClock, tau: float = 0.0, min_window_s: float = 0.0) -> EnergyMeter:
    source = SimulatedSource([(0, ramp(0)), (1e4, ramp(1e4))], update_period_s=tau, clock=clock)
    return EnergyMeter(source, clock=clock, sleep=clock.advance, min_window_s=min_window_s)


def test_a_window() -> None:
    clock = FakeClock()
    meter = simulated_meter(clock)
    clock.advance(3)
    with meter.window("train") as window:
        clock.advance(10)
    clock.advance(3)
    result = window.result
    assert result.gross_j == pytest.approx(ramp_joules(3, 13))
    assert result.mean_w == pytest.approx(ramp(8))
    assert (result.seconds, result.windows) == (10, 1)
    assert (result.method, result.scope, result.flags) == ("simulated", "simulated", ("SIMULATED",))
    assert (result.net_j, result.idle_w) == (None, None)


@given(st.lists(spans, min_size=1, max_size=8), st.sampled_from([0.0, 0.1]))
def test_touching_windows_lose_nothing(lengths: list[float], tau: float) -> None:
    clock = FakeClock()
    meter = simulated_meter(clock, tau)
    with meter.window("run") as run:
        for length in lengths:
            with meter.window("epoch"):
                clock.advance(length)
            clock.advance(1e-4)  # logging
    epochs = meter.totals()["epoch"]
    assert epochs.windows == len(lengths)
    assert epochs.seconds == pytest.approx(run.result.seconds, abs=2e-4)
    if epochs.gross_j is not None:  # it is None below one period of the counter
        # The run ends after the last epoch, so that only there the counter may have moved once more.
        assert run.result.gross_j == pytest.approx(epochs.gross_j, abs=ramp(clock.now) * (tau + 2e-4))


@given(st.lists(st.tuples(spans, spans), min_size=1, max_size=5))
def test_children_and_the_rest_make_the_parent(pieces: list[tuple[float, float]]) -> None:
    clock = FakeClock()
    meter = simulated_meter(clock)
    rest_j = 0.0
    with meter.window("parent") as parent:
        for child_s, rest_s in pieces:
            with meter.window("child"):
                clock.advance(child_s)
            begin = clock.now
            clock.advance(rest_s)
            rest_j += ramp_joules(begin, clock.now)
    children = meter.totals()["child"].gross_j
    assert children is not None
    assert parent.result.gross_j == pytest.approx(children + rest_j)


def test_a_pause_is_left_out_of_every_open_window_exactly() -> None:
    clock = FakeClock()
    meter = simulated_meter(clock)
    with meter.window("run") as run:
        clock.advance(2)
        with meter.window("epoch") as epoch:
            clock.advance(3)
            with meter.paused():
                clock.advance(4)
                with meter.paused():  # a pause in a pause changes nothing
                    clock.advance(1)
                with meter.window("checkpoint") as checkpoint:
                    clock.advance(1)
                assert meter.joules() == pytest.approx(ramp_joules(0, 5))
            clock.advance(5)
    assert run.result.gross_j == pytest.approx(ramp_joules(0, 5) + ramp_joules(11, 16))
    assert epoch.result.gross_j == pytest.approx(ramp_joules(2, 5) + ramp_joules(11, 16))
    assert (run.result.seconds, epoch.result.seconds) == (10, 8)
    assert checkpoint.result.gross_j == pytest.approx(ramp_joules(10, 11))


def test_a_window_that_ends_in_a_pause_stays_ended() -> None:
    clock = FakeClock()
    meter = simulated_meter(clock)
    window = meter.window("train")
    with window as train:
        clock.advance(2)
        pause = meter.paused()
        pause.__enter__()
        clock.advance(3)
    pause.__exit__(None, None, None)
    clock.advance(5)
    assert not train.running
    assert train.result.seconds == 2
    assert train.result.gross_j == pytest.approx(ramp_joules(0, 2))


def test_joules_until_now() -> None:
    clock = FakeClock()
    sync = mock.Mock()
    meter = simulated_meter(clock)
    meter._sync = sync
    assert meter.joules() is None
    with meter.window("run") as run:
        clock.advance(4)
        calls = sync.call_count
        with meter.window("epoch"):
            clock.advance(1)
            assert meter.joules() == pytest.approx(ramp_joules(0, 5))  # of the outermost window
        with meter.paused():
            clock.advance(10)
            assert meter.joules() == pytest.approx(ramp_joules(0, 5))
        clock.advance(2)
        assert meter.joules() == pytest.approx(ramp_joules(0, 5) + ramp_joules(15, 17))
        assert sync.call_count == calls + 4  # two windows' and pauses' ends, none for joules
    assert meter.joules() is None
    assert run.result.gross_j == pytest.approx(ramp_joules(0, 5) + ramp_joules(15, 17))


def test_a_checkpoint_in_a_pause_holds_what_the_run_has_cost() -> None:
    clock = FakeClock()
    meter = simulated_meter(clock)
    with meter.window("run"):
        for _ in range(2):
            with meter.window("epoch"):
                clock.advance(3)
                with meter.paused():
                    clock.advance(5)
                    saved = meter.totals()
    assert saved["run"].gross_j == pytest.approx(ramp_joules(0, 3) + ramp_joules(8, 11))
    assert saved["epoch"].gross_j == pytest.approx(saved["run"].gross_j)
    assert (saved["run"].windows, saved["epoch"].windows) == (1, 2)
    resumed = simulated_meter(clock)
    with resumed.window("run"):
        clock.advance(4)
        assert resumed.totals()["run"].gross_j == pytest.approx(ramp_joules(0, 4))
    total = saved["run"] + resumed.totals()["run"]
    assert total.gross_j == pytest.approx(ramp_joules(0, 3) + ramp_joules(8, 11) + ramp_joules(0, 4))


def test_order_of_reading() -> None:
    events: list[str] = []
    clock = FakeClock()
    source = SimulatedSource(100.0, clock=clock)

    def tick() -> float:
        events.append("clock")
        return clock()

    with mock.patch.object(source, "energy_j", autospec=True, side_effect=lambda: events.append("counter")):
        meter = EnergyMeter(source, clock=tick, sync=lambda: events.append("sync"))
        with meter.window("train"):
            events.append("work")
    assert events == ["sync", "clock", "counter", "work", "sync", "counter", "clock"]


def test_cuda_is_waited_for_only_where_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = mock.create_autospec(torch.cuda.synchronize)
    monkeypatch.setattr(torch.cuda, "synchronize", waits)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    source = NullSource("test")
    with EnergyMeter(source, device="cuda:1"):
        pass
    assert waits.call_args_list == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with EnergyMeter(source, device="cpu"):
        pass
    assert waits.call_args_list == []
    with EnergyMeter(source, device=["cuda:0", torch.device("cuda:1")]):
        waits.assert_has_calls([mock.call("cuda:0"), mock.call(torch.device("cuda:1"))])
        assert waits.call_count == 2
    assert waits.call_count == 4
    with EnergyMeter(source):
        waits.assert_called_with(None)  # the current device


def test_random_windows_are_within_one_period_of_the_truth() -> None:
    tau, watts = 0.1, 200.0
    chance = random.Random(0)
    clock = FakeClock()
    meter = EnergyMeter(SimulatedSource(watts, update_period_s=tau, clock=clock), clock=clock)
    worst = 0.0
    for _ in range(1000):
        clock.advance(chance.uniform(0.01, 1))
        seconds = chance.uniform(tau * 1.01, 20)
        with meter.window("random") as window:
            clock.advance(seconds)
        if window.result.gross_j is not None:
            worst = max(worst, abs(window.result.gross_j - watts * seconds))
    assert 0.5 * watts * tau < worst <= watts * tau * (1 + 1e-9)


def test_aligned_windows_are_within_one_poll_of_the_truth() -> None:
    tau, watts, poll_s = 0.1, 200.0, 0.003
    chance = random.Random(0)
    clock = FakeClock()
    source = SimulatedSource(watts, update_period_s=tau, clock=clock)
    read = source.energy_j

    def slow_read() -> float | None:
        clock.advance(poll_s)
        return read()

    with mock.patch.object(source, "energy_j", autospec=True, side_effect=slow_read):
        meter = EnergyMeter(source, clock=clock, align=True, min_window_s=0)
        for _ in range(200):
            clock.advance(chance.uniform(0.01, 1))
            begin = clock.now
            with meter.window("random") as window:
                assert clock.now - begin <= tau + 2 * poll_s
                clock.advance(chance.uniform(0.15, 2))
            result = window.result
            assert result.gross_j == pytest.approx(watts * result.seconds, abs=watts * poll_s)


def test_waiting_for_a_dead_counter_ends() -> None:
    clock = FakeClock()
    source = SimulatedSource(0.0, update_period_s=0.1, clock=clock)

    def slow_read() -> float:
        clock.advance(0.01)
        return 5.0

    with mock.patch.object(source, "energy_j", autospec=True, side_effect=slow_read):
        meter = EnergyMeter(source, clock=clock, align=True)
        with meter.window("train"):
            assert clock.now <= 0.25
            clock.advance(20)
    assert meter.totals()["train"].flags == ("COUNTER_FROZEN", "SIMULATED")


def test_short_windows_are_marked_and_may_add_up_to_a_long_one() -> None:
    clock = FakeClock()
    meter = simulated_meter(clock, tau=0.1, min_window_s=10)
    results = []
    for _ in range(4):
        with meter.window("epoch") as window:
            clock.advance(3)
        results.append(window.result)
    assert all("SHORT_WINDOW" in result.flags for result in results)
    assert "SHORT_WINDOW" not in meter.totals()["epoch"].flags  # one span of 12 s
    clock.advance(1)
    with meter.window("epoch"):
        clock.advance(3)
    assert "SHORT_WINDOW" in meter.totals()["epoch"].flags  # two spans of 7.5 s


def test_pauses_without_length_cost_no_accuracy() -> None:
    clock = FakeClock()
    meter = simulated_meter(clock, tau=0.1, min_window_s=10)
    with meter.window("train") as window:
        for _ in range(4):
            clock.advance(3)
            with meter.paused():
                pass
    assert "SHORT_WINDOW" not in window.result.flags


@pytest.mark.parametrize("poll_hz", [0, 10])
def test_a_window_of_no_length_has_no_number(clock: FakeClock, poll_hz: float) -> None:
    meter = EnergyMeter(SimulatedSource(100.0, clock=clock), clock=clock, min_window_s=0, poll_hz=poll_hz)
    with meter.window("nothing") as window:
        pass
    assert (window.result.gross_j, window.result.mean_w) == (None, None)
    assert window.result.flags == ("SHORT_WINDOW", "SIMULATED")


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.07, 0.099])
@pytest.mark.parametrize("phase", [0.0, 0.05, 0.09])
def test_a_window_below_one_period_has_no_number(seconds: float, phase: float) -> None:
    clock = FakeClock()
    meter = simulated_meter(clock, tau=0.1, min_window_s=10)
    clock.advance(phase)
    with meter.window("step") as window:
        clock.advance(seconds)
    assert window.result.gross_j is None
    assert "SHORT_WINDOW" in window.result.flags


def test_net_energy_is_that_of_the_load() -> None:
    clock = FakeClock()
    load = {"w": 0.0}
    meter = EnergyMeter(SimulatedSource(lambda t: 70 + load["w"], clock=clock), clock=clock, sleep=clock.advance)
    assert meter.measure_idle(30) == pytest.approx(70)
    load["w"] = 230
    with meter.window("train") as window:
        clock.advance(20)
    load["w"] = 0
    with meter.window("nothing") as nothing:
        clock.advance(20)
    assert window.result.net_j == pytest.approx(230 * 20)
    assert window.result.gross_j == pytest.approx(300 * 20)
    assert nothing.result.net_j == pytest.approx(0, abs=1e-6)
    assert meter.info()["idle_w"] == [pytest.approx(70)]
    assert meter.totals()["idle"].seconds == 30


@pytest.mark.parametrize(("drift", "flagged"), [(1.9, False), (2.1, True)])
def test_the_baseline_is_the_mean_of_before_and_after(drift: float, flagged: bool) -> None:
    clock = FakeClock()
    power = [(0, 70), (30, 70), (30.001, 300), (50, 300), (50.001, 70 + drift), (90, 70 + drift)]
    meter = EnergyMeter(SimulatedSource(power, clock=clock), clock=clock, sleep=clock.advance)
    meter.measure_idle(30)
    with meter.window("train") as window:
        clock.advance(20)
    before = window.result
    clock.advance(1)
    meter.measure_idle(30)
    assert before.idle_w == pytest.approx(70)
    assert window.result.idle_w == pytest.approx(70 + drift / 2)
    assert ("IDLE_DRIFT" in window.result.flags) == flagged


def test_less_than_idle_is_reported_as_it_is() -> None:
    clock = FakeClock()
    meter = EnergyMeter(SimulatedSource([(0, 100), (30, 100), (31, 60)], clock=clock), clock=clock, sleep=clock.advance)
    meter.measure_idle(30)
    clock.advance(1)
    with meter.window("train") as window:
        clock.advance(20)
    assert window.result.net_j == pytest.approx(-800)
    assert "NET_NEGATIVE" in window.result.flags
    assert "HOST_BOUND" in window.result.flags


def test_a_source_may_be_named() -> None:
    meter = EnergyMeter("simulated", device="cpu")
    with meter.window("a"):
        pass
    assert meter.source.standing_flags == SimulatedSource(1.0).standing_flags
    with pytest.raises(UsageError, match="did you mean simulated"):
        EnergyMeter("simulatd")
    with pytest.raises(UsageError, match="poll_hz must not be negative"):
        EnergyMeter("simulated", poll_hz=-1)


def test_wrong_use_is_told() -> None:
    clock = FakeClock()
    meter = simulated_meter(clock, min_window_s=10)
    with pytest.raises(UsageError, match="below the minimum"):
        meter.measure_idle(5)
    with pytest.raises(UsageError, match="end of `with meter:`"):
        _ = meter.result
    with meter.window("train") as window:
        clock.advance(1)
        with pytest.raises(UsageError, match="outside of windows; train is open"):
            meter.measure_idle(30)
        with pytest.raises(UsageError, match="'train' is already open"), meter.window("train"):
            pass
        with pytest.raises(UsageError, match="'train' is still open"):
            _ = window.result
        clock.advance(19)
    assert window.result.seconds == 20  # none of it hurt the window


def test_an_exception_ends_the_window_without_waiting_and_keeps_its_energy() -> None:
    clock = FakeClock()
    sync = mock.Mock()
    meter = EnergyMeter(SimulatedSource(100.0, clock=clock), clock=clock, sync=sync)

    def interrupted() -> None:
        with meter.window("train"):
            clock.advance(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sync.call_count == 1
    assert meter.totals()["train"].gross_j == pytest.approx(2000)


def test_an_exception_ends_a_pause() -> None:
    clock = FakeClock()
    meter = EnergyMeter(SimulatedSource(100.0, clock=clock), clock=clock)

    def save() -> None:
        with meter.paused():
            clock.advance(20)
            raise OSError("disk full")

    with meter:
        clock.advance(10)
        with pytest.raises(OSError, match="disk full"):
            save()
        clock.advance(5)
    assert meter.result.seconds == 15
    assert meter.result.gross_j == pytest.approx(1500)


def test_the_meter_is_a_window_itself() -> None:
    clock = FakeClock()
    with EnergyMeter(SimulatedSource(100.0, clock=clock), clock=clock) as meter:
        clock.advance(15)
        with meter.window("part"):
            clock.advance(15)
    assert meter.result.gross_j == pytest.approx(3000)
    assert list(meter.totals()) == ["part", "total"]


def test_without_any_source_there_are_seconds_and_a_reason() -> None:
    clock = FakeClock()
    with EnergyMeter(NullSource("no sensor"), clock=clock) as meter:
        clock.advance(15)
        assert meter.joules() is None
    result = meter.result
    assert (result.gross_j, result.seconds, result.method) == (None, 15, "none")
    assert result.flags == ("COUNTER_UNSUPPORTED",)
    assert meter.info()["reason"] == "no sensor"
    assert meter.trace is None


def test_a_resumed_run_adds_to_its_earlier_part() -> None:
    clock = FakeClock()
    first = simulated_meter(clock)
    with first.window("total"):
        clock.advance(10)
    kept = first.totals()
    source = SimulatedSource([(0, ramp(0)), (1e4, ramp(1e4))], clock=clock)  # its trace begins now
    second = EnergyMeter(source, clock=clock, min_window_s=0, earlier={**kept, "setup": kept["total"]})
    with second.window("total"):
        clock.advance(5)
        assert second.joules() == pytest.approx(ramp_joules(0, 10) + ramp_joules(0, 5))
    total = second.totals()["total"]
    assert total.gross_j == pytest.approx(ramp_joules(0, 10) + ramp_joules(0, 5))
    assert (total.seconds, total.windows) == (15, 2)
    assert second.totals()["setup"] == kept["total"]


def test_a_baseline_may_come_from_before() -> None:
    clock = FakeClock()
    meter = EnergyMeter(SimulatedSource(300, clock=clock), clock=clock, min_window_s=0, idle_w=(100, 110))
    with meter.window("total") as window:
        clock.advance(10)
    assert window.result.net_j == pytest.approx((300 - 105) * 10)
    assert "IDLE_DRIFT" in window.result.flags
