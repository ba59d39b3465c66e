"""Run folders with made-up numbers, for tables, figures and reports. Nothing in them was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpfree.experiments.config import resolve
from bpfree.experiments.records import CONFIG, ENVIRONMENT, METRICS, SUMMARY, RunFolder

H200 = "NVIDIA H200"


def make_run(
    root: Path,
    rule: str,
    seed: int,
    *,
    accuracy: float = 60.0,
    joules: float | None = 1000.0,
    seconds: float = 10.0,
    curve: Sequence[tuple[float | None, float]] = ((None, 40.0), (500.0, 60.0)),
    utilisation: float | None = 0.95,
    mib: float = 200.0,
    hardware: str = H200,
    network: str = "mlp:3x2000",
    dataset: str = "cifar10",
    idle_w: float | None = 20.0,
    flops: float | None = 3e12,
    flags: Sequence[str] = ("SIMULATED",),
    metric: str = "accuracy",
    board: str | None = None,
    **training: Any,
) -> Path:
    """One finished run.

    Args:
        root: where its folder goes.
        rule: short name.
        seed: seed.
        accuracy: on the test part, %.
        joules: gross energy, J.
        seconds: time, s.
        curve: of each epoch the joules at its start, and validation accuracy, %.
        utilisation: share of the time with a kernel running.
        mib: peak memory of the allocator; the device has 1000 MiB more.
        hardware: the device.
        network: network.
        dataset: data set.
        idle_w: power of the idle device, W.
        flops: of the whole training.
        flags: of the energy.
        metric: what accuracy is.
        board: hash of the board.
        training: training settings.
    """
    config = resolve(rule, dataset, network, preset="none", seed=seed, training=training)
    folder = RunFolder.create(root, dataset=dataset, algorithm=rule, network=network, seed=seed)
    folder.write_json(CONFIG, config.to_dict())
    folder.write_json(ENVIRONMENT, {"hardware": hardware})
    epochs = [
        {"stage": "all", "epoch": i + 1, "steps": 100 * (i + 1), "joules_at_start": spent, "validation_accuracy": value}
        for i, (spent, value) in enumerate(curve)
    ]
    (folder.path / METRICS).write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    net = None if joules is None or idle_w is None else joules - idle_w * seconds
    energy = {
        "gross_j": joules,
        "net_j": net,
        "seconds": seconds,
        "mean_w": None if joules is None else joules / seconds,
        "idle_w": idle_w,
        "method": "simulated",
        "scope": "simulated",
        "flags": list(flags),
        "regime": {"utilisation": utilisation},
        "j_per_sample": None if joules is None else joules / 1e6,
        "source": {"uuid_hash": board},
    }
    accuracies = [value for _, value in curve]
    summary = {
        "algorithm": config.algorithm,
        "dataset": dataset,
        "network": network,
        "variant": "",
        "preset": None,
        "seed": seed,
        "metric": metric,
        "test_accuracy": accuracy,
        "test_loss": 1.0,
        "test_diagnostics": {},
        "validation_accuracy": max(accuracies),
        "passes": len(curve),
        "updates": 100 * len(curve),
        "seconds": seconds,
        "energy": energy,
        "memory": {"peak_mib": mib, "device_mib": mib + 1000, "method": "torch allocator"},
        "peak_memory_mib": mib,
        "stages": [{"stage": "all", "epochs": len(curve), "best_epoch": 1 + accuracies.index(max(accuracies))}],
        "flops": flops,
        "forward_flops": 28_330_000,
        "blocks": int(network.split(":")[1].split("x")[0]),
        "hardware": hardware,
        "date": "2026-01-01T00:00:00Z",
        "commit": "0000000",
        "command": f"bpfree run --seed {seed}",
    }
    folder.write_json(SUMMARY, summary)
    return folder.path
