"""`bpfree list` and `bpfree table`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from bpfree import data
from bpfree.algorithms import ALGORITHMS
from bpfree.cli.base import Command, baseline_option, format_option, mixed_hardware_option, warn
from bpfree.energy.carbon import carbon_intensity
from bpfree.errors import DataError, UsageError, unknown_name
from bpfree.experiments.config import presets
from bpfree.experiments.tables import (
    CHANGES,
    COLUMNS,
    PUBLISHED,
    csv_table,
    latex_table,
    markdown_table,
    readable,
    result_rows,
    text_table,
)
from bpfree.networks import describe_networks

KINDS_OF_THINGS = ("algorithms", "datasets", "networks", "presets")
PLAIN: Final = "the plain list"
USED_BY: Final = {
    "columns": (PLAIN,),
    "leave_out": (PLAIN,),
    "with_reference": (PLAIN, "T1", "T2", "T3", "T4", "T5", "T6", "T9"),
    "baseline": ("T3", "T4", "T5", "T6", "T7", "T9"),
    "targets": ("T7",),
    "carbon": ("T2",),
}
"""Options of `bpfree table` that some tables have no use for."""


@click.command("list", cls=Command)
@click.argument("kinds", nargs=-1, type=click.Choice(KINDS_OF_THINGS))
@format_option("table", "json")
def list_things(kinds: tuple[str, ...], form: str) -> None:
    """Show algorithms, data sets, networks and presets, or just the KINDS named."""
    things = {kind: _things(kind, detailed=form == "json") for kind in kinds or KINDS_OF_THINGS}
    if form == "json":
        click.echo(json.dumps(things, indent=1, ensure_ascii=False))
        return
    tables = [f"{click.style(kind, bold=True)}\n{text_table(rows)}" for kind, rows in things.items() if rows]
    click.echo("\n\n".join(tables))


def _things(kind: str, *, detailed: bool) -> list[dict[str, Any]]:
    if kind == "algorithms":
        rows: list[dict[str, Any]] = []
        for entry in ALGORITHMS:
            paper = entry.paper
            source = f"{paper.authors} {paper.year}" + (f", arXiv {paper.arxiv}" if paper.arxiv else "")
            row = {
                "name": entry.alias,
                "long name": entry.name,
                "locality": entry.learner.locality,
                "paper": source,
                "description": entry.description,
            }
            rows.append({**row, "parameters": entry.parameters()} if detailed else row)
        return rows
    if kind == "datasets":
        return [
            {
                "name": entry.name,
                "samples": entry.size,
                "shape": entry.shape,
                "classes": str(entry.classes),
                "where": "packaged" if entry.packaged else "bpfree data fetch",
                "licence": entry.licence,
            }
            for entry in data.DATASETS.values()
        ]
    if kind == "networks":
        return [dict(row) for row in describe_networks()]
    return [
        {
            "name": entry.name,
            "algorithm": entry.algorithm,
            "dataset": entry.dataset,
            "network": entry.network,
            "published, %": "" if entry.published is None else f"{entry.published:.2f}",
            "description": entry.description,
            **({"source": entry.source, "published in": entry.published_in} if detailed else {}),
        }
        for entry in presets().values()
    ]


@click.command(cls=Command)
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("results"))
@click.option(
    "--table",
    "-t",
    "names",
    multiple=True,
    metavar="T1..T9",
    help="A table of the energy study (repeatable), or 'all'.",
)
@click.option("--columns", metavar="A,B,..", help="Columns of the plain list, in this order (not for json).")
@click.option(
    "--with-reference",
    is_flag=True,
    help="Lay published numbers beside ours; of the plain list, show what has one.",
)
@click.option(
    "--leave-out",
    multiple=True,
    metavar="FOLDER",
    help="Plain list: a folder under ROOT that is not looked at, such as 'tuning' or '*/search' (repeatable).",
)
@click.option(
    "--dataset", "-d", "datasets", multiple=True, metavar="NAME", help="Only runs on this data set (repeatable)."
)
@baseline_option
@mixed_hardware_option
@click.option("--target", "targets", type=click.FloatRange(0, 100), multiple=True, help="T7: accuracies to reach, %.")
@click.option("--carbon", metavar="COUNTRY", help="T2: CO2 equivalents of measured energy; ISO code such as POL.")
@format_option("table", "markdown", "csv", "latex", "json")
def table(
    root: Path,
    names: tuple[str, ...],
    columns: str | None,
    with_reference: bool,
    leave_out: tuple[str, ...],
    datasets: tuple[str, ...],
    baseline: str | None,
    mixed_hardware: bool,
    targets: tuple[float, ...],
    carbon: str | None,
    form: str,
) -> None:
    """Show the runs recorded under ROOT, one row per configuration, over its seeds.

    \b
    bpfree table results                                a list of everything
    bpfree table results --with-reference               presets as they are, beside what their papers report
    bpfree table results -t T3                          changes against the baseline, with intervals
    bpfree table results -t all --with-reference        everything beside the published numbers

    T1 performance, T2 efficiency, T3 changes against the baseline, T4 matched passes, T5 own convergence, T6 ablation
    ladder, T7 energy to accuracy, T8 tuning bill, T9 the factors of a difference in energy.
    """
    datasets = tuple(_known_dataset(name) for name in datasets)
    if not names:
        _refuse_unused([PLAIN])
        _list_runs(root, columns, form, with_reference=with_reference, leave_out=leave_out, datasets=datasets)
        return
    from bpfree.experiments.collect import collect, tuning_records
    from bpfree.experiments.study_tables import TITLES, make_tables

    every = any(name.lower() == "all" for name in names)
    chosen = list(TITLES) if every else [name.upper() for name in names]
    for name in chosen:  # before runs are read, which may refuse too
        if name not in TITLES:
            raise unknown_name("table", name, TITLES)
    _refuse_unused(chosen)
    tuning = [record for record in tuning_records(root, say=warn) if not datasets or record["dataset"] in datasets]
    shown: dict[str, Any] = {"baseline": baseline, "mixed_hardware": mixed_hardware, "datasets": datasets}
    entries = [] if chosen == ["T8"] else collect(root, **shown, say=warn)
    made = make_tables(
        chosen,
        entries,
        tuning=tuning,
        with_reference=with_reference,
        targets=targets,
        intensity=None if carbon is None else carbon_intensity(carbon),
    )
    if every:
        made = [one for one in made if one.rows]
    if form == "json":
        click.echo(json.dumps([one.as_dict() for one in made], indent=1, ensure_ascii=False))
        return
    click.echo("\n\n".join(one.render(form) for one in made))


def _refuse_unused(tables: Sequence[str]) -> None:
    """Refuse options that none of the tables asked for would use. Variables of the environment may stay set.

    Raises:
        UsageError: one of them is given.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        users = USED_BY.get(name, tables)
        if not set(users) & set(tables) and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{max(parameter.opts, key=len)} is for {', '.join(users)}; leave it out")


def _known_dataset(name: str) -> str:
    """The data set's own name; what is unknown may be a set of the user's."""
    with suppress(UsageError):
        return data.info(name).name
    return name


def _list_runs(
    root: Path,
    columns: str | None,
    form: str,
    *,
    with_reference: bool,
    leave_out: Sequence[str],
    datasets: Sequence[str],
) -> None:
    if form == "json" and columns is not None:
        raise UsageError("--columns is for tables; --format json has everything")
    rows = result_rows(root, leave_out=leave_out, datasets=datasets, say=warn)
    if with_reference:
        rows = [row for row in rows if row["published_accuracy"] is not None]
        if not rows:
            raise DataError(f"no run under {root} is a preset, unchanged, for which an accuracy was published")
    if form == "json":
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    usual = [column for column in COLUMNS if column != CHANGES and (with_reference or column != PUBLISHED)]
    shown = readable(rows, columns.split(",") if columns else usual)
    forms = {"table": text_table, "markdown": markdown_table, "csv": csv_table, "latex": latex_table}
    click.echo(forms[form](shown))
