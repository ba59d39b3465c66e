"""T7: energy to accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final

from bpfree.experiments.collect import Entry, baseline_of
from bpfree.experiments.statistics import Estimate, ToAccuracy, energy_to_accuracy, paired_ratio, reached
from bpfree.experiments.study_tables.columns import Row
from bpfree.experiments.study_tables.rows import against, estimate_columns, over, place
from bpfree.experiments.study_tables.table import Table

FEWEST_HELD_OUT: Final = 100
"""With fewer validation samples than this, reaching an accuracy on them says nothing."""


def to_accuracy(entries: Sequence[Entry], targets: Sequence[float]) -> Table:
    """T7 at `targets`, %, or at those that the comparisons have fixed."""
    rows = []
    for entry in entries:
        baseline = baseline_of(entry, entries)
        if not entry.runs or baseline is None or entry is baseline:
            continue
        held_out = entry.config.training.validation
        if held_out is not None and held_out < FEWEST_HELD_OUT:
            continue
        medians = baseline.values("validation_accuracy")
        baseline = over(baseline, {*entry.runs, *entry.failed})
        for target in targets or entry.analysis.targets or (statistics.median(medians) - 1,):
            row: Row = {**place(entry), **against(baseline), "target": target}
            spent: dict[str, dict[int, ToAccuracy]] = {}
            for whose, arm in (("baseline_", baseline), ("", entry)):
                spent[whose] = {
                    **{seed: energy_to_accuracy(runs[0].curve(), target) for seed, runs in arm.runs.items()},
                    **dict.fromkeys(arm.failed, ToAccuracy(math.inf, False)),
                }
                summary = reached(list(spent[whose].values()))
                row |= {f"{whose}{name}": getattr(summary, name) for name in ("k", "n", "median_j", "bound_j")}
                row[f"{whose}unmeasured"] = summary.unmeasured or None
            rows.append({**row, **estimate_columns("ratio", _ratio_to_accuracy(spent[""], spent["baseline_"]))})
    notes = [
        "Cumulative gross joules up to the first validation at the target, validation included: median over seeds; by "
        "Kaplan-Meier where some ended below the target, as if they would have gone on like the others; runs that "
        "failed would not. > is a lower bound, where there is no median. Energy x is the ratio over paired seeds, "
        "given only if all runs of both arms got there.",
        "Targets were fixed beforehand, or are the baseline's median validation accuracy less one point. Arms that "
        f"hold out fewer than {FEWEST_HELD_OUT} samples are left out.",
    ]
    return Table("T7", rows, notes)


def _ratio_to_accuracy(ours: Mapping[int, ToAccuracy], baseline: Mapping[int, ToAccuracy]) -> Estimate | None:
    """The ratio over paired seeds; None unless all runs of both arms got there and were measured."""
    if not all(run.reached and run.joules for run in (*ours.values(), *baseline.values())):
        return None
    seeds = sorted(ours.keys() & baseline.keys())
    spent = [[run.joules for seed in seeds if (run := arm[seed]).joules is not None] for arm in (ours, baseline)]
    return paired_ratio(*spent) if seeds else None
