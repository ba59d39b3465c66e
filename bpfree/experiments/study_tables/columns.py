"""What each table shows: its title, and how the columns that a person reads are made of a row's plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column as a person reads it.

    Attributes:
        title: with the unit; "{baseline}" is where the baseline's name goes.
        show: makes its cell from a row.
    """

    title: str
    show: Callable[[Row], str]


def _text(title: str, name: str) -> Column:
    return Column(title, lambda row: "" if row.get(name) is None else str(row[name]))


def _number(title: str, name: str, digits: int, *, sign: bool = False) -> Column:
    """A number, with its standard deviation or interval where the row has them."""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"

    def show(row: Row) -> str:
        if row.get(name) is None:
            return ""
        text = form.format(row[name])
        if row.get(f"{name}_sd") is not None:
            text += f" ± {row[f'{name}_sd']:.{digits}f}"
        if row.get(f"{name}_low") is not None:
            text += f" [{form.format(row[f'{name}_low'])}, {form.format(row[f'{name}_high'])}]"
        return text

    return Column(title, show)


def _both(title: str, name: str, digits: int) -> Column:
    """The baseline's number and ours, as the study prints them."""

    def show(row: Row) -> str:
        numbers = row.get(f"baseline_{name}"), row.get(name)
        return "" if None in numbers else " / ".join(f"{value:.{digits}f}" for value in numbers)

    return Column(title, show)


def _list(title: str, name: str) -> Column:
    return Column(title, lambda row: ", ".join(map(str, row.get(name) or [])))


def _spent(row: Row, whose: str) -> str:
    """A median, or the bound below it with the mark of a censored number."""
    if row[f"{whose}median_j"] is not None:
        return f"{row[f'{whose}median_j']:.1f}"
    return "" if row[f"{whose}bound_j"] is None else f"> {row[f'{whose}bound_j']:.1f}"


PLACE: Final = (_text("Dataset", "dataset"), _text("Architecture", "network"))
ALGORITHM: Final = (*PLACE, _text("Algorithm", "algorithm"))
SOURCE: Final = (_text("Protocol", "protocol"), _text("Hardware", "hardware"), _text("Source", "source"))
STATUS: Final = _text("Status", "status")
AGAINST: Final = _text("Against", "baseline")
"""Shown where rows have several baselines, so that the table's heads cannot name the one."""

TITLES: Final = {
    "T1": "Performance",
    "T2": "Efficiency",
    "T3": "Change against {baseline}",
    "T4": "Matched data passes",
    "T5": "Own convergence",
    "T6": "Ablation ladder",
    "T7": "Energy to accuracy",
    "T8": "Tuning bill",
    "T9": "What a difference in energy is made of",
}

