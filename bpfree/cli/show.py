"""`bpfree list` and `bpfree table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bpfree import data
from bpfree.algorithms import ALGORITHMS
from bpfree.cli.base import Command, format_option
from bpfree.experiments.config import presets
from bpfree.experiments.tables import COLUMNS, markdown_table, readable, result_rows, text_table
from bpfree.networks import describe_networks

KINDS_OF_THINGS = ("algorithms", "datasets", "networks", "presets")


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
        entries = [data.info(name) for name in data.names()]
        return [
            {
                "name": entry.name,
                "samples": entry.size,
                "shape": entry.shape,
                "classes": str(entry.classes),
                "where": "packaged" if entry.packaged else "bpfree data fetch",
                "licence": entry.licence,
            }
            for entry in entries
        ]
    if kind == "networks":
        return [dict(row) for row in describe_networks()]
    return [
        {
            "name": entry.name,
            "algorithm": entry.algorithm,
            "dataset": entry.dataset,
            "network": entry.network,
            "description": entry.description,
        }
        for entry in presets().values()
    ]


@click.command(cls=Command)
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("results"))
@click.option("--columns", metavar="A,B,..", help="Columns to show, in this order (not for json).  [default: all]")
@format_option("table", "markdown", "json")
def table(root: Path, columns: str | None, form: str) -> None:
    """Show the runs recorded under ROOT, one row per configuration, over its seeds."""
    rows = result_rows(root)
    if form == "json":
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    shown = readable(rows, columns.split(",") if columns else tuple(COLUMNS))
    click.echo(text_table(shown) if form == "table" else markdown_table(shown))
