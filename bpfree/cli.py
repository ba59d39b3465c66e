"""The `bpfree` command: parse, call, print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from bpfree import __version__, data
from bpfree.algorithms import ALGORITHMS
from bpfree.console import Console, energy_words
from bpfree.data.batches import AUGMENTATIONS
from bpfree.energy import KINDS
from bpfree.errors import BpfreeError, UsageError
from bpfree.experiments.config import RunConfig, parse_settings, presets, resolve, training_config
from bpfree.experiments.schedules import SCHEDULES
from bpfree.experiments.stepper import PRECISIONS
from bpfree.experiments.tables import COLUMNS, markdown_table, readable, result_rows, text_table
from bpfree.experiments.train import MONITORS, SPLITS
from bpfree.networks import describe_networks

EXIT_TARGET_MISSED = 3
ENVIRONMENT_NOTE = (
    "Every option can also be given as an environment variable BPFREE_COMMAND_OPTION, such as "
    "BPFREE_RUN_EPOCHS=10; BPFREE_DATA names the folder of the data sets."
)
EXIT_NOTE = "Exit codes: 0 done, 1 failure, 2 usage, 3 target accuracy missed."


def _fail(error: BpfreeError) -> NoReturn:
    click.echo(f"bpfree: error: {error}", err=True)
    sys.exit(error.exit_code)


class _Command(click.Command):
    """A command whose errors are one line; `--debug` shows where they came from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the stack trace of an error."))

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if parent is not None and parent.auto_envvar_prefix and info_name:
            for option in self.params:  # click would take the variable's name from the function's argument
                if isinstance(option, click.Option) and option.envvar is None:
                    words = (parent.auto_envvar_prefix, info_name, max(option.opts, key=len).lstrip("-"))
                    option.envvar = "_".join(words).upper().replace("-", "_")
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, context: click.Context) -> Any:
        debug = context.params.pop("debug")
        try:
            return super().invoke(context)
        except BpfreeError as error:
            if debug:
                raise
            _fail(error)


class _Group(click.Group):
    command_class = _Command


@click.group(
    cls=_Group,
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
    bpfree list                                 algorithms, data sets, networks, presets
    bpfree table results                        accuracy, time and joules of all recorded runs
    """
    if os.environ.get("NO_COLOR"):  # https://no-color.org; click itself only looks for a terminal
        context.color = False


def _format_option(*choices: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--format", "form", type=click.Choice(choices), default=choices[0], help="How to print the result."
    )


def _data_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--data",
        "data_root",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="BPFREE_DATA",
        show_envvar=True,
        show_default="a folder in the user's cache",
        help="Folder of the data sets.",
    )(function)


@cli.command(epilog=ENVIRONMENT_NOTE + "\n\n" + EXIT_NOTE)
@click.option("--algo", "-a", "algorithm_name", help="Learning rule, by its short or long name.  [default: mf]")
@click.option("--dataset", "-d", help="Data set.  [default: digits, which is packaged]")
@click.option("--network", "-n", help="Network, such as mlp:2x1000 or cnn:mf.  [default: the preset's]")
@click.option("--preset", help="Start from this preset; 'none' for the rule's defaults.  [default: the one that fits]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a parameter of the rule (repeatable).")
@click.option(
    "--seed", "seeds", type=click.IntRange(min=0), multiple=True, default=(0,), help="Seed; repeat it for several runs."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Cap on epochs per stage.  [default: 100]")
@click.option(
    "--patience", type=click.IntRange(min=1), help="Epochs without improvement that end a stage.  [default: 20]"
)
@click.option("--min-delta", type=click.FloatRange(min=0), help="What counts as improvement.  [default: 0]")
@click.option(
    "--passes", type=click.IntRange(min=1), help="Train for exactly this many data passes, without early stopping."
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples per step.  [default: 128]")
@click.option("--lr-schedule", type=click.Choice(SCHEDULES), help="Learning-rate schedule.  [default: constant]")
@click.option("--warmup-epochs", type=click.FloatRange(min=0), help="Linear learning-rate warm-up.  [default: 0]")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Arithmetic of matrix products.  [default: tf32]")
@click.option("--augmentation", type=click.Choice(AUGMENTATIONS), help="Augmentation.  [default: the data set's own]")
@click.option("--validation", type=click.IntRange(min=1), help="Validation samples.  [default: the data set's own]")
@click.option("--monitor", type=click.Choice(MONITORS), help="What validation wants better.  [default: loss]")
@click.option("--split", type=click.Choice(SPLITS), help="Graphs: which split.  [default: the graph's own]")
@click.option("--validate-every", type=click.IntRange(min=1), help="Graphs: steps between validations.  [default: 2]")
@click.option(
    "--reveal-validation/--no-reveal-validation",
    default=None,
    help="Graphs: show validation labels to the rule at test.  [default: no-reveal-validation]",
)
@click.option("--graph/--no-graph", default=None, help="CUDA graphs for training steps.  [default: graph]")
@click.option(
    "--checkpoint-every",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Time between checkpoints.  [default: 60]",
)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--energy", type=click.Choice(KINDS), default="auto", help="Where joules come from.")
@click.option(
    "--idle-seconds",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Measure the idle device this long before the first run, for net joules; 10 or more.",
)
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
@_data_option
@_format_option("table", "json")
def run(
    algorithm_name: str | None,
    dataset: str | None,
    network: str | None,
    preset: str | None,
    settings: tuple[str, ...],
    seeds: tuple[int, ...],
    device: str,
    energy: str,
    idle_seconds: float,
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
    bpfree run --preset mono_forward-cifar10 --seed 1 --seed 2 --seed 3
    bpfree run --resume results/runs/cifar10-mf-...

    A preset with the hyperparameters of a paper or of our tuning is taken when one fits the rule, the data set and
    the network; options override it. Parameters of a rule are listed by `bpfree list algorithms --format json`.
    """
    from bpfree.experiments import run as runs

    console = Console(quiet=quiet)
    options: dict[str, Any] = {
        "data_root": data_root,
        "reporter": console,
        "keep_model": keep_model,
    }
    if resumed is not None:
        _refuse_others("--resume", allowed={"resumed", "target_accuracy", "data_root", "keep_model", "quiet", "form"})
        summaries = [runs.resume(resumed, **options)]
        _print_summary(summaries[0], form)
    else:
        given = {name: value for name, value in training.items() if value is not None}
        if config_file is not None:
            _refuse_others("--config", refused={"algorithm_name", "dataset", "network", "preset"})
            start = RunConfig.read(config_file)
            config = replace(
                start,
                training=training_config({**vars(start.training), **given}),
                parameters={**start.parameters, **parse_settings(settings, start.algorithm)},
                device=start.device if _is_default("device") else device,
                energy=start.energy if _is_default("energy") else energy,
            )
            seeds = (start.seed,) if _is_default("seeds") else seeds
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
            )
        loaded = runs.load_dataset(config.dataset, data_root, download=download)
        idle_w = runs.measure_idle(config, idle_seconds) if idle_seconds else ()
        summaries = []
        for seed in seeds:
            summaries.append(runs.run(replace(config, seed=seed), results, dataset=loaded, idle_w=idle_w, **options))
            _print_summary(summaries[-1], form)
    worst = min(summary["test_accuracy"] for summary in summaries)
    if target_accuracy is not None and worst < target_accuracy:
        click.echo(f"bpfree: test accuracy {worst:.2f} % is below the target of {target_accuracy:g} %", err=True)
        sys.exit(EXIT_TARGET_MISSED)


