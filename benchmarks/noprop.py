"""NoProp's tables: accuracy beside the paper's, what inference costs, and ways to train its blocks at once.

    python benchmarks/noprop.py --runs results/noprop/runs                    accuracy, from run records
    python benchmarks/noprop.py --inference RUN .. --json inference.json      accuracy and joules by sampler and steps
    python benchmarks/noprop.py --training --json training.json               a step's time, joules and memory
    python benchmarks/noprop.py --show inference.json                         only the table, from a record
    python benchmarks/noprop.py --show inference.json --figure inference.png  and accuracy by steps and joules, drawn

RUN is a folder of a finished `bpfree run`, with its weights. What the file of --json has of other runs stays in it.
Training is measured on random CIFAR-10-sized images; "vmap" is a bare step with stacked weights (torch.func), PyTorch's
dropout and one fused optimiser, for its speed alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from step import IMAGE, random_images, read, repeat, staged_stepper
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import convert_conv2d_weight_memory_format

from bpfree import NoProp, build_network
from bpfree.algorithms import Learner, NoPropBackprop
from bpfree.algorithms._noprop_processes import DiscreteDiffusion
from bpfree.energy import EnergyMeter, Flag, choose_source
from bpfree.errors import BpfreeError, UsageError
from bpfree.experiments import run as runs
from bpfree.experiments.config import RunConfig, changes
from bpfree.experiments.records import CONFIG, SUMMARY, RunFolder, environment, find_runs
from bpfree.experiments.stepper import numerics
from bpfree.experiments.tables import listed, markdown_table
from bpfree.experiments.train import rate
from bpfree.networks.normalization import VectorNorm
from bpfree.networks.streams import StreamDropout

BATCH: Final = 128
SHARES: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # of all denoising steps

# Table 1 of arXiv 2503.24322: test accuracy in %
PAPER: Final[dict[tuple[str, str, str], float]] = {
    ("mnist", "noprop-bp", "onehot"): 99.46,
    ("mnist", "noprop-bp", "learned"): 99.43,
    ("mnist", "noprop-bp", "prototype"): 99.44,
    ("mnist", "dt", "onehot"): 99.47,
    ("mnist", "dt", "learned"): 99.49,
    ("mnist", "dt", "prototype"): 99.54,
    ("mnist", "ct", "onehot"): 97.84,
    ("mnist", "ct", "prototype"): 97.17,
    ("mnist", "fm", "onehot"): 99.21,
    ("mnist", "fm", "prototype"): 98.52,
    ("cifar10", "noprop-bp", "onehot"): 79.92,
    ("cifar10", "noprop-bp", "learned"): 79.30,
    ("cifar10", "noprop-bp", "prototype"): 79.58,
    ("cifar10", "dt", "onehot"): 79.25,
    ("cifar10", "dt", "learned"): 79.12,
    ("cifar10", "dt", "prototype"): 80.54,
    ("cifar10", "ct", "onehot"): 73.35,
    ("cifar10", "ct", "prototype"): 66.54,
    ("cifar10", "fm", "onehot"): 73.14,
    ("cifar10", "fm", "prototype"): 75.18,
}


def accuracy_table(root: Path) -> str:
    """One row per data set and arm: mean over seeds and draws of the noise, standard deviation over seeds.

    Runs with other settings than their preset's have rows of their own. Repeats of a seed count once, by their mean.

    Raises:
        UsageError: there is no finished run.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for path in find_runs(root):
        folder = RunFolder.open(path)
        config, summary = folder.read_json(CONFIG), folder.read_json(SUMMARY)
        parameters = config["parameters"]
        arm = "noprop-bp" if config["algorithm"] == "noprop-bp" else parameters.get("variant", "dt")
        schedule = f"{config['training']['epochs']} epochs, {config['training']['lr_schedule']} rate"
        embeddings = parameters.get("embeddings", "onehot")
        settings = listed(changes(RunConfig.of_run(folder)))
        groups[summary["dataset"], arm, embeddings, schedule, settings].append(summary)
    varied = any(settings for *_, settings in groups)
    rows = []
    for (dataset, arm, embeddings, schedule, settings), same in sorted(groups.items()):
        by_seed: dict[int, list[float]] = defaultdict(list)
        for summary in same:
            by_seed[summary["seed"]].append(statistics.fmean(summary["test_draws"]))
        means = [statistics.fmean(repeats) for repeats in by_seed.values()]
        spread = statistics.fmean(statistics.pstdev(summary["test_draws"]) for summary in same)
        first = [summary["test_diagnostics"].get("block 0 accuracy") for summary in same]
        paper = PAPER.get((dataset, arm, embeddings))
        shared = any(Flag.FOREIGN_PROCESS.name in summary["energy"]["flags"] for summary in same)
        rows.append(
            {
                "dataset": dataset,
                "rule": arm,
                "embeddings": embeddings,
                "training": schedule,
                **({"settings": settings} if varied else {}),
                "seeds": str(len(means)),
                "test accuracy, %": f"{statistics.fmean(means):.2f}"
                + (f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""),
                "between draws": f"{spread:.2f}",
                "paper": "" if paper is None else f"{paper:.2f}",
                "first block alone": "" if None in first else f"{statistics.fmean(first):.2f}",
                "time, s": "" if shared else f"{statistics.fmean(summary['seconds'] for summary in same):.0f}",
                "peak memory, MiB": f"{max(summary['peak_memory_mib'] for summary in same):.0f}",
            }
        )
    if not rows:
        raise UsageError(f"there is no finished run of noprop or noprop-bp under {root}")
    return markdown_table(rows)


