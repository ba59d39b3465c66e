"""The `bpfree` command: parse, call, print."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from bpfree import __version__
from bpfree.cli.audit import audit
from bpfree.cli.base import ENVIRONMENT_NOTE, EXIT_NOTE, Group
from bpfree.cli.compare import compare
from bpfree.cli.data import data_group
from bpfree.cli.energy import energy_group
from bpfree.cli.figures import plot, report
from bpfree.cli.plan import plan
from bpfree.cli.run import run
from bpfree.cli.show import list_things, table
from bpfree.cli.tune import tune_rule


@click.group(
    cls=Group,
    context_settings={"auto_envvar_prefix": "BPFREE", "show_default": True, "help_option_names": ["-h", "--help"]},
    epilog=ENVIRONMENT_NOTE + "\n\n" + EXIT_NOTE,
)
@click.version_option(__version__, prog_name="bpfree")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train neural networks without back-propagation, and measure what that costs and saves.

    \b
    bpfree run                                  Mono-Forward on the packaged digits
    bpfree run --algo bp --dataset mnist        the baseline, with the preset's hyperparameters
    bpfree tune --algo mf --trials 50           hyperparameters, by the same search for every rule
    bpfree compare --algos mf,bp --seeds 5      rules against the baseline over paired seeds
    bpfree plan --gpus 1,2,4,8,64,1024          what many GPUs would bring, from block times measured on one
    bpfree audit                                on which later blocks each update depends, against what is declared
    bpfree list                                 algorithms, data sets, networks, presets
    bpfree table results                        accuracy, time and joules of all recorded runs
    bpfree report results                       tables and figures of comparisons as one page
    bpfree energy measure -- python train.py    joules, seconds and watts of any program
    """
    if os.environ.get("NO_COLOR"):  # https://no-color.org; click itself only looks for a terminal
        context.color = False


for command in (run, tune_rule, compare, plan, audit, list_things, table, plot, report, data_group, energy_group):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `bpfree` command."""
    cli.main(args=None if arguments is None else list(arguments), prog_name="bpfree")
