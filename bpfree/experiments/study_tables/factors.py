"""T9: what a difference in energy is made of."""

from __future__ import annotations

from collections.abc import Sequence

from bpfree.experiments.collect import Entry, known_pairs
from bpfree.experiments.statistics import Estimate
from bpfree.experiments.study_tables.columns import Row
from bpfree.experiments.study_tables.rows import (
    AGAINST_BP,
    against,
    beside,
    compare,
    estimate_columns,
    over,
    paired,
    place,
    reference_pairs,
    same_epochs,
    stopping,
)
from bpfree.experiments.study_tables.table import Table


def factors(entries: Sequence[Entry], with_reference: bool) -> Table:
    """T9."""
    rows = []
    for entry, baseline in (_known_alike(*arms) for arms in paired(entries)):
        energy = compare(entry, baseline, "gross_j")
        changes = {name: compare(entry, baseline, name) for name in ("passes", "seconds", "flops")}
        if not same_epochs(entry, baseline):
            changes["passes"] = None
        rows.append(
            {
                **place(entry),
                **against(baseline),
                "stopping": stopping(entry),
                "baseline_stopping": stopping(baseline),
                "n": len(entry.runs.keys() & baseline.runs.keys()),
                **estimate_columns("accuracy_change", compare(entry, baseline, "accuracy", absolute=True)),
                **estimate_columns("wh_ratio", energy),
                **_quotients(energy=_value(energy), **{name: _value(change) for name, change in changes.items()}),
            }
        )
    reference = [
        {
            **{name: row[name] for name in ("dataset", "network", "algorithm", "source")},
            **AGAINST_BP,
            "accuracy_change": row["accuracy"] - baseline["accuracy"],
            "wh_ratio": row["wh"] / baseline["wh"],
            **_quotients(
                energy=row["wh"] / baseline["wh"],
                passes=row["passes"] / baseline["passes"],
                seconds=row["seconds"] / baseline["seconds"],
            ),
        }
        for row, baseline in reference_pairs()
    ]
    notes = [
        "Energy = passes x time a pass x mean watts; time a pass = FLOPs a pass x time a FLOP. Geometric means over "
        "paired seeds, so that the factors of a row multiply to its energy. --baseline ARM pairs with another arm. On "
        "graphs a pass is an epoch, and those of arms with another validate_every than the baseline are not compared.",
    ]
    return Table("T9", beside(rows, reference, wanted=with_reference), notes)


def _known_alike(ours: Entry, baseline: Entry) -> tuple[Entry, Entry]:
    """Both arms over the seeds for which whatever is known of any pair is known: a quotient is of the same runs."""
    seeds = set(ours.runs)
    for quantity in ("gross_j", "passes", "seconds", "flops"):
        seeds &= known_pairs(ours, baseline, quantity) or seeds
    return over(ours, seeds), over(baseline, seeds)


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _quotients(*, energy: float | None, passes: float | None, seconds: float | None, flops: float | None = None) -> Row:
    """The factors of a ratio of energies, from the ratios of energy, passes, time and operations."""

    def over(dividend: float | None, divisor: float | None) -> float | None:
        return None if dividend is None or divisor is None else dividend / divisor

    return {
        "passes_ratio": passes,
        "pass_seconds_ratio": over(seconds, passes),
        "watts_ratio": over(energy, seconds),
        "pass_flops_ratio": over(flops, passes),
        "flop_seconds_ratio": over(seconds, flops),
    }