def measure_inference(path: Path, window: float, device: torch.device) -> dict[str, Any]:
    """Accuracy over five draws of the noise, and seconds and joules per prediction, by sampler and denoising steps.

    Raises:
        CheckpointError: `path` is not a run folder, or has no model.
        UsageError: it is of another rule.
    """
    config, learner, (_, validation, test) = runs.trained(path, device)
    if not isinstance(learner, NoProp):
        raise UsageError(f"{path} holds no run of noprop, but of {config.algorithm}; name one that does")
    precision = config.training.precision
    meter = EnergyMeter(choose_source("auto", device), device=device, min_window_s=window)
    all_steps = sorted({max(1, round(share * learner.process.steps)) for share in SHARES})
    rows = []
    with numerics(precision):
        for sampler, steps in itertools.product(learner.process.samplers, all_steps):
            learner.sampler = sampler
            draws = [partial(learner.sample, steps=steps, draw=draw) for draw in range(runs.TEST_DRAWS)]
            accuracies = [
                [100 * rate(draw, part, precision, learner)[1].item() for draw in draws] for part in (validation, test)
            ]
            passes, started = 0, time.perf_counter()
            with meter.window("inference") as measured:
                while time.perf_counter() - started < window:
                    rate(draws[0], test, precision, learner).tolist()
                    passes += 1
            result, count = measured.result, passes * len(test)
            rows.append(
                {
                    "sampler": sampler,
                    "steps": steps,
                    "validation": accuracies[0],
                    "test": accuracies[1],
                    "seconds": result.seconds / count,
                    "joules": None if result.gross_j is None else result.gross_j / count,
                    "flags": list(result.flags),
                }
            )
    return {
        "run": path.name,
        "rule": learner.kind,
        "embeddings": learner.embeddings.kind,
        "config": config.to_dict(),
        "environment": environment(device),
        "rows": rows,
    }


def trained(study: dict[str, Any]) -> dict[str, str]:
    """What was trained: the data, the arm, and what is not as its preset says but the sampler, which is a row's own."""
    config = RunConfig.from_dict(study["config"])
    settings = {name: value for name, value in changes(config).items() if name != "sampler"}
    return {
        "dataset": config.dataset,
        "rule": study["rule"],
        "embeddings": study["embeddings"],
        "settings": listed(settings),
    }


def with_known(studies: list[dict[str, Any]], path: Path | None) -> list[dict[str, Any]]:
    """What a file holds of other runs, if there is one, and these."""
    known = read(path).get("inference", []) if path is not None and path.exists() else []
    return list({study["run"]: study for study in (*known, *studies)}.values())


def inference_table(record: dict[str, Any]) -> str:
    """Accuracy and cost of a prediction by rule and steps."""
    return markdown_table(
        [
            {
                **trained(study),
                "sampler": row["sampler"],
                "steps": str(row["steps"]),
                "validation accuracy, %": f"{statistics.fmean(row['validation']):.2f}" if row["validation"] else "",
                "test accuracy, %": f"{statistics.fmean(row['test']):.2f}",
                "between draws": f"{statistics.pstdev(row['test']):.2f}",
                "us per prediction": f"{1e6 * row['seconds']:.2f}",
                "mJ per prediction": "" if row["joules"] is None else f"{1e3 * row['joules']:.3f}",
                "flags": ", ".join(row["flags"]),
                "hardware": study["environment"]["hardware"],
                "date": study["environment"]["date"][:10],
            }
            for study in record["inference"]
            for row in study["rows"]
        ]
    )


