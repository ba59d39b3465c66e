"""Several devices as one: the energy of a run that is spread over more than one board."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bpfree.energy.flags import Flag
from bpfree.energy.sources import PowerSource, Status


class CombinedSource(PowerSource):
    """The sum of other sources, which it owns. A part that cannot be read leaves the sum unknown.

    Args:
        parts: at least one source, of devices that do not overlap.
    """

    def __init__(self, parts: Sequence[PowerSource]) -> None:
        self._parts = tuple(parts)
        self.name = _label(part.name for part in parts)
        self.power_name = _label(part.power_name for part in parts)
        self.scope = _label(part.scope for part in parts)
        self.update_period_s = max(part.update_period_s for part in parts)
        self.standing_flags = frozenset[Flag]().union(*(part.standing_flags for part in parts))
        self.idle_w = _all_known(sum, [part.idle_w for part in parts])
        self.calibrated = "; ".join(dict.fromkeys(part.calibrated for part in parts if part.calibrated)) or None
        self.reason = "; ".join(dict.fromkeys(part.reason for part in parts if part.reason))

    def energy_j(self) -> float | None:
        return _all_known(sum, [part.energy_j() for part in self._parts])

    def power_w(self) -> float | None:
        return _all_known(sum, [part.power_w() for part in self._parts])

    def powers(self) -> dict[str, Callable[[], float | None]]:
        return {self.power_name: self.power_w}

    def status(self) -> Status:
        """Sums of watts and processes, means of clock and utilisation, the hottest temperature."""
        states = [part.status() for part in self._parts]
        foreign = [s.foreign_processes for s in states if s.foreign_processes is not None]
        return Status(
            temperature_c=_all_known(max, [s.temperature_c for s in states]),
            sm_clock_mhz=_all_known(_mean, [s.sm_clock_mhz for s in states]),
            utilisation=_all_known(_mean, [s.utilisation for s in states]),
            power_limit_w=_all_known(sum, [s.power_limit_w for s in states]),
            throttled=any(s.throttled for s in states),
            foreign_processes=sum(foreign) if foreign else None,
        )

    def info(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "scope": self.scope,
            "update_period_s": self.update_period_s,
            "parts": [part.info() for part in self._parts],
        }

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _label(names: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(names))


def _all_known(combine: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return combine(known) if len(known) == len(values) else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
