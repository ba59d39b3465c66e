"""Progress on standard error: a live bar on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from bpfree.algorithms import Learner
from bpfree.experiments.config import RunConfig, command
from bpfree.experiments.run import Reporter
from bpfree.experiments.train import Trainer
from bpfree.experiments.tune import Observer, TuneConfig
from bpfree.words import count_of

LINE_EVERY_S: Final = 10.0


def energy_words(energy: Mapping[str, Any]) -> str:
    """Joules as a person reads them, with how they were measured, or why they were not."""
    if energy["gross_j"] is None:
        reason = energy["source"].get("reason") or ", ".join(energy["flags"])
        return f"energy not measured ({reason})"
    net = "" if energy["net_j"] is None else f", {energy['net_j']:.0f} J net"
    flags = f", {', '.join(energy['flags'])}" if energy["flags"] else ""
    return f"{energy['gross_j']:.0f} J gross{net} ({energy['method']}, {energy['scope']}{flags})"


class Console(Reporter):
    """Tells a person at a terminal how a run goes.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._stage = ""
        self._last_line = 0.0

    def _say(self, text: str) -> None:
        if not self._quiet:
            click.echo(text, err=True)

    def started(self, config: RunConfig, folder: Path, learner: Learner, trainer: Trainer) -> None:
        self._trainer = trainer
        self._metric = trainer.validation.metric
        self._stages = [stage.name for stage in learner.stages()]
        self._stage = ""
        preset = f" (preset {config.preset})" if config.preset else ""
        self._say(f"{command(config)}{preset}\n{folder} on {trainer.train.device}")

    def steps(self, stage: str, epoch: int, count: int) -> None:
        if self._quiet or not sys.stderr.isatty():
            return
        if stage != self._stage:
            self.finished()
            from tqdm import tqdm

            self._stage = stage
            self._bar = tqdm(
                total=self._trainer.planned_steps,
                initial=epoch * self._trainer.steps_per_epoch,
                desc=f"{stage} ({self._stages.index(stage) + 1}/{len(self._stages)})",
                unit="step",
                dynamic_ncols=True,
            )
        self._bar.update(count)

    def epoch(self, record: dict[str, Any]) -> None:
        loss, accuracy = record["validation_loss"], record["validation_accuracy"]
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"epoch {record['epoch']}, validation loss {loss:.4f}, {self._metric} {accuracy:.2f} %"
            )
        elif not sys.stderr.isatty() and time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._say(
                f"{record['stage']}, epoch {record['epoch']}: validation loss {loss:.4f}, "
                f"{self._metric} {accuracy:.2f} %"
            )

    def finished(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TuningConsole(Observer):
    """Tells a person at a terminal how tuning goes: a line per trial, and a live bar for the one in hand.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._trials, self._by_cost, self._metric = 0, False, ""
        self._number = 0
        self._bar: Any = None
        self._last_line = 0.0

    def _say(self, text: str) -> None:
        if not self._quiet:
            click.echo(text, err=True)

    def started(self, config: TuneConfig, folder: Path, space: Mapping[str, Any], done: int) -> None:
        self._trials, self._by_cost = config.trials, config.target is not None
        base = config.base
        self._metric = base.metric
        what = f"{base.algorithm} on {base.dataset} with {base.network}"
        self._say(f"tuning {what}, {count_of(config.trials, 'trial')} -> {folder}")
        if done:
            self._say(f"{done} of them done already")
        for name, values in space.items():
            choices = values.get("choices")
            limits = f"{values.get('low')} to {values.get('high')}{' by logarithm' if values.get('log') else ''}"
            self._say(f"  {name}: {', '.join(map(str, choices)) if choices else limits}")

    def trial_started(self, number: int, run: RunConfig) -> None:
        self._number = number
        # bars of several processes would overwrite each other
        if self._quiet or not sys.stderr.isatty() or multiprocessing.parent_process() is not None:
            return
        from tqdm import tqdm

        self._bar = tqdm(total=100, desc=f"trial {number}", unit="%", dynamic_ncols=True, leave=False)

    def trial_progress(self, fraction: float, record: Mapping[str, Any]) -> None:
        words = f"validation {self._metric} {record['validation_accuracy']:.2f} %"
        if self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(round(100 * fraction) - self._bar.n)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._say(f"trial {self._number}: {100 * fraction:.0f} % done, {words}")

    def trial_ended(self, trial: Mapping[str, Any], ended: int, best: Mapping[str, Any] | None) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._last_line = time.monotonic()
        joules = "" if trial["gross_j"] is None else f", {trial['gross_j']:.0f} J"
        accuracy = trial.get("validation_accuracy")
        how = trial["reason"] if accuracy is None else f"{self._metric} {accuracy:.2f} %"
        values = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial["values"].items())
        leader = ""
        if best is not None:
            cost = f" for {best['gross_j']:.0f} J" if self._by_cost else ""
            leader = f"; best {best['validation_accuracy']:.2f} %{cost} (trial {best['number']})"
        self._say(
            f"[{ended}/{self._trials}] trial {trial['number']} {trial['state']}: {how}, "
            f"{count_of(trial['passes'], 'pass')}, {trial['seconds']:.1f} s{joules}: {values}{leader}"
        )
