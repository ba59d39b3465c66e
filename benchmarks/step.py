"""Time, joules, FLOP/s and bytes/s of a training step, eager and as a CUDA graph, against the card's ceilings.

    python benchmarks/step.py                     MLP 3x2000 on CIFAR-10-sized inputs, batches 128, 1024, 8192
    python benchmarks/step.py --window 10 --json step.json
    python benchmarks/step.py --presets forward_forward-mnist counter_current-cifar10 backprop-cifar10-ccl --kernels 12

With --presets the steps are those of presets, of their first stage, with their peak memory (16 staged batches included)
and the kernels that take longest if --kernels asks for them; --trace keeps a timeline of all kernels on all streams.
--set changes what they say. Other steps that the file of --json has already stay in it.

Inputs are random and already staged on the device, as the fit loop stages them. "least bytes" counts what an
ideal step must move through device memory at least once: parameters, gradients and Adam's two moments.
The epoch line is the whole loop on 45,000 random images: crop and flip, steps, validation on 5,000.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.profiler import ProfilerActivity, profile

from bpfree import build_network
from bpfree import data as datasets
from bpfree.algorithms import Learner, algorithm
from bpfree.algorithms.learner import evaluation_mode
from bpfree.data.batches import Batches
from bpfree.energy import EnergyMeter, choose_source
from bpfree.errors import BpfreeError, UsageError
from bpfree.experiments.config import RunConfig, changes, parse_mixed_settings, resolve
from bpfree.experiments.records import environment
from bpfree.experiments.run import peak_memory, preferred_layout
from bpfree.experiments.stepper import Stepper, numerics
from bpfree.experiments.tables import listed, markdown_table, text_table
from bpfree.experiments.train import EVALUATION_BATCH, Trainer, TrainingConfig

IMAGE = (3, 32, 32)
CLASSES = 10
STAGED_STEPS = 16
MOST_STAGED = 2**17  # images
FLOAT = 4  # bytes


def random_images(
    count: int,
    device: torch.device,
    shape: tuple[int, ...] = IMAGE,
    classes: int = CLASSES,
    layout: torch.memory_format = torch.contiguous_format,
    reconstruct: bool = False,
) -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    targets = torch.randint(classes, (count,), generator=generator)
    channels = shape[0] if len(shape) == 3 else 1
    shared: dict[str, Any] = {"device": device, "layout": layout, "reconstruct": reconstruct}
    return Batches(images, targets, mean=(0.5,) * channels, std=(0.25,) * channels, **shared)


def build(rule: str, network: str, device: torch.device) -> Learner:
    torch.manual_seed(0)
    return algorithm(rule).build(build_network(network, IMAGE), CLASSES, IMAGE, lr=1e-4).to(device)


def repeat(stepper: Stepper, seconds: float, device: torch.device) -> int:
    """Replay staged steps for about `seconds`; returns the number of steps."""
    chunks, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(4):
            stepper.run(stepper.capacity, lambda: False)
            chunks += 1
        if device.type == "cuda":  # keep the queue short, so that the loop ends on time
            torch.cuda.synchronize()
    return chunks * stepper.capacity


def least_bytes(learner: Learner, rule: str, batch: int) -> int:
    """Forward reads W, the backward pass of BP reads it again behind the first layer, gradients are written, Adam
    reads p, g, m, v and writes p, m, v; inputs are read twice (forward and weight gradient)."""
    parameters = sum(p.numel() for p in learner.parameters())
    first = sum(p.numel() for p in learner.blocks()[0].parameters())
    backward = parameters - first if rule == "bp" else 0
    return FLOAT * (parameters * (1 + 1 + 7) + backward + 2 * batch * torch.Size(IMAGE).numel())


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured copy bandwidth (bytes read plus written, B/s) and TF32 matrix rate (FLOP/s)."""
    source = torch.rand(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    found = {}
    for name, work, amount in (
        ("bytes_per_s", lambda: target.copy_(source), 2 * source.nbytes),
        ("flop_per_s", lambda: a @ b, 2 * size**3),
    ):
        for _ in range(3):
            work()
        _sync(device)
        started = time.perf_counter()
        for _ in range(10):
            work()
        _sync(device)
        found[name] = 10 * amount / (time.perf_counter() - started)
    return found


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def staged_stepper(
    learner: Learner, batch: int, graph: bool, device: torch.device, precision: str = "tf32", **images: Any
) -> Stepper:
    """Steps of the first stage on random images, ready to be repeated."""
    stage = learner.stages()[0]
    data = random_images(batch * max(1, min(STAGED_STEPS, MOST_STAGED // batch)), device, **images)
    if stage.step_prefix is not None:
        with evaluation_mode(learner), torch.no_grad():
            data = data.map(stage.step_prefix, EVALUATION_BATCH)
    stepper = Stepper(
        learner,
        stage,
        data,
        live_prefix=None,
        batch_size=batch,
        precision=precision,
        scheduled=False,
        graph=graph,
    )
    draw = data.draw(0)
    stepper.rehearse(draw)
    stepper.stage_batches(draw, 0, stepper.capacity, [1.0] * stepper.capacity)
    repeat(stepper, 1.0, device)  # clocks and caches settle
    return stepper


def measure_step(
    rule: str, network: str, batch: int, graph: bool, window: float, device: torch.device, top: dict[str, float]
) -> dict[str, Any]:
    learner = build(rule, network, device)
    row = measured(staged_stepper(learner, batch, graph, device), window, device)
    seconds = row["ms"] / 1e3
    bytes_per_s = least_bytes(learner, rule, batch) / seconds
    return {
        "rule": rule,
        "network": network,
        "batch": batch,
        **row,
        "of_flop_ceiling": row["tflop_per_s"] * 1e12 / top["flop_per_s"],
        "tb_per_s": bytes_per_s / 1e12,
        "of_byte_ceiling": bytes_per_s / top["bytes_per_s"],
    }


def measured(stepper: Stepper, window: float, device: torch.device) -> dict[str, Any]:
    """Time and joules of a step, repeated for `window` seconds."""
    meter = EnergyMeter(choose_source("auto", device), device=device, min_window_s=window)
    with meter.window("steps") as result_of:
        steps = repeat(stepper, window + 0.1, device)
    result = result_of.result
    seconds = result.seconds / steps
    return {
        "mode": "graph" if stepper.use_graph else "eager",
        "ms": 1e3 * seconds,
        "j": None if result.gross_j is None else result.gross_j / steps,
        "mean_w": result.mean_w,
        "tflop_per_s": stepper.flops_per_step / seconds / 1e12,
        "steps": steps,
        "method": result.method,
        "flags": list(result.flags),
    }


def configured(name: str, settings: list[str]) -> RunConfig:
    """A preset with other values of some parameters and training settings."""
    parameters, training = parse_mixed_settings(tuple(settings), resolve(preset=name).algorithm)
    return resolve(preset=name, parameters=parameters, training=training)


def measure_preset(
    config: RunConfig, window: float, kernels: int, device: torch.device, trace: Path | None = None
) -> dict[str, Any]:
    """A step as the fit loop does it with a preset, and its longest kernels; a timeline of some steps in `trace`."""
    reconstruct = config.task == "autoencode"
    training, info = config.training, datasets.info(config.dataset)
    assert isinstance(info, datasets.DatasetInfo)  # graphs have no batches to be timed
    torch.manual_seed(0)
    network = build_network(config.network, info.input_shape)
    classes = 0 if reconstruct else info.classes
    learner = algorithm(config.algorithm).build(network, classes, info.input_shape, **config.parameters)
    layout = preferred_layout(network, device)
    convert_conv2d_weight_memory_format(learner, layout)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with numerics(training.precision):
        stepper = staged_stepper(
            learner.to(device),
            training.batch_size,
            training.graph,
            device,
            training.precision,
            shape=info.input_shape,
            classes=info.classes,
            layout=layout,
            reconstruct=reconstruct,
        )
        row = measured(stepper, window, device)
        memory = peak_memory(device)
        if trace is not None:
            trace.mkdir(parents=True, exist_ok=True)
            profiled(stepper).export_chrome_trace(str(trace / f"{config.preset}.json.gz"))
        longest = longest_kernels(stepper, kernels) if kernels and device.type == "cuda" else []
    return {
        "preset": config.preset,
        "settings": listed(changes(config)),
        "rule": algorithm(config.algorithm).alias,
        "network": config.network,
        "batch": training.batch_size,
        "precision": training.precision,
        **row,
        "memory": memory,
        "kernels": longest,
    }


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        UsageError: there is none that can be read.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a record of steps ({error}); name one that --json has written") from error
    return record


def preset_rows(path: Path) -> list[dict[str, Any]]:
    """The steps of presets in a record; where one environment stands for all of them, each gets it."""
    record = read(path)
    shared = {"environment": record["environment"]} if "environment" in record else {}
    return [{"settings": "", **shared, **row} for row in record["presets"]]


def profiled(stepper: Stepper) -> profile:
    """The kernels of as many steps as are staged."""
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as seen:
        stepper.run(stepper.capacity, lambda: False)
        if on_gpu:
            torch.cuda.synchronize()
    return seen


def longest_kernels(stepper: Stepper, most: int) -> list[dict[str, Any]]:
    """The kernels of a step that take most of its time, all of one name together; side streams overlap."""
    steps = stepper.capacity
    found = [
        {"us": event.self_device_time_total / steps, "launches": event.count / steps, "name": event.key}
        for event in profiled(stepper).key_averages()
    ]
    return sorted(found, key=lambda kernel: -kernel["us"])[:most]


def measure_epoch(rule: str, network: str, epochs: int, device: torch.device) -> dict[str, Any]:
    learner = build(rule, network, device)
    train, validation = random_images(45_000, device), random_images(5_000, device)
    train.augmentation = "crop-flip"
    moments: list[float] = []
    trainer = Trainer(
        learner,
        train,
        validation,
        TrainingConfig(epochs=epochs, patience=epochs),
        on_epoch=lambda record: moments.append(time.perf_counter()),
    )
    trainer.run()
    return {"rule": rule, "network": network, "epoch_s": (moments[-1] - moments[0]) / (len(moments) - 1)}


def show_presets(rows: list[dict[str, Any]]) -> None:
    """Print a table of presets' steps, and below it their longest kernels."""
    varied = any(row["settings"] for row in rows)
    cells = [
        {
            "preset": row["preset"],
            **({"settings": row["settings"]} if varied else {}),
            "network": row["network"],
            "batch": str(row["batch"]),
            "precision": row["precision"],
            "mode": row["mode"],
            "step, ms": f"{row['ms']:.4f}",
            "J/step": "not measured" if row["j"] is None else f"{row['j']:.4f}",
            "W": "" if row["mean_w"] is None else f"{row['mean_w']:.0f}",
            **({"peak memory, MiB": f"{row['memory']['peak_mib']:.0f}"} if "memory" in row else {}),
            "flags": ", ".join(row["flags"]),
            "hardware": row["environment"]["hardware"],
            "date": row["environment"]["date"][:10],
        }
        for row in rows
    ]
    print(markdown_table(cells))
    for row in rows:
        for kernel in row["kernels"]:
            name = kernel["name"][:100]
            what = " ".join(filter(None, (row["preset"], row["settings"])))
            print(f"{what}: {kernel['us']:7.1f} us a step in {kernel['launches']:5.1f} launches of {name}")


def show(record: dict[str, Any]) -> None:
    """Print the tables of a record of rules' steps."""
    top, described = record["ceilings"], record["environment"]
    print(
        f"{described['hardware']}, torch {described['torch']}, {described['date'][:10]}, commit {described['commit']}"
    )
    print(f"ceilings: {top['flop_per_s'] / 1e12:.0f} TFLOP/s (TF32), {top['bytes_per_s'] / 1e12:.2f} TB/s")
    rows = [
        {
            "batch": str(row["batch"]),
            "rule": row["rule"],
            "mode": row["mode"],
            "ms/step": f"{row['ms']:.4f}",
            "J/step": "" if row["j"] is None else f"{row['j']:.4f}",
            "W": "" if row["mean_w"] is None else f"{row['mean_w']:.0f}",
            "TFLOP/s": f"{row['tflop_per_s']:.1f} ({row['of_flop_ceiling']:.0%})",
            "least TB/s": f"{row['tb_per_s']:.2f} ({row['of_byte_ceiling']:.0%})",
            "flags": ", ".join(row["flags"]),
        }
        for row in record["steps"]
    ]
    print(text_table(rows))
    for row in record["epochs"]:
        print(f"{row['rule']}: an epoch of 45,000 images takes {row['epoch_s']:.4f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="mlp:3x2000")
    parser.add_argument("--rules", nargs="+", default=["bp", "mf"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 1024, 8192])
    parser.add_argument("--presets", nargs="+", help="measure steps of these presets instead")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="instead of what presets say")
    parser.add_argument("--kernels", type=int, default=0, help="with --presets, list so many of the longest kernels")
    parser.add_argument("--trace", type=Path, help="with --presets, a folder for timelines to be opened in Perfetto")
    parser.add_argument("--window", type=float, default=5.0, help="seconds per measurement")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of the epoch line; 0 leaves it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--show", type=Path, help="print the tables of such a file instead of measuring")
    options = parser.parse_args()
    if not options.presets and (options.set or options.kernels or options.trace):
        parser.error("--set, --kernels and --trace are for steps of --presets")
    try:
        carry_out(options)
    except BpfreeError as error:
        sys.exit(str(error))


def carry_out(options: argparse.Namespace) -> None:
    """Measure, or show what has been measured."""
    if options.show:
        record = read(options.show)
        show_presets(preset_rows(options.show)) if "presets" in record else show(record)
        return
    device = torch.device(options.device)
    if options.presets:
        configs = [configured(name, options.set) for name in options.presets]
        measure_presets(configs, options, device)
        return
    with numerics("tf32"):
        top = ceilings(device)
        modes = [False, True] if device.type == "cuda" else [False]
        steps = [
            measure_step(rule, options.network, batch, graph, options.window, device, top)
            for batch in options.batches
            for rule in options.rules
            for graph in modes
        ]
    epochs = [
        measure_epoch(rule, options.network, options.epochs, device) for rule in options.rules if options.epochs > 1
    ]
    record = {"environment": environment(device), "ceilings": top, "steps": steps, "epochs": epochs}
    show(record)
    if options.json:
        write(record, options.json)


def measure_presets(configs: list[RunConfig], options: argparse.Namespace, device: torch.device) -> None:
    """Measure, show, and put the rows in the place of those of the same steps in the file, if there are any."""
    described = environment(device)
    rows = [
        {**measure_preset(config, options.window, options.kernels, device, options.trace), "environment": described}
        for config in configs
    ]
    show_presets(rows)
    if options.json:
        write({"presets": merged(rows, options.json)}, options.json)


def merged(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows of a file, if there is one, with these in the place of those of the same steps."""
    known = [*(preset_rows(path) if path.exists() else []), *rows]
    return list({(row["preset"], row["settings"]): row for row in known}.values())


def write(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
