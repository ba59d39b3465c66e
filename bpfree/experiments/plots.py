"""Figures made from records: PNG and PDF, with the numbers in them as CSV beside.

A rule has one colour in all of them; arms of one rule differ in their dashes and markers.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bpfree.algorithms import ALGORITHMS
from bpfree.errors import DataError, UsageError, cannot_write
from bpfree.experiments.collect import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

COLORS: Final = {
    "bp": "#1f1f1f",
    "mf": "#1f77b4",
    "bp-ds": "#7f7f7f",
    "mf-joint": "#17becf",
    "ff": "#d62728",
    "dff": "#ff7f0e",
    "cwc": "#e7ba52",
    "sff": "#8c564b",
    "cafo": "#2ca02c",
    "ccl": "#bcbd22",
    "noprop": "#9467bd",
    "noprop-bp": "#c5b0d5",
    "man": "#e377c2",
    "fgnn": "#98df8a",
    "dfa": "#ad494a",
    "greedy": "#393b79",
    "dgl": "#637939",
    "predsim": "#8c6d31",
    "infopro": "#7b4173",
}
SPARE: Final = ("#3182bd", "#e6550d", "#31a354", "#756bb1", "#843c39", "#636363")
"""For rules that have no colour here yet."""

DASHES: Final = ("-", "--", ":", "-.")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
GRID: Final = 200
"""Points of a band over joules, beside the ends of runs."""

DEPTH: Final = re.compile(r":\d+x")
"""The number of layers in a network's name, as in mlp:3x2000."""

DPI: Final = 150


def color(rule: str) -> str:
    """The colour of a rule, by its short name; rules without one here take spare ones, in the order of the registry."""
    if rule in COLORS:
        return COLORS[rule]
    new = [entry.alias for entry in ALGORITHMS if entry.alias not in COLORS]
    return SPARE[new.index(rule) % len(SPARE)]


@dataclass(frozen=True)
class Plot:
    """A figure and the numbers in it.

    Attributes:
        name: stem of its files.
        title: what it shows.
        rows: the numbers, one row per point.
        draw: draws them.
    """

    name: str
    title: str
    rows: list[Row]
    draw: Callable[[Axes], None]

    def data(self) -> str:
        """The numbers as CSV."""
        file = io.StringIO()
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in self.rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        return file.getvalue()

    def image(self, form: str) -> bytes:
        """The figure as "png" or "pdf".

        Raises:
            UsageError: matplotlib is not installed.
        """
        file = io.BytesIO()
        with self._figure() as figure:
            figure.savefig(file, format=form, dpi=DPI)
        return file.getvalue()

    @contextmanager
    def _figure(self) -> Iterator[Figure]:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UsageError('figures need matplotlib: pip install "bpfree[plot]"') from error
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        FigureCanvasAgg(figure)  # no window system, and no global state
        axes = figure.add_subplot()
        axes.set_title(self.title, fontsize="medium")
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        self.draw(axes)
        yield figure


def save(plots: Iterable[Plot], folder: Path) -> list[Path]:
    """Write each figure as PNG, PDF and CSV.

    Raises:
        CheckpointError: a file cannot be written.
        UsageError: matplotlib is not installed.
    """
    written = []
    for plot in plots:
        files = {"png": plot.image("png"), "pdf": plot.image("pdf"), "csv": plot.data().encode()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for suffix, content in files.items():
                written.append(folder / f"{plot.name}.{suffix}")
                written[-1].write_bytes(content)
        except OSError as error:
            raise cannot_write(folder / plot.name, error) from error
    return written


def make_plots(entries: Sequence[Entry]) -> list[Plot]:
    """Every figure that the records have numbers for: per data set, network and protocol, and over depths.

    Raises:
        DataError: nothing to draw.
    """
    plots: list[Plot] = []
    with_runs = [entry for entry in entries if entry.runs]
    for place in dict.fromkeys(entry.place for entry in with_runs):
        here = [entry for entry in with_runs if entry.place == place]
        for maker in (_accuracy_against_joules, _idle_and_dynamic, _epochs, _pareto):
            plots += _where(place, maker(here), simulated=any("SIMULATED" in entry.flags() for entry in here))
    for study, dataset, protocol, hardware in dict.fromkeys(_without_network(entry) for entry in with_runs):
        here = [e for e in with_runs if _without_network(e) == (study, dataset, protocol, hardware)]
        plots += _where((study, dataset, "", protocol, hardware), _memory(here), simulated=False)
    if not plots:
        raise DataError("the records hold nothing to draw")
    return plots


def _without_network(entry: Entry) -> tuple[str, str, str, str]:
    study, dataset, _, protocol, hardware = entry.place
    return study, dataset, protocol, hardware


def _where(place: tuple[str, str, str, str, str], plot: Plot, *, simulated: bool) -> list[Plot]:
    """The figure, called after what it is of; none if there is nothing in it."""
    if not plot.rows:
        return []
    study, dataset, network, protocol, hardware = place
    words = [word for word in ("" if study == "." else study, dataset, network, protocol) if word]
    name = "-".join("".join(c if c.isalnum() else "-" for c in word) for word in (*words, hardware, plot.name))
    title = f"{plot.title}\n{', '.join(words)}, {hardware}{', simulated energy' if simulated else ''}"
    return [Plot(name, title, plot.rows, plot.draw)]


@dataclass(frozen=True)
class _Style:
    color: str
    dashes: str
    marker: str


def _styles(entries: Sequence[Entry]) -> dict[str, _Style]:
    """By label: the rule's colour, and dashes and markers that tell its arms apart."""
    seen: dict[str, int] = {}
    styles: dict[str, _Style] = {}
    for entry in entries:
        if entry.label not in styles:
            rule = entry.config.algorithm
            number = seen[rule] = seen.get(rule, -1) + 1
            styles[entry.label] = _Style(color(rule), DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)])
    return styles


