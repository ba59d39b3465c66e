"""`bpfree run`."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from bpfree.algorithms.learner import Task
from bpfree.cli.base import (
    ENVIRONMENT_NOTE,
    EXIT_NOTE,
    Command,
    data_option,
    format_option,
    is_default,
    refuse_idle_measurement,
    refuse_others,
    subject_options,
)
from bpfree.cli.launch import one_voice, start_ranks, stop_with_launcher
from bpfree.cli.training import training_options
from bpfree.console import Console, energy_words
from bpfree.energy import KINDS
from bpfree.errors import UsageError
from bpfree.experiments.config import RunConfig, overridden, parse_settings, resolve, training_config
from bpfree.parallel import FORMS, Ranks, Spread, launched
from bpfree.parallel.ranks import TIMEOUT_S
from bpfree.words import count_of

EXIT_TARGET_MISSED = 3
OF_RANKS = ("nproc", "nnodes", "rdzv_endpoint", "form_of_ranks", "cut", "mesh", "rank_timeout")
INFERENCE_ACCURACY = " inference accuracy"  # ends the name of a diagnostic that is another way to answer


@click.command(cls=Command, epilog=ENVIRONMENT_NOTE + "\n\n" + EXIT_NOTE)
@click.option("--algo", "-a", "algorithm_name", help="Learning rule, by its short or long name.  [default: mf]")
@subject_options
@click.option(
    "--seed", "seeds", type=click.IntRange(min=0), multiple=True, default=(0,), help="Seed; repeat it for several runs."
)
@click.option(
    "--passes",
    type=click.IntRange(min=1),
    help="Train for this many data passes, without early stopping; stages share them equally, rounded up.",
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
    "--target-accuracy",
    type=click.FloatRange(0, 100),
    help="Exit with code 3 if test accuracy (or ROC-AUC, R2), %, is lower.",
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
@click.option(
    "--nproc",
    type=click.IntRange(min=1),
    help="Train on this many processes of this machine, one per GPU; see --parallel.  [default: 1]",
)
@click.option("--nnodes", default="1", metavar="N", help="Machines, each with --nproc processes, as torchrun takes it.")
@click.option(
    "--rdzv-endpoint", metavar="HOST:PORT", help="Where machines meet; the same command is given on each of them."
)
@click.option(
    "--parallel",
    "form_of_ranks",
    type=click.Choice(FORMS),
    help="What each process does: 'layer', consecutive blocks that hand activations on, with the weights of one "
    "process; 'block', blocks that need nothing from each other (NoProp-DT, CaFo); 'data', a part of every batch; "
    "'layer,data', both.",
)
@click.option(
    "--cut", metavar="3,7", help="The last block of each process, from 0.  [default: balanced by measured time]"
)
@click.option("--mesh", metavar="LxD", help="With --parallel layer,data: L runs of blocks times D parts of a batch.")
@click.option(
    "--rank-timeout",
    type=click.FloatRange(min=1),
    default=TIMEOUT_S,
    metavar="SECONDS",
    help="A process that does not answer for so long ends the run on all of them (30 s later at most).",
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
    nproc: int | None,
    nnodes: str,
    rdzv_endpoint: str | None,
    form_of_ranks: str | None,
    cut: str | None,
    mesh: str | None,
    rank_timeout: float,
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
    bpfree run --algo mf --network mlp:16x8192 --nproc 2 --parallel layer

    With --nproc, torchrun starts the processes (or start them yourself: torchrun -m bpfree run ...). Which rule can be
    spread in which way, and what is exact, is in docs/scaling.md.

    A preset with the hyperparameters of a paper or of our tuning is taken when one fits the rule, the data set and
    the network; options override it. `bpfree tune` writes presets of your own. Parameters of a rule are listed by
    `bpfree list algorithms --format json`.
    """
    from bpfree.experiments import run as runs

    if nproc is None and not launched():
        elsewhere = {"--nnodes": None if nnodes == "1" else nnodes, "--rdzv-endpoint": rdzv_endpoint}
        for option, value in {"--parallel": form_of_ranks, "--cut": cut, "--mesh": mesh, **elsewhere}.items():
            if value is not None:
                raise UsageError(f"{option} spreads a run over processes; say how many with --nproc")
    _refuse_two_lengths(training)
    spread = _spread(nproc, nnodes, form_of_ranks, cut, mesh, device, seeds)
    if spread is not None and not launched():
        start_ranks(nproc or 1, nnodes, rdzv_endpoint)
    with ExitStack() as stack:
        together = None
        if spread is not None:
            launcher = stop_with_launcher()
            ranks = Ranks(device, timeout_s=rank_timeout)
            stack.enter_context(one_voice(ranks, launcher))
            together = runs.Together(ranks, spread)
        leader = together is None or together.ranks.rank == 0
        options: dict[str, Any] = {
            "data_root": data_root,
            "reporter": Console(quiet=quiet) if leader else None,
            "keep_model": keep_model,
            "together": together,
        }
        if resumed is not None:
            refuse_others(
                "--resume",
                allowed={"resumed", "target_accuracy", "data_root", "keep_model", "carbon", "quiet", "form", *OF_RANKS},
            )
            summaries = [runs.resume(resumed, measuring=runs.Measuring(carbon=carbon), **options)]
            if leader:
                _print_summary(summaries[0], form)
        else:
            given = {name: value for name, value in training.items() if value is not None}
            if config_file is not None:
                refuse_others("--config", refused={"algorithm_name", "dataset", "network", "task", "preset"})
                start = RunConfig.read(config_file)
                config = replace(
                    start,
                    training=training_config(overridden(vars(start.training), given)),
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
            refuse_idle_measurement(config.energy, idle_seconds)
            loaded = _loaded(config.dataset, data_root, download, together)
            device_of_rank = None if together is None else together.ranks.device
            idle_w = runs.measure_idle(config, idle_seconds, device_of_rank) if idle_seconds else ()
            summaries = []
            for seed in seeds:
                measuring = runs.Measuring(idle_w, idle_seconds, carbon)
                summaries.append(
                    runs.run(replace(config, seed=seed), results, dataset=loaded, measuring=measuring, **options)
                )
                if not leader:
                    continue
                if idle_seconds:  # after this run is before the next
                    idle_w = tuple(summaries[-1]["energy"]["source"]["idle_w"][-1:])
                _print_summary(summaries[-1], form)
        if not leader:
            return
        worst = min(summary["test_accuracy"] for summary in summaries)
        if target_accuracy is not None and worst < target_accuracy:
            metric = summaries[0].get("metric", "accuracy")
            click.echo(f"bpfree: test {metric} {worst:.2f} % is below the target of {target_accuracy:g} %", err=True)
            sys.exit(EXIT_TARGET_MISSED)


def _refuse_two_lengths(training: Mapping[str, Any]) -> None:
    """Refuse options that a fixed number of data passes leaves without a meaning.

    Raises:
        UsageError: there are some.
    """
    for option in ("epochs", "patience") if training["passes"] is not None else ():
        if training[option] is not None:
            raise UsageError(f"--passes says how long to train, whatever --{option} is; leave one of them out")


def _spread(
    nproc: int | None,
    nnodes: str,
    form: str | None,
    cut: str | None,
    mesh: str | None,
    device: str,
    seeds: tuple[int, ...],
) -> Spread | None:
    """How the run is spread over processes; None for one process.

    Raises:
        UsageError: options that do not go together, before any process is started.
    """
    if nproc is None and not launched():
        return None
    # of several machines only torchrun knows how many have come
    count = int(os.environ["WORLD_SIZE"]) if launched() else nproc if nnodes == "1" else None
    if form is None:
        if count == 1:
            return None
        raise UsageError("say what each process does: --parallel layer, block or data (see docs/scaling.md)")
    if len(seeds) > 1:
        raise UsageError("processes that train together do one run at a time; give one --seed")
    if device not in {"auto", "cpu", "cuda"}:
        raise UsageError(f"each process takes a device of its own, so --device is auto, cpu or cuda, not {device}")
    boards = torch.cuda.device_count()
    if nproc is not None and device != "cpu" and (boards or device == "cuda") and nproc > boards:
        raise UsageError(f"{nproc} processes need {nproc} CUDA devices, and there are {boards}; use --device cpu")
    try:
        ends = tuple(int(end) for end in cut.split(",")) if cut else ()
        shape = tuple(int(size) for size in mesh.split("x")) if mesh else ()
    except ValueError:
        given = " and ".join(filter(None, (cut, mesh)))
        raise UsageError(f"--cut takes numbers of blocks such as 3,7, --mesh sizes such as 2x2; got {given}") from None
    spread = Spread(form, ends, shape)
    if shape and count is not None and math.prod(shape) != count:
        raise UsageError(f"a mesh of {mesh} has {math.prod(shape)} processes, and there are {count}")
    return spread


def _loaded(name: str, root: Path | None, download: bool, together: Any) -> Any:
    """The data set; of several processes one fetches it, before the others look."""
    from bpfree.experiments import run as runs

    if together is None:
        return runs.load_dataset(name, root, download=download)
    ranks: Ranks = together.ranks
    loaded = None
    if ranks.local_rank == 0:
        loaded = runs.load_dataset(name, root, download=download)
    ranks.of_all(None)  # a machine's first process has it by now
    return runs.load_dataset(name, root) if loaded is None else loaded


def _preset_rule(name: str) -> str:
    return resolve(preset=name).algorithm


def _print_summary(summary: Mapping[str, Any], form: str) -> None:
    if form == "json":
        click.echo(json.dumps(summary, ensure_ascii=False))
        return
    rule = summary["algorithm"] + (f" ({summary['variant']})" if summary["variant"] else "")
    click.echo(
        f"{summary['dataset']} {summary['network']} {rule} seed {summary['seed']}: "
        f"test {_error_words(summary)}{summary.get('metric', 'accuracy')} {summary['test_accuracy']:.2f} %"
        f"{_inference_words(summary['test_diagnostics'])}, "
        f"{count_of(summary['passes'], 'pass')}, "
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
