"""ForwardGNN's tables: rules x convolutions x depths x data sets x splits, resumable, beside the paper's numbers.

    python benchmarks/forward_gnn.py --out results/forward_gnn --workers 8           node classification, unmetered
    python benchmarks/forward_gnn.py --out results/forward_gnn --arms link-ce link-bp --datasets citeseer_full
    python benchmarks/forward_gnn.py --out results/gnn_depth --arms sf bp --depths 1 2 4 8 --every-depth --meter
    python benchmarks/forward_gnn.py --out results/gnn_honest --datasets cora citeseer --split random \\
        --arms bp bp-tuned greedy sf ff-la dfa --networks gcn --depths 3 --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/forward_gnn.py --show results/forward_gnn/nodes.jsonl           only the table, from records

With --workers several runs share the device, one process each, which says nothing about time or energy: those need
--meter, one run after another. A greedy run of the largest depth also answers for all smaller ones, whose accuracy its
record holds, so only --every-depth trains each. --collect adds what the tables need of all runs under --out to a file
of one line per run. Runs that are recorded there or under --out are not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from bpfree.errors import BpfreeError
from bpfree.experiments import run as runs
from bpfree.experiments.config import RunConfig, resolve
from bpfree.experiments.records import CONFIG, SUMMARY, RunFolder, find_runs
from bpfree.experiments.tables import markdown_table
from bpfree.experiments.train import InterruptedRunError

WIDTH: Final = 128
PAPER_STOPPING: Final = {"epochs": 500, "patience": 100, "monitor": "metric"}  # 1000 steps, validation every 2
ADAM: Final = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 5e-4}
TUNED: Final = {"optimizer": "adam", "lr": 1e-2, "weight_decay": 5e-4, "dropout": 0.5}
GREEDY_HEAD: Final = {"schedule": "sequential", "inference": "sum_probs"}

Arm = tuple[str, dict[str, Any], dict[str, Any]]  # rule, its parameters, training settings
ARMS: Final[dict[str, Arm]] = {
    **{name: ("fgnn", {"variant": name, **ADAM}, {}) for name in ("sf", "sf-t2i", "sf-t2l", "ff-la", "ff-vn")},
    **{f"{name}-symba": ("fgnn", {"variant": name, "loss": "symba", **ADAM}, {}) for name in ("ff-la", "ff-vn")},
    "sf-t2l-raw": ("fgnn", {"variant": "sf-t2l", "bottom_up": "raw", **ADAM}, {}),
    "bp": ("bp", {"readout": "conv", **ADAM}, {}),
    "bp-tuned": ("bp", {"readout": "conv", **TUNED}, {}),
    "greedy": ("mf", {**GREEDY_HEAD, **ADAM}, {}),
    "greedy-tuned": ("mf", {**GREEDY_HEAD, **ADAM, "lr": 1e-2}, {}),
    "dfa": ("dfa", ADAM, {}),
    **{name: ("fgnn", {"variant": name, **ADAM}, {"split": "edges"}) for name in ("link-ce", "link-ff")},
    "link-t2i": ("fgnn", {"variant": "link-t2i", **ADAM, "weight_decay": 0.0}, {"split": "edges"}),
    "link-bp": ("bp", {"readout": "dot", **ADAM}, {"split": "edges"}),
    "link-bp-tuned": ("bp", {"readout": "dot", **TUNED}, {"split": "edges"}),
}
CONVOLUTION_READOUT: Final = ("bp", "bp-tuned", "link-bp", "link-bp-tuned")

# Appendix E of arXiv 2403.11004: means for 1, 2, 3, 4 layers. Of the link tables the columns 2 and 4 are identical for
# the forward rules, so the fourth is left out. The rows of ff-la and ff-vn reveal validation labels at test.
PAPER: Final[dict[tuple[str, str, str], tuple[float, ...]]] = {
    ("citeseer_full", "gcn", "bp"): (84.28, 94.28, 94.89, 94.87),
    ("citeseer_full", "sage", "bp"): (87.28, 94.56, 95.20, 95.20),
    ("citeseer_full", "gat", "bp"): (79.17, 94.18, 94.78, 94.49),
    ("citeseer_full", "gcn", "ff-la"): (95.39, 95.86, 95.89, 95.89),
    ("citeseer_full", "sage", "ff-la"): (95.41, 95.53, 95.58, 95.63),
    ("citeseer_full", "gat", "ff-la"): (95.34, 95.48, 95.27, 95.37),
    ("citeseer_full", "gcn", "ff-vn"): (43.22, 53.31, 52.81, 54.28),
    ("citeseer_full", "sage", "ff-vn"): (89.95, 93.85, 95.39, 95.56),
    ("citeseer_full", "gat", "ff-vn"): (90.99, 94.04, 95.48, 95.39),
    ("citeseer_full", "gcn", "sf"): (92.60, 94.18, 94.33, 94.66),
    ("citeseer_full", "sage", "sf"): (79.88, 89.60, 92.27, 92.74),
    ("citeseer_full", "gat", "sf"): (82.06, 93.33, 93.78, 94.21),
    ("citeseer_full", "gcn", "sf-t2l"): (92.62, 94.11, 94.56, 94.02),
    ("citeseer_full", "sage", "sf-t2l"): (79.39, 92.51, 94.02, 93.43),
    ("citeseer_full", "gat", "sf-t2l"): (81.21, 91.96, 92.03, 91.89),
    ("citeseer_full", "gcn", "sf-t2i"): (94.30, 94.78, 94.87, 94.96),
    ("citeseer_full", "sage", "sf-t2i"): (90.57, 93.90, 93.40, 93.22),
    ("citeseer_full", "gat", "sf-t2i"): (91.16, 94.02, 93.95, 93.83),
    ("cora_ml", "gcn", "bp"): (31.72, 86.84, 88.65, 86.61),
    ("cora_ml", "sage", "bp"): (42.87, 88.75, 88.21, 85.98),
    ("cora_ml", "gat", "bp"): (33.82, 80.97, 87.58, 86.04),
    ("cora_ml", "gcn", "ff-la"): (81.74, 63.77, 63.71, 64.54),
    ("cora_ml", "sage", "ff-la"): (85.41, 85.34, 85.08, 85.18),
    ("cora_ml", "gat", "ff-la"): (82.67, 61.80, 63.57, 63.24),
    ("cora_ml", "gcn", "ff-vn"): (28.61, 28.11, 27.25, 25.81),
    ("cora_ml", "sage", "ff-vn"): (86.01, 87.68, 87.85, 87.71),
    ("cora_ml", "gat", "ff-vn"): (84.61, 85.64, 86.48, 86.74),
    ("cora_ml", "gcn", "sf"): (87.75, 87.95, 88.15, 88.48),
    ("cora_ml", "sage", "sf"): (85.14, 87.35, 87.61, 87.55),
    ("cora_ml", "gat", "sf"): (66.81, 83.17, 84.34, 85.14),
    ("cora_ml", "gcn", "sf-t2l"): (87.55, 84.07, 85.64, 84.67),
    ("cora_ml", "sage", "sf-t2l"): (84.77, 85.94, 85.28, 85.31),
    ("cora_ml", "gat", "sf-t2l"): (65.21, 79.50, 83.57, 84.17),
    ("cora_ml", "gcn", "sf-t2i"): (87.05, 86.08, 87.05, 87.68),
    ("cora_ml", "sage", "sf-t2i"): (86.08, 86.58, 86.84, 86.84),
    ("cora_ml", "gat", "sf-t2i"): (83.27, 84.51, 85.28, 84.84),
    ("amazon_photo", "gcn", "bp"): (45.83, 64.88, 91.03, 90.21),
    ("amazon_photo", "sage", "bp"): (33.79, 91.58, 94.55, 93.27),
    ("amazon_photo", "gat", "bp"): (37.63, 46.54, 90.33, 89.33),
    ("amazon_photo", "gcn", "ff-la"): (91.20, 48.54, 48.08, 49.74),
    ("amazon_photo", "sage", "ff-la"): (88.95, 88.80, 88.80, 88.75),
    ("amazon_photo", "gat", "ff-la"): (90.93, 39.28, 39.05, 39.74),
    ("amazon_photo", "gcn", "ff-vn"): (22.69, 26.43, 22.92, 20.84),
    ("amazon_photo", "sage", "ff-vn"): (76.44, 80.93, 82.44, 82.80),
    ("amazon_photo", "gat", "ff-vn"): (47.65, 49.40, 50.20, 50.16),
    ("amazon_photo", "gcn", "sf"): (93.67, 93.73, 93.48, 93.48),
    ("amazon_photo", "sage", "sf"): (92.90, 93.63, 93.70, 93.71),
    ("amazon_photo", "gat", "sf"): (60.07, 87.02, 90.18, 90.68),
    ("amazon_photo", "gcn", "sf-t2l"): (93.76, 83.18, 60.43, 47.40),
    ("amazon_photo", "sage", "sf-t2l"): (93.01, 87.88, 87.62, 84.92),
    ("amazon_photo", "gat", "sf-t2l"): (63.14, 90.26, 90.73, 91.46),
    ("amazon_photo", "gcn", "sf-t2i"): (93.19, 92.88, 92.16, 92.30),
    ("amazon_photo", "sage", "sf-t2i"): (92.18, 92.99, 93.28, 92.92),
    ("amazon_photo", "gat", "sf-t2i"): (89.96, 90.55, 91.53, 91.10),
    ("citeseer_full", "gcn", "link-bp"): (90.00, 84.31, 80.93),
    ("citeseer_full", "gcn", "link-ff"): (85.11, 91.94, 91.95),
    ("citeseer_full", "gcn", "link-ce"): (89.32, 93.61, 93.49),
    ("citeseer_full", "gcn", "link-t2i"): (92.15, 88.39, 88.47),
    ("cora_ml", "gcn", "link-bp"): (82.20, 79.86, 79.97),
    ("cora_ml", "gcn", "link-ff"): (91.91, 92.46, 92.39),
    ("cora_ml", "gcn", "link-ce"): (91.77, 93.30, 93.26),
    ("cora_ml", "gcn", "link-t2i"): (93.64, 91.03, 91.57),
    ("amazon_photo", "gcn", "link-bp"): (82.41, 81.38, 88.69),
    ("amazon_photo", "gcn", "link-ff"): (96.18, 96.16, 96.17),
    ("amazon_photo", "gcn", "link-ce"): (93.84, 95.49, 95.38),
    ("amazon_photo", "gcn", "link-t2i"): (97.13, 96.81, 96.32),
}


def is_greedy(arm: str) -> bool:
    """Whether one deep run holds the results of all shallower ones."""
    return arm.startswith(("ff-", "link-ce", "link-ff")) or arm == "sf"


def arm_config(arm: str, dataset: str, kind: str, depth: int, options: argparse.Namespace) -> RunConfig | None:
    """The run of an arm, or None where there is none: a convolution as read-out is a layer of its own."""
    rule, parameters, training = ARMS[arm]
    hidden = depth - 1 if arm in CONVOLUTION_READOUT else depth
    if not hidden:
        return None
    return resolve(
        rule,
        dataset,
        f"{kind}:{hidden}x{options.width}",
        preset="none",
        parameters=parameters,
        training={"split": options.split, **PAPER_STOPPING, **training},
        device=options.device,
        energy="auto" if options.meter else "none",
    )


def tasks(options: argparse.Namespace) -> list[RunConfig]:
    """Everything that is to be run, the arms shuffled within each seed so that drift hits all of them alike."""
    every = []
    for seed in options.seeds:
        configs = []
        for dataset in options.datasets:
            for arm in options.arms:
                depths = [max(options.depths)] if is_greedy(arm) and not options.every_depth else options.depths
                for kind in options.networks:
                    configs += [arm_config(arm, dataset, kind, depth, options) for depth in depths]
        every += [replace(c, seed=seed) for c in random.Random(seed).sample(configs, len(configs)) if c is not None]
    return every


@cache
def load(name: str) -> Any:
    """Every worker reads a data set once."""
    return runs.load_dataset(name)


def work(config: RunConfig, out: Path, idle_w: tuple[float, ...], threads: int | None) -> tuple[str, Path]:
    """Do one run; a line that says how it went, and its folder."""
    if threads:
        torch.set_num_threads(threads)
    summary = runs.run(config, out, dataset=load(config.dataset), measuring=runs.Measuring(idle_w), keep_model=False)
    joules = summary["energy"]["gross_j"]
    line = (
        f"{config.dataset} {config.network} {summary['algorithm']} ({summary['variant']}) seed {config.seed}: "
        f"validation {summary['validation_accuracy']:.2f} %, test {summary['test_accuracy']:.2f} %, "
        f"{summary['updates']} steps, {summary['seconds']:.1f} s, {'-' if joules is None else round(joules)} J"
    )
    return line, Path(summary["run_dir"])


def run_all(options: argparse.Namespace) -> int:
    """Do what has not been done; returns the number of failures."""
    done = [RunFolder.open(path).read_json(CONFIG) for path in find_runs(options.out)] if options.out.exists() else []
    if options.collect and options.collect.exists():
        done += [record["config"] for record in load_records(options.collect)]
    left = [config for config in tasks(options) if config.to_dict() not in done]
    print(f"{len(left)} runs to do, {len(done)} recorded", flush=True)
    if not left:
        return 0
    if options.collect:
        options.collect.parent.mkdir(parents=True, exist_ok=True)
    started, failures = time.monotonic(), 0

    def tell(config: RunConfig, result: Callable[[], tuple[str, Path]]) -> None:
        nonlocal failures
        try:
            line, path = result()
            if options.collect:  # at once: what ends this program early takes no record with it
                with options.collect.open("a") as file:
                    file.write(record_line(path))
        except InterruptedRunError as error:
            sys.exit(str(error))
        except BpfreeError as error:
            failures += 1
            line = f"{config.dataset} {config.network} {config.parameters} seed {config.seed}: FAILED: {error}"
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    if options.workers == 1:
        idle_w = runs.measure_idle(left[0], options.idle) if options.idle else ()
        for config in left:
            if time.monotonic() - started < options.budget:
                tell(config, lambda config=config: work(config, options.out, idle_w, None))  # type: ignore[misc]
        return failures
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        waiting, running = deque(left), dict[Future[tuple[str, Path]], RunConfig]()
        while waiting or running:
            while waiting and len(running) < options.workers:
                if time.monotonic() - started > options.budget:
                    waiting.clear()
                    break
                config = waiting.popleft()
                running[pool.submit(work, config, options.out, (), 1)] = config
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                tell(running.pop(future), future.result)
    return failures


KEPT: Final = (
    "seed",
    "test_accuracy",
    "test_diagnostics",
    "test_revealed",
    "metric",
    "validation_accuracy",
    "validation_loss",
    "updates",
    "seconds",
    "energy",
    "memory",
    "flops",
    "parameters",
    "hardware",
    "date",
    "commit",
    "command",
)


def record_line(path: Path) -> str:
    """A run as a line of JSON: configuration, and what of the summary is kept."""
    folder = RunFolder.open(path)
    summary = folder.read_json(SUMMARY)
    kept = {name: summary[name] for name in KEPT if name in summary}
    if kept["energy"]["gross_j"] is None:
        kept["energy"] = {name: kept["energy"][name] for name in ("gross_j", "method", "flags")}
    return json.dumps({"run": path.name, "config": folder.read_json(CONFIG), **kept}) + "\n"


def collect(root: Path, file: Path) -> None:
    """Add the runs under `root` to a file of their lines, and sort it."""
    lines = set(file.read_text().splitlines(keepends=True)) if file.exists() else set()
    lines |= {record_line(path) for path in find_runs(root)} if root.exists() else set()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(sorted(lines)))
    print(f"{len(lines)} runs in {file}")


def load_records(file: Path) -> list[dict[str, Any]]:
    """What `collect` wrote."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def arm_of(config: dict[str, Any]) -> tuple[str, str, int] | None:
    """Arm, convolution and number of layers of a run, or None if it is none of the arms."""
    training = {"split": "edges"} if config["training"]["split"] == "edges" else {}
    wanted = [config["algorithm"], config["parameters"], training]
    for arm, (rule, parameters, settings) in ARMS.items():
        if wanted == [rule, parameters, settings]:
            kind, _, sizes = config["network"].partition(":")
            return arm, kind, int(sizes.partition("x")[0]) + (arm in CONVOLUTION_READOUT)
    return None


