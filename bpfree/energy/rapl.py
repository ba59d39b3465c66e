"""Energy of the CPU packages and their memory from RAPL, as Linux shows it under /sys/class/powercap.

Each zone is a counter in microjoules that starts again at `max_energy_range_uj`, after a quarter of an hour
on a busy server, sooner on some. A small thread therefore looks at it every half a minute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bpfree.energy.heartbeat import Heartbeat
from bpfree.energy.sources import PowerSource, SourceUnavailableError, Status

POWERCAP = Path("/sys/class/powercap")

REFRESH_S = 30.0
"""Longest time between two looks at the counters, s; far below the time that a busy package takes to wrap."""


class WrappingCounter:
    """A counter that starts again at `modulus`, made monotone. It must be read at least once per turn."""

    def __init__(self, modulus: int, start: int) -> None:
        self._modulus = modulus
        self._last = start
        self._total = 0

    def advance(self, raw: int) -> int:
        """Take a new raw reading; return what was counted since the start."""
        self._total += (raw - self._last) % self._modulus
        self._last = raw
        return self._total


class RaplSource(PowerSource):
    """CPU packages plus memory.

    Args:
        root: the powercap folder.
        refresh_s: longest time between two looks at the counters, s.

    Raises:
        SourceUnavailableError: there is no RAPL, or it may not be read.
    """

    name = "rapl"
    power_name = "none"
    update_period_s = 1e-3

    def __init__(self, root: Path = POWERCAP, *, refresh_s: float = REFRESH_S) -> None:
        self._zones = _zones(root)
        try:
            self._counters = {
                zone: WrappingCounter(_read_int(zone / "max_energy_range_uj"), _read_int(zone / "energy_uj"))
                for zone in self._zones
            }
        except PermissionError as error:
            raise SourceUnavailableError(f"RAPL is there but only root may read it ({error.filename})") from error
        except (OSError, ValueError) as error:
            raise SourceUnavailableError(f"RAPL cannot be read: {error}") from error
        self.scope = "cpu package + dram" if "dram" in self._zones.values() else "cpu package"
        self._lock = threading.Lock()
        self._closed = False
        self._heartbeat = Heartbeat(self.energy_j, refresh_s)
        self._heartbeat.start()

    def energy_j(self) -> float | None:
        with self._lock:
            if self._closed:
                return None
            try:
                counted = [c.advance(_read_int(zone / "energy_uj")) for zone, c in self._counters.items()]
            except (OSError, ValueError):
                return None
            return sum(counted) / 1e6

    def power_w(self) -> float | None:
        return None

    def powers(self) -> dict[str, Callable[[], float | None]]:
        return {}

    def status(self) -> Status:
        return Status()

    def info(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "scope": self.scope,
            "update_period_s": self.update_period_s,
            "zones": sorted(f"{zone.name} {name}" for zone, name in self._zones.items()),
        }

    def close(self) -> None:
        self._heartbeat.stop()
        with self._lock:
            self._closed = True


def _zones(root: Path) -> dict[Path, str]:
    """The zones to add up, and their names.

    Cores and graphics are parts of a package, and "psys" holds the packages: adding them would count joules
    twice. The colon keeps out `intel-rapl-mmio`, a second view of the same packages.
    """
    zones: dict[Path, str] = {}
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
        except OSError:
            continue
        if name.startswith("package") or name == "dram":
            zones[zone] = name
    if not zones:
        raise SourceUnavailableError(f"no RAPL packages under {root}")
    return zones


def _read_int(path: Path) -> int:
    return int(path.read_text())
