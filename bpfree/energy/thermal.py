"""Runs that start at one temperature: leakage grows with it, so that a run after a hot one reads high.

The rule is that of energy_protocol 6.7: a run starts within ±2 °C of a chosen value; what did not is flagged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from bpfree.energy.judge import HOT_START_C
from bpfree.energy.load import MatrixLoad
from bpfree.energy.sources import Device, PowerSource

POLL_S: Final = 0.5

REST_S: Final = 10.0
"""How long the device rests between the warm-up and the reading that becomes the start temperature, s: a die that
leaves full load falls by many °C in the first seconds."""


class ThermalStart:
    """Brings a device to the temperature at which every run of a comparison starts.

    Args:
        source: tells the temperature; the caller closes it.
        device: what is warmed up.
        target_c: the temperature, °C; None takes what the device has after a warm-up and a rest.
        warm_up_s: how long the device is loaded before anything else, s.
        wait_s: the longest that a run waits for its temperature, s.
        load: makes a load, on from `__enter__` to `__exit__`; None takes matrix products.
        clock: a time in s that never goes back.
        sleep: waits for a number of seconds.

    Attributes:
        target_c: the start temperature, °C; None where the device does not tell its temperature.
    """

    def __init__(
        self,
        source: PowerSource,
        device: Device,
        *,
        target_c: float | None = None,
        warm_up_s: float = 30.0,
        wait_s: float = 120.0,
        load: Callable[[], AbstractContextManager[object]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._source = source
        self._load = load or (lambda: MatrixLoad(device))
        self._wait_s = wait_s
        self._clock, self._sleep = clock, sleep
        self.target_c = None
        if self.temperature_c() is None:
            return
        if warm_up_s:
            with self._load():
                sleep(warm_up_s)
            sleep(REST_S)
        self.target_c = self.temperature_c() if target_c is None else target_c

    def temperature_c(self) -> float | None:
        """Temperature now, °C."""
        return self._source.status().temperature_c

    def settle(self) -> float | None:
        """Cool down by waiting or warm up by load, until the start temperature is reached or the wait is over.

        Returns:
            Temperature at the end, °C; None where the device does not tell it.
        """
        if self.target_c is None:
            return None
        deadline = self._clock() + self._wait_s
        while (now := self.temperature_c()) is not None and self._clock() < deadline:
            if abs(now - self.target_c) <= HOT_START_C:
                break
            if now > self.target_c:
                self._sleep(POLL_S)
            else:
                with self._load():
                    self._sleep(POLL_S)
        return now
