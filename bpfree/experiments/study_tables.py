"""Tables T1 to T8, those of the reference study with every extra column to the right, and T9, made from records.

A row holds plain numbers under plain names, which is what JSON and CSV give; for people a column joins some of them.
Changes against the baseline come from paired seeds: accuracy as the mean difference, all else as the geometric mean of
ratios, with 95 % intervals by paired bootstrap. Published rows have what was printed, and changes of printed means.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from bpfree.algorithms import algorithm
from bpfree.energy.result import JOULES_PER_WH
from bpfree.errors import DataError, unknown_name
from bpfree.experiments.arms import MATCHED, OWN
from bpfree.experiments.collect import Entry, baseline_of, pairs
from bpfree.experiments.published import SOURCES, number, published
from bpfree.experiments.statistics import (
    FEW_PAIRS,
    Estimate,
    ToAccuracy,
    difference_p,
    energy_to_accuracy,
    equivalent,
    holm,
    paired_difference,
    paired_ratio,
    reached,
    relative_change,
)
from bpfree.experiments.tables import latex_table, markdown_table, text_table

Row = dict[str, Any]
OURS: Final = "this work"
LEVEL: Final = 0.05
"""Probability of a false claim in a column, of each kind of test, after Holm's correction."""

LADDER: Final = ("bp-ds", "mf-joint", "mf")
FEWEST_HELD_OUT: Final = 100
"""With fewer validation samples than this, reaching an accuracy on them says nothing."""


@dataclass(frozen=True)
class Column:
    """A column as a person reads it.

    Attributes:
        title: with the unit.
        show: makes its cell from a row.
    """

    title: str
    show: Callable[[Row], str]


