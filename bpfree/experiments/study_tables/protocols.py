"""T4 matched passes, T5 own convergence and T6 ablation ladder: the baseline and an arm side by side, by protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bpfree.energy.result import JOULES_PER_WH
from bpfree.experiments.arms import MATCHED, OWN
from bpfree.experiments.collect import Entry
from bpfree.experiments.study_tables.columns import Row
from bpfree.experiments.study_tables.rows import (
    AGAINST_BP,
    against,
    beside,
    compare,
    estimate_columns,
    paired,
    place,
    reference_rows,
    same_epochs,
    scaled,
    stopping,
)
from bpfree.experiments.study_tables.table import Table

LADDER: Final = ("bp-ds", "mf-joint", "mf")


def matched(entries: Sequence[Entry], with_reference: bool) -> Table:
    """T4."""
    quantities = {"passes": "passes", "accuracy": "accuracy", "wh": "gross_j", "mib": "allocator_mib", "w": "mean_w"}
    rows = []
    for entry, baseline in paired(entries, MATCHED):
        if not same_epochs(entry, baseline):
            continue
        n = len(entry.runs.keys() & baseline.runs.keys())
        row: Row = {**place(entry), **against(baseline), "n": n, "regime": entry.regime()}
        for name, quantity in quantities.items():
            scale = 1 / JOULES_PER_WH if name == "wh" else 1.0
            for whose, arm in (("baseline_", baseline), ("", entry)):
                row[f"{whose}{name}"] = scaled(arm.mean(quantity), scale)
        row |= estimate_columns("accuracy_change", compare(entry, baseline, "accuracy", absolute=True))
        for name, quantity in {**quantities, "seconds": "seconds"}.items():
            if name not in {"passes", "accuracy"}:
                row |= estimate_columns(f"{name}_change", compare(entry, baseline, quantity), change=True)
        rows.append(row)
    both = ("accuracy", "wh", "mib", "w")
    names = [*both, *(f"baseline_{name}" for name in both), "baseline_passes", "n"]
    reference = reference_rows(
        "s3_matched", **{name: name for name in names}, **{f"{name}_change": f"{name}_change" for name in both[1:]},
        seconds_change="seconds_change", stages="stages", epochs="epochs",
    )  # fmt: skip
    for row in reference:
        row |= AGAINST_BP
        row["passes"] = row.pop("stages") * row.pop("epochs")
        row["accuracy_change"] = row["accuracy"] - row["baseline_accuracy"]
        row["n"] = int(row["n"])
    notes = [
        "Every arm sees the data as often as the comparison's baseline did on average, rounded up in each stage (one "
        "pass in closed form); no early stopping; best state restored. On graphs a pass is an epoch of validate_every "
        "full-batch steps; arms with another number of them than the baseline are left out."
    ]
    return Table("T4", beside(rows, reference, wanted=with_reference), notes)


def own_convergence(entries: Sequence[Entry], with_reference: bool) -> Table:
    """T5."""
    rows = [
        {
            **place(entry),
            **against(baseline),
            "n": len(entry.runs.keys() & baseline.runs.keys()),
            "baseline_accuracy": baseline.mean("accuracy"),
            "accuracy": entry.mean("accuracy"),
            **estimate_columns("accuracy_change", compare(entry, baseline, "accuracy", absolute=True)),
            **estimate_columns("seconds_ratio", compare(entry, baseline, "seconds")),
            **estimate_columns("wh_ratio", compare(entry, baseline, "gross_j")),
            "baseline_stopping": stopping(baseline),
            "stopping": stopping(entry),
            "regime": entry.regime(),
        }
        for entry, baseline in paired(entries, OWN)
    ]
    names = ("n", "baseline_accuracy", "accuracy", "accuracy_change", "seconds_ratio", "wh_ratio")
    reference = reference_rows("s3_own", **{name: name for name in names})
    for row in reference:
        row |= AGAINST_BP
        row["n"] = int(row["n"])
        if row["accuracy_change"] is None:
            row["accuracy_change"] = row["accuracy"] - row["baseline_accuracy"]
    notes = [
        "Every arm stops on its own validation data: after so many epochs without gain, at most so many in a stage. "
        "Where the two rules differ, so does what is compared."
    ]
    return Table("T5", beside(rows, reference, wanted=with_reference), notes)


def ladder(entries: Sequence[Entry], with_reference: bool) -> Table:
    """T6, in the order of `LADDER`."""
    steps = [
        (entry, baseline)
        for entry, baseline in paired(entries, OWN)
        if entry.config.algorithm in LADDER and stopping(entry) == stopping(baseline)
    ]
    rows = []
    for entry, baseline in sorted(steps, key=lambda step: (step[0].place, LADDER.index(step[0].config.algorithm))):
        energy = compare(entry, baseline, "gross_j")
        rows.append(
            {
                **place(entry),
                **against(baseline),
                "n": len(entry.runs.keys() & baseline.runs.keys()),
                **estimate_columns("accuracy_change", compare(entry, baseline, "accuracy", absolute=True)),
                **{name: scaled(value, 100) for name, value in estimate_columns("wh_percent", energy).items()},
            }
        )
    published = reference_rows("s3_ladder", accuracy_change="accuracy_change", wh_percent="wh_percent")
    reference = [{**row, **AGAINST_BP} for row in published]
    notes = [
        "Rungs from back-propagation to Mono-Forward: local heads with global gradients (BP-DS), its read-out "
        "(MF-Joint), the detach; arms that stop by another rule than the baseline are left out."
    ]
    return Table("T6", beside(rows, reference, wanted=with_reference), notes)