def _along(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[float, list[float]]]:
    """Points from the first to the last of any curve, all ends among them, and the values of those that are there."""
    ends = np.array([[x[0], x[-1]] for x, _ in curves])
    for at in np.unique([*np.linspace(ends.min(), ends.max(), GRID), *ends.flat]):
        there = [curve for curve, (first, last) in zip(curves, ends, strict=True) if first <= at <= last]
        yield float(at), [float(np.interp(at, x, y)) for x, y in there]


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Lowest, median and highest of some values; None of none, where a line has a gap."""
    if not values:
        return dict.fromkeys(("low", "median", "high"))
    return {"low": min(values), "median": statistics.median(values), "high": max(values)}


def _draw_bands(axes: Axes, entries: Sequence[Entry], rows: Sequence[Row], x: str) -> None:
    """Medians and ranges; pale where an arm's runs are not all there, since those that are left are no fair sample."""
    for label, style in _styles(entries).items():
        own = [row for row in rows if row["arm"] == label]
        if not own:
            continue
        at = np.array([row[x] for row in own])
        low, middle, high = (np.array([row[name] for row in own], dtype=float) for name in ("low", "median", "high"))
        whole = np.array([row.get("there", row["n"]) == row["n"] for row in own])
        axes.fill_between(at, low, high, where=whole, color=style.color, alpha=0.2, linewidth=0)
        axes.fill_between(at, low, high, where=~whole, color=style.color, alpha=0.07, linewidth=0)
        line: Row = {"color": style.color, "linestyle": style.dashes}
        axes.plot(at, np.where(whole, middle, np.nan), **line, label=f"{label} (n = {own[0]['n']})")
        pale = np.pad(~whole, 1)
        joined = pale[:-2] | pale[1:-1] | pale[2:]  # with the points that pale stretches begin and end at
        axes.plot(at, np.where(joined, middle, np.nan), **line, alpha=0.35)
        known = np.pad(np.isfinite(middle), 1)
        alone = known[1:-1] & ~known[:-2] & ~known[2:]  # a line of one point is not to be seen
        axes.plot(at[alone], middle[alone], color=style.color, marker=style.marker, linestyle="none")
    axes.legend(frameon=False, fontsize="small")


def _accuracy_against_joules(entries: Sequence[Entry]) -> Plot:
    """Median and range at equal joules, over the runs of an arm that are between their first and last validation."""
    rows: list[Row] = []
    for entry in entries:
        curves = []
        for run in entry.all_runs():
            points = [(spent, accuracy) for spent, accuracy in run.curve() if spent]
            if points:
                spent, accuracies = np.array(points).T
                curves.append((np.log(spent), accuracies))
        for log_joules, values in _along(curves) if curves else ():
            spread = _spread(values)
            rows.append(_point(entry, len(curves), joules=math.exp(log_joules), there=len(values), **spread))

    def draw(axes: Axes) -> None:
        _draw_bands(axes, entries, rows, "joules")
        axes.set_xscale("log")
        axes.set_xlabel("gross energy so far, J (log scale)")
        axes.set_ylabel(f"validation {_metric(entries)}, %")

    metric = _metric(entries)
    title = f"{metric[0].upper()}{metric[1:]} against energy: median and range over seeds"
    return Plot("accuracy-joules", title, rows, draw)


def _epochs(entries: Sequence[Entry]) -> Plot:
    """Validation accuracy after each data pass; an arm's line ends with its first run."""
    rows: list[Row] = []
    for entry in entries:
        curves = [[epoch["validation_accuracy"] for epoch in run.epochs()] for run in entry.all_runs()]
        for index in range(min(map(len, curves))):
            values = [curve[index] for curve in curves]
            rows.append(_point(entry, len(curves), epoch=index + 1, **_spread(values)))

    def draw(axes: Axes) -> None:
        _draw_bands(axes, entries, rows, "epoch")
        _whole_numbers(axes)
        axes.set_xlabel("validation (one per epoch, stages one after another)")
        axes.set_ylabel(f"validation {_metric(entries)}, %")

    return Plot("epochs", f"Validation {_metric(entries)} per epoch: median and range over seeds", rows, draw)


