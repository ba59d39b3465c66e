"""Finished runs as their records have them. What is damaged is left out, and said to be: it must not hide the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bpfree.energy.flags import Flag
from bpfree.errors import BpfreeError, DataError
from bpfree.experiments.config import RunConfig
from bpfree.experiments.records import RunFolder, energy_curve, find_runs

Say = Callable[[str], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One finished run."""

    path: Path
    config: RunConfig
    summary: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Run:
        """The run in a folder.

        Raises:
            CheckpointError: it is damaged.
            UsageError: its configuration holds what this version does not know.
        """
        folder = RunFolder.open(path)
        return cls(path, RunConfig.of_run(folder), folder.read_summary())

    def epochs(self) -> list[dict[str, Any]]:
        """One record per epoch.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        return RunFolder(self.path).read_metrics()

    def curve(self) -> list[tuple[float | None, float]]:
        """Joules and validation accuracy, see `energy_curve`; without joules of a board that was shared."""
        curve = energy_curve(self.epochs(), self.summary)
        return [(None, accuracy) for _, accuracy in curve] if shared_its_board(self.summary) else curve


def shared_its_board(summary: Mapping[str, Any]) -> bool:
    """Whether something else computed on the board: the run's accuracy counts, its time and joules do not."""
    return Flag.FOREIGN_PROCESS.name in summary["energy"]["flags"]


def finished_runs(root: Path, *, epochs: bool = False, say: Say = warnings.warn) -> list[Run]:
    """Finished runs under a folder, in order of name.

    Args:
        root: where to look.
        epochs: whether what they recorded per epoch will be wanted, and must be readable as well.
        say: told of each run that is left out, and why.
    """

    def read(path: Path) -> Run:
        run = Run.read(path)
        if epochs:
            run.epochs()
        return run

    found = [read_or_leave_out("run", path, read, say) for path in find_runs(root)]
    return [run for run in found if run is not None]


def read_or_leave_out(what: str, path: Path, read: Callable[[Path], T], say: Say) -> T | None:
    """What `read` makes of a path; None if it cannot, having said why and, as errors do, what to do about it."""
    try:
        return read(path)
    except BpfreeError as error:
        say(f"left out the {what} {path}: {error}")
        return None


def nothing_to_show(root: Path, datasets: Collection[str] = ()) -> DataError:
    """The error where no run is left, of those data sets if some were asked for."""
    wanted = f" on {' or '.join(datasets)}" if datasets else ""
    return DataError(
        f"no finished run{wanted} under {root} that can be shown; make some with `bpfree run` or `bpfree compare`"
    )
