"""Many runs in one process: presets x seeds (x a grid of parameters), interleaved, resumable, one table at the end.

    python benchmarks/campaign.py --out results/foundation --seeds 0 1 2 3 4 --presets mono_forward-mnist backprop-mnist
    python benchmarks/campaign.py --out tuning --seeds 100 --presets backprop-cifar10 --vary lr=1e-4,2e-4,4e-4

The arms are shuffled within each seed, so that drift of the board's temperature hits all of them alike. Runs that
are recorded under --out already are not repeated. Weights are not kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from bpfree import data
from bpfree.errors import BpfreeError
from bpfree.experiments import run as runs
from bpfree.experiments.arms import interleaved
from bpfree.experiments.compare import config_key, is_finished, recorded
from bpfree.experiments.config import RunConfig, parse_settings, resolve
from bpfree.experiments.tables import readable, result_rows, text_table
from bpfree.experiments.train import InterruptedRunError


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where run folders are made")
    parser.add_argument("--presets", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--vary", nargs="*", default=[], metavar="KEY=V1,V2,..")
    parser.add_argument("--training", nargs="*", default=[], metavar="KEY=VALUE", help="instead of the presets'")
    parser.add_argument("--idle", type=float, default=0.0, help="seconds of idle baseline before the first run")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no run after this many seconds")
    options = parser.parse_args()

    training = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.training)}
    configs = arms(options.presets, options.vary, training)
    load = cache(data.load)
    done = {key for key, path in recorded(options.out).items() if is_finished(path)}
    seeded = [replace(config, seed=seed) for seed in options.seeds for config in interleaved(configs, seed)]
    waiting = [config for config in seeded if config_key(config) not in done]
    started, failures = time.monotonic(), 0
    try:
        idle_w = runs.measure_idle(waiting[0], options.idle) if options.idle and waiting else ()
    except BpfreeError as error:
        sys.exit(str(error))
    for config in waiting:
        if time.monotonic() - started > options.budget:
            break
        try:
            summary = runs.run(
                config,
                options.out,
                dataset=load(config.dataset),
                measuring=runs.Measuring(idle_w),
                keep_model=False,
            )
        except InterruptedRunError as error:
            sys.exit(str(error))
        except BpfreeError as error:
            failures += 1
            print(f"{config.preset} {config.parameters} seed {config.seed}: {error}", file=sys.stderr)
            continue
        joules = summary["energy"]["gross_j"]
        print(
            f"{time.monotonic() - started:6.0f} s  {config.preset} {config.parameters} seed {config.seed}: "
            f"{summary['metric']} {summary['validation_accuracy']:.2f} % in validation, "
            f"loss {summary['validation_loss']:.4f}, {summary['test_accuracy']:.2f} % in the test, "
            f"{summary['passes']} passes, {summary['seconds']:.1f} s, {'-' if joules is None else round(joules)} J",
            flush=True,
        )
    print(text_table(readable(result_rows(options.out))))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
