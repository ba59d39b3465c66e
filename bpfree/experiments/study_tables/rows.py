"""What rows of several tables are made of: where an arm belongs, whom it is paired with, and what was published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from bpfree.errors import DataError
from bpfree.experiments.collect import Entry, baseline_of, pairs
from bpfree.experiments.published import SOURCES, number, published
from bpfree.experiments.statistics import Estimate, paired_difference, paired_ratio
from bpfree.experiments.study_tables.columns import Row
from bpfree.experiments.train import TrainingConfig

OURS: Final = "this work"
AGAINST_BP: Final[Row] = {"baseline": "BP", "baseline_algorithm": "bp"}
"""`against` of published rows."""


def place(entry: Entry) -> Row:
    """The columns that say which arm a row is of, and where it was run."""
    return {
        "dataset": entry.config.dataset,
        "network": entry.config.network,
        "algorithm": entry.label,
        "protocol": entry.protocol,
        "hardware": entry.hardware,
        "source": OURS,
    }


def against(baseline: Entry) -> Row:
    """The columns that say what a row is compared with; heads are made of them."""
    return {"baseline": baseline.label, "baseline_algorithm": baseline.config.algorithm}


def same_epochs(entry: Entry, baseline: Entry) -> bool:
    """Whether passes of both are of one length: on graphs they are epochs, of `validate_every` full-batch steps."""
    return entry.config.training.validate_every == baseline.config.training.validate_every


def stopping(entry: Entry) -> str:
    """The stopping rule in words, with the length of epochs where it is not the usual one."""
    training = entry.config.training
    steps = training.validate_every
    length = "" if steps == TrainingConfig.validate_every else f" of {steps} steps"
    if training.passes is not None:
        return f"{training.passes} passes{length}"
    return f"{training.patience} epochs{length} without gain, at most {training.epochs} a stage"


def paired(entries: Sequence[Entry], protocol: str | None = None) -> list[tuple[Entry, Entry]]:
    """Every arm with runs, and the arm it is paired with, both over the seeds that they share."""
    found = []
    for entry in entries:
        if entry.runs and (protocol is None or entry.protocol == protocol):
            baseline = baseline_of(entry, entries)
            if baseline is not None and baseline is not entry and entry.runs.keys() & baseline.runs.keys():
                found.append((over(entry, baseline.runs), over(baseline, entry.runs)))
    return found


def over(entry: Entry, seeds: Iterable[int]) -> Entry:
    """An arm's runs and failures of some seeds."""
    wanted = set(seeds)
    runs = {seed: repeats for seed, repeats in entry.runs.items() if seed in wanted}
    return replace(entry, runs=runs, failed={seed: why for seed, why in entry.failed.items() if seed in wanted})


def compare(ours: Entry, baseline: Entry, quantity: str, *, absolute: bool = False) -> Estimate | None:
    """The paired difference or ratio; None where no pair is known."""
    a, b = pairs(ours, baseline, quantity)
    if not a:
        return None
    try:
        return paired_difference(a, b) if absolute else paired_ratio(a, b)
    except DataError:  # a ratio of what is not positive, as the joules of a run that was too short to measure
        return None


def estimate_columns(name: str, estimate: Estimate | None, *, change: bool = False) -> Row:
    """An estimate's numbers as columns; with `change`, a ratio as a change in %."""
    numbers = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
    keys = (name, f"{name}_low", f"{name}_high")
    return {k: None if v is None else 100 * (v - 1) if change else v for k, v in zip(keys, numbers, strict=True)}


def scaled(value: float | None, factor: float) -> float | None:
    """A number in another unit, if it is known."""
    return None if value is None else value * factor


def beside(rows: list[Row], references: Iterable[Row], *, wanted: bool) -> list[Row]:
    """Our rows, and below each data set and network what has been published about it."""
    if not wanted:
        return rows
    everything = [*rows, *references]
    wheres = list(dict.fromkeys((row["dataset"], row["network"]) for row in everything))
    return [row for where in wheres for row in everything if (row["dataset"], row["network"]) == where]


def reference_rows(table: str, **columns: str) -> list[Row]:
    """Rows of a published table under our names for its columns."""
    study = table.split("_")[0]
    return [
        {
            "dataset": row["dataset"],
            "network": row["network"],
            "algorithm": row["algorithm"],
            **{ours: number(row[theirs]) for ours, theirs in columns.items()},
            "source": SOURCES[study],
        }
        for row in published(table)
    ]


def reference_pairs() -> list[tuple[Row, Row]]:
    """Every published arm of the first study, and back-propagation on its network."""
    rows = reference_rows(
        "s1", accuracy="accuracy", passes="passes", seconds="seconds", wh="wh", device_mib="device_mib"
    )
    baselines = {(row["dataset"], row["network"]): row for row in rows if row["algorithm"] == "BP"}
    beside_them = [(row, baselines[row["dataset"], row["network"]]) for row in rows]
    return [(row, baseline) for row, baseline in beside_them if row is not baseline]
