"""`bpfree data`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from bpfree import data
from bpfree.cli.base import Group, data_option, format_option
from bpfree.experiments.tables import text_table


@click.group("data", cls=Group)
def data_group() -> None:
    """Fetch, check and find data sets."""


@data_group.command()
@click.argument("names", nargs=-1, required=True)
@data_option
def fetch(names: tuple[str, ...], data_root: Path | None) -> None:
    """Download data sets from their official hosts, and check them."""
    for name in names:
        click.echo(f"{data.info(name).name}: {data.fetch(name, data_root)}")


@data_group.command()
@click.argument("names", nargs=-1)
@data_option
@format_option("table", "json")
def verify(names: tuple[str, ...], data_root: Path | None, form: str) -> None:
    """Check files against their checksums; exit with code 1 if one of NAMES is missing or corrupt.

    Without NAMES all data sets are looked at, and missing ones are no failure.
    """
    states: list[dict[str, str]] = []
    for name in names or data.names():
        for path, state in data.verify(name, data_root):
            states.append({"dataset": data.info(name).name, "state": state, "file": str(path)})
    click.echo(json.dumps(states, indent=1) if form == "json" else text_table(states))
    bad = {"corrupt", "missing"} if names else {"corrupt"}
    if any(row["state"] in bad for row in states):
        sys.exit(1)


@data_group.command("path")
@click.argument("name", required=False)
@data_option
def show_path(name: str | None, data_root: Path | None) -> None:
    """Print where a data set is or would be; without NAME the folder of all data sets."""
    click.echo(data.data_root(data_root) if name is None else data.path(name, data_root))
