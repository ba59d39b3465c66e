"""`bpfree plot` and `bpfree report`."""

from __future__ import annotations

from pathlib import Path

import click

from bpfree.cli.base import Command, baseline_option, mixed_hardware_option, warn

ROOT = click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("results"))


@click.command(cls=Command)
@ROOT
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Where figures go.  [default: ROOT/figures]"
)
@mixed_hardware_option
def plot(root: Path, out: Path | None, mixed_hardware: bool) -> None:
    """Draw the runs recorded under ROOT, as PNG and PDF with their numbers as CSV beside.

    Accuracy against joules and per epoch with the range over seeds, idle and dynamic joules, test accuracy against
    energy with its Pareto front, and memory against depth where networks differ in nothing else. A rule has one colour
    in all.
    """
    from bpfree.experiments.collect import collect
    from bpfree.experiments.plots import make_plots, save

    plots = make_plots(collect(root, mixed_hardware=mixed_hardware, say=warn))
    for path in save(plots, out or root / "figures"):
        click.echo(str(path))


@click.command(cls=Command)
@ROOT
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The page.  [default: ROOT/report.html]")
@click.option("--title", default="Learning rules and their energy", help="Title of the page.")
@click.option("--with-reference", is_flag=True, help="Lay the published tables beside ours.")
@baseline_option
@mixed_hardware_option
def report(
    root: Path, out: Path | None, title: str, with_reference: bool, baseline: str | None, mixed_hardware: bool
) -> None:
    """Write one self-contained HTML page: what was compared under ROOT, all tables, all figures."""
    from bpfree import __version__
    from bpfree.experiments import report as pages
    from bpfree.experiments.collect import collect, read_plans, tuning_records
    from bpfree.experiments.plots import make_plots
    from bpfree.experiments.study_tables import TITLES, make_tables

    entries = collect(root, baseline=baseline, mixed_hardware=mixed_hardware, say=warn)
    tuning = tuning_records(root, say=warn)
    tables = make_tables(list(TITLES), entries, tuning=tuning, with_reference=with_reference)
    page = pages.report(title, read_plans(root), tables, make_plots(entries), version=__version__)
    path = out or root / "report.html"
    pages.write_report(path, page)
    click.echo(str(path))