def draw_inference(record: dict[str, Any], figure: Path) -> None:
    """Test accuracy against denoising steps, and against joules where they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    canvas, panels = plt.subplots(1, 2, figsize=(9, 5), sharey=True)
    for study in record["inference"]:
        for sampler, group in itertools.groupby(study["rows"], key=lambda row: row["sampler"]):
            rows = list(group)
            right = [statistics.fmean(row["test"]) for row in rows]
            name = ", ".join(part for part in (*trained(study).values(), sampler) if part)
            panels[0].plot([row["steps"] for row in rows], right, marker=".", label=name)
            if all(row["joules"] is not None for row in rows):
                panels[1].plot([1e3 * row["joules"] for row in rows], right, marker=".")
    axes = (("denoising steps", (1,)), ("mJ per prediction", (1, 2, 5)))
    for panel, (title, ticks) in zip(panels, axes, strict=True):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=ticks))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    canvas.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    canvas.set_layout_engine("constrained")
    canvas.savefig(figure, dpi=150)
    plt.close(canvas)


def build(kind: str, device: torch.device, **options: Any) -> Learner:
    """The paper's CIFAR-10 network under one of the rules."""
    torch.manual_seed(0)
    rule = NoPropBackprop if kind == "noprop-bp" else NoProp
    learner: Learner = rule(build_network("noprop:dt", IMAGE), 10, input_shape=IMAGE, **options)
    return convert_conv2d_weight_memory_format(learner.to(device), torch.channels_last)


class StackedStep:
    """One step of all blocks at once: weights stacked, losses and gradients by `torch.func.vmap`."""

    def __init__(self, device: torch.device) -> None:
        learner = build("dt", device)
        process = learner.process
        assert isinstance(process, DiscreteDiffusion)
        blocks = [_of_pytorch(block) for block in learner.network]
        parameters, self._buffers = stack_module_state(blocks)
        # gradients come in this layout, and a fused optimiser wants one layout
        self._parameters = {name: value.detach().contiguous().requires_grad_() for name, value in parameters.items()}
        self._block, self._weights = copy.deepcopy(blocks[0]), process.weights.float()
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=1e-3, weight_decay=1e-3, fused=True, capturable=True
        )
        self._gradients = vmap(grad(self._loss), in_dims=(0, 0, None, 0, None, 0), randomness="different")
        self._bars = process.alpha_bars[:-1].float()

    def _loss(self, parameters: Any, buffers: Any, x: Tensor, z: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        logits = functional_call(self._block, (parameters, buffers), (x, z))
        return weight * (logits.softmax(1) - targets).square().sum(1).mean()

    def __call__(self, x: Tensor, y: Tensor) -> None:
        targets = F.one_hot(y, 10).float()
        bars = self._bars[:, None, None]
        z = bars.sqrt() * targets + (1 - bars).sqrt() * torch.randn(len(bars), *targets.shape, device=x.device)
        found = self._gradients(self._parameters, self._buffers, x, z, targets, self._weights)
        for name, parameter in self._parameters.items():
            parameter.grad = found[name].contiguous()
        self._optimizer.step()


def _of_pytorch(block: nn.Module) -> nn.Module:
    """A copy with PyTorch's dropout and normalisation: vmap cannot batch a kernel of ours."""
    found = copy.deepcopy(block)
    for module in list(found.modules()):
        for name, child in module.named_children():
            if isinstance(child, StreamDropout):
                setattr(module, name, nn.Dropout(child.p))
            elif isinstance(child, VectorNorm):
                norm = nn.BatchNorm1d(child.num_features, device=child.weight.device)
                setattr(module, name, nn.Sequential(norm, nn.ReLU()) if child.rectified else norm)
    return found


def repeat_stacked(device: torch.device) -> Callable[[float], int]:
    """Capture a stacked step; the result repeats it for about some seconds and returns the number of steps."""
    step = StackedStep(device)
    images = random_images(BATCH, device)
    x, y = next(iter(images.in_order(BATCH)))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x, y)

    def run(seconds: float) -> int:
        steps, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(16):
                graph.replay()
            torch.cuda.synchronize()
            steps += 16
        return steps

    run(1.0)  # clocks and caches settle
    return run


