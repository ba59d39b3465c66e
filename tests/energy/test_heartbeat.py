"""The one real thread of the meter. No time is asserted: events only."""

from __future__ import annotations

import threading

from bpfree.energy import EnergyMeter, SimulatedSource
from bpfree.energy.heartbeat import Heartbeat


def test_beats_again_and_again_in_another_thread() -> None:
    beats: list[int] = []
    third = threading.Event()

    def beat() -> None:
        beats.append(threading.get_ident())
        if len(beats) == 3:
            third.set()

    heartbeat = Heartbeat(beat, 0.001)
    heartbeat.start()
    assert third.wait(timeout=30)
    heartbeat.stop()
    heartbeat.stop()
    assert threading.get_ident() not in beats


def test_stopping_waits_for_a_call_in_progress() -> None:
    began, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def beat() -> None:
        began.set()
        go_on.wait(timeout=30)
        done.set()

    heartbeat = Heartbeat(beat, 0.001)
    heartbeat.start()
    assert began.wait(timeout=30)
    threading.Timer(0.02, go_on.set).start()
    heartbeat.stop()
    assert done.is_set()


def test_stopping_what_was_never_started() -> None:
    Heartbeat(lambda: None, 1.0).stop()


def test_a_real_thread_fills_the_trace() -> None:
    sampled = threading.Event()

    def power(t: float) -> float:
        if threading.current_thread() is not threading.main_thread():
            sampled.set()
        return 100.0

    meter = EnergyMeter(SimulatedSource(power), poll_hz=200, min_window_s=0)
    with meter.window("train") as window:
        assert sampled.wait(timeout=30)
    assert meter.trace is not None
    assert len(meter.trace.times) >= 3  # at the start, in the thread, at the end
    assert window.result.gross_j is not None
