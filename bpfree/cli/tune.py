"""`bpfree tune`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bpfree.algorithms.learner import Task
from bpfree.cli.base import (
    ENVIRONMENT_NOTE,
    EXIT_NOTE,
    Command,
    data_option,
    format_option,
    is_default,
    is_given,
    task_option,
)
from bpfree.cli.training import setting_options
from bpfree.console import TuningConsole
from bpfree.energy import KINDS
from bpfree.errors import UsageError
from bpfree.experiments.config import parse_settings, resolve, training_config, usual_training
from bpfree.experiments.search import SharedSpace
from bpfree.experiments.tables import text_table
from bpfree.experiments.tune import PRUNERS, TUNING_SEED, TuneConfig, fit_space, study_name, tune
from bpfree.words import count_of

SPACE = SharedSpace()
PROTOCOLS = ("passes", "convergence")


def words(values: tuple[Any, ...]) -> str:
    return ",".join(map(str, values))


@click.command("tune", cls=Command, epilog=ENVIRONMENT_NOTE + "\n\n" + EXIT_NOTE)
@click.option("--algo", "-a", "algorithm_name", help="Learning rule, by its short or long name.")
@click.option(
    "--dataset",
    "-d",
    help="Data set, or folder:PATH[@SIZE] for image files of your own.  [default: digits, which is packaged]",
)
@click.option("--network", "-n", help="Network, such as mlp:2x1000 or cnn:mf.  [default: the preset's]")
@task_option
@click.option(
    "--preset",
    help="Take network and parameters of the rule that are not searched from this preset; 'none' for the rule's "
    "defaults.  [default: the one that fits]",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Fix a parameter of the rule, which is not searched."
)
@click.option("--trials", type=click.IntRange(min=1), default=50, help="Trials in all, with those of earlier sessions.")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="passes",
    help="Search the number of data passes, without early stopping; or train every trial to its own convergence.",
)
@click.option("--passes", nargs=2, type=click.IntRange(min=1), default=SPACE.passes, help="Least and most data passes.")
@click.option(
    "--epochs", type=click.IntRange(min=1), default=100, help="Cap on epochs per stage, with --protocol convergence."
)
@click.option(
    "--patience", type=click.IntRange(min=1), default=20, help="Epochs without improvement that end a stage, likewise."
)
@click.option("--lr", nargs=2, type=float, default=SPACE.lr, help="Least and largest learning rate.")
@click.option("--weight-decay", nargs=2, type=float, default=SPACE.weight_decay, help="Least and largest weight decay.")
@click.option("--lr-schedules", metavar="A,B,..", default=words(SPACE.lr_schedules), help="Learning-rate schedules.")
@click.option("--batch-sizes", metavar="N,N,..", default=words(SPACE.batch_sizes), help="Samples per step.")
@click.option(
    "--dropout",
    nargs=2,
    type=float,
    default=SPACE.dropout,
    help="Least and largest dropout, where the network has some.",
)
@click.option("--pareto", is_flag=True, help="Minimise joules too: the front of validation accuracy and energy.")
@click.option(
    "--target",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="PERCENT",
    help="Minimise the joules up to the first validation at this accuracy instead; a trial ends there, or where it has "
    "spent more than the best one.",
)
@click.option(
    "--pruner",
    type=click.Choice(PRUNERS),
    help="Whether trials below the median end early.  [default: median, with joules as an objective none]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=TUNING_SEED, help="Of trials and sampler; report runs of others."
)
@click.option("--workers", type=click.IntRange(min=1), default=1, help="Processes: one per GPU, or sharing a device.")
@click.option(
    "--nproc",
    type=click.IntRange(min=1),
    help="Processes of each trial, of which there is 1. Given, each trial has a GPU of its own: more workers than GPUs "
    "are refused, which would share them and measure no joules.",
)
@click.option(
    "--storage",
    metavar="WHERE",
    help="Database URL such as postgresql://.., or path of a journal file.  [default: SQLite in the study's folder]",
)
@click.option("--name", help="Of the study, its folder and its preset.  [default: data set, rule and network]")
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results/tuning"),
    help="Where folders of studies are made.",
)
@setting_options
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--energy", type=click.Choice(KINDS), default="auto", help="Where joules come from.")
@click.option("--download/--no-download", default=True, help="Fetch the data set if it is not there.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
@data_option
@format_option("table", "json")
def tune_rule(
    algorithm_name: str | None,
    dataset: str | None,
    network: str | None,
    task: Task | None,
    preset: str | None,
    settings: tuple[str, ...],
    trials: int,
    protocol: str,
    passes: tuple[int, int],
    epochs: int,
    patience: int,
    lr: tuple[float, float],
    weight_decay: tuple[float, float],
    lr_schedules: str,
    batch_sizes: str,
    dropout: tuple[float, float],
    pareto: bool,
    target: float | None,
    pruner: str | None,
    seed: int,
    workers: int,
    nproc: int | None,
    storage: str | None,
    name: str | None,
    results: Path,
    device: str,
    energy: str,
    download: bool,
    quiet: bool,
    data_root: Path | None,
    form: str,
    **training: Any,
) -> None:
    """Search the hyperparameters of a learning rule, on validation data only.

    \b
    bpfree tune --algo mf --dataset digits --network mlp:2x100 --trials 20
    bpfree tune --algo bp --dataset digits --network mlp:2x100 --trials 20    the same budget for the baseline
    bpfree run --preset results/tuning/digits-mf-mlp-2x100/digits-mf-mlp-2x100.toml
    bpfree tune --algo mf --dataset cifar10 --trials 100 --pareto             accuracy against joules
    bpfree tune --algo mf --dataset cifar10 --trials 100 --target 60          the fewest joules to 60 %
    bpfree tune --algo mf --dataset cifar10 --set schedule=sequential         fix what is not to be searched

    Every rule gets the same search: learning rate and its schedule, weight decay, batch size, dropout where the network
    has it, number of data passes; beside it what the rule declares of its own. Give every rule that you compare the
    same options. A range whose ends agree fixes a value.

    The study lives in its folder. The same command goes on after an interruption or a kill, and a larger --trials
    prolongs it. The folder gets the best configuration as a preset and tuning.json, with every trial, why it was pruned
    or failed, and what tuning cost.
    """
    from bpfree.experiments import run as runs

    if algorithm_name is None and preset in (None, "none"):
        raise UsageError("say what to tune: --algo NAME (see `bpfree list algorithms`)")
    if nproc is not None and nproc > 1:
        raise UsageError(
            f"a trial is one process, not {nproc}; for several trials at once: --workers {nproc} --nproc 1"
        )
    refused = ("epochs", "patience", "min_delta") if protocol == "passes" else ("passes",)
    for option in refused:
        if not is_default(option):
            raise UsageError(f"--{option.replace('_', '-')} has no meaning with --protocol {protocol}; leave it out")
    start = resolve(algorithm_name, dataset, network, preset=preset, task=task, seed=seed, device=device, energy=energy)
    given = parse_settings(settings, start.algorithm)
    for searched in ("lr", "weight_decay", "dropout"):
        if searched in given and is_given(searched):
            option = f"--{searched.replace('_', '-')}"
            raise UsageError(f"--set fixes {searched}, so that {option} has nothing to search; leave one of them out")
    fixed = {**usual_training(start.task), **{key: value for key, value in training.items() if value is not None}}
    if protocol == "convergence":
        fixed.update(epochs=epochs, patience=patience)
    # of a preset only what is the rule's own: how to train is the same for every rule
    base = replace(start, parameters={**start.parameters, **given}, training=training_config(fixed))
    space = SharedSpace(
        lr=lr,
        weight_decay=weight_decay,
        lr_schedules=tuple(lr_schedules.split(",")),
        batch_sizes=_sizes(batch_sizes),
        dropout=dropout,
        passes=passes if protocol == "passes" else None,
    )
    loaded = runs.load_dataset(base.dataset, data_root, download=download)
    config = TuneConfig(
        name=name or study_name(base, convergence=protocol == "convergence", pareto=pareto, target=target),
        base=base,
        shared=space,
        given=given,
        trials=trials,
        pareto=pareto,
        target=target,
        pruner=pruner or ("median" if target is None and not pareto else "none"),
    )
    if not is_default("batch_sizes") and (dropped := set(space.batch_sizes) - set(_fitting(config, loaded))):
        raise UsageError(f"batches of {min(dropped)} do not fit the training set of {base.dataset} twice")
    if not is_default("dropout") and fit_space(space, base, loaded).dropout is None:
        raise UsageError(f"{base.network} has no dropout layer; leave out --dropout")
    record = tune(
        config,
        results,
        dataset=loaded,
        storage=storage,
        workers=workers,
        apart=nproc is not None,
        observer=TuningConsole(quiet=quiet),
    )
    click.echo(json.dumps(record, ensure_ascii=False) if form == "json" else _report(record, base.metric))


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise UsageError(f"--batch-sizes takes whole numbers like 64,128, got {text!r}") from None


def _fitting(config: TuneConfig, dataset: Any) -> tuple[int, ...]:
    return fit_space(config.shared, config.base, dataset).batch_sizes


def _report(record: Mapping[str, Any], metric: str) -> str:
    """The best trial, the front if joules are an objective, what tuning cost, and how to use the result."""
    best, spent = record["best"], record["bill"]
    shown = [record["trials"][number] for number in record["front"]] or [best]
    joules = "joules not measured" if spent["gross_j"] is None else f"{spent['gross_j']:.0f} J ({spent['method']})"
    folder = Path(record["folder"])
    lines = [
        text_table([_row(trial, metric) for trial in shown]),
        f"{count_of(spent['trials'], 'trial')} ({spent['finished']} finished, {spent['pruned']} pruned, "
        f"{spent['failed']} failed), {count_of(spent['passes'], 'pass')}, {spent['seconds']:.1f} s, {joules}",
        *(shlex.join(["bpfree", "run", "--preset", str(folder / preset)]) for preset in record["presets"]),
        "The best of many trials of one seed looks better than it is; to report, run fresh seeds of all arms:",
        _confirmation(record, folder / record["presets"][0]),
    ]
    return "\n".join(lines)


def _confirmation(record: Mapping[str, Any], preset: Path) -> str:
    """The command that compares what was found with another arm, on seeds that no study has seen."""
    algorithm, settings = record["algorithm"], record["settings"]
    other = "mf" if algorithm == "bp" else "bp"
    path = f'"{preset}"' if re.search(r"[\s,:]", str(preset)) else preset
    command = shlex.join(["bpfree", "compare", "--algos", f"{algorithm}@{path},{other}@ITS_PRESET"])
    command += " --protocol own" if settings["shared"]["passes"] is None else " --protocol tuned"
    return command + ("" if settings["target"] is None else f" --target {settings['target']:g}")


def _row(trial: Mapping[str, Any], metric: str) -> dict[str, str]:
    values = dict(trial["values"])
    planned = values.pop("passes", trial["passes"])
    return {
        "trial": str(trial["number"]),
        f"validation {metric}, %": f"{trial['validation_accuracy']:.2f}",
        "passes": str(trial["passes"]) if planned == trial["passes"] else f"{trial['passes']} of {planned}",
        "time, s": f"{trial['seconds']:.1f}",
        "energy, J": "not measured" if trial["gross_j"] is None else f"{trial['gross_j']:.0f}",
        **{name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in values.items()},
    }
