"""`bpfree compare`."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bpfree.cli.base import (
    ENVIRONMENT_NOTE,
    EXIT_NOTE,
    Command,
    data_option,
    format_option,
    refuse_idle_measurement,
)
from bpfree.cli.training import training_options
from bpfree.console import Console
from bpfree.energy import KINDS
from bpfree.energy.carbon import carbon_intensity
from bpfree.errors import DataError, UsageError
from bpfree.experiments.arms import BOTH, MATCHED, OWN, PROTOCOLS, TUNED, arm_label, make_arms, split_arms
from bpfree.words import count_of


@click.command(cls=Command, epilog=ENVIRONMENT_NOTE + "\n\n" + EXIT_NOTE)
@click.option(
    "--algos",
    "-a",
    required=True,
    metavar="ARM,ARM,..",
    help="Arms: RULE, RULE@PRESET, RULE@FILE.toml, each with :KEY=VALUE.. behind it; a VALUE with commas in quotes.",
)
@click.option(
    "--dataset",
    "-d",
    help="Data set, or folder:PATH[@SIZE] for image files of your own.  [default: that of the presets named in "
    "--algos, or digits]",
)
@click.option("--network", "-n", help="Network of all arms.  [default: of each arm's preset, the baseline on all]")
@click.option("--seeds", type=click.IntRange(min=1), default=10, help="Number of paired seeds.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, help="The lowest seed.")
@click.option(
    "--protocol",
    type=click.Choice((*PROTOCOLS, "both")),
    default="both",
    help="Own convergence, matched data passes, or both; or as many passes as each arm's preset was tuned for.",
)
@click.option(
    "--passes", type=click.IntRange(min=1), help="Matched data passes.  [default: the baseline's mean, rounded up]"
)
@click.option("--baseline", default="bp", help="The arm that the others are paired with.")
@click.option(
    "--margin-accuracy",
    type=click.FloatRange(min=0, min_open=True),
    default=0.25,
    help="Differences of accuracy that count as equivalent, percentage points.",
)
@click.option(
    "--margin-relative",
    type=click.FloatRange(min=0, min_open=True),
    default=0.05,
    help="Relative differences of time, energy and memory that count as equivalent.",
)
@click.option(
    "--target",
    "targets",
    type=click.FloatRange(0, 100),
    multiple=True,
    help="Validation accuracy (%) for energy to accuracy; repeatable.  [default: the baseline's median less 1]",
)
@training_options
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--energy", type=click.Choice(KINDS), default="auto", help="Where joules come from.")
@click.option(
    "--idle-seconds",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Measure the idle device this long before the first run and after each run, for net joules; 10 or more.",
)
@click.option("--carbon", metavar="COUNTRY", help="Add CO2 equivalents by CodeCarbon; ISO code such as POL or USA.")
@click.option("--warm-up", type=click.FloatRange(min=0), default=30.0, help="Load before the first run, s.")
@click.option("--start-temperature", type=float, help="Start runs at this temperature, °C.  [default: when warmed up]")
@click.option("--settle", type=click.FloatRange(min=0), default=120.0, help="Longest wait for that temperature, s.")
@click.option("--budget", type=click.FloatRange(min=0), metavar="MIN", help="Start no run after so many minutes.")
@click.option("--retry-failed", is_flag=True, help="Try again what failed in an earlier call.")
@click.option("--mixed-hardware", is_flag=True, help="Go on with a comparison that other hardware has begun.")
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of this comparison.  [default: results/runs/compare-DATASET-NETWORK]",
)
@click.option("--download/--no-download", default=True, help="Fetch the data set if it is not there.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
@data_option
@format_option("table", "json")
def compare(
    algos: str,
    dataset: str | None,
    network: str | None,
    seeds: int,
    first_seed: int,
    protocol: str,
    passes: int | None,
    baseline: str,
    margin_accuracy: float,
    margin_relative: float,
    targets: tuple[float, ...],
    device: str,
    energy: str,
    idle_seconds: float,
    carbon: str | None,
    warm_up: float,
    start_temperature: float | None,
    settle: float,
    budget: float | None,
    retry_failed: bool,
    mixed_hardware: bool,
    results: Path | None,
    download: bool,
    quiet: bool,
    data_root: Path | None,
    form: str,
    **training: Any,
) -> None:
    """Compare learning rules over paired seeds, everything but the rule being the same.

    \b
    bpfree compare --algos mf,bp --dataset digits --seeds 5
    bpfree compare --algos mf,mf:schedule=sequential,bp --dataset cifar10 --network mlp:3x2000
    bpfree compare --algos mf:patience=4,bp --dataset cifar10 --network mlp:3x2000 --protocol own
    bpfree compare --algos 'man:ends="13,27,41,54",bp' --dataset cifar10 --network resnet:110

    An arm takes the preset for the data set and network, if there is one, and all arms the same stopping rule; of a
    preset that is named, RULE@PRESET, everything is taken. What each of them takes is said first.

    Arms run in random order within each seed. Every arm first trains to its own convergence by the same stopping rule,
    then all of them see the data as often as the baseline did. The same command goes on with what is missing, also
    with more arms or seeds. Tables of the result: `bpfree table FOLDER -t T3`, figures: `bpfree plot FOLDER`.
    """
    from bpfree.experiments import run as runs
    from bpfree.experiments.compare import Analysis, Comparison, Conditions

    if passes is not None and protocol in (OWN, TUNED):
        raise UsageError("--passes belongs to matched passes; leave it out or choose --protocol matched or both")
    if protocol == MATCHED and passes is None and results is None:
        raise UsageError("matched passes alone need --passes, or --results with the baseline's own convergence")
    if idle_seconds and not idle_seconds >= 10:
        raise UsageError("--idle-seconds takes 10 or more, or 0 for none")
    refuse_idle_measurement(energy, idle_seconds)
    if carbon is not None:
        carbon_intensity(carbon)
    given = {name: value for name, value in training.items() if value is not None}
    arms = make_arms(
        split_arms(algos), dataset, network, baseline=baseline, training=given, device=device, energy=energy
    )
    if not arms:
        raise UsageError("--algos names no arm")
    try:
        loaded = runs.load_dataset(arms[0].config.dataset, data_root, download=download)
    except DataError as error:
        raise UsageError(f"nothing was started: {error}") from error
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"compare-{loaded.name}-{network or 'own networks'}")
    folder = results or Path("results/runs") / name
    comparison = Comparison(
        folder,
        arms,
        range(first_seed, first_seed + seeds),
        loaded,
        protocols=BOTH if protocol == "both" else (protocol,),
        passes=passes,
        analysis=Analysis(arm_label(baseline), margin_accuracy, margin_relative, targets),
        conditions=Conditions(
            idle_s=idle_seconds,
            carbon=carbon,
            warm_up_s=warm_up,
            wait_s=settle,
            start_temperature_c=start_temperature,
            budget_s=math.inf if budget is None else 60 * budget,
            retry_failed=retry_failed,
            mixed_hardware=mixed_hardware,
        ),
        say=lambda line: None if quiet else click.echo(line, err=True),
        reporter=Console(quiet=True),
    )
    outcome = comparison.run()
    if form == "json":
        click.echo(json.dumps({**asdict(outcome), "results": str(folder)}, indent=1, ensure_ascii=False))
    else:
        left = f", {outcome.left} left for another call" if outcome.left else ""
        failed = f", {len(outcome.failed)} failed" if outcome.failed else ""
        click.echo(f"{count_of(outcome.done, 'run')} done{failed}{left} -> {folder}")
    if outcome.failed:
        for one in outcome.failed if quiet else ():  # nothing has said so yet
            words = f"{one['arm']} on {one['network']}, {one['protocol']}, seed {one['seed']}"
            click.echo(f"{words} failed: {one['reason']}", err=True)
        sys.exit(1)
