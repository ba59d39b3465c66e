"""Tables made from run records, and nothing else."""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import statistics
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Final

from bpfree.errors import unknown_name
from bpfree.experiments.config import RunConfig, changes, differing, published_accuracy
from bpfree.experiments.finished import Say, finished_runs, nothing_to_show, shared_its_board

PUBLISHED, CHANGES = "published", "changes"
COLUMNS: Final = {
    "dataset": "dataset",
    "network": "network",
    "algorithm": "algorithm",
    "variant": "variant",
    "preset": "preset",
    "settings": "settings",
    CHANGES: "other than the preset",
    "seeds": "seeds",
    "accuracy": "test accuracy, %",
    PUBLISHED: "published, %",
    "loss": "test loss",
    "validation": "validation accuracy, %",
    "passes": "passes",
    "time": "time, s",
    "energy": "energy, J",
    "net": "net, J",
    "power": "mean power, W",
    "busy": "GPU busy, %",
    "memory": "peak memory, MiB",
    "method": "method",
    "flags": "flags",
    "hardware": "hardware",
    "dates": "date",
}
"""What `readable` shows: the name of a column and its title."""


def result_rows(
    root: Path, *, leave_out: Collection[str] = (), datasets: Collection[str] = (), say: Say = warnings.warn
) -> list[dict[str, Any]]:
    """One row per configuration, over its seeds, from the run folders under `root`.

    Runs belong to one row when everything but the seed is the same. Runs that repeat a seed count once, by their
    mean, because the spread of repeats is not the spread of seeds. Time, joules and what comes of them are those of the
    runs that had the board to themselves.

    Args:
        root: where to look.
        leave_out: folders under it that are not looked at, relative to it; `*` stands for anything.
        datasets: whose runs are wanted; none for all.
        say: told of what cannot be read, and is left out, and of folders in `leave_out` that have no run.

    Raises:
        DataError: no finished run under `root`.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    configs: dict[str, RunConfig] = {}
    unused = list(leave_out)
    for run in finished_runs(root, say=say):
        inside = run.path.relative_to(root)
        places = [place.as_posix() for place in (inside, *inside.parents)]
        if around := [folder for folder in leave_out if fnmatch.filter(places, folder)]:
            unused = [folder for folder in unused if folder not in around]
            continue
        if datasets and run.config.dataset not in datasets:
            continue
        config = replace(run.config, seed=0)
        key = json.dumps([config.to_dict(), run.summary["variant"], run.summary["hardware"]], sort_keys=True)
        configs[key] = config
        groups[key].append({**run.summary, "run_dir": inside.as_posix()})
    for folder in unused:  # a folder that is there on other machines may be named
        say(f"there is no finished run to leave out in {root / folder}")
    if not groups:
        raise nothing_to_show(root, datasets)
    rows = [_row(runs, configs[key]) for key, runs in groups.items()]
    return sorted(rows, key=lambda row: (row["dataset"], row["network"], row["algorithm"], row["variant"]))


def listed(settings: Mapping[str, Any]) -> str:
    """Settings as key=value."""
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()
    )


def _row(runs: Sequence[Mapping[str, Any]], config: RunConfig) -> dict[str, Any]:
    by_seed: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        by_seed[run["seed"]].append(run)
    first = runs[0]

    apart = {
        seed: [run for run in repeats if not shared_its_board(run)]
        for seed, repeats in by_seed.items()
        if not all(map(shared_its_board, repeats))
    }

    def per_seed(value: str, *inside: str, of: Mapping[int, list[Mapping[str, Any]]] = by_seed) -> list[float]:
        """Mean of a quantity per seed; empty unless every run has it."""
        numbers = [[reduce(getitem, inside, run)[value] for run in repeats] for repeats in of.values()]
        known = all(number is not None for repeats in numbers for number in repeats)
        return [statistics.fmean(repeats) for repeats in numbers] if known else []

    def cost(value: str, *inside: str) -> float | None:
        return _mean(per_seed(value, *inside, of=apart))

    accuracies, losses = per_seed("test_accuracy"), per_seed("test_loss")
    return {
        "dataset": first["dataset"],
        "network": first["network"],
        "algorithm": first["algorithm"],
        "variant": first["variant"],
        "metric": first.get("metric", "accuracy"),
        "preset": first["preset"],
        "settings": listed({**config.parameters, **differing(config.training)}),
        CHANGES: listed(changes(config)),
        "n": len(by_seed),
        "seeds": sorted(by_seed),
        "test_accuracy_mean": statistics.fmean(accuracies),
        "test_accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "published_accuracy": published_accuracy(config),
        "test_loss_mean": statistics.fmean(losses),
        "test_loss_sd": statistics.stdev(losses) if len(losses) > 1 else None,
        "validation_accuracy_mean": _mean(per_seed("validation_accuracy")),
        "passes_mean": _mean(per_seed("passes")),
        "n_apart": len(apart),
        "seconds_mean": cost("seconds"),
        "gross_j_mean": cost("gross_j", "energy"),
        "net_j_mean": cost("net_j", "energy"),
        "mean_w_mean": cost("mean_w", "energy"),
        "utilisation_mean": cost("utilisation", "energy", "regime"),
        "energy_method": " + ".join(dict.fromkeys(run["energy"]["method"] for run in runs)),
        "flags": list(dict.fromkeys(flag for run in runs for flag in run["energy"]["flags"])),
        "peak_memory_mib_mean": _mean(per_seed("peak_memory_mib")),
        "hardware": first["hardware"],
        "dates": sorted({run["date"][:10] for run in runs}),
        "command": first["command"],
        "runs": sorted(run["run_dir"] for run in runs),
    }


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def readable(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = tuple(COLUMNS)) -> list[dict[str, str]]:
    """Rows of `result_rows` as a person reads them, one string per column.

    Raises:
        UsageError: a column that does not exist.
    """
    for column in columns:
        if column not in COLUMNS:
            raise unknown_name("column", column, COLUMNS)
    return [{COLUMNS[column]: cells[column] for column in columns} for cells in map(_cells, rows)]


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    spread = "" if row["test_accuracy_sd"] is None else f" ± {row['test_accuracy_sd']:.2f}"
    fewer = f" (n = {row['n_apart']})" if row["n_apart"] < row["n"] else ""

    def cost(value: float | None, form: str, unknown: str = "") -> str:
        return unknown if value is None else f"{value:{form}}{fewer}"

    return {
        "dataset": row["dataset"],
        "network": row["network"],
        "algorithm": row["algorithm"],
        "variant": row["variant"],
        "preset": row["preset"] or "",
        "settings": row["settings"],
        CHANGES: row[CHANGES],
        "seeds": f"{', '.join(map(str, row['seeds']))} (n = {row['n']})",
        "accuracy": f"{row['test_accuracy_mean']:.2f}{spread}"
        + ("" if row["metric"] == "accuracy" else f" {row['metric']}"),
        PUBLISHED: "" if row["published_accuracy"] is None else f"{row['published_accuracy']:.2f}",
        "loss": f"{row['test_loss_mean']:.5g}"
        + ("" if row["test_loss_sd"] is None else f" ± {row['test_loss_sd']:.2g}"),
        "validation": "" if row["validation_accuracy_mean"] is None else f"{row['validation_accuracy_mean']:.2f}",
        "passes": f"{row['passes_mean']:.1f}",
        "time": cost(row["seconds_mean"], ".1f"),
        "energy": cost(row["gross_j_mean"], ".0f", unknown="not measured"),
        "net": cost(row["net_j_mean"], ".0f"),
        "power": cost(row["mean_w_mean"], ".0f"),
        "busy": "" if row["utilisation_mean"] is None else f"{100 * row['utilisation_mean']:.0f}",
        "memory": "" if row["peak_memory_mib_mean"] is None else f"{row['peak_memory_mib_mean']:.0f}",
        "method": row["energy_method"],
        "flags": ", ".join(row["flags"]),
        "hardware": row["hardware"],
        "dates": ", ".join(row["dates"]),
    }


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Columns aligned with spaces, for a terminal."""
    titles = list(rows[0])
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in titles}
    lines = ["  ".join(title.ljust(widths[title]) for title in titles)]
    lines += ["  ".join(row[title].ljust(widths[title]) for title in titles) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The same as Markdown."""
    titles = list(rows[0])
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    lines += ["| " + " | ".join(row[title] for title in titles) + " |" for row in rows]
    return "\n".join(lines)


def csv_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The same as comma-separated values."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().rstrip("\n")


LATEX: Final = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
}
"""What LaTeX would take for something else."""


def latex_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The same as a LaTeX tabular; it needs the package booktabs."""

    def line(cells: Iterable[str]) -> str:
        return " & ".join("".join(LATEX.get(character, character) for character in cell) for cell in cells) + r" \\"

    titles = list(rows[0])
    body = [line(row[title] for title in titles) for row in rows]
    begin = rf"\begin{{tabular}}{{{'l' * len(titles)}}}"
    return "\n".join([begin, r"\toprule", line(titles), r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])
