"""Progress on standard error: a live bar on a terminal, a line per stage elsewhere."""

from __future__ import annotations

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
