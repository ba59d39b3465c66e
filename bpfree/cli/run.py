"""`bpfree run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bpfree.algorithms.learner import TASKS, Task
from bpfree.cli.base import ENVIRONMENT_NOTE, EXIT_NOTE, Command, data_option, format_option, is_default, refuse_others
from bpfree.cli.training import training_options
from bpfree.console import Console, energy_words
from bpfree.energy import KINDS
from bpfree.experiments.config import RunConfig, parse_settings, resolve, training_config

EXIT_TARGET_MISSED = 3
INFERENCE_ACCURACY = " inference accuracy"  # ends the name of a diagnostic that is another way to answer


@click.command(cls=Command, epilog=ENVIRONMENT_NOTE + "\n\n" + EXIT_NOTE)
@click.option("--algo", "-a", "algorithm_name", help="Learning rule, by its short or long name.  [default: mf]")
@click.option("--dataset", "-d", help="Data set.  [default: digits, which is packaged]")
@click.option("--network", "-n", help="Network, such as mlp:2x1000 or cnn:mf.  [default: the preset's]")
@click.option(
    "--task",
    type=click.Choice(TASKS),
    help="Tell classes apart (or links of graphs), or reconstruct images.  [default: classify]",
)
@click.option(
    "--preset",
    help="Start from this preset, by name or as a .toml file; 'none' for the rule's defaults.  "
    "[default: the one that fits]",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a parameter of the rule (repeatable).")
@click.option(
    "--seed", "seeds", type=click.IntRange(min=0), multiple=True, default=(0,), help="Seed; repeat it for several runs."
)
@click.option(
    "--passes", type=click.IntRange(min=1), help="Train for exactly this many data passes, without early stopping."
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
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results/runs"),
    help="Where run folders are made.",
)
@click.option("--keep-model/--no-keep-model", default=True, help="Keep the trained weights in the run folder.")
@click.option(
    "--target-accuracy", type=click.FloatRange(0, 100), help="Exit with code 3 if test accuracy (%) is lower."
)
@click.option(
    "--resume",
    "resumed",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="RUN",
    help="Go on with an interrupted run folder.",
)
@click.option(
    "--config", "config_file", type=click.Path(dir_okay=False, path_type=Path), help="Repeat the run of a config.json."
)
@click.option("--download/--no-download", default=True, help="Fetch the data set if it is not there.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
@data_option
@format_option("table", "json")
def run(
    algorithm_name: str | None,
    dataset: str | None,
    network: str | None,
    task: Task | None,
    preset: str | None,
    settings: tuple[str, ...],
    seeds: tuple[int, ...],
    device: str,
    energy: str,
    idle_seconds: float,
    carbon: str | None,
    results: Path,
    keep_model: bool,
    target_accuracy: float | None,
    resumed: Path | None,
    config_file: Path | None,
    download: bool,
    quiet: bool,
    data_root: Path | None,
    form: str,
    **training: Any,
) -> None:
    """Train a network with a learning rule, test it, and record the run.

    \b
    bpfree run --algo mf --dataset cifar10
    bpfree run --algo mf --dataset mnist --network mlp:2x1000 --epochs 10 --set lr=5e-4
    bpfree run --algo ccl --task autoencode --dataset cifar10
    bpfree run --preset mono_forward-cifar10 --seed 1 --seed 2 --seed 3
    bpfree run --resume results/runs/cifar10-mf-...

    A preset with the hyperparameters of a paper or of our tuning is taken when one fits the rule, the data set and
    the network; options override it. `bpfree tune` writes presets of your own. Parameters of a rule are listed by
    `bpfree list algorithms --format json`.
    """
    from bpfree.experiments import run as runs

    console = Console(quiet=quiet)
    options: dict[str, Any] = {
        "data_root": data_root,
        "reporter": console,
        "keep_model": keep_model,
    }
    if resumed is not None:
        refuse_others(
            "--resume", allowed={"resumed", "target_accuracy", "data_root", "keep_model", "carbon", "quiet", "form"}
        )
        summaries = [runs.resume(resumed, measuring=runs.Measuring(carbon=carbon), **options)]
        _print_summary(summaries[0], form)
    else:
        given = {name: value for name, value in training.items() if value is not None}
        if config_file is not None:
            refuse_others("--config", refused={"algorithm_name", "dataset", "network", "task", "preset"})
            start = RunConfig.read(config_file)
            config = replace(
                start,
                training=training_config({**vars(start.training), **given}),
                parameters={**start.parameters, **parse_settings(settings, start.algorithm)},
                device=start.device if is_default("device") else device,
                energy=start.energy if is_default("energy") else energy,
            )
            seeds = (start.seed,) if is_default("seeds") else seeds
        else:
            rule = algorithm_name or (None if preset not in (None, "none") else "mf")
            named = rule or _preset_rule(str(preset))
            config = resolve(
                rule,
                dataset,
                network,
                preset=preset,
                parameters=parse_settings(settings, named),
                training=given,
                device=device,
                energy=energy,
                task=task,
            )
        loaded = runs.load_dataset(config.dataset, data_root, download=download)
        idle_w = runs.measure_idle(config, idle_seconds) if idle_seconds else ()
        summaries = []
        for seed in seeds:
            measuring = runs.Measuring(idle_w, idle_seconds, carbon)
            summaries.append(
                runs.run(replace(config, seed=seed), results, dataset=loaded, measuring=measuring, **options)
            )
            if idle_seconds:  # after this run is before the next
                idle_w = tuple(summaries[-1]["energy"]["source"]["idle_w"][-1:])
            _print_summary(summaries[-1], form)
    worst = min(summary["test_accuracy"] for summary in summaries)
    if target_accuracy is not None and worst < target_accuracy:
        click.echo(f"bpfree: test accuracy {worst:.2f} % is below the target of {target_accuracy:g} %", err=True)
        sys.exit(EXIT_TARGET_MISSED)


def _preset_rule(name: str) -> str:
    return resolve(preset=name).algorithm


def _print_summary(summary: Mapping[str, Any], form: str) -> None:
    if form == "json":
        click.echo(json.dumps(summary, ensure_ascii=False))
        return
    rule = summary["algorithm"] + (f" ({summary['variant']})" if summary["variant"] else "")
    click.echo(
        f"{summary['dataset']} {summary['network']} {rule} seed {summary['seed']}: "
        f"test {_error_words(summary)}{summary['metric']} {summary['test_accuracy']:.2f} %"
        f"{_inference_words(summary['test_diagnostics'])}, "
        f"{summary['passes']} passes, "
        f"{summary['seconds']:.1f} s, "
        f"{energy_words(summary['energy'])}{_carbon_words(summary.get('carbon'))}, "
        f"peak memory {summary['peak_memory_mib']:.0f} MiB -> {summary['run_dir']}"
    )


def _error_words(summary: Mapping[str, Any]) -> str:
    """The error of reconstructions, which is what one wants to know of them."""
    return f"{summary['criterion']} {summary['test_loss']:.5f}, " if summary.get("task") == "autoencode" else ""


def _inference_words(diagnostics: Mapping[str, float]) -> str:
    """The accuracy of every way of inference, where a rule has several."""
    ways = {name: value for name, value in diagnostics.items() if name.endswith(INFERENCE_ACCURACY)}
    words = (f"{name.removesuffix(INFERENCE_ACCURACY)} {value:.2f} %" for name, value in ways.items())
    return f" ({', '.join(words)})" if ways else ""


def _carbon_words(carbon: Mapping[str, Any] | None) -> str:
    if carbon is None:
        return ""
    if carbon["g_co2e"] is None:
        unknown = [name for name, part in carbon["parts"].items() if part["how"] == "not measured"]
        return f", CO2e not known ({', '.join(unknown)} not measured)"
    how = "; ".join(f"{name} {part['how']}" for name, part in carbon["parts"].items())
    return f", {carbon['g_co2e']:.3g} g CO2e ({how}; {carbon['intensity']['country']})"
