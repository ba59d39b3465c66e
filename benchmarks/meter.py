"""How good the energy numbers are on this board: agreement, noise, repeatability, edge alignment, overhead.

    bpfree energy calibrate --output results/energy/calibration.json
    python benchmarks/meter.py --out results/energy            11 minutes, one JSON file per study
    python benchmarks/meter.py --show results/energy           the tables of such a folder

agreement   60 s of matrix products: the counter against power sampled at 10 Hz and integrated
idle        60 s of an idle board with a context, the same comparison
repeat      ten windows of 15 s of one training step (Mono-Forward, MLP 3x2000, batch 128, CUDA graph): J per step
edges       windows of 1, 2, 5 and 10 s of that step, with and without waiting for the counter to change
overhead    trainings of 60 epochs with the meter on as in `bpfree run` and off, in the order ABBA: time and J per step,
            by a second window around epochs 2 to 60, which does not sample
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from step import build, random_images, repeat, staged_stepper

from bpfree.cli.energy import calibration_rows
from bpfree.energy import KINDS, EnergyMeter, PowerSource, Window, choose_source
from bpfree.energy.calibration import SETTLE_S, Calibration
from bpfree.energy.load import MatrixLoad
from bpfree.experiments.records import environment
from bpfree.experiments.run import POLL_HZ
from bpfree.experiments.stepper import Stepper, numerics
from bpfree.experiments.tables import markdown_table
from bpfree.experiments.train import Trainer, TrainingConfig

NETWORK, BATCH = "mlp:3x2000", 128
EDGE_WINDOWS = {1.0: 12, 2.0: 10, 5.0: 6, 10.0: 4}
"""Length of windows, s, and how many of them."""


class Bench:
    """The board under test and how long to look at it."""

    def __init__(self, device: torch.device, seconds: float, source: PowerSource) -> None:
        self.device, self.seconds, self.source = device, seconds, source

    def meter(self, **options: Any) -> EnergyMeter:
        return EnergyMeter(self.source, device=self.device, **options)

    def stepper(self) -> Stepper:
        return staged_stepper(build("mf", NETWORK, self.device), BATCH, True, self.device)

    def _compared(self, wait: Callable[[], object]) -> dict[str, Any]:
        """Counter and integrated power over the same window."""
        meter = self.meter(poll_hz=10.0)
        with meter.window("compared") as window:
            wait()
        counter, trace = window.tally.counter_j, window.tally.trace_j
        agreement = None if counter is None or not trace else counter / trace
        return {**window.result.as_dict(), "counter_j": counter, "integrated_j": trace, "counter_over_power": agreement}

    def agreement(self) -> dict[str, Any]:
        with MatrixLoad(self.device):
            time.sleep(SETTLE_S)
            return self._compared(lambda: time.sleep(self.seconds))

    def idle(self) -> dict[str, Any]:
        torch.zeros(1, device=self.device)
        time.sleep(SETTLE_S)
        return self._compared(lambda: time.sleep(self.seconds))

    def _windows(self, stepper: Stepper, seconds: float, count: int, align: bool) -> list[dict[str, Any]]:
        windows = []
        for _ in range(count):
            meter = self.meter(align=align)
            with meter.window("steps") as window:
                steps = repeat(stepper, seconds, self.device)
            result = window.result
            windows.append(
                {
                    "seconds": result.seconds,
                    "steps": steps,
                    "gross_j": result.gross_j,
                    "j_per_step": None if result.gross_j is None else result.gross_j / steps,
                    "temperature_c": result.regime.temperature_end_c,
                    "flags": list(result.flags),
                }
            )
        return windows

    def repeat(self) -> dict[str, Any]:
        with numerics("tf32"):
            stepper = self.stepper()
            repeat(stepper, SETTLE_S, self.device)
            return {"windows": self._windows(stepper, self.seconds / 4, 10, align=False)}

    def edges(self) -> dict[str, Any]:
        with numerics("tf32"):
            stepper = self.stepper()
            repeat(stepper, SETTLE_S, self.device)
            return {
                "windows": [
                    {"align": align, "length": length, **window}
                    for length, count in EDGE_WINDOWS.items()
                    for align in (False, True)
                    for window in self._windows(stepper, length * self.seconds / 60, count, align)
                ]
            }

    def overhead(self) -> dict[str, Any]:
        self._training(True)  # warms up
        return {"runs": [self._training(metered) for metered in (True, False, False, True) * 3]}

    def _training(self, metered: bool) -> dict[str, Any]:
        """A training of some seconds, and what all its epochs but the first took by a window around them."""
        torch.manual_seed(0)
        epochs = max(2, round(self.seconds))  # of about 0.12 s
        train, validation = random_images(45_000, self.device), random_images(5_000, self.device)
        outer = self.meter()
        window = outer.window("epochs")
        inner = self.meter(poll_hz=POLL_HZ) if metered else None
        entered: list[Window] = []

        def on_epoch(record: dict[str, Any]) -> None:
            if record["epoch"] == 1:
                entered.append(window.__enter__())
            elif record["epoch"] == epochs:
                window.__exit__(None, None, None)

        trainer = Trainer(
            build("bp", NETWORK, self.device),
            train,
            validation,
            TrainingConfig(epochs=epochs, patience=epochs),
            meter=inner,
            on_epoch=on_epoch,
        )
        with nullcontext() if inner is None else inner.window("total"):
            steps = trainer.run().steps * (epochs - 1) / epochs
        result = entered[0].result
        return {
            "metered": metered,
            "seconds": result.seconds,
            "ms_per_step": 1e3 * result.seconds / steps,
            "j_per_step": None if result.gross_j is None else result.gross_j / steps,
            "flags": list(result.flags),
        }


CALIBRATION = "calibration"
STUDIES = ("agreement", "idle", "repeat", "edges", "overhead")


def _spread(values: list[float]) -> str:
    """Mean and coefficient of variation."""
    return f"{statistics.fmean(values):.5f} ± {100 * statistics.stdev(values) / statistics.fmean(values):.2f} %"


def show(folder: Path, studies: Sequence[str]) -> None:
    """Print the tables of a folder of studies; those that compare sensors make one table."""

    def read(name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        return record

    tables = []
    if CALIBRATION in studies:
        tables.append(calibration_rows(Calibration.load(folder / f"{CALIBRATION}.json")))
    if compared := [name for name in ("agreement", "idle") if name in studies]:
        tables.append([_compared_row(name, read(name)) for name in compared])
    reference = statistics.fmean(window["j_per_step"] for window in read("repeat")["windows"])
    if "repeat" in studies:
        tables.append(_repeat_rows(read("repeat")["windows"]))
    if "edges" in studies:
        tables.append(_edge_rows(read("edges")["windows"], reference))
    if "overhead" in studies:
        tables.append(_overhead_rows(read("overhead")["runs"]))
    print("\n\n".join(markdown_table(rows) for rows in tables))


def _compared_row(name: str, record: dict[str, Any]) -> dict[str, str]:
    return {
        "window": name,
        "seconds": f"{record['seconds']:.1f}",
        "counter, J": f"{record['counter_j']:.1f}",
        "integrated power, J": f"{record['integrated_j']:.1f}",
        "counter / integral": f"{record['counter_over_power']:.4f}",
        "mean, W": f"{record['mean_w']:.1f}",
        "flags": ", ".join(record["flags"]),
    }


def _repeat_rows(windows: list[dict[str, Any]]) -> list[dict[str, str]]:
    values = [window["j_per_step"] for window in windows]
    return [
        {
            "windows": f"{len(values)} of {windows[0]['seconds']:.0f} s",
            "J per step": _spread(values),
            "lowest": f"{min(values):.5f}",
            "highest": f"{max(values):.5f}",
        }
    ]


def _edge_rows(windows: list[dict[str, Any]], reference: float) -> list[dict[str, str]]:
    """Spread of J per step, and its mean against that of the long windows."""
    rows = []
    for length in dict.fromkeys(window["length"] for window in windows):
        row = {"window, s": f"{length:g}"}
        for align, title in ((False, "plain"), (True, "aligned")):
            values = [w["j_per_step"] for w in windows if w["length"] == length and w["align"] == align]
            row[f"{title}: n"] = str(len(values))
            row[f"{title}: spread, %"] = f"{100 * statistics.stdev(values) / statistics.fmean(values):.2f}"
            row[f"{title}: mean against 15 s windows, %"] = f"{100 * (statistics.fmean(values) / reference - 1):+.2f}"
        rows.append(row)
    return rows


def _overhead_rows(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """On against off, with the standard error of the difference of the means."""
    rows = []
    for name, title in (("ms_per_step", "ms per step"), ("j_per_step", "J per step")):
        on, off = ([run[name] for run in runs if run["metered"] is metered] for metered in (True, False))
        base = statistics.fmean(off)
        error = (statistics.variance(on) / len(on) + statistics.variance(off) / len(off)) ** 0.5
        rows.append(
            {
                "quantity": title,
                "meter off": _spread(off),
                "meter on": _spread(on),
                "difference, %": f"{100 * (statistics.fmean(on) / base - 1):+.2f} ± {100 * error / base:.2f}",
                "n": f"{len(on)} + {len(off)}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/energy"), help="folder of the JSON files")
    parser.add_argument("--only", nargs="+", choices=(CALIBRATION, *STUDIES), help="these studies (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the long windows; others follow")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--source", choices=KINDS, default="auto", help="where joules come from")
    parser.add_argument("--show", type=Path, help="print the tables of such a folder instead of measuring")
    options = parser.parse_args()
    if not options.show and CALIBRATION in (options.only or ()):
        parser.error("a calibration is made by `bpfree energy calibrate`, and only shown here")
    if options.show:
        show(options.show, options.only or (CALIBRATION, *STUDIES))
        return
    device = torch.device(options.device)
    bench = Bench(device, options.seconds, choose_source(options.source, device))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or STUDIES:
        started = time.monotonic()
        record = {**getattr(bench, name)(), "environment": environment(device), "source": bench.source.info()}
        (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