def _is_default(parameter: str) -> bool:
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.DEFAULT


def _refuse_others(
    option: str, *, allowed: AbstractSet[str] = frozenset(), refused: AbstractSet[str] = frozenset()
) -> None:
    """Refuse options that `option` would have to ignore: those in `refused`, or else all but those in `allowed`.

    Variables of the environment may stay set.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        ignored = name in refused if refused else name not in allowed
        if ignored and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{option} takes the run as it was recorded; leave out {max(parameter.opts, key=len)}")


def _preset_rule(name: str) -> str:
    return resolve(preset=name).algorithm


def _print_summary(summary: Mapping[str, Any], form: str) -> None:
    if form == "json":
        click.echo(json.dumps(summary, ensure_ascii=False))
        return
    rule = summary["algorithm"] + (f" ({summary['variant']})" if summary["variant"] else "")
    click.echo(
        f"{summary['dataset']} {summary['network']} {rule} seed {summary['seed']}: "
        f"test {summary['metric']} {summary['test_accuracy']:.2f} %, {summary['passes']} passes, "
        f"{summary['seconds']:.1f} s, {energy_words(summary['energy'])}, "
        f"peak memory {summary['peak_memory_mib']:.0f} MiB -> {summary['run_dir']}"
    )


KINDS_OF_THINGS = ("algorithms", "datasets", "networks", "presets")


@cli.command("list")
@click.argument("kinds", nargs=-1, type=click.Choice(KINDS_OF_THINGS))
@_format_option("table", "json")
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


@cli.command()
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("results"))
@click.option("--columns", metavar="A,B,..", help="Columns to show, in this order (not for json).  [default: all]")
@_format_option("table", "markdown", "json")
def table(root: Path, columns: str | None, form: str) -> None:
    """Show the runs recorded under ROOT, one row per configuration, over its seeds."""
    rows = result_rows(root)
    if form == "json":
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    shown = readable(rows, columns.split(",") if columns else tuple(COLUMNS))
    click.echo(text_table(shown) if form == "table" else markdown_table(shown))


@cli.group("data", cls=_Group)
def data_group() -> None:
    """Fetch, check and find data sets."""


@data_group.command()
@click.argument("names", nargs=-1, required=True)
@_data_option
def fetch(names: tuple[str, ...], data_root: Path | None) -> None:
    """Download data sets from their official hosts, and check them."""
    for name in names:
        click.echo(f"{data.info(name).name}: {data.fetch(name, data_root)}")


@data_group.command()
@click.argument("names", nargs=-1)
@_data_option
@_format_option("table", "json")
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
@_data_option
def show_path(name: str | None, data_root: Path | None) -> None:
    """Print where a data set is or would be; without NAME the folder of all data sets."""
    click.echo(data.data_root(data_root) if name is None else data.path(name, data_root))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `bpfree` command."""
    cli.main(args=None if arguments is None else list(arguments), prog_name="bpfree")
