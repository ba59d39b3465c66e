"""Many runs in one go: presets x seeds (x a grid of parameters), interleaved, resumable, one table at the end.

    python benchmarks/campaign.py --out results/foundation --seeds 0 1 2 3 4 --presets mono_forward-mnist backprop-mnist
    python benchmarks/campaign.py --out tuning --seeds 100 --presets backprop-cifar10 --vary lr=1e-4,2e-4,4e-4
    python benchmarks/campaign.py --workers 4 --file campaigns.txt

The arms are shuffled within each seed, so that drift of the board's temperature hits all of them alike. Runs that
are recorded under --out already are not repeated, and those that were interrupted go on. Weights are not kept, unless
--keep says so.

A file has one campaign per line, with the options above. With --workers, so many runs share the device: for accuracy,
where one run does not fill a GPU (with NVIDIA's MPS their kernels overlap). Their records say so (FOREIGN_PROCESS), and
tables leave their time and joules out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from bpfree.errors import BpfreeError, UsageError
from bpfree.experiments import run as runs
from bpfree.experiments.arms import interleaved
from bpfree.experiments.compare import config_key, is_finished, recorded
from bpfree.experiments.config import RunConfig, parse_settings, resolve
from bpfree.experiments.signals import stop_without
from bpfree.experiments.tables import readable, result_rows, text_table
from bpfree.experiments.train import InterruptedRunError

load = cache(runs.load_dataset)


@dataclass(frozen=True)
class Job:
    """One run, where its folder is made, that folder if it has begun already, and whether its weights stay there."""

    config: RunConfig
    out: Path
    begun: Path | None = None
    keep: bool = False


def arms(presets: list[str], variations: list[str], training: dict[str, Any]) -> list[RunConfig]:
    """Every preset with every combination of the varied parameters."""
    axes = [
        [f"{name}={value}" for value in values.split(",")]
        for name, _, values in (variation.partition("=") for variation in variations)
    ]
    configs = []
    for preset in presets:
        rule = resolve(preset=preset).algorithm
        for settings in itertools.product(*axes):
            parameters = parse_settings(settings, rule)
            configs.append(resolve(preset=preset, parameters=parameters, training=training))
    return configs


def campaign_parser() -> argparse.ArgumentParser:
    """The options of one campaign."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, help="where run folders are made")
    parser.add_argument("--presets", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--vary", nargs="*", default=[], metavar="KEY=V1,V2,..")
    parser.add_argument("--training", nargs="*", default=[], metavar="KEY=VALUE", help="instead of the presets'")
    parser.add_argument("--keep", action="store_true", help="keep the weights of finished runs")
    return parser


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The runs of a campaign that are not finished yet.

    Raises:
        BpfreeError: what it asks for does not exist or does not fit.
    """
    try:
        training = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.training)}
    except json.JSONDecodeError as error:
        raise UsageError(
            f"--training takes KEY=VALUE with a JSON value, such as monitor='\"metric\"': {error}"
        ) from None
    configs = arms(options.presets, options.vary, training)
    known = recorded(options.out)
    seeded = [replace(config, seed=seed) for seed in options.seeds for config in interleaved(configs, seed)]
    jobs = [Job(config, options.out, known.get(config_key(config)), options.keep) for config in seeded]
    return [job for job in jobs if job.begun is None or not is_finished(job.begun)]


def perform(job: Job, started: float, idle_w: Sequence[float] = ()) -> bool:
    """Run, and print a line; False if it failed.

    Raises:
        InterruptedRunError: somebody asked to stop.
    """
    config = job.config
    try:
        dataset = load(config.dataset)
        measuring = runs.Measuring(tuple(idle_w))
        if job.begun is None:
            summary = runs.run(config, job.out, dataset=dataset, measuring=measuring, keep_model=job.keep)
        else:
            summary = runs.resume(job.begun, dataset=dataset, measuring=measuring, keep_model=job.keep)
    except InterruptedRunError:
        raise
    except BpfreeError as error:
        print(f"{config.preset} {config.parameters} seed {config.seed}: {error}", file=sys.stderr, flush=True)
        return False
    joules = summary["energy"]["gross_j"]
    print(
        f"{time.time() - started:6.0f} s  {config.preset} {config.parameters} seed {config.seed}: "
        f"{summary['metric']} {summary['validation_accuracy']:.2f} % in validation, "
        f"loss {summary['validation_loss']:.4f}, {summary['test_accuracy']:.2f} % in the test, "
        f"{summary['passes']} passes, {summary['seconds']:.1f} s, {'-' if joules is None else round(joules)} J",
        flush=True,
    )
    return True


def one_by_one(jobs: Iterable[Job], started: float, budget: float, idle_s: float) -> int:
    """Run in this process; the number of failures."""
    failures, idle_w = 0, None
    for job in jobs:
        if time.time() - started > budget:
            break
        if idle_w is None:
            idle_w = runs.measure_idle(job.config, idle_s) if idle_s else ()
        failures += not perform(job, started, idle_w)
    return failures


def work(waiting: Any, failed: Any, started: float, budget: float, threads: int, parent: int) -> None:
    """What each of several processes does: take runs until none is left, or the process that started it is gone."""
    stop_without(parent)
    torch.set_num_threads(threads)
    while time.time() - started <= budget:
        try:
            succeeded = perform(waiting.get_nowait(), started)
        except Empty:
            return
        except InterruptedRunError as error:
            sys.exit(str(error))
        if not succeeded:
            with failed.get_lock():
                failed.value += 1


def side_by_side(jobs: Iterable[Job], started: float, budget: float, workers: int) -> int:
    """Run in several processes that share the device; the number of failures."""
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(stop_without, (os.getpid(),))
    waiting, failed = manager.Queue(), context.Value("i", 0)
    for job in jobs:
        waiting.put(job)
    threads = max(1, (os.cpu_count() or 1) // workers)
    shared = (waiting, failed, started, budget, threads, os.getpid())
    processes = [context.Process(target=work, args=shared) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:  # which reaches the workers as well: each saves the run that it is in
        for process in processes:
            process.join()
        raise UsageError("stopped; the same command goes on with the runs that are not finished yet") from None
    return int(failed.value) + sum(process.exitcode != 0 for process in processes)


def main() -> None:
    campaign = campaign_parser()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[campaign]
    )
    parser.add_argument("--file", type=Path, help="further campaigns, one per line")
    parser.add_argument("--workers", type=int, default=1, help="so many runs at once; their joules do not count")
    parser.add_argument("--idle", type=float, default=0.0, help="seconds of idle baseline before the first run")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no run after this many seconds")
    options = parser.parse_args()
    if options.idle and options.workers > 1:
        parser.error("--idle is for joules, which do not count with --workers")
    campaigns = [options] if options.presets else []
    if options.file:
        if not options.file.is_file():
            parser.error(f"there is no file {options.file}; it has one campaign per line")
        lines = options.file.read_text().splitlines()
        campaigns += [campaign.parse_args(shlex.split(line, comments=True)) for line in lines if line.strip()]
    if not campaigns or any(one.out is None for one in campaigns):
        parser.error("a campaign needs --presets and --out")

    started = time.time()
    try:
        jobs = [job for one in campaigns for job in jobs_of(one)]
        if options.workers > 1:
            failures = side_by_side(jobs, started, options.budget, options.workers)
        else:
            failures = one_by_one(jobs, started, options.budget, options.idle)
        for out in dict.fromkeys(one.out for one in campaigns):
            print(text_table(readable(result_rows(out))))
    except BpfreeError as error:  # a run that was interrupted, too
        sys.exit(str(error))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
