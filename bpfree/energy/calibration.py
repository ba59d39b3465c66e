"""What the sensors of one device are worth: how often they change, what they read idle and loaded, how they agree.

    calibration = calibrate(source, MatrixLoad("cuda"), seconds=20)
    calibration.save()

A calibration is kept in a file per device (`calibration_folder`). Sources that are opened later take the update
period and the idle power from it, as long as board, driver and power limit are the same.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bpfree.energy.sources import PowerSource, SourceUnavailableError
from bpfree.energy.trace import PowerTrace
from bpfree.errors import DataError

FOLDER_VARIABLE = "BPFREE_CALIBRATION"

COUNTER = "counter"

SETTLE_S = 3.0
"""Time for clocks and power to settle before each observation, s."""

TRACE_PERIOD_S = 0.1
"""Sensors are read far more often; gaps of the trace are judged by how often boards refresh their power."""

WHAT_MUST_MATCH = ("method", "uuid_hash", "driver", "power_limit_w")
"""Entries of `PowerSource.info` that must be as they were for a calibration to be of use."""


@dataclass(frozen=True)
class Sensor:
    """One sensor, read as fast as it answers.

    Attributes:
        reads: number of readings.
        read_ms: median time that a reading takes, ms.
        update_ms: median time between two changes of the value, ms; None if it did not change twice.
        update_p95_ms: the time that 95 % of these stay below, ms.
        mean_w: mean power over the observation, W.
    """

    reads: int
    read_ms: float
    update_ms: float | None
    update_p95_ms: float | None
    mean_w: float | None


@dataclass(frozen=True)
class Observation:
    """All sensors of a device over the same seconds of one steady state.

    Attributes:
        seconds: from the first to the last change of the counter, s (without a counter: all of it).
        sensors: by name; the energy counter is "counter".
        counter_over_trapezoid: energy by the counter over that integrated from each power sensor's readings.
    """

    seconds: float
    sensors: dict[str, Sensor]
    counter_over_trapezoid: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """The sensors of one device, idle and loaded.

    Attributes:
        device: what the source says of itself.
        date: when it was done, UTC.
        idle: with a context alive and no kernel running.
        loaded: under a steady load.
    """

    device: dict[str, Any]
    date: str
    idle: Observation
    loaded: Observation

    @property
    def idle_w(self) -> float | None:
        """Power of the idle device, W, by the counter or else by the first power sensor."""
        return next((sensor.mean_w for sensor in self.idle.sensors.values() if sensor.mean_w is not None), None)

    @property
    def update_period_s(self) -> float | None:
        """Time between two changes of the counter (or else of the first power sensor) under load, s."""
        update_ms = next(iter(self.loaded.sensors.values())).update_ms
        return None if update_ms is None else update_ms / 1e3

    def as_json(self) -> str:
        """What `save` writes."""
        return json.dumps(asdict(self), indent=1)

    def save(self, path: Path | None = None) -> Path:
        """Write the calibration, by default to where later runs look for it; returns the path.

        Raises:
            DataError: the file cannot be written.
        """
        path = path or calibration_path(self.device)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.partial")
            temporary.write_text(self.as_json() + "\n")
            temporary.replace(path)
        except OSError as error:
            raise DataError(f"cannot write the calibration to {path}: {error.strerror}") from error
        return path

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing or is not a calibration.
        """
        try:
            record = json.loads(path.read_text())
            states = {name: _observation(record[name]) for name in ("idle", "loaded")}
            return cls(dict(record["device"]), str(record["date"]), **states)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a calibration ({error}); delete it, or make it again with `bpfree energy calibrate`"
            ) from error


def calibrate(
    source: PowerSource,
    load: AbstractContextManager[object],
    *,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
    on_state: Callable[[str], object] = lambda state: None,
) -> Calibration:
    """Observe all sensors of a device, idle and then loaded (energy_protocol, 6.2).

    Args:
        source: the device; its context, if it needs one, must be alive.
        load: keeps the device busy while it is entered.
        seconds: length of each of the two observations, s.
        clock: a time in s that never goes back.
        sleep: waits for a number of seconds.
        on_state: told "idle" and "loaded" as they begin.

    Raises:
        SourceUnavailableError: there is nothing to calibrate.
    """
    if not _readers(source):
        raise SourceUnavailableError(f"there is no sensor to calibrate: {source.reason or 'no number can be read'}")
    on_state("idle")
    sleep(SETTLE_S)
    idle = observe(source, seconds, clock)
    on_state("loaded")
    with load:
        sleep(SETTLE_S)
        loaded = observe(source, seconds, clock)
    return Calibration(source.info(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), idle, loaded)


