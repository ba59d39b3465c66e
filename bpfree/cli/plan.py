"""`bpfree plan`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from bpfree import data
from bpfree.algorithms import algorithm
from bpfree.cli.base import ENVIRONMENT_NOTE, EXIT_NOTE, Command, format_option, is_default, refuse_others
from bpfree.errors import UsageError, unknown_name
from bpfree.experiments.block_times import Subject, count, measure, read_measurements, read_profile, write_profile
from bpfree.experiments.config import DEFAULT_NETWORK, parse_settings
from bpfree.experiments.links import LINKS, Link
from bpfree.experiments.plan import (
    LAYER,
    PIPELINE,
    Comparison,
    Measurement,
    Prediction,
    Profile,
    compare,
    predict,
)
from bpfree.experiments.run import pick_device
from bpfree.experiments.stepper import PRECISIONS
from bpfree.experiments.tables import csv_table, markdown_table, text_table
from bpfree.networks.registry import canonical_name

MIB = 2**20
SUBJECT = frozenset({"algorithm_name", "network", "batch_size"})
SHAPES = frozenset({"settings", "dataset", "precision", "device"})
"""Options on what to measure; a record may leave some of the latter open."""


@click.command(cls=Command, epilog=ENVIRONMENT_NOTE + "\n\n" + EXIT_NOTE)
@click.option("--gpus", "-g", metavar="P,P,..", help="Numbers of GPUs to plan for, such as 8 or 1,2,4,8,64,1024.")
@click.option("--algo", "-a", "algorithm_name", default="mf", help="Learning rule, by its short or long name.")
@click.option("--network", "-n", default=DEFAULT_NETWORK, help="Network, such as mlp:16x8192 or resnet:110.")
@click.option(
    "--dataset",
    "-d",
    default="digits",
    help="Data set or folder:PATH[@SIZE], for shapes and classes only; it is not loaded.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, help="Samples per step of one replica.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a parameter of the rule (repeatable).")
@click.option("--precision", type=click.Choice(PRECISIONS), default="tf32", help="Arithmetic of matrix products.")
@click.option("--device", default="auto", help="What measures the blocks: auto, cpu, cuda or cuda:N.")
@click.option(
    "--times",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Measure nothing, and take the block times of this JSON file.",
)
@click.option(
    "--save-times",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the block times for --times, here or on a machine without a GPU.",
)
@click.option("--link", "link_name", default="nvlink4", help=f"What connects the GPUs: {', '.join(LINKS)}.")
@click.option("--bandwidth", type=float, metavar="GB/s", help="Of the link, in one direction.  [default: the link's]")
@click.option("--latency", type=float, metavar="US", help="Of a message, microseconds.  [default: the link's]")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=10_000,
    help="Steps of the run, which its one pipeline fill is part of.",
)
@click.option(
    "--microbatches",
    type=click.IntRange(min=1),
    help="Micro-batches of back-propagation's 1F1B.  [default: 4 per stage]",
)
@click.option(
    "--max-batch", type=click.IntRange(min=1), help="Leave out what needs more samples per step, all replicas together."
)
@click.option(
    "--compare",
    "record",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="RECORD",
    help="Print prediction and measurement of the steps in this JSON file instead.",
)
@format_option("table", "markdown", "csv", "json")
def plan(
    gpus: str | None,
    algorithm_name: str,
    network: str,
    dataset: str,
    batch_size: int,
    settings: tuple[str, ...],
    precision: str,
    device: str,
    times: Path | None,
    save_times: Path | None,
    link_name: str,
    bandwidth: float | None,
    latency: float | None,
    steps: int,
    microbatches: int | None,
    max_batch: int | None,
    record: Path | None,
    form: str,
) -> None:
    """Predict training on many GPUs from block times measured on one.

    \b
    bpfree plan --network mlp:8x1000 --gpus 4
    bpfree plan --network mlp:16x8192 --dataset cifar10 --batch-size 4096 --precision bf16 --gpus 1,2,4,8,64,1024
    bpfree plan --algo dgl --set k=16 --network resnet:110 --dataset cifar10 --link pcie5 --gpus 2,4,8
    bpfree plan --gpus 2 --save-times times.json          measure here,
    bpfree plan --times times.json --gpus 8,512           plan anywhere
    bpfree plan --compare record.json --link nvlink4      how wrong was it?

    Measured are the seconds that each block takes on this machine for one local step, and for one step of
    back-propagation. Everything else is a model of them and of the link (docs/planning.md has the formulas):

    \b
    layer          ranks own consecutive blocks, activations go one way, the pipeline fills once in a run
    data           replicas all-reduce their gradients on a ring, behind the computation or not
    layer x data   the best P = stages x replicas
    1f1b           back-propagation's pipeline, whose bubble (p-1)/(m+p-1) is part of every step

    Scaling is weak in replicas: --batch-size is that of each, and a step is one of all of them. Speed-up and
    efficiency are samples per second against one GPU with the same rule.
    """
    link = _link(link_name, bandwidth, latency)
    where = {"dataset": dataset, "precision": precision, "device": device}
    if times is not None:
        refuse_others("--times", refused=SUBJECT | SHAPES | {"save_times"})
    if record is not None:
        refuse_others("--compare", refused=SUBJECT | {"gpus", "steps", "max_batch", "save_times", "microbatches"})
        _compare(record, times, link, settings, where, form)
        return
    if gpus is None:
        raise UsageError("say how many GPUs to plan for: --gpus 8, or a list such as --gpus 1,2,4,8,64,1024")
    counts = _counts(gpus)
    if times is not None:
        profile = read_profile(times)
    else:
        profile = measure(_subject(algorithm_name, network, batch_size, settings, where))
        if save_times is not None:
            write_profile(profile, save_times)
    plans = {
        number: predict(
            profile, link, number, steps=steps, microbatches=microbatches or 0, largest_batch=max_batch or math.inf
        )
        for number in counts
    }
    every = [one for found in plans.values() for one in found]
    if form == "json":
        described = [_described(one) for one in every]
        click.echo(json.dumps({"profile": asdict(profile), "link": asdict(link), "plans": described}, indent=1))
        return
    for number, found in plans.items():
        if not found:
            click.echo(f"bpfree: {number} GPUs need more than {max_batch} samples per step in every form", err=True)
    if not every:
        raise UsageError("there is no plan to show; allow a larger --max-batch or fewer GPUs")
    rows = [_cells(one) for one in every]
    if form == "csv":
        click.echo(csv_table(rows))
        return
    table = text_table if form == "table" else markdown_table
    parts = [_heading(profile, link), table(rows)]
    if len(counts) == 1:
        parts += [
            f"Ranks of {one.algorithm} {one.form}, {one.stages} stages x {one.replicas} replicas:\n"
            + ("\n" if form == "markdown" else "")
            + table(_rank_cells(one))
            for one in every
            if one.form in {LAYER, PIPELINE}
        ]
    parts += sorted({f"Note: {one.note}." for one in every if one.note})
    click.echo("\n\n".join(parts))


def _link(name: str, bandwidth: float | None, latency: float | None) -> Link:
    """The link of that name, with what the user knows better.

    Raises:
        UsageError: there is none, or a number that no link has.
    """
    if name not in LINKS:
        raise unknown_name("link", name, LINKS)
    link = LINKS[name]
    if bandwidth is not None:
        link = replace(link, bytes_per_second=1e9 * bandwidth)
    if latency is not None:
        link = replace(link, latency_seconds=1e-6 * latency)
    return link if link == LINKS[name] else replace(link, name=f"{name}, changed")


def _counts(gpus: str) -> list[int]:
    words = [word.strip() for word in gpus.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"--gpus takes numbers from 1 on, such as 8 or 1,2,4,8,64,1024, got {gpus!r}")
    return list(dict.fromkeys(map(int, words)))


def _subject(rule: str, network: str, batch_size: int, settings: tuple[str, ...], where: Mapping[str, str]) -> Subject:
    """What to measure; `where` has the data set that gives shapes, the precision and the device."""
    entry = data.info(where["dataset"])
    if isinstance(entry, data.GraphInfo):
        raise UsageError(f"plans are for images and vectors, and {entry.name} is a graph")
    if where["precision"] not in PRECISIONS:
        raise unknown_name("precision", where["precision"], PRECISIONS)
    return Subject(
        rule=algorithm(rule),
        network=canonical_name(network),
        input_shape=entry.input_shape,
        classes=entry.classes,
        batch_size=batch_size,
        parameters=parse_settings(settings, rule),
        precision=where["precision"],
        device=pick_device(where["device"]),
    )


def _compare(
    record: Path, times: Path | None, link: Link, settings: tuple[str, ...], where: Mapping[str, str], form: str
) -> None:
    given = None if times is None else read_profile(times)
    comparisons = []
    for measured in read_measurements(record):
        profile = given or _profile_of(measured, settings, where)
        comparisons.append((compare(measured, profile, link), profile.source))
    if form == "json":
        rows = [
            {
                "measured": asdict(one.measured),
                "predicted": _described(one.predicted),
                "error": one.error,
                "times": source,
            }
            for one, source in comparisons
        ]
        click.echo(json.dumps({"link": asdict(link), "comparisons": rows}, indent=1))
        return
    table = {"table": text_table, "markdown": markdown_table, "csv": csv_table}[form]
    click.echo(table([_compared_cells(one, source) for one, source in comparisons]))
    if form != "csv":
        click.echo(f"\nLink: {_link_words(link)}. Error: how much longer the predicted step is than the measured one.")


def _profile_of(measured: Measurement, settings: tuple[str, ...], where: Mapping[str, str]) -> Profile:
    """The block times to predict a measurement with: its own if it has them, else measured here."""
    known = {name: getattr(measured, name) for name in ("dataset", "precision") if is_default(name)}
    where = {**where, **{name: value for name, value in known.items() if value is not None}}
    if not measured.block_seconds:
        return measure(_subject(measured.algorithm, measured.network, measured.batch_size, settings, where))
    subject = _subject(measured.algorithm, measured.network, measured.batch_size, settings, {**where, "device": "cpu"})
    return count(subject, measured.block_seconds, "the record")


def _described(one: Prediction) -> dict[str, Any]:
    """A prediction with what follows from it, as plain values."""
    derived = ("devices", "speedup", "idle", "imbalance", "memory_bytes", "link_bytes", "reduced_bytes")
    return {**asdict(one), **{name: getattr(one, name) for name in derived}}


def _cells(one: Prediction) -> dict[str, str]:
    return {
        "GPUs": str(one.devices),
        "rule": one.algorithm,
        "form": one.form if one.overlap else f"{one.form}, no overlap",
        "stages x replicas": f"{one.stages} x {one.replicas}",
        "samples/step": str(one.samples_per_step),
        "step, ms": f"{1e3 * one.step_seconds:.4g}",
        "samples/s": f"{one.samples_per_second:.4g}",
        "speed-up": f"{one.speedup:.2f}",
        "efficiency, %": f"{100 * one.efficiency:.1f}",
        "idle, %": f"{100 * one.idle:.1f}",
        "bubble, %": f"{100 * one.bubble:.2g}",
        "fill, ms": f"{1e3 * one.fill_seconds:.3g}",
        "waits for": one.bound,
        "MiB/GPU": f"{one.memory_bytes / MIB:.4g}",
        "MiB to next": f"{one.link_bytes / MIB:.3g}",
        "to replica": f"{one.reduced_bytes / MIB:.3g}",
    }


def _rank_cells(one: Prediction) -> list[dict[str, str]]:
    return [
        {
            "rank": str(index),
            "blocks": f"{rank.first}" if rank.first == rank.last else f"{rank.first}-{rank.last}",
            "busy, ms": f"{1e3 * rank.busy_seconds:.4g}",
            "of a step, %": f"{100 * rank.busy_seconds / one.step_seconds:.1f}",
            "parameters, MiB": f"{rank.parameter_bytes / MIB:.4g}",
            "gradients": f"{rank.gradient_bytes / MIB:.4g}",
            "optimiser": f"{rank.optimizer_bytes / MIB:.4g}",
            "activations": f"{rank.activation_bytes / MIB:.4g}",
            "ahead, MiB/step": f"{rank.sent_bytes / MIB:.3g}",
            "back": f"{rank.returned_bytes / MIB:.3g}",
        }
        for index, rank in enumerate(one.ranks)
    ]


def _compared_cells(one: Comparison, source: str) -> dict[str, str]:
    return {
        "form": one.measured.form,
        "ranks": str(one.measured.ranks),
        "rule": one.measured.algorithm,
        "network": one.measured.network,
        "batch": str(one.measured.batch_size),
        "predicted, ms": f"{1e3 * one.predicted.step_seconds:.4g}",
        "measured, ms": f"{1e3 * one.measured.step_seconds:.4g}",
        "error, %": f"{100 * one.error:+.1f}",
        "waits for": one.predicted.bound,
        "block times": source,
    }


def _heading(profile: Profile, link: Link) -> str:
    seconds = math.fsum(block.seconds for block in profile.own)
    return (
        f"Block times ({profile.source}): {profile.algorithm} on {profile.network}, {len(profile.own)} blocks, batch "
        f"{profile.batch_size}, {profile.precision}, {profile.device}; {1e3 * seconds:.4g} ms a step on one.\n"
        f"Everything below is modelled from them (docs/planning.md). Link: {_link_words(link)}."
    )


def _link_words(link: Link) -> str:
    return f"{link.name}, {link.bytes_per_second / 1e9:g} GB/s a direction, {1e6 * link.latency_seconds:g} us a message"