COLUMNS: Final[dict[str, tuple[Column, ...]]] = {
    "T1": (
        *ALGORITHM,
        _number("Test acc, %", "accuracy", 2),
        _number("Effective epochs", "passes", 2),
        _text("n", "n"),
        _number("Best-val epoch", "best_epochs", 1),
        _number("Mean acc, % [95 % CI]", "mean_accuracy", 2),
        STATUS,
        *SOURCE,
    ),
    "T2": (
        *ALGORITHM,
        _number("Train time, s", "seconds", 2),
        _number("Energy, Wh", "wh", 4),
        _number("CO2e, g", "co2e_g", 3),
        _number("Peak mem, MiB", "device_mib", 0),
        _number("GFLOPs", "gflops", 5),
        _number("Net, Wh", "net_wh", 4),
        _number("Mean W", "mean_w", 1),
        _number("J/sample", "j_per_sample", 6),
        _number("Allocator, MiB", "allocator_mib", 1),
        _number("Training TFLOPs", "tflops", 2),
        _number("GPU busy, %", "busy_percent", 0),
        _text("Regime", "regime"),
        _text("Method", "method"),
        _list("Flags", "flags"),
        _text("n", "n"),
        *SOURCE,
    ),
    "T3": (
        _text("Variant", "algorithm"),
        *PLACE,
        AGAINST,
        _number("Δ acc, pp", "accuracy", 2, sign=True),
        _text("acc", "accuracy_verdict"),
        _number("Δ time, %", "seconds", 2, sign=True),
        _text("time", "seconds_verdict"),
        _number("Δ energy, %", "wh", 2, sign=True),
        _text("energy", "wh_verdict"),
        _number("Δ mem, %", "device_mib", 2, sign=True),
        _text("mem", "device_mib_verdict"),
        _text("Pairs", "n"),
        _text("Regime", "regime"),
        *SOURCE,
    ),
    "T4": (
        *ALGORITHM,
        AGAINST,
        _both("Passes {baseline} / alg", "passes", 1),
        _both("Acc {baseline} / alg, %", "accuracy", 2),
        _number("Δ acc, pp", "accuracy_change", 2, sign=True),
        _both("Energy {baseline} / alg, Wh", "wh", 3),
        _number("Δ energy, %", "wh_change", 1, sign=True),
        _both("Allocator {baseline} / alg, MiB", "mib", 1),
        _number("Δ mem, %", "mib_change", 1, sign=True),
        _both("Mean W {baseline} / alg", "w", 1),
        _number("Δ W, %", "w_change", 1, sign=True),
        _number("Δ time, %", "seconds_change", 1, sign=True),
        _text("Pairs", "n"),
        _text("Regime", "regime"),
        *SOURCE[1:],
    ),
    "T5": (
        *ALGORITHM,
        AGAINST,
        _text("Pairs", "n"),
        _number("{baseline} acc, %", "baseline_accuracy", 2),
        _number("Alg acc, %", "accuracy", 2),
        _number("Δ acc, pp", "accuracy_change", 2, sign=True),
        _number("Time x", "seconds_ratio", 2),
        _number("Energy x", "wh_ratio", 2),
        _text("Stops after, {baseline}", "baseline_stopping"),
        _text("Stops after, alg", "stopping"),
        _text("Regime", "regime"),
        *SOURCE[1:],
    ),
    "T6": (
        *ALGORITHM,
        AGAINST,
        _text("Pairs", "n"),
        _number("Acc vs {baseline}, pp", "accuracy_change", 2, sign=True),
        _number("Energy, % of {baseline}", "wh_percent", 0),
        *SOURCE[1:],
    ),
    "T7": (
        *ALGORITHM,
        AGAINST,
        _number("Target val acc, %", "target", 2),
        Column("J {baseline}", lambda row: _spent(row, "baseline_")),
        Column("J alg", lambda row: _spent(row, "")),
        Column(
            "Reached {baseline}", lambda row: f"{row['baseline_k']} of {row['baseline_n']}" if row["baseline_n"] else ""
        ),
        Column("Reached alg", lambda row: f"{row['k']} of {row['n']}"),
        _number("Energy x", "ratio", 2),
        _text("Unmeasured", "unmeasured"),
        *SOURCE[:2],
    ),
    "T8": (
        *ALGORITHM,
        _text("Study", "study"),
        _text("Sought", "sought"),
        _text("Trials", "trials"),
        _text("Pruned", "pruned"),
        _text("Failed", "failed"),
        _number("GPU-seconds", "seconds", 0),
        _number("Energy, Wh", "wh", 3),
        _number("Best trial: val, %", "best_validation", 2),
        _number("Best trial: J", "best_j", 0),
        _text("Hardware", "hardware"),
    ),
    "T9": (
        *ALGORITHM,
        _text("Against", "baseline"),
        _text("Stops after, alg", "stopping"),
        _text("Stops after, baseline", "baseline_stopping"),
        _text("Pairs", "n"),
        _number("Δ acc, pp", "accuracy_change", 2, sign=True),
        _number("Energy x", "wh_ratio", 2),
        _number("= passes x", "passes_ratio", 2),
        _number("time a pass x", "pass_seconds_ratio", 2),
        _number("watts x", "watts_ratio", 2),
        _number("(FLOPs a pass x", "pass_flops_ratio", 2),
        _number("time a FLOP x)", "flop_seconds_ratio", 2),
        *SOURCE,
    ),
}
