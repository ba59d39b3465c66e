"""`bpfree audit`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
from tqdm import tqdm

from bpfree.algorithms import ALGORITHMS
from bpfree.algorithms.audit import STEPS, Audit
from bpfree.algorithms.learner import Task
from bpfree.cli.base import ENVIRONMENT_NOTE, Command, data_option, format_option, subject_options
from bpfree.errors import BpfreeError, UsageError
from bpfree.experiments.audit import BATCH_SIZE, WARM_UP, audit_run, usual_config
from bpfree.experiments.config import RunConfig, named_preset, parse_settings, resolve
from bpfree.experiments.run import load_dataset
from bpfree.experiments.tables import csv_table, markdown_table, text_table

EXIT_DIFFERS = 1
EXIT_NOTE = "Exit codes: 0 every rule does what it declares and no more, 1 one does not, 2 usage."


class Finding(NamedTuple):
    """What was audited, and what was found."""

    config: RunConfig
    found: Audit


@click.command(cls=Command, epilog=ENVIRONMENT_NOTE + "\n\n" + EXIT_NOTE)
@click.option(
    "--algo",
    "-a",
    "rules",
    multiple=True,
    help="Learning rule, by its short or long name (repeatable).  [default: all, or the preset's]",
)
@subject_options
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the network, the batches and the noise.")
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, help="Steps that are watched.")
@click.option("--warm-up", type=click.IntRange(min=1), default=WARM_UP, help="Steps before them.")
@click.option("--batch-size", type=click.IntRange(min=1), default=BATCH_SIZE, help="Samples per step.")
@click.option("--device", default="cpu", help="auto, cpu, cuda or cuda:N.")
@click.option("--download/--no-download", default=True, help="Fetch the data set if it is not there.")
@data_option
@format_option("table", "markdown", "csv", "json")
def audit(
    rules: tuple[str, ...],
    dataset: str | None,
    network: str | None,
    task: Task | None,
    preset: str | None,
    settings: tuple[str, ...],
    seed: int,
    steps: int,
    warm_up: int,
    batch_size: int,
    device: str,
    download: bool,
    data_root: Path | None,
    form: str,
) -> None:
    """Show on which later blocks the update of each block depends, and whether the rule declares it.

    \b
    bpfree audit                                            every rule on packaged data
    bpfree audit --algo mf --network mlp:4x100              one rule, with the matrix of its blocks
    bpfree audit --algo bp --algo dfa --algo mf --network mlp:4x100
    bpfree audit --algo man --dataset cifar10 --network resnet:32 --set k=4
    bpfree audit --algo ccl --network mlp-elu:3x100 --set clip_scope=network --format json

    Found by trying: after some steps of warm-up, the next steps are taken from the same state, on the same batches and
    with the same random numbers, once as they are and once for every block with noise on its weights. Where gradients
    or weights of another block are then other bits, its update depends on that block. On blocks before it every block
    depends, since they make its inputs. On blocks behind it a local rule must not. Without data set, network, task and
    preset, each rule takes the first packaged data set that its usual network fits.

    \b
    declared   how far a gradient travels, as the rule says: within a layer, a block, or through the network
    measured   how far an update depends on what is behind it, within the step
    reach      on how many blocks behind it; "later" counts what arrives in the steps after
    channels   what carries it: a gradient, or what the rule declares, such as the feedback stream of ccl

    A dependence that neither locality nor channels allow makes the exit code 1 (docs/auditing.md).
    """
    rules = rules or ((named_preset(preset).algorithm,) if preset not in (None, "none") else ())
    free = dataset is network is task is None and preset in (None, "none")

    def finding(rule: str) -> Finding | BpfreeError:
        options: dict[str, Any] = {"preset": preset, "seed": seed, "device": device}
        try:
            options["parameters"] = parse_settings(settings, rule)
            config = usual_config(rule, **options) if free else resolve(rule, dataset, network, task=task, **options)
            loaded = load_dataset(config.dataset, data_root, download=download)
            config = replace(config, dataset=loaded.name)
            return Finding(config, audit_run(config, loaded, steps=steps, warm_up=warm_up, batch_size=batch_size))
        except BpfreeError as error:
            if rules:
                raise
            return error  # of all rules, those that fit are asked for

    every = list(rules or (entry.alias for entry in ALGORITHMS))
    results = {rule: finding(rule) for rule in tqdm(every, unit="rule", disable=None if len(every) > 1 else True)}
    findings = [result for result in results.values() if isinstance(result, Finding)]
    refused = {rule: result for rule, result in results.items() if isinstance(result, BpfreeError)}
    if not findings:
        raise next(iter(refused.values()))
    click.echo("\n".join(_report(findings, form, warm_up)))
    for rule, error in refused.items():
        click.echo(f"bpfree: {rule} is left out: {error}", err=True)
    differing = [one.config.algorithm for one in findings if not one.found.agrees]
    if differing:
        click.echo(f"bpfree: not what is declared, of {len(findings)} audited: {', '.join(differing)}", err=True)
    if differing or not all(isinstance(error, UsageError) for error in refused.values()):
        sys.exit(EXIT_DIFFERS)


def _report(findings: list[Finding], form: str, warm_up: int) -> Iterator[str]:
    """What is printed, piece by piece."""
    if form == "json":
        yield json.dumps([_described(one) for one in findings], indent=1)
        return
    table = {"table": text_table, "markdown": markdown_table, "csv": csv_table}[form]
    yield table([_cells(one) for one in findings])
    if form == "csv":
        return
    faults = [f"{one.config.algorithm}: {fault}" for one in findings for fault in one.found.faults]
    if faults:
        yield from ("", *faults)
    if len(findings) == 1:
        found = findings[0].found
        yield from ("", table(_matrix(found)), "", _legend(found, warm_up))
        yield from (f"Channel {channel.name}: {channel.carries}." for channel in found.channels)


def _described(one: Finding) -> dict[str, Any]:
    """A finding with what follows from it, as plain values."""
    config, found = one
    derived = ("measured", "reach", "late_reach", "upward", "unexplained", "faults", "agrees")
    return {
        "algorithm": config.algorithm,
        "dataset": config.dataset,
        "network": config.network,
        "preset": config.preset,
        "parameters": config.parameters,
        "seed": config.seed,
        **asdict(found),
        **{name: getattr(found, name) for name in derived},
    }


def _cells(one: Finding) -> dict[str, str]:
    config, found = one
    later = f", later {found.late_reach}" if found.late_reach > found.reach else ""
    return {
        "rule": config.algorithm,
        "data set": config.dataset,
        "network": config.network,
        "blocks": str(len(found.trained)),
        "declared": found.locality,
        "measured": found.measured,
        "reach": f"{found.reach}{later}",
        "channels": ", ".join(["gradient"] * bool(found.entered) + [channel.name for channel in found.channels]),
        "verdict": _verdict(found),
    }


def _verdict(found: Audit) -> str:
    if not found.agrees:
        return "NOT as declared"
    return "as declared, by channel" if found.upward and found.locality != "network" else "as declared"


def _matrix(found: Audit) -> list[dict[str, str]]:
    """A row for each block and other part that learns, a column for each block."""
    undeclared = {(one.block, one.on) for one in found.unexplained}
    rows = [(f"block {index}", changes) for index, changes in enumerate(found.first_changes)]
    return [
        {
            "update of": name,
            **{
                str(on): ("." if step is None else str(step)) + "!" * ((index, on) in undeclared)
                for on, step in enumerate(changes)
            },
        }
        for index, (name, changes) in enumerate([*rows, *found.parts.items()])
    ]


def _legend(found: Audit, warm_up: int) -> str:
    return (
        f"Columns: the block with noise on it. A number: the first step, behind {warm_up} of warm-up, in which the\n"
        f"noise changed the update of the row; a dot: in none of {found.steps}. Right of the diagonal an update\n"
        "depends on a later block; ! marks what is not declared."
    )