@dataclass(frozen=True)
class Table:
    """One of the tables.

    Attributes:
        name: "T1" to "T9".
        rows: plain values.
        notes: what must be known to read it.
    """

    name: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.name]

    def cells(self) -> list[dict[str, str]]:
        """Rows as a person reads them; columns in which nothing is known are left out."""
        shown = [{column.title: column.show(row) for column in COLUMNS[self.name]} for row in self.rows]
        empty = {title for title in (shown[0] if shown else {}) if not any(cells[title] for cells in shown)}
        return [{title: cell for title, cell in cells.items() if title not in empty} for cells in shown]

    def as_dict(self) -> dict[str, Any]:
        return {"table": self.name, "title": self.title, "rows": self.rows, "notes": self.notes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Table:
        """The counterpart of `as_dict`.

        Raises:
            UsageError: there is no such table.
        """
        if values["table"] not in TITLES:
            raise unknown_name("table", values["table"], TITLES)
        return cls(values["table"], list(values["rows"]), list(values["notes"]))

    def to_csv(self) -> str:
        """Plain values; lists and names of flags are joined by semicolons, what is not known is empty."""
        file = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: "; ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
        return file.getvalue()

    def render(self, form: str) -> str:
        """The table as "table", "markdown", "csv", "latex" or "json" text."""
        if form == "json":
            return json.dumps(self.as_dict(), indent=1, ensure_ascii=False)
        if form == "csv":
            return self.to_csv().rstrip("\n")
        if not self.rows:
            return f"{self.name}: {self.title}\n\nno such rows"
        if form == "latex":
            notes = "".join(f"% {note}\n" for note in self.notes)
            return f"% {self.name}: {self.title}\n{notes}{latex_table(self.cells())}"
        body = (markdown_table if form == "markdown" else text_table)(self.cells())
        return "\n\n".join([f"{self.name}: {self.title}", body, *self.notes])


# -- cells ----------------------------------------------------------------------------------------------------------


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


PLACE: Final = (_text("Dataset", "dataset"), _text("Architecture", "network"))
ALGORITHM: Final = (*PLACE, _text("Algorithm", "algorithm"))
SOURCE: Final = (_text("Protocol", "protocol"), _text("Hardware", "hardware"), _text("Source", "source"))
STATUS: Final = _text("Status", "status")

TITLES: Final = {
    "T1": "Performance",
    "T2": "Efficiency",
    "T3": "Change against back-propagation",
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
        _both("Passes BP / alg", "passes", 1),
        _both("Acc BP / alg, %", "accuracy", 2),
        _number("Δ acc, pp", "accuracy_change", 2, sign=True),
        _both("Energy BP / alg, Wh", "wh", 3),
        _number("Δ energy, %", "wh_change", 1, sign=True),
        _both("Allocator BP / alg, MiB", "mib", 1),
        _number("Δ mem, %", "mib_change", 1, sign=True),
        _both("Mean W BP / alg", "w", 1),
        _number("Δ W, %", "w_change", 1, sign=True),
        _number("Δ time, %", "seconds_change", 1, sign=True),
        _text("Pairs", "n"),
        _text("Regime", "regime"),
        *SOURCE[1:],
    ),
    "T5": (
        *ALGORITHM,
        _text("Pairs", "n"),
        _number("BP acc, %", "baseline_accuracy", 2),
        _number("Alg acc, %", "accuracy", 2),
        _number("Δ acc, pp", "accuracy_change", 2, sign=True),
        _number("Time x", "seconds_ratio", 2),
        _number("Energy x", "wh_ratio", 2),
        _text("Stops after, BP", "baseline_stopping"),
        _text("Stops after, alg", "stopping"),
        _text("Regime", "regime"),
        *SOURCE[1:],
    ),
    "T6": (
        *ALGORITHM,
        _text("Pairs", "n"),
        _number("Acc vs BP, pp", "accuracy_change", 2, sign=True),
        _number("Energy, % of BP", "wh_percent", 0),
        *SOURCE[1:],
    ),
    "T7": (
        *ALGORITHM,
        _number("Target val acc, %", "target", 2),
        Column("J BP", lambda row: _spent(row, "baseline_")),
        Column("J alg", lambda row: _spent(row, "")),
        Column("Reached BP", lambda row: f"{row['baseline_k']} of {row['baseline_n']}" if row["baseline_n"] else ""),
        Column("Reached alg", lambda row: f"{row['k']} of {row['n']}"),
        _number("Energy x", "ratio", 2),
        _text("Unmeasured", "unmeasured"),
        *SOURCE[:2],
    ),
    "T8": (
        *ALGORITHM,
        _text("Trials", "trials"),
        _text("Pruned", "pruned"),
        _text("Failed", "failed"),
        _number("GPU-seconds", "seconds", 0),
        _number("Energy, Wh", "wh", 3),
        _number("Best val acc, %", "best_validation_accuracy", 2),
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


def _spent(row: Row, whose: str) -> str:
    """A median, or the bound below it with the mark of a censored number."""
    if row[f"{whose}median_j"] is not None:
        return f"{row[f'{whose}median_j']:.1f}"
    return "" if row[f"{whose}bound_j"] is None else f"> {row[f'{whose}bound_j']:.1f}"


# -- rows -----------------------------------------------------------------------------------------------------------


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
        "T1": lambda: _performance(entries, with_reference),
        "T2": lambda: _efficiency(entries, with_reference, intensity),
        "T3": lambda: _changes(entries, with_reference),
        "T4": lambda: _matched(entries, with_reference),
        "T5": lambda: _own(entries, with_reference),
        "T6": lambda: _ladder(entries, with_reference),
        "T7": lambda: _to_accuracy(entries, targets),
        "T8": lambda: _bill(tuning),
        "T9": lambda: _factors(entries, with_reference),
    }
    for name in names:
        if name not in makers:
            raise unknown_name("table", name, makers)
    return [makers[name]() for name in names]


def _place(entry: Entry) -> Row:
    return {
        "dataset": entry.config.dataset,
        "network": entry.config.network,
        "algorithm": entry.label,
        "protocol": entry.protocol,
        "hardware": entry.hardware,
        "source": OURS,
    }


def _beside(rows: list[Row], references: Iterable[Row], *, wanted: bool) -> list[Row]:
    """Our rows, and below each data set and network what has been published about it."""
    if not wanted:
        return rows
    everything = [*rows, *references]
    places = list(dict.fromkeys((row["dataset"], row["network"]) for row in everything))
    return [row for place in places for row in everything if (row["dataset"], row["network"]) == place]


def _reference_rows(table: str, **columns: str) -> list[Row]:
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


def _status(entry: Entry) -> str | None:
    if entry.skipped is not None:
        return f"skipped: {entry.skipped}"
    parts = []
    if entry.failed:
        reasons = "; ".join(dict.fromkeys(entry.failed.values()))
        parts.append(f"{len(entry.failed)} failed: {reasons}")
    if entry.missing:
        parts.append(f"{len(entry.missing)} not run")
    return ", ".join(parts) or None


def _performance(entries: Sequence[Entry], with_reference: bool) -> Table:
    rows = []
    for entry in entries:
        accuracies = entry.values("accuracy")
        mean = paired_difference(accuracies, [0.0] * len(accuracies)) if accuracies else None
        rows.append(
            {
                **_place(entry),
                "accuracy": entry.mean("accuracy"),
                "accuracy_sd": entry.sd("accuracy"),
                "passes": entry.mean("passes"),
                "passes_sd": entry.sd("passes"),
                "n": len(entry.runs),
                "seeds": list(entry.runs),
                "best_epochs": entry.mean("best_epochs"),
                **_estimate("mean_accuracy", mean),
                "status": _status(entry),
            }
        )
    names = ("accuracy", "accuracy_sd", "passes", "passes_sd")
    reference = _reference_rows("s1", **{name: name for name in names})
    for row in reference:
        row["n"] = 3
    notes = ["Accuracy: mean ± standard deviation over seeds. Epochs are data passes, summed over stages."]
    return Table("T1", _beside(rows, reference, wanted=with_reference), notes)


def _efficiency(entries: Sequence[Entry], with_reference: bool, intensity: Mapping[str, Any] | None) -> Table:
    rows = []
    for entry in entries:
        if not entry.runs:
            continue
        wh = _scaled(entry.mean("gross_j"), 1 / JOULES_PER_WH)
        recorded_g = entry.mean("co2e_g")
        estimated_g = None if intensity is None else _scaled(wh, intensity["g_per_kwh"] / 1000)
        network_wide = algorithm(entry.config.algorithm).learner.locality == "network"
        rows.append(
            {
                **_place(entry),
                "seconds": entry.mean("seconds"),
                "seconds_sd": entry.sd("seconds"),
                "wh": wh,
                "wh_sd": _scaled(entry.sd("gross_j"), 1 / JOULES_PER_WH),
                "co2e_g": estimated_g if recorded_g is None else recorded_g,
                "device_mib": entry.mean("device_mib"),
                "gflops": _scaled(entry.mean("forward_flops"), (3 if network_wide else 1) / 1e9),
                "net_wh": _scaled(entry.mean("net_j"), 1 / JOULES_PER_WH),
                "mean_w": entry.mean("mean_w"),
                "j_per_sample": entry.mean("j_per_sample"),
                "allocator_mib": entry.mean("allocator_mib"),
                "tflops": _scaled(entry.mean("flops"), 1e-12),
                "busy_percent": _scaled(entry.mean("utilisation"), 100),
                "regime": entry.regime(),
                "method": " + ".join(dict.fromkeys(run.summary["energy"]["method"] for run in entry.all_runs())),
                "flags": entry.flags(),
                "n": len(entry.runs),
            }
        )
    names = ("seconds", "seconds_sd", "wh", "wh_sd", "co2e_g", "co2e_g_sd", "device_mib", "gflops")
    reference = _reference_rows("s1", **{name: name for name in names})
    notes = [
        "Energy is gross and of the device alone; net is less the idle device. GFLOPs: one forward pass of one sample, "
        "times 3 where a gradient crosses the network, as in the study; training TFLOPs are counted."
    ]
    if intensity is not None:
        notes.append(
            f"CO2e of rows whose runs recorded none: the device's energy times {intensity['g_per_kwh']:g} g/kWh "
            f"({intensity['country']}, CodeCarbon's table)."
        )
    return Table("T2", _beside(rows, reference, wanted=with_reference), notes)


CHANGES: Final = {"accuracy": "accuracy", "seconds": "seconds", "wh": "gross_j", "device_mib": "device_mib"}
"""Columns of T3 and the quantities behind them."""


def _changes(entries: Sequence[Entry], with_reference: bool) -> Table:
    rows: list[Row] = []
    found: dict[str, list[Row]] = {column: [] for column in CHANGES}  # tests of each column, for Holm's correction
    for entry, baseline in _paired(entries):
        row: Row = {**_place(entry), "n": len(entry.runs.keys() & baseline.runs.keys()), "regime": entry.regime()}
        for column, quantity in CHANGES.items():
            absolute = column == "accuracy"
            estimate = _compare(entry, baseline, quantity, absolute=absolute)
            row |= _estimate(column, estimate, change=not absolute)
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
    return Table("T3", _beside(rows, _reference_changes(), wanted=with_reference), notes)


def _tests(ours: Entry, baseline: Entry, quantity: str, *, absolute: bool) -> Row:
    a, b = pairs(ours, baseline, quantity)
    margin = ours.analysis.margin_accuracy if absolute else ours.analysis.margin_relative
    same = equivalent(a, b, margin=margin, relative=not absolute)
    return {"equal_p": same.p, "differ_p": difference_p(a, b, relative=not absolute)}


def _verdicts(column: str, tests: Sequence[Row]) -> list[str]:
    """What each row of a column may claim, all of them together at `LEVEL`."""
    known = [test for test in tests if test["differ_p"] is not None and test["equal_p"] is not None]
    for name in ("differ_p", "equal_p"):
        for test, adjusted in zip(known, holm([test[name] for test in known]), strict=True):
            test[f"{name}_adjusted"] = adjusted
    words = []
    for test in tests:
        if test not in known:
            words.append("not tested")
        elif test["equal_p_adjusted"] <= LEVEL:
            words.append("equivalent")
        elif test["differ_p_adjusted"] <= LEVEL:
            words.append("higher" if test["row"][column] > 0 else "lower")
        else:
            words.append("inconclusive")
    return words


def _reference_pairs() -> list[tuple[Row, Row]]:
    """Every published arm of the first study, and back-propagation on its network."""
    rows = _reference_rows(
        "s1", accuracy="accuracy", passes="passes", seconds="seconds", wh="wh", device_mib="device_mib"
    )
    baselines = {(row["dataset"], row["network"]): row for row in rows if row["algorithm"] == "BP"}
    paired = [(row, baselines[row["dataset"], row["network"]]) for row in rows]
    return [(row, baseline) for row, baseline in paired if row is not baseline]


def _reference_changes() -> list[Row]:
    """Changes of the published means: those that the study prints do not all follow from them."""
    changes = []
    for row, baseline in _reference_pairs():
        change = {name: relative_change(row[name], baseline[name]) for name in ("seconds", "wh", "device_mib")}
        changes.append({**row, **change, "accuracy": row["accuracy"] - baseline["accuracy"], "n": None})
    return changes


def _matched(entries: Sequence[Entry], with_reference: bool) -> Table:
    quantities = {"passes": "passes", "accuracy": "accuracy", "wh": "gross_j", "mib": "allocator_mib", "w": "mean_w"}
    rows = []
    for entry, baseline in _paired(entries, MATCHED):
        row: Row = {**_place(entry), "n": len(entry.runs.keys() & baseline.runs.keys()), "regime": entry.regime()}
        for name, quantity in quantities.items():
            scale = 1 / JOULES_PER_WH if name == "wh" else 1.0
            for whose, arm in (("baseline_", baseline), ("", entry)):
                row[f"{whose}{name}"] = _scaled(arm.mean(quantity), scale)
        row |= _estimate("accuracy_change", _compare(entry, baseline, "accuracy", absolute=True))
        for name, quantity in {**quantities, "seconds": "seconds"}.items():
            if name not in {"passes", "accuracy"}:
                row |= _estimate(f"{name}_change", _compare(entry, baseline, quantity), change=True)
        rows.append(row)
    both = ("accuracy", "wh", "mib", "w")
    names = [*both, *(f"baseline_{name}" for name in both), "baseline_passes", "n"]
    reference = _reference_rows(
        "s3_matched", **{name: name for name in names}, **{f"{name}_change": f"{name}_change" for name in both[1:]},
        seconds_change="seconds_change", stages="stages", epochs="epochs",
    )  # fmt: skip
    for row in reference:
        row["passes"] = row.pop("stages") * row.pop("epochs")
        row["accuracy_change"] = row["accuracy"] - row["baseline_accuracy"]
        row["n"] = int(row["n"])
    notes = [
        "Every arm sees the data as often as the baseline did on average, rounded up in each stage (one pass in closed "
        "form); no early stopping; best state restored."
    ]
    return Table("T4", _beside(rows, reference, wanted=with_reference), notes)


def _own(entries: Sequence[Entry], with_reference: bool) -> Table:
    rows = [
        {
            **_place(entry),
            "n": len(entry.runs.keys() & baseline.runs.keys()),
            "baseline_accuracy": baseline.mean("accuracy"),
            "accuracy": entry.mean("accuracy"),
            **_estimate("accuracy_change", _compare(entry, baseline, "accuracy", absolute=True)),
            **_estimate("seconds_ratio", _compare(entry, baseline, "seconds")),
            **_estimate("wh_ratio", _compare(entry, baseline, "gross_j")),
            "baseline_stopping": _stopping(baseline),
            "stopping": _stopping(entry),
            "regime": entry.regime(),
        }
        for entry, baseline in _paired(entries, OWN)
    ]
    names = ("n", "baseline_accuracy", "accuracy", "accuracy_change", "seconds_ratio", "wh_ratio")
    reference = _reference_rows("s3_own", **{name: name for name in names})
    for row in reference:
        row["n"] = int(row["n"])
        if row["accuracy_change"] is None:
            row["accuracy_change"] = row["accuracy"] - row["baseline_accuracy"]
    notes = [
        "Every arm stops on its own validation data: after so many epochs without gain, at most so many in a stage. "
        "Where the two rules differ, so does what is compared."
    ]
    return Table("T5", _beside(rows, reference, wanted=with_reference), notes)


def _ladder(entries: Sequence[Entry], with_reference: bool) -> Table:
    steps = [
        (entry, baseline)
        for entry, baseline in _paired(entries, OWN)
        if entry.config.algorithm in LADDER and _stopping(entry) == _stopping(baseline)
    ]
    rows = []
    for entry, baseline in sorted(steps, key=lambda step: (step[0].place, LADDER.index(step[0].config.algorithm))):
        energy = _compare(entry, baseline, "gross_j")
        rows.append(
            {
                **_place(entry),
                "n": len(entry.runs.keys() & baseline.runs.keys()),
                **_estimate("accuracy_change", _compare(entry, baseline, "accuracy", absolute=True)),
                **{name: _scaled(value, 100) for name, value in _estimate("wh_percent", energy).items()},
            }
        )
    reference = _reference_rows("s3_ladder", accuracy_change="accuracy_change", wh_percent="wh_percent")
    notes = [
        "BP, then local heads with global gradients (BP-DS), Mono-Forward's read-out (MF-Joint), then the detach; arms "
        "that stop by another rule than the baseline are left out."
    ]
    return Table("T6", _beside(rows, reference, wanted=with_reference), notes)


def _to_accuracy(entries: Sequence[Entry], targets: Sequence[float]) -> Table:
    rows = []
    for entry in entries:
        baseline = baseline_of(entry, entries)
        if not entry.runs or baseline is None or entry is baseline:
            continue
        held_out = entry.config.training.validation
        if held_out is not None and held_out < FEWEST_HELD_OUT:
            continue
        medians = baseline.values("validation_accuracy")
        baseline = _over(baseline, {*entry.runs, *entry.failed})
        for target in targets or entry.analysis.targets or (statistics.median(medians) - 1,):
            row: Row = {**_place(entry), "target": target}
            spent: dict[str, dict[int, ToAccuracy]] = {}
            for whose, arm in (("baseline_", baseline), ("", entry)):
                spent[whose] = {
                    **{seed: energy_to_accuracy(runs[0].curve(), target) for seed, runs in arm.runs.items()},
                    **dict.fromkeys(arm.failed, ToAccuracy(None, False)),
                }
                summary = reached(list(spent[whose].values()))
                row |= {f"{whose}{name}": getattr(summary, name) for name in ("k", "n", "median_j", "bound_j")}
                row[f"{whose}unmeasured"] = summary.unmeasured or None
            rows.append({**row, **_estimate("ratio", _ratio_to_accuracy(spent[""], spent["baseline_"]))})
    notes = [
        "Cumulative gross joules up to the first validation at the target, validation included: median over seeds by "
        "Kaplan-Meier; > is a lower bound, where half of the runs never got there. Runs that failed never got there. "
        "Energy x is the ratio over paired seeds, given only if all runs of both arms got there.",
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


def _bill(tuning: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for record in tuning:
        bill, best = record["bill"], record["best"] or {}
        rows.append(
            {
                "dataset": record["dataset"],
                "network": record["network"],
                "algorithm": record["algorithm"],
                **{name: bill[name] for name in ("trials", "pruned", "failed", "seconds", "wh")},
                "best_validation_accuracy": best.get("validation_accuracy"),
                "hardware": record["environment"]["hardware"],
            }
        )
    return Table(
        "T8", rows, ["Every trial counts, whatever became of it. Seconds and energy are training and validation."]
    )


def _factors(entries: Sequence[Entry], with_reference: bool) -> Table:
    rows = []
    for entry, baseline in _paired(entries):
        energy = _compare(entry, baseline, "gross_j")
        changes = {name: _compare(entry, baseline, name) for name in ("passes", "seconds", "flops")}
        rows.append(
            {
                **_place(entry),
                "baseline": baseline.label,
                "stopping": _stopping(entry),
                "baseline_stopping": _stopping(baseline),
                "n": len(entry.runs.keys() & baseline.runs.keys()),
                **_estimate("accuracy_change", _compare(entry, baseline, "accuracy", absolute=True)),
                **_estimate("wh_ratio", energy),
                **_quotients(energy=_value(energy), **{name: _value(change) for name, change in changes.items()}),
            }
        )
    reference = [
        {
            **{name: row[name] for name in ("dataset", "network", "algorithm", "source")},
            "baseline": baseline["algorithm"],
            "accuracy_change": row["accuracy"] - baseline["accuracy"],
            "wh_ratio": row["wh"] / baseline["wh"],
            **_quotients(
                energy=row["wh"] / baseline["wh"],
                passes=row["passes"] / baseline["passes"],
                seconds=row["seconds"] / baseline["seconds"],
            ),
        }
        for row, baseline in _reference_pairs()
    ]
    notes = [
        "Energy = passes x time a pass x mean watts; time a pass = FLOPs a pass x time a FLOP. Geometric means over "
        "paired seeds, so that the factors of a row multiply to its energy. --baseline ARM pairs with another arm.",
    ]
    return Table("T9", _beside(rows, reference, wanted=with_reference), notes)


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


def _stopping(entry: Entry) -> str:
    """The stopping rule in words."""
    training = entry.config.training
    if training.passes is not None:
        return f"{training.passes} passes"
    return f"{training.patience} epochs without gain, at most {training.epochs} a stage"


def _paired(entries: Sequence[Entry], protocol: str | None = None) -> list[tuple[Entry, Entry]]:
    """Every arm with runs, and the arm it is paired with, both over the seeds that they share."""
    found = []
    for entry in entries:
        if entry.runs and (protocol is None or entry.protocol == protocol):
            baseline = baseline_of(entry, entries)
            if baseline is not None and baseline is not entry and entry.runs.keys() & baseline.runs.keys():
                found.append((_over(entry, baseline.runs), _over(baseline, entry.runs)))
    return found


def _over(entry: Entry, seeds: Iterable[int]) -> Entry:
    """An arm's runs of some seeds."""
    return replace(entry, runs={seed: runs for seed, runs in entry.runs.items() if seed in set(seeds)})


def _compare(ours: Entry, baseline: Entry, quantity: str, *, absolute: bool = False) -> Estimate | None:
    """The paired difference or ratio; None where no pair is known."""
    a, b = pairs(ours, baseline, quantity)
    if not a:
        return None
    try:
        return paired_difference(a, b) if absolute else paired_ratio(a, b)
    except DataError:  # a ratio of what is not positive, as the joules of a run that was too short to measure
        return None


def _estimate(name: str, estimate: Estimate | None, *, change: bool = False) -> Row:
    """An estimate's numbers as columns; with `change`, a ratio as a change in %."""
    numbers = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
    keys = (name, f"{name}_low", f"{name}_high")
    return {k: None if v is None else 100 * (v - 1) if change else v for k, v in zip(keys, numbers, strict=True)}


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