def repeat_steps(
    kind: str, device: torch.device, graph: bool = True, precision: str = "tf32", **options: Any
) -> Callable[[float], int]:
    """The same for a learner's step."""
    stepper = staged_stepper(build(kind, device, **options), BATCH, graph, device, precision)
    return lambda seconds: repeat(stepper, seconds, device)


def measure_training(window: float, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds, joules and peak memory of a step on random images, one way after another."""
    steps = partial(repeat_steps, device=device)
    ways: dict[str, Callable[[], Callable[[float], int]]] = {
        "dt, eager": partial(steps, "dt", graph=False),
        **{f"dt, {lanes} lanes": partial(steps, "dt", lanes=lanes) for lanes in (1, 2, 3, 4, 6, 10)},
        "dt, vmap": partial(repeat_stacked, device),
        "dt, 6 lanes, bf16": partial(steps, "dt", lanes=6, precision="bf16"),
        "dt prototype": partial(steps, "dt", embeddings="prototype"),
        "dt prototype, 6 lanes": partial(steps, "dt", embeddings="prototype", shared_updates="step", lanes=6),
        "bp": partial(steps, "noprop-bp"),
    }
    meter, rows = EnergyMeter(choose_source("auto", device), device=device, min_window_s=window), []
    with numerics("tf32"):
        for name, prepare in ways.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run = prepare()
            with meter.window("steps") as measured:
                count = run(window)
            result = measured.result
            rows.append(
                {
                    "way": name,
                    "ms": 1e3 * result.seconds / count,
                    "j": None if result.gross_j is None else result.gross_j / count,
                    "mean_w": result.mean_w,
                    "peak_mib": (torch.cuda.max_memory_allocated(device) - before) / runs.MIB,
                    "flags": list(result.flags),
                }
            )
            print(rows[-1], flush=True)
            del run
    return rows


def training_table(record: dict[str, Any]) -> str:
    """Cost of a step by way of running it."""
    return markdown_table(
        [
            {
                "step": row["way"],
                "ms": f"{row['ms']:.3f}",
                "epoch of 45,000, s": f"{row['ms'] * (45_000 // BATCH) / 1e3:.2f}",
                "J": "" if row["j"] is None else f"{row['j']:.3f}",
                "W": "" if row["mean_w"] is None else f"{row['mean_w']:.0f}",
                "peak memory, MiB": f"{row['peak_mib']:.0f}",
                "flags": ", ".join(row["flags"]),
            }
            for row in record["training"]
        ]
    )


UNDRAWN: Final = "--figure draws what inference costs; give it with --inference, or --show of such a record"
TABLES: Final = {"inference": inference_table, "training": training_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--runs", type=Path, metavar="DIR", help="print the accuracies of the runs under there")
    what.add_argument("--inference", nargs="+", type=Path, metavar="RUN", help="measure inference of trained runs")
    what.add_argument("--training", action="store_true", help="measure a training step; needs a CUDA device")
    what.add_argument("--show", type=Path, metavar="FILE", help="print the table of a record")
    parser.add_argument("--window", type=float, default=5.0, help="seconds per measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw what inference costs, in this format")
    options = parser.parse_args()
    try:
        carry_out(options)
    except BpfreeError as error:
        sys.exit(str(error))


def carry_out(options: argparse.Namespace) -> None:
    """Measure, or show what has been measured.

    Raises:
        BpfreeError: nothing to measure or to show, or a figure of something else than inference.
    """
    if options.figure and not (options.inference or options.show):
        raise UsageError(UNDRAWN)
    if options.runs:
        print(accuracy_table(options.runs))
        return
    if options.show:
        record = read(options.show)
    else:
        device = runs.pick_device(options.device)
        if options.training:
            if device.type != "cuda":
                raise UsageError("--training compares ways to use a CUDA device, and there is none")
            record = {"environment": environment(device), "training": measure_training(options.window, device)}
        else:
            studies = [measure_inference(path, options.window, device) for path in options.inference]
            record = {"inference": with_known(studies, options.json)}
    if options.figure and "inference" not in record:
        raise UsageError(UNDRAWN)
    print("\n".join(make(record) for kind, make in TABLES.items() if kind in record))
    if options.figure:
        draw_inference(record, options.figure)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
