"""T1 performance, T2 efficiency and T8 tuning bill: every arm by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bpfree.algorithms import algorithm
from bpfree.energy.result import JOULES_PER_WH
from bpfree.experiments.collect import Entry
from bpfree.experiments.statistics import paired_difference
from bpfree.experiments.study_tables.rows import beside, estimate_columns, place, reference_rows, scaled
from bpfree.experiments.study_tables.table import Table


def performance(entries: Sequence[Entry], with_reference: bool) -> Table:
    """T1, with the arms that failed or could not run."""
    rows = []
    for entry in entries:
        accuracies = entry.values("accuracy")
        mean = paired_difference(accuracies, [0.0] * len(accuracies)) if accuracies else None
        rows.append(
            {
                **place(entry),
                "accuracy": entry.mean("accuracy"),
                "accuracy_sd": entry.sd("accuracy"),
                "passes": entry.mean("passes"),
                "passes_sd": entry.sd("passes"),
                "n": len(entry.runs),
                "seeds": list(entry.runs),
                "best_epochs": entry.mean("best_epochs"),
                **estimate_columns("mean_accuracy", mean),
                "status": _status(entry),
            }
        )
    names = ("accuracy", "accuracy_sd", "passes", "passes_sd")
    reference = reference_rows("s1", **{name: name for name in names})
    for row in reference:
        row["n"] = 3
    notes = [
        "Accuracy: mean ± standard deviation over seeds. Epochs are data passes, summed over stages; on graphs each is "
        "validate_every passes."
    ]
    return Table("T1", beside(rows, reference, wanted=with_reference), notes)


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


def efficiency(entries: Sequence[Entry], with_reference: bool, intensity: Mapping[str, Any] | None) -> Table:
    """T2; `intensity` is that of `make_tables`."""
    rows = []
    for entry in entries:
        if not entry.runs:
            continue
        wh = scaled(entry.mean("gross_j"), 1 / JOULES_PER_WH)
        recorded_g = entry.mean("co2e_g")
        estimated_g = None if intensity is None else scaled(wh, intensity["g_per_kwh"] / 1000)
        network_wide = algorithm(entry.config.algorithm).learner.locality == "network"
        rows.append(
            {
                **place(entry),
                "seconds": entry.mean("seconds"),
                "seconds_sd": entry.sd("seconds"),
                "wh": wh,
                "wh_sd": scaled(entry.sd("gross_j"), 1 / JOULES_PER_WH),
                "co2e_g": estimated_g if recorded_g is None else recorded_g,
                "device_mib": entry.mean("device_mib"),
                "gflops": scaled(entry.mean("forward_flops"), (3 if network_wide else 1) / 1e9),
                "net_wh": scaled(entry.mean("net_j"), 1 / JOULES_PER_WH),
                "mean_w": entry.mean("mean_w"),
                "j_per_sample": entry.mean("j_per_sample"),
                "allocator_mib": entry.mean("allocator_mib"),
                "tflops": scaled(entry.mean("flops"), 1e-12),
                "busy_percent": scaled(entry.mean("utilisation"), 100),
                "regime": entry.regime(),
                "method": " + ".join(dict.fromkeys(run.summary["energy"]["method"] for run in entry.all_runs())),
                "flags": entry.flags(),
                "n": len(entry.runs),
            }
        )
    names = ("seconds", "seconds_sd", "wh", "wh_sd", "co2e_g", "co2e_g_sd", "device_mib", "gflops")
    reference = reference_rows("s1", **{name: name for name in names})
    notes = [
        "Energy is gross and of the device alone; net is less the idle device. GFLOPs: one forward pass of one sample, "
        "times 3 where a gradient crosses the network, as in the study; training TFLOPs are counted."
    ]
    if intensity is not None:
        notes.append(
            f"CO2e of rows whose runs recorded none: the device's energy times {intensity['g_per_kwh']:g} g/kWh "
            f"({intensity['country']}, CodeCarbon's table)."
        )
    return Table("T2", beside(rows, reference, wanted=with_reference), notes)


def bill(tuning: Sequence[Mapping[str, Any]]) -> Table:
    """T8, from records of `bpfree tune`."""
    rows = []
    for record in tuning:
        bill, best = record["bill"], record["best"] or {}
        rows.append(
            {
                "dataset": record["dataset"],
                "network": record["network"],
                "algorithm": record["algorithm"],
                "study": record["study"],
                "sought": " and ".join(record["objectives"]),
                **{name: bill[name] for name in ("trials", "pruned", "failed", "seconds", "wh")},
                "best_validation": best.get("validation_accuracy"),
                "best_j": best.get("gross_j"),
                "hardware": record["environment"]["hardware"],
            }
        )
    return Table(
        "T8",
        rows,
        [
            "Every trial counts, whatever became of it. Seconds and energy are training and validation. The best trial "
            "is one of many, with one seed."
        ],
    )