def _idle_and_dynamic(entries: Sequence[Entry]) -> Plot:
    """What the idle board would have taken in the same time, and what training added; where idle power is known."""
    rows = []
    for entry in entries:
        gross, net = entry.mean("gross_j"), entry.mean("net_j")
        if gross is not None and net is not None:
            rows.append(_point(entry, len(entry.runs), idle_j=gross - net, dynamic_j=net))

    def draw(axes: Axes) -> None:
        at = np.arange(len(rows))
        colors = [color(row["rule"]) for row in rows]
        idle, dynamic = ([row[name] for row in rows] for name in ("idle_j", "dynamic_j"))
        axes.bar(at, idle, color=colors, alpha=0.35, label="idle board")
        axes.bar(at, dynamic, bottom=idle, color=colors, label="dynamic")
        axes.set_xticks(at, [f"{row['arm']}\n(n = {row['n']})" for row in rows], fontsize="small")
        axes.set_ylabel("energy of training, J (pale: idle board)")

    return Plot("idle-dynamic", "Idle and dynamic energy: means over seeds", rows, draw)


def _pareto(entries: Sequence[Entry]) -> Plot:
    """Test accuracy against energy; arms that no other one beats in both are joined by a line."""
    rows = []
    for entry in entries:
        joules, accuracy = entry.mean("gross_j"), entry.mean("accuracy")
        if joules and accuracy is not None:
            spread = {"joules_sd": entry.sd("gross_j"), "accuracy_sd": entry.sd("accuracy")}
            rows.append(_point(entry, len(entry.runs), joules=joules, accuracy=accuracy, **spread))
    for row in rows:
        row["front"] = not any(_dominates(other, row) for other in rows)

    def draw(axes: Axes) -> None:
        styles = _styles(entries)
        for row in rows:
            style = styles[row["arm"]]
            axes.errorbar(
                row["joules"],
                row["accuracy"],
                xerr=row["joules_sd"],
                yerr=row["accuracy_sd"],
                color=style.color,
                marker=style.marker,
                capsize=2,
                linestyle="none",
                label=f"{row['arm']} (n = {row['n']})",
            )
        front = sorted((row["joules"], row["accuracy"]) for row in rows if row["front"])
        axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=0)
        axes.set_xscale("log")
        axes.set_xlabel("gross energy of training, J (log scale)")
        axes.set_ylabel(f"test {_metric(entries)}, %")
        axes.legend(frameon=False, fontsize="small")

    title = f"Test {_metric(entries)} against energy: mean ± SD over seeds, and the Pareto front"
    return Plot("pareto", title, rows, draw)


def _dominates(a: Row, b: Row) -> bool:
    """Whether `a` is at least as good in both, and better in one."""
    at_least = a["joules"] <= b["joules"] and a["accuracy"] >= b["accuracy"]
    return at_least and (a["joules"], a["accuracy"]) != (b["joules"], b["accuracy"])


def _memory(entries: Sequence[Entry]) -> Plot:
    """Peak of the allocator against depth, for networks that differ in nothing else."""
    rows = []
    for entry in entries:
        family, deep = DEPTH.subn(":Nx", entry.config.network)
        blocks, mib = entry.mean("blocks"), entry.mean("allocator_mib")
        if deep and blocks is not None and mib is not None:
            rows.append(_point(entry, len(entry.runs), family=family, blocks=blocks, mib=mib))
    depths = {family: {row["blocks"] for row in rows if row["family"] == family} for family in _names(rows, "family")}
    rows = sorted((row for row in rows if len(depths[row["family"]]) > 1), key=lambda row: row["blocks"])

    def draw(axes: Axes) -> None:
        styles = _styles(entries)
        for family in _names(rows, "family"):
            for label in _names(rows, "arm"):
                own = [(row["blocks"], row["mib"]) for row in rows if (row["arm"], row["family"]) == (label, family)]
                if own:
                    style = styles[label]
                    look: Row = {"color": style.color, "linestyle": style.dashes, "marker": style.marker}
                    axes.plot(*zip(*own, strict=True), **look, label=f"{label}, {family}")
        _whole_numbers(axes)
        axes.set_xlabel("blocks of the network")
        axes.set_ylabel("peak of the allocator, MiB")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small")

    return Plot("memory-depth", "Peak memory against depth: means over seeds", rows, draw)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _names(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _metric(entries: Sequence[Entry]) -> str:
    """What the arms of a figure are rated by."""
    return " or ".join(dict.fromkeys(entry.metric for entry in entries))


def _point(entry: Entry, n: int, **numbers: Any) -> Row:
    return {"arm": entry.label, "rule": entry.config.algorithm, "n": n, **numbers}
