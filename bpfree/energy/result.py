"""What a measurement says: joules, how they were obtained, and what may be wrong with them.

Only the quantities that add are stored; mean and net power follow from them. A run that was interrupted and
resumed is therefore the plain sum of its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bpfree.energy.flags import Flag

JOULES_PER_WH = 3600.0


@dataclass(frozen=True)
class Regime:
    """What kept the device busy; every field is None where the source could not tell.

    Attributes:
        utilisation: mean share of the time with a kernel running, 0 to 1.
        sm_clock_mhz: mean clock of the streaming multiprocessors, MHz.
        power_limit_w: enforced power limit, W.
        temperature_start_c: temperature before the first window, °C.
        temperature_end_c: temperature after the last one, °C.
    """

    utilisation: float | None = None
    sm_clock_mhz: float | None = None
    power_limit_w: float | None = None
    temperature_start_c: float | None = None
    temperature_end_c: float | None = None


@dataclass(frozen=True)
class EnergyResult:
    """Energy of one window, or of several added up.

    Attributes:
        gross_j: energy of the device in the window, J: what the job costs. None if it was not to be measured.
        seconds: length of the window without paused spans, s.
        method: what the joules come from: "nvml-counter", "nvml-power-instant", "rapl", "simulated", "none".
        scope: what the joules cover: "gpu board", "cpu package + dram", ...
        idle_w: power of the idle device with its context alive, W. None without a baseline.
        windows: number of windows added up.
        flags: names of `Flag`, in the order of their definition; `explain(flag)` says what each means.
        regime: what kept the device busy.
    """

    gross_j: float | None
    seconds: float
    method: str
    scope: str
    idle_w: float | None = None
    windows: int = 1
    flags: tuple[str, ...] = ()
    regime: Regime = Regime()

    @property
    def net_j(self) -> float | None:
        """What the computation added, J: gross energy less that of the idle device. Never clipped at zero."""
        if self.gross_j is None or self.idle_w is None:
            return None
        return self.gross_j - self.idle_w * self.seconds

    @property
    def mean_w(self) -> float | None:
        """Mean power over the window, W."""
        if self.gross_j is None or self.seconds <= 0:
            return None
        return self.gross_j / self.seconds

    @property
    def wh(self) -> float | None:
        """Gross energy in Wh."""
        return None if self.gross_j is None else self.gross_j / JOULES_PER_WH

    @property
    def power_share(self) -> float | None:
        """Mean power as a share of the enforced limit."""
        if self.mean_w is None or not self.regime.power_limit_w:
            return None
        return self.mean_w / self.regime.power_limit_w

    def __add__(self, other: EnergyResult) -> EnergyResult:
        """Add the energy of a later part of the same run: sums, united flags, means weighted by time.

        A part that could not be measured leaves the sum unknown rather than too small.
        """
        if not isinstance(other, EnergyResult):
            return NotImplemented
        return EnergyResult(
            gross_j=add_known(self.gross_j, other.gross_j),
            seconds=self.seconds + other.seconds,
            method=_join(self.method, other.method),
            scope=_join(self.scope, other.scope),
            idle_w=_weighted(self.idle_w, self.seconds, other.idle_w, other.seconds),
            windows=self.windows + other.windows,
            flags=flag_names(Flag[name] for name in (*self.flags, *other.flags)),
            regime=_join_regimes(self, other),
        )

    def beside(self, other: EnergyResult) -> EnergyResult:
        """Add the energy of another device in the same span of time: joules and powers add up, seconds do not."""
        limit_w = add_known(self.regime.power_limit_w, other.regime.power_limit_w)
        return EnergyResult(
            gross_j=add_known(self.gross_j, other.gross_j),
            seconds=max(self.seconds, other.seconds),
            method=_join(self.method, other.method),
            scope=_join(self.scope, other.scope),
            idle_w=add_known(self.idle_w, other.idle_w),
            windows=max(self.windows, other.windows),
            flags=flag_names(Flag[name] for name in (*self.flags, *other.flags)),
            regime=replace(_join_regimes(self, other), power_limit_w=limit_w),
        )

    def as_dict(self) -> dict[str, Any]:
        """All fields and the derived numbers, ready for JSON."""
        derived = {name: getattr(self, name) for name in ("net_j", "mean_w", "wh", "power_share")}
        return {**asdict(self), "flags": list(self.flags), **derived}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EnergyResult:
        """The result that `as_dict` wrote, for adding the earlier part of a resumed run.

        Raises:
            KeyError: the record lacks a field.
        """
        fields = {name: record[name] for name in ("gross_j", "seconds", "method", "scope", "idle_w", "windows")}
        return cls(**fields, flags=tuple(record["flags"]), regime=Regime(**record["regime"]))


def flag_names(flags: Iterable[Flag]) -> tuple[str, ...]:
    """Names of the flags, each once, in the order of definition, so that equal sets print alike."""
    present = set(flags)
    return tuple(flag.name for flag in Flag if flag in present)


def add_known(a: float | None, b: float | None) -> float | None:
    """Sum of two numbers; None when either is unknown."""
    return None if a is None or b is None else a + b


def _join(a: str, b: str) -> str:
    """Both labels, each once: a sum of two methods must not claim to be only one of them."""
    return " + ".join(dict.fromkeys([*a.split(" + "), *b.split(" + ")]))


def _weighted(a: float | None, weight_a: float, b: float | None, weight_b: float) -> float | None:
    """Mean of two numbers by weight; None when either is unknown."""
    if a is None or b is None:
        return None
    total = weight_a + weight_b
    return (a * weight_a + b * weight_b) / total if total > 0 else (a + b) / 2


def _join_regimes(first: EnergyResult, second: EnergyResult) -> Regime:
    a, b = first.regime, second.regime
    return Regime(
        utilisation=_weighted(a.utilisation, first.seconds, b.utilisation, second.seconds),
        sm_clock_mhz=_weighted(a.sm_clock_mhz, first.seconds, b.sm_clock_mhz, second.seconds),
        power_limit_w=_weighted(a.power_limit_w, first.seconds, b.power_limit_w, second.seconds),
        temperature_start_c=a.temperature_start_c,
        temperature_end_c=b.temperature_end_c,
    )
