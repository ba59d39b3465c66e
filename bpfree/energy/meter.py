"""The energy meter: named windows around pieces of a run.

    meter = EnergyMeter(choose_source("auto", "cuda"), device="cuda")
    meter.measure_idle(30)
    with meter.window("train") as window:
        train()
    meter.measure_idle(30)
    print(window.result.gross_j, window.result.net_j, window.result.flags)

A window begins with sync, clock, counter and ends with sync, counter, clock: its joules never belong to more
time than is stated. In between nothing runs, unless a trace of sampled power is asked for, or is all there
is. Each end waits for the device, so windows are for runs and stages, not for single steps; `phase` marks pieces
of a window without waiting.

Named windows, this order and the preference for the counter are those of ml-energy/zeus.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from bpfree.energy.choose import choose_source
from bpfree.energy.counter import CounterReader
from bpfree.energy.flags import Flag
from bpfree.energy.judge import judge
from bpfree.energy.phases import Phases, edges_for
from bpfree.energy.result import EnergyResult
from bpfree.energy.sampler import Sampler
from bpfree.energy.sources import Device, PowerSource, Status, device_list
from bpfree.energy.tally import Tally
from bpfree.energy.trace import PowerTrace
from bpfree.energy.window import Window
from bpfree.errors import UsageError

TOTAL = "total"
"""Name of the window of `with EnergyMeter() as meter`."""

IDLE = "idle"
"""Name of the windows of `measure_idle`."""

FALLBACK_POLL_HZ = 10.0
"""Sampling rate for devices without a counter, 1/s."""


class EnergyMeter:
    """Measures the energy of named windows. A sensor that fails leads to flags, never to an exception.

    Args:
        source: where joules come from; the caller closes it. A kind by its name, see `choose_source`, or None, which is
            "auto", is opened for `device`.
        device: where the run computes, one or several; what is waited for at the ends of windows. None is the
            current CUDA device, if any.
        min_window_s: windows with shorter spans are flagged, s. With a counter refreshed every 0.1 s, 10 s
            keep the error below 1 %.
        sync: waits for the device; None waits for `device`.
        clock: a time in s that never goes back.
        sleep: waits for a number of seconds, used by `measure_idle`.
        poll_hz: rate of sampling in a thread, 1/s: the power as a cross-check of the counter, the counter for
            phases, and once a second the state of the device. 0 turns it off, except on devices without a counter;
            nothing is sampled on devices that do not tell their power.
        align: let both ends of a window wait for the counter to change, at most two update periods. It makes
            short windows exact to the time of one reading, and puts the wait at the end, up to one period,
            into the window.
        start_temperature_c: the temperature at which runs are meant to start, °C.
        idle_w: powers of the idle device measured before, W, as if `measure_idle` had found them. Without any, the
            device's calibration is asked.
        earlier: totals of the part of this run that an interruption ended; they count in `totals` and `joules`.

    Attributes:
        source: the power source.
    """

    def __init__(
        self,
        source: PowerSource | str | None = None,
        *,
        device: Device | Sequence[Device] | None = None,
        min_window_s: float = 10.0,
        sync: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
        poll_hz: float = 0.0,
        align: bool = False,
        start_temperature_c: float | None = None,
        idle_w: Sequence[float] = (),
        earlier: Mapping[str, EnergyResult] | None = None,
    ) -> None:
        if poll_hz < 0:
            raise UsageError(f"poll_hz must not be negative, got {poll_hz}; 0 turns sampling off")
        self._owns_source = not isinstance(source, PowerSource)
        named = "auto" if source is None else source
        self.source = named if isinstance(named, PowerSource) else choose_source(named, device or _default_device())
        self._counter = CounterReader(self.source, clock, align=align)
        counts = Flag.COUNTER_UNSUPPORTED not in self.source.standing_flags
        if not counts:
            poll_hz = poll_hz or FALLBACK_POLL_HZ
        self._sampler: Sampler | None = None
        if poll_hz and self.source.power_w() is not None:
            on_sample = self._counter.now if counts else None
            self._sampler = Sampler(self.source, clock, poll_hz, self._share_status, on_sample)
        self._phases = Phases(clock, lambda: edges_for(device, self._counter, clock))
        self._min_window_s = min_window_s
        self._sync = sync or _synchroniser(device)
        self._sleep = sleep
        self._start_temperature_c = start_temperature_c
        self._idle_w = list(idle_w)
        self._earlier = dict(earlier or {})
        self._totals: dict[str, Tally] = {}
        self._open: dict[str, Window] = {}
        self._lock = threading.Lock()  # guards _open against the sampling thread
        self._with = ExitStack()

    @contextmanager
    def window(self, name: str) -> Iterator[Window]:
        """Measure the block. Windows may be nested, and a name may be used again: see `totals`.

        If the block raises, its energy so far is kept, without waiting for the device.

        Raises:
            UsageError: a window of this name is open.
        """
        if name in self._open:
            raise UsageError(f"window {name!r} is already open")
        window = self._begin(name)
        try:
            yield window
            self._sync()
        finally:
            self._end(window)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark the block as a phase of the open window, without waiting for the device: see `totals`.

        For pieces that come often or are short. Their energy is as exact as the counter and `poll_hz` are fine:
        phases of less than the minimum window are flagged, and below the counter's update period their joules are
        integrated from the sampled power.

        Raises:
            UsageError: no window is open, or another phase is running.
        """
        if not self._open or self._phases.name is not None:
            raise UsageError(f"phase {name!r} must lie in a window, and in no other phase")
        self._phases.begin(name)
        try:
            yield
        finally:
            self._phases.end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out of all windows that are open: writing checkpoints, for example."""
        phase = self._phases.name
        self._phases.end()
        self._sync()
        reading = self._counter.at_end()
        self._settle_phases()
        pausing = [window for window in self._open.values() if window.running]
        for window in pausing:
            window.pause(reading, self.trace)
        try:
            yield
            self._sync()
        finally:
            reading = self._counter.at_start()
            for window in pausing:
                window.run(reading)
            if phase is not None:
                self._phases.begin(phase)

    def joules(self) -> float | None:
        """Gross energy of the outermost open window until now, J, without paused spans and without waiting.

        For energy to accuracy: call it when an evaluation is done. None outside of windows, and where
        nothing could be measured.
        """
        outermost = next(iter(self._open.values()), None)
        if outermost is None:
            return None
        return self._with_earlier(outermost.name, outermost.so_far(self._counter.now(), self.trace)).gross_j

    def totals(self) -> dict[str, EnergyResult]:
        """All windows and phases summed by name, without waiting for the device; `measure_idle` is "idle".

        A window that is still open counts with what it has so far, so that a checkpoint can hold what the run
        has cost; phases count up to the latest pause or end of a window. Windows less than a millisecond apart
        share a reading, so that no energy is lost between, say, epochs: such a row is as accurate as one long
        window, and only its whole length counts against the minimum.
        """
        tallies = dict(self._totals)
        if self._open:
            reading = self._counter.now()
            for name, window in self._open.items():
                tally = Tally()
                tally.merge(self._totals.get(name, Tally()))
                tally.merge(window.so_far(reading, self.trace))
                tallies[name] = tally
        return {**self._earlier, **{name: self._with_earlier(name, tally) for name, tally in tallies.items()}}

    def measure_idle(self, seconds: float = 30.0) -> float | None:
        """Measure the power of the idle device, as the baseline of net energy.

        The context should be alive and no kernel running. Call it before and after the run: the mean is used,
        and a difference above 2 W is flagged.

        Returns:
            Mean power, W; None when there is no number.

        Raises:
            UsageError: a window is open, or `seconds` is below the minimum window.
        """
        if self._open:
            raise UsageError(f"idle power is measured outside of windows; {', '.join(self._open)} is open")
        if seconds < self._min_window_s:
            raise UsageError(f"an idle baseline of {seconds:g} s is below the minimum of {self._min_window_s:g} s")
        with self.window(IDLE) as window:
            self._sleep(seconds)
        watts = window.result.mean_w
        if watts is not None:
            self._idle_w.append(watts)
        return watts

    def info(self) -> dict[str, Any]:
        """How the meter measures, for the run record, ready for JSON."""
        return {
            **self.source.info(),
            "min_window_s": self._min_window_s,
            "poll_hz": 1 / self.trace.period_s if self.trace else 0.0,
            "idle_w": list(self._baseline()),
            "idle_from": "measured" if self._idle_w else "calibration" if self._baseline() else None,
            "calibration": self.source.calibrated,
        }

    def close(self) -> None:
        """Release the source, if the meter opened it."""
        if self._owns_source:
            self.source.close()

    @property
    def trace(self) -> PowerTrace | None:
        """The sampled power, None without sampling."""
        return None if self._sampler is None else self._sampler.trace

    @property
    def result(self) -> EnergyResult:
        """What `with EnergyMeter() as meter` measured. The source is still open, for `measure_idle`.

        Raises:
            UsageError: no such block has ended.
        """
        if TOTAL not in self._totals:
            raise UsageError("meter.result comes with the end of `with meter:`")
        return self._judge(self._totals[TOTAL])

    def __enter__(self) -> EnergyMeter:
        self._with.enter_context(self.window(TOTAL))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._with.__exit__(kind, error, trace)

    def _begin(self, name: str) -> Window:
        window = Window(name, self._judge)
        outermost = not self._open
        if outermost:
            window.tally.add_status(self.source.status(), at_edge=True)
        self._sync()
        window.run(self._counter.at_start())
        with self._lock:
            self._open[name] = window
        if outermost and self._sampler is not None:
            self._sampler.start()
        return window

    def _end(self, window: Window) -> None:
        reading = self._counter.at_end()
        with self._lock:
            del self._open[window.name]
        outermost = not self._open
        if outermost and self._sampler is not None:
            self._sampler.stop()
        self._settle_phases()
        if outermost:
            window.tally.add_status(self.source.status(), at_edge=True)
        window.end(reading, self.trace)
        self._totals.setdefault(window.name, Tally()).merge(window.tally)

    def _baseline(self) -> Sequence[float]:
        """Powers of the idle device, W: measured with the run, else by the calibration, else none."""
        if self._idle_w or self.source.idle_w is None:
            return self._idle_w
        return [self.source.idle_w]

    def _settle_phases(self) -> None:
        for name, tally in self._phases.settle(self.trace).items():
            self._totals.setdefault(name, Tally()).merge(tally)

    def _share_status(self, status: Status) -> None:
        with self._lock:
            for window in self._open.values():
                if window.running:
                    window.tally.add_status(status, at_edge=False)

    def _with_earlier(self, name: str, tally: Tally) -> EnergyResult:
        result = self._judge(tally)
        return self._earlier[name] + result if name in self._earlier else result

    def _judge(self, tally: Tally) -> EnergyResult:
        return judge(
            tally,
            self.source,
            min_window_s=self._min_window_s,
            idle_w=self._baseline(),
            start_temperature_c=self._start_temperature_c,
        )


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _synchroniser(device: Device | Sequence[Device] | None) -> Callable[[], None]:
    """A function that waits for `device`, without ever importing torch or creating a context by itself."""
    targets: list[Device | None] = [None]
    if device is not None:
        targets = [d for d in device_list(device) if str(d).startswith("cuda")]

    def synchronise() -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            for target in targets:
                torch.cuda.synchronize(target)

    return synchronise
