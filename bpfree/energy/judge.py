"""What may be said of the sums of a tally: which number to trust, and every doubt as a flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bpfree.energy.flags import Flag
from bpfree.energy.result import EnergyResult, flag_names
from bpfree.energy.sources import PowerSource
from bpfree.energy.tally import Tally

FROZEN_PERIODS = 10
"""A counter that keeps its value for this many update periods has stopped, and is not just stale."""

DISAGREEMENT = 0.03
"""Relative difference of counter and trace that sensors of one board do not explain (energy_protocol,
6.1)."""

IDLE_DRIFT_W = 2.0
"""Difference of idle powers, W, beyond which the baseline is doubtful (6.6)."""

HOT_START_C = 2.0
"""Difference from the chosen start temperature, °C, beyond which runs are not comparable (6.7)."""

HOST_BOUND_UTILISATION = 0.3
HOST_BOUND_OVER_IDLE = 1.3
"""Below this utilisation, or this multiple of idle power, the device mostly waits (6.9)."""


def judge(
    tally: Tally,
    source: PowerSource,
    *,
    min_window_s: float,
    idle_w: Sequence[float] = (),
    start_temperature_c: float | None = None,
) -> EnergyResult:
    """Turn sums into a result: the counter if it can be trusted, else the trace, else no number.

    Args:
        tally: the sums.
        source: where they come from.
        min_window_s: shortest span whose energy is worth having, s.
        idle_w: measured idle powers, W; their mean is the baseline.
        start_temperature_c: the temperature at which runs are meant to start, °C.
    """
    flags = tally.flags | source.standing_flags
    if Flag.COUNTER_UNSUPPORTED in source.standing_flags:
        flags.discard(Flag.SENSOR_LOST)  # there was nothing to lose
    span_s = tally.seconds / tally.spans
    if span_s < min_window_s:
        flags.add(Flag.SHORT_WINDOW)
    gross_j, method = tally.counter_j, source.name
    distrust = _distrust(tally, source)
    if distrust is not None:
        flags.add(distrust)
        gross_j = None
    if gross_j is not None and _disagree(gross_j, tally.trace_j, stale=source.update_period_s / span_s):
        flags.add(Flag.SOURCES_DISAGREE)
    if gross_j is None and tally.trace_j is not None and tally.seconds > 0:
        gross_j, method = tally.trace_j, source.power_name
    result = EnergyResult(
        gross_j=gross_j,
        seconds=tally.seconds,
        method=method,
        scope=source.scope,
        idle_w=sum(idle_w) / len(idle_w) if idle_w else None,
        windows=tally.windows,
        regime=tally.regime(),
    )
    flags |= _doubts(result, min_window_s, idle_w, start_temperature_c)
    return replace(result, flags=flag_names(flags))


def _distrust(tally: Tally, source: PowerSource) -> Flag | None:
    """Why a difference of the counter, though it could be formed, tells nothing."""
    if tally.counter_j is None:
        return None
    span_s = tally.seconds / tally.spans
    if tally.counter_j == 0 and span_s > 0 and span_s >= FROZEN_PERIODS * source.update_period_s:
        return Flag.COUNTER_FROZEN
    if tally.counter_j == 0 or span_s <= source.update_period_s:
        # The counter had no time to move, or it moved for what was before the window.
        return Flag.SHORT_WINDOW
    return None


def _disagree(counter_j: float, trace_j: float | None, *, stale: float) -> bool:
    """Do the two differ by more than sensors do, and than the stale share of the counter explains?"""
    return trace_j is not None and abs(counter_j - trace_j) > (DISAGREEMENT + stale) * counter_j


def _doubts(
    result: EnergyResult, min_window_s: float, idle_w: Sequence[float], start_temperature_c: float | None
) -> set[Flag]:
    """What the finished numbers themselves give away."""
    regime = result.regime
    # a board tells the utilisation of up to the last second, which in a short window is mostly that of before
    long_enough = result.seconds >= min_window_s
    waiting = long_enough and regime.utilisation is not None and regime.utilisation < HOST_BOUND_UTILISATION
    if result.mean_w is not None and result.idle_w is not None:
        waiting |= result.mean_w < HOST_BOUND_OVER_IDLE * result.idle_w
    temperature = regime.temperature_start_c
    found = {
        Flag.NET_NEGATIVE: result.net_j is not None and result.net_j < 0,
        Flag.IDLE_DRIFT: bool(idle_w) and max(idle_w) - min(idle_w) > IDLE_DRIFT_W,
        Flag.HOST_BOUND: waiting,
        Flag.HOT_START: temperature is not None
        and start_temperature_c is not None
        and abs(temperature - start_temperature_c) > HOT_START_C,
    }
    return {flag for flag, is_so in found.items() if is_so}
