"""Sampling the power while windows are open: a cross-check of the counter, or all there is without one."""

from __future__ import annotations

from collections.abc import Callable

from bpfree.energy.heartbeat import Heartbeat
from bpfree.energy.sources import PowerSource, Status
from bpfree.energy.trace import PowerTrace

STATUS_PERIOD_S = 1.0
"""Time between two looks at temperature, clocks and processes, s: as often as boards renew their utilisation."""


class Sampler:
    """Fills a trace from a thread.

    Args:
        source: the power source.
        clock: a time in s that never goes back.
        hz: samples per second.
        on_status: is given the state of the device about once a second, in the sampling thread.
        on_sample: called with every sample, in the sampling thread.

    Attributes:
        trace: the samples so far.
    """

    def __init__(
        self,
        source: PowerSource,
        clock: Callable[[], float],
        hz: float,
        on_status: Callable[[Status], None],
        on_sample: Callable[[], object] | None = None,
    ) -> None:
        self.trace = PowerTrace(1 / hz)
        self._source = source
        self._clock = clock
        self._on_status = on_status
        self._on_sample = on_sample or (lambda: None)
        self._next_status_s = 0.0
        self._heartbeat: Heartbeat | None = None

    def start(self) -> None:
        """Take a sample and go on taking them."""
        self._next_status_s = self._clock() + STATUS_PERIOD_S
        self._sample()
        self._heartbeat = Heartbeat(self._sample, self.trace.period_s)
        self._heartbeat.start()

    def stop(self) -> None:
        """Take a last sample, so that the trace reaches beyond what it is to cover."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._sample()

    def _sample(self) -> None:
        now = self._clock()
        self.trace.add(now, self._source.power_w())
        self._on_sample()
        if now >= self._next_status_s:
            self._next_status_s = now + STATUS_PERIOD_S
            self._on_status(self._source.status())
