"""T3: what each arm changes against the baseline, and what may be claimed of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bpfree.experiments.collect import Entry, pairs
from bpfree.experiments.statistics import FEW_PAIRS, constant, difference_p, equivalent, holm, relative_change
from bpfree.experiments.study_tables.columns import Row
from bpfree.experiments.study_tables.rows import (
    AGAINST_BP,
    against,
    beside,
    compare,
    estimate_columns,
    paired,
    place,
    reference_pairs,
)
from bpfree.experiments.study_tables.table import Table

LEVEL: Final = 0.05
"""Probability of a false claim in a column, of each kind of test, after Holm's correction."""

CHANGES: Final = {"accuracy": "accuracy", "seconds": "seconds", "wh": "gross_j", "device_mib": "device_mib"}
"""Columns of T3 and the quantities behind them."""


def changes(entries: Sequence[Entry], with_reference: bool) -> Table:
    """T3, with a verdict on every change."""
    rows: list[Row] = []
    found: dict[str, list[Row]] = {column: [] for column in CHANGES}  # tests of each column, for Holm's correction
    for entry, baseline in paired(entries):
        n = len(entry.runs.keys() & baseline.runs.keys())
        row: Row = {**place(entry), **against(baseline), "n": n, "regime": entry.regime()}
        for column, quantity in CHANGES.items():
            absolute = column == "accuracy"
            estimate = compare(entry, baseline, quantity, absolute=absolute)
            row |= estimate_columns(column, estimate, change=not absolute)
            row[f"{column}_verdict"] = None
            if estimate is not None:
                test = _tests(entry, baseline, quantity, absolute=absolute)
                found[column].append({"row": row, **test})
        rows.append(row)
    for column, tests in found.items():
        for test, verdict in zip(tests, _verdicts(column, tests), strict=True):
            test["row"][f"{column}_verdict"] = verdict
    margins = dict.fromkeys((e.analysis.margin_accuracy, e.analysis.margin_relative) for e in entries)
    words = "; ".join(f"±{points:g} pp and ±{100 * share:g} %" for points, share in margins)
    notes = [
        f"Paired by seed, [95 % CI] by bootstrap, with fewer than {FEW_PAIRS} pairs Student's. Verdicts: paired t test "
        f"and two one-sided tests, each Holm-corrected over the rows of a column at {LEVEL:g}; margins of equivalence, "
        f"fixed before the first run: {words}."
    ]
    return Table("T3", beside(rows, _reference_changes(), wanted=with_reference), notes)


def _tests(ours: Entry, baseline: Entry, quantity: str, *, absolute: bool) -> Row:
    a, b = pairs(ours, baseline, quantity)
    margin = ours.analysis.margin_accuracy if absolute else ours.analysis.margin_relative
    same = equivalent(a, b, margin=margin, relative=not absolute)
    differ_p = difference_p(a, b, relative=not absolute)
    return {"equal_p": same.p, "differ_p": differ_p, "constant": constant(a, b, relative=not absolute)}


def _verdicts(column: str, tests: Sequence[Row]) -> list[str]:
    """What each row of a column may claim, all of them together at `LEVEL`."""
    known = [test for test in tests if test["differ_p"] is not None and test["equal_p"] is not None]
    for name in ("differ_p", "equal_p"):
        for test, adjusted in zip(known, holm([test[name] for test in known]), strict=True):
            test[f"{name}_adjusted"] = adjusted
    words = []
    for test in tests:
        if test not in known:
            words.append("the same in all pairs" if test["constant"] else "not tested")
        elif test["equal_p_adjusted"] <= LEVEL:
            words.append("equivalent")
        elif test["differ_p_adjusted"] <= LEVEL:
            words.append("higher" if test["row"][column] > 0 else "lower")
        else:
            words.append("inconclusive")
    return words


def _reference_changes() -> list[Row]:
    """Changes of the published means: those that the study prints do not all follow from them."""
    rows = []
    for row, baseline in reference_pairs():
        change = {name: relative_change(row[name], baseline[name]) for name in ("seconds", "wh", "device_mib")}
        rows.append({**row, **AGAINST_BP, **change, "accuracy": row["accuracy"] - baseline["accuracy"], "n": None})
    return rows
