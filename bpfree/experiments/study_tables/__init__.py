"""Tables T1 to T8, those of the reference study with every extra column to the right, and T9, made from records.

A row holds plain numbers under plain names, which is what JSON and CSV give; for people a column joins some of them.
Changes against the baseline come from paired seeds: accuracy as the mean difference, all else as the geometric mean of
ratios, with 95 % intervals by paired bootstrap. Published rows have what was printed, and changes of printed means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from bpfree.errors import unknown_name
from bpfree.experiments.collect import Entry
from bpfree.experiments.study_tables.changes import changes
from bpfree.experiments.study_tables.columns import COLUMNS, TITLES
from bpfree.experiments.study_tables.factors import factors
from bpfree.experiments.study_tables.per_arm import bill, efficiency, performance
from bpfree.experiments.study_tables.protocols import ladder, matched, own_convergence
from bpfree.experiments.study_tables.rows import paired
from bpfree.experiments.study_tables.table import Table
from bpfree.experiments.study_tables.to_accuracy import to_accuracy

__all__ = ["COLUMNS", "TITLES", "Table", "make_tables"]

ACCURACY: Final = "accuracy"
OF_ACCURACY: Final = {"T1", "T3", "T4", "T5", "T6", "T7", "T9"}
"""Tables with a column of accuracy, or of energy up to one."""

OF_PAIRS: Final = {"T3", "T4", "T5", "T6", "T7", "T9"}
"""Tables that hold arms against a baseline."""


def make_tables(
    names: Sequence[str],
    entries: Sequence[Entry],
    *,
    tuning: Sequence[Mapping[str, Any]] = (),
    with_reference: bool = False,
    targets: Sequence[float] = (),
    intensity: Mapping[str, Any] | None = None,
) -> list[Table]:
    """The tables called `names`.

    Args:
        names: "T1" to "T9".
        entries: arms, from `collect`.
        tuning: records of `bpfree tune`.
        with_reference: lay the published numbers beside ours.
        targets: accuracies for T7, %, instead of those fixed by the comparison.
        intensity: from `carbon_intensity`, for CO2 equivalents of measured joules where the runs recorded none.

    Raises:
        UsageError: there is no such table, or a baseline is not clear.
    """
    makers: dict[str, Callable[[], Table]] = {
        "T1": lambda: performance(entries, with_reference),
        "T2": lambda: efficiency(entries, with_reference, intensity),
        "T3": lambda: changes(entries, with_reference),
        "T4": lambda: matched(entries, with_reference),
        "T5": lambda: own_convergence(entries, with_reference),
        "T6": lambda: ladder(entries, with_reference),
        "T7": lambda: to_accuracy(entries, targets),
        "T8": lambda: bill(tuning),
        "T9": lambda: factors(entries, with_reference),
    }
    for name in names:
        if name not in makers:
            raise unknown_name("table", name, makers)
    tables = [makers[name]() for name in names]
    other = _other_metrics(entries)
    apart = _other_boards(entries) if OF_PAIRS & set(names) else []
    return [
        replace(
            table,
            notes=[
                *table.notes,
                *(other if table.name in OF_ACCURACY else ()),
                *(apart if table.name in OF_PAIRS else ()),
            ],
        )
        for table in tables
    ]


def _other_metrics(entries: Sequence[Entry]) -> list[str]:
    """What stands under accuracy where it is none."""
    where = dict.fromkeys((e.metric, f"{e.config.dataset} {e.config.network}") for e in entries if e.metric != ACCURACY)
    return [f"On {place} accuracy stands for {metric}, in %." for metric, place in where]


def _other_boards(entries: Sequence[Entry]) -> list[str]:
    """Which arms are held against a baseline that ran on another board."""
    apart: dict[str, dict[str, None]] = {}
    for entry, baseline in paired(entries):
        if entry.boards() and baseline.boards() and entry.boards() != baseline.boards():
            place = f"On {entry.config.dataset} {entry.config.network} not all on the board of {baseline.label}"
            apart.setdefault(place, {})[entry.label] = None
    return [
        f"{place}: {', '.join(arms)}. Joules of boards of a kind differ by some percent."
        for place, arms in apart.items()
    ]