def observe(source: PowerSource, seconds: float, clock: Callable[[], float] = time.perf_counter) -> Observation:
    """Read all sensors of a device in turn, as fast as they answer, for some seconds."""
    readers = _readers(source)
    readings: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    costs: dict[str, list[float]] = {name: [] for name in readers}
    end = clock() + seconds
    now = clock()
    while now < end:
        for name, read in readers.items():
            before, value = now, read()
            now = clock()
            costs[name].append(now - before)
            if value is not None:
                readings[name].append((now, value))
    changes = {name: _changes(taken) for name, taken in readings.items()}
    span = _span(changes.get(COUNTER) or []) or (end - seconds, end)
    length = span[1] - span[0]
    joules = _joules(readings, span)
    sensors = {}
    for name in readers:
        gaps = sorted(1e3 * (t1 - t0) for (t0, _), (t1, _) in pairwise(changes[name]))
        sensors[name] = Sensor(
            reads=len(costs[name]),
            read_ms=1e3 * statistics.median(costs[name]),
            update_ms=statistics.median(gaps) if gaps else None,
            update_p95_ms=gaps[int(0.95 * (len(gaps) - 1))] if gaps else None,
            mean_w=None if name not in joules or length <= 0 else joules[name] / length,
        )
    ratios = {
        name: joules[COUNTER] / amount for name, amount in joules.items() if COUNTER in joules and name != COUNTER
    }
    return Observation(length, sensors, ratios)


def calibration_folder() -> Path:
    """Where calibrations are kept: what BPFREE_CALIBRATION names, else a folder in the user's cache."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import pooch

    return Path(pooch.os_cache("bpfree")) / "calibration"


def calibration_path(device: Mapping[str, Any]) -> Path:
    """The file of the device that `PowerSource.info` describes."""
    return calibration_folder() / f"{device.get('uuid_hash') or device['method']}.json"


def use_calibration(source: PowerSource, *, context: bool = True) -> None:
    """Let a source take its update period and idle power from its calibration, if there is one that fits.

    What was found, or why it was not used, is left in `source.calibrated`.

    Args:
        source: the device.
        context: whether a context will be alive all the time; without one the device idles at less power than it was
            calibrated at, and that power is no baseline.
    """
    device = source.info()
    path = calibration_path(device)
    if not path.is_file():
        return
    try:
        calibration = Calibration.load(path)
    except DataError as error:
        source.calibrated = str(error)
        return
    for name in WHAT_MUST_MATCH:
        then, now = calibration.device.get(name), device.get(name)
        if then != now:
            source.calibrated = f"the calibration of {calibration.date} is not used: {name} was {then}, is {now}"
            return
    source.calibrated = calibration.date
    source.idle_w = calibration.idle_w if context else None
    source.update_period_s = calibration.update_period_s or source.update_period_s


def _readers(source: PowerSource) -> dict[str, Callable[[], float | None]]:
    """The sensors that answer, the counter first."""
    readers = {COUNTER: source.energy_j, **source.powers()}
    return {name: read for name, read in readers.items() if read() is not None}


def _changes(readings: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The readings that differ from the one before: each is as fresh as readings are close."""
    return [later for earlier, later in pairwise(readings) if later[1] != earlier[1]]


def _span(changes: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Times of the first and the last change, None if there are not two."""
    return (changes[0][0], changes[-1][0]) if len(changes) > 1 else None


def _joules(readings: Mapping[str, list[tuple[float, float]]], span: tuple[float, float]) -> dict[str, float]:
    """Energy between two times by every sensor that can tell, J."""
    joules = {}
    for name, taken in readings.items():
        if name == COUNTER:
            inside = [value for t, value in taken if span[0] <= t <= span[1]]
            amount = inside[-1] - inside[0] if inside else None
        else:
            trace = PowerTrace(TRACE_PERIOD_S)
            for t, watts in taken:
                trace.add(t, watts)
            amount = trace.energy_j(*span)
        if amount:
            joules[name] = amount
    return joules


def _observation(record: Mapping[str, Any]) -> Observation:
    sensors = {name: Sensor(**sensor) for name, sensor in record["sensors"].items()}
    return Observation(record["seconds"], sensors, dict(record["counter_over_trapezoid"]))
