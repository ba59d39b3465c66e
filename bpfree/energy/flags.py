"""What can be wrong with a number of joules, one flag each.

A measurement never raises and never invents: when something is off, the result carries the name of a flag,
and the number is either withheld (`None`) or taken from the next honest method.
"""

from __future__ import annotations

from enum import Enum

from bpfree.errors import unknown_name


class Flag(Enum):
    """A reason to doubt an `EnergyResult`; the value is the explanation in one line."""

    SHORT_WINDOW = "shorter than the minimum window: a stale counter may be wrong by more than promised"
    COUNTER_UNSUPPORTED = "no energy counter: joules, if any, are integrated from sampled power"
    COUNTER_WENT_BACK = "the counter fell (driver reload, reset): its difference was thrown away"
    COUNTER_FROZEN = "the counter stood still for many of its update periods: its difference was thrown away"
    SENSOR_LOST = "the counter could be read at one time and not at another (device lost, library shut down)"
    SOURCES_DISAGREE = "counter and sampled power differ by more than 3 %: one misses part of the load"
    FOREIGN_PROCESS = "another process computed on the board: its energy is in the number"
    THROTTLED = "the board slowed down for heat, its power supply or a fault: repeat the run"
    HOT_START = "the run did not start within 2 °C of the chosen temperature: leakage differs between runs"
    HOST_BOUND = "the board was mostly waiting for the host: this ranks implementations, not algorithms"
    MISSING_SAMPLES = "the power trace has gaps too long to bridge: no energy was taken from it"
    NET_NEGATIVE = "less energy than an idle board takes: a fault of the measurement, not a saving"
    IDLE_DRIFT = "idle power before and after differ by more than 2 W: net energy is that uncertain"
    SIMULATED = "the power was made up, nothing was measured"


def explain(flag: str) -> str:
    """Explain a flag of `EnergyResult.flags` in one line.

    Raises:
        UsageError: there is no such flag.
    """
    if flag not in Flag.__members__:
        raise unknown_name("energy flag", flag, Flag.__members__)
    return Flag[flag].value