def results(runs_done: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], dict[int, list[float]]]:
    """(data set, convolution, arm) -> depth -> test results in %, one per seed."""
    found: dict[tuple[str, str, str], dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in runs_done:
        known = arm_of(record["config"])
        if known is None:
            continue
        (arm, kind, depth), dataset, seed = known, record["config"]["dataset"], record["seed"]
        rows = {arm: record["test_diagnostics"] if is_greedy(arm) else {}}
        if arm.startswith("ff-"):
            rows[f"{arm}-revealed"] = record["test_revealed"]
        for name, values in rows.items():
            for key, value in values.items():
                if key.startswith("depth"):
                    found[dataset, kind, name][int(key.split()[1])].setdefault(seed, value)
        found[dataset, kind, arm][depth][seed] = record["test_accuracy"]
    return {key: {depth: list(by_seed.values()) for depth, by_seed in row.items()} for key, row in found.items()}


def table(runs_done: Iterable[dict[str, Any]]) -> str:
    """Ours (mean, population standard deviation, number of splits) and the paper's, by depth."""
    found = results(runs_done)
    depths = sorted({depth for row in found.values() for depth in row})
    comparable = any(key in PAPER for key in found)
    rows = []
    for (dataset, kind, arm), row in sorted(found.items()):
        paper = PAPER.get((dataset, kind, arm.removesuffix("-revealed").removesuffix("-raw").removesuffix("-tuned")))
        best = max(statistics.fmean(values) for values in row.values())
        cells = {"dataset": dataset, "network": kind, "rule": arm}
        cells |= {f"{depth} layers": _cell(row.get(depth, [])) for depth in depths}
        cells["best"] = f"{best:.2f}"
        if comparable:
            cells["paper, 1-4 layers"] = " / ".join(f"{value:.2f}" for value in paper) if paper else ""
            cells["paper's best"] = f"{max(paper):.2f}" if paper else ""
            cells["difference"] = f"{best - max(paper):+.2f}" if paper else ""
        rows.append(cells)
    return markdown_table(rows) if rows else "no finished run"


COLOURS: Final = {"sf": "tab:blue", "bp": "tab:gray"}


def by_depth(runs_done: Iterable[dict[str, Any]]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Arm -> layers -> records, of metered runs."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in runs_done:
        known = arm_of(record["config"])
        if known is not None and record["energy"]["gross_j"] is not None:
            found[known[0]][known[2]].append(record)
    return {arm: dict(sorted(row.items())) for arm, row in sorted(found.items())}


COSTS: Final[dict[str, Callable[[dict[str, Any]], float]]] = {
    "test accuracy, %": lambda record: record["test_accuracy"],
    "steps": lambda record: record["updates"],
    "time, s": lambda record: record["seconds"],
    "energy, J": lambda record: record["energy"]["gross_j"],
    "peak memory, MiB": lambda record: record["memory"]["peak_mib"],
}


def depth_table(runs_done: Iterable[dict[str, Any]]) -> str:
    """Means and population standard deviations by rule and depth."""
    rows = []
    for arm, row in by_depth(runs_done).items():
        for depth, same in row.items():
            cells = {"rule": arm, "layers": str(depth), "splits": str(len(same))}
            for title, value in COSTS.items():
                numbers = [value(record) for record in same]
                digits = 2 if title in ("test accuracy, %", "time, s") else 0
                cells[title] = f"{statistics.fmean(numbers):.{digits}f} ± {statistics.pstdev(numbers):.{digits}f}"
            cells["flags"] = ", ".join(dict.fromkeys(flag for record in same for flag in record["energy"]["flags"]))
            rows.append(cells)
    return markdown_table(rows)


def draw(runs_done: Iterable[dict[str, Any]], file: Path) -> None:
    """Accuracy, time, energy and memory against depth: mean and range over splits."""
    import matplotlib.pyplot as plt

    titles = [title for title in COSTS if title != "steps"]
    figure, axes = plt.subplots(1, len(titles), figsize=(3.2 * len(titles), 3), layout="constrained")
    for arm, row in by_depth(runs_done).items():
        for axis, title in zip(axes, titles, strict=True):
            values = [[COSTS[title](record) for record in same] for same in row.values()]
            axis.plot(list(row), [statistics.fmean(v) for v in values], "o-", color=COLOURS[arm], label=arm)
            axis.fill_between(list(row), list(map(min, values)), list(map(max, values)), color=COLOURS[arm], alpha=0.2)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xlabel("layers")
        axis.set_title(title, fontsize="medium")
        if title != titles[0]:
            axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.savefig(file, dpi=150)


def _cell(values: Iterable[float]) -> str:
    numbers = list(values)
    return f"{statistics.fmean(numbers):.2f} ± {statistics.pstdev(numbers):.2f} ({len(numbers)})" if numbers else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/runs"), help="where run folders are made")
    parser.add_argument("--datasets", nargs="+", default=["citeseer_full", "cora_ml", "amazon_photo"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--networks", nargs="+", default=["gcn", "sage", "gat"])
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="also choose the fold")
    parser.add_argument("--split", default="folds", choices=["folds", "random", "public"], help="of nodes")
    parser.add_argument(
        "--every-depth", action="store_true", help="train greedy rules at each depth, for time and energy"
    )
    parser.add_argument("--meter", action="store_true", help="measure energy; needs one worker")
    parser.add_argument("--idle", type=float, default=0.0, help="with --meter: seconds of idle baseline")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no run after this many seconds")
    parser.add_argument("--collect", type=Path, metavar="FILE", help="write the records of all runs under --out there")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print the table of such a file")
    parser.add_argument("--depth", action="store_true", help="with --show: cost against depth, of metered runs")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="with --show: draw that, as .png or .pdf")
    options = parser.parse_args()
    if options.meter and options.workers > 1:
        parser.error("--meter needs one worker: joules of several runs at once cannot be told apart")
    options.arms = options.arms or ["sf", "sf-t2i", "sf-t2l", "ff-la", "ff-vn", "bp", "bp-tuned"]
    if options.show:
        shown = load_records(options.show)
        if options.figure:
            draw(shown, options.figure)
        print(depth_table(shown) if options.depth else table(shown))
        return
    failures = run_all(options)
    if options.collect:
        collect(options.out, options.collect)
        print(table(load_records(options.collect)))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
