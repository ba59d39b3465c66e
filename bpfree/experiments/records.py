"""Run folders: what a run was, what it measured, and what it needs to go on. Written atomically."""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import IO, Any, Final

import numpy as np
import torch

from bpfree.errors import CheckpointError, cannot_write

CONFIG: Final = "config.json"
ENVIRONMENT: Final = "environment.json"
METRICS: Final = "metrics.jsonl"
PACKED_METRICS: Final = "metrics.jsonl.gz"
SUMMARY: Final = "summary.json"
UNTESTED: Final = "untested.json"  # in its place if a run was not tested
CHECKPOINT: Final = "checkpoint.pt"
MODEL: Final = "model.pt"
PICTURE: Final = "reconstructions.png"
DATASET_LETTERS: Final = 60

START_AGAIN: Final = "delete it, and --resume trains this run from its start"
"""What to do about a checkpoint that is no good."""

NUMBER: Final = (int, float)
MAYBE: Final = (int, float, NoneType)  # what not every device tells

MEASURED: Final[dict[str, Any]] = {
    **dict.fromkeys(("algorithm", "dataset", "network", "variant", "hardware", "date", "command"), str),
    "preset": (str, NoneType),
    "seed": int,
    "validation_accuracy": NUMBER,
    "passes": int,
    "seconds": NUMBER,
    "peak_memory_mib": NUMBER,
    "memory": {"peak_mib": NUMBER, "method": str},
    "energy": {
        **dict.fromkeys(("gross_j", "net_j", "mean_w"), MAYBE),
        "method": str,
        "scope": str,
        "flags": [str],
        "regime": {"utilisation": MAYBE},
        "source": dict,
    },
    "stages": [{"best_epoch": int}],
}
"""What a summary has at least, and of which type: whatever is read of it without asking whether it is there."""

TESTED: Final[dict[str, Any]] = {"test_accuracy": NUMBER, "test_loss": NUMBER, "test_diagnostics": dict}
"""What a summary has besides if the run was tested."""

SURROUNDINGS: Final[dict[str, Any]] = {"hardware": str, "date": str, "commit": (str, NoneType)}
"""What the record of a run's environment has at least."""

EPOCH: Final[dict[str, Any]] = {"steps": int, "validation_accuracy": NUMBER, "joules_at_start": MAYBE}
"""The same of an epoch's record."""


class RunFolder:
    """One run on disk.

    Every file is written beside its place and moved there when complete, so that a run that is killed, or a disk
    that fills up, leaves the previous version behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, root: Path, *, dataset: str, algorithm: str, network: str, seed: int) -> RunFolder:
        """A new, empty run folder under `root`; its name is unique.

        Raises:
            CheckpointError: it cannot be made.
        """
        moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        network = re.sub(r"[^A-Za-z0-9]+", "-", network)
        # of folder:PATH the end, which tells most; a name of a file has at most 255 bytes
        dataset = re.sub(r"[^A-Za-z0-9_]+", "-", dataset)[-DATASET_LETTERS:].strip("-")
        path = root / f"{dataset}-{algorithm}-{network}-seed{seed}-{moment}-{secrets.token_hex(4)}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            CheckpointError: there is none, or it holds no configuration.
        """
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path} is not a run folder (it has no {CONFIG})")
        return cls(path)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object.

        Raises:
            CheckpointError: it cannot be written; the previous version is still there.
        """
        self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text.

        Raises:
            CheckpointError: it cannot be written; the previous version is still there.
        """
        self._write(name, lambda file: file.write(text.encode()))

    def read_json(self, name: str, shape: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """Read a JSON object.

        Args:
            name: of the file.
            shape: what it has at least: by key a type, several types, a shape of its own, or a list of one of these.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            value: dict[str, Any] = json.loads((self.path / name).read_text())
        except OSError as error:
            raise CheckpointError(
                f"cannot read {self.path / name}: {error.strerror}; restore it, or move the folder {self.path} away"
            ) from error
        except ValueError as error:
            raise self.damaged(name, str(error)) from error
        self._check(name, value, shape)
        return value

    def read_summary(self, name: str = SUMMARY) -> dict[str, Any]:
        """A run's summary, which has all that it needs to have.

        Args:
            name: SUMMARY, or UNTESTED for that of a run that was not tested.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return self.read_json(name, MEASURED if name == UNTESTED else {**MEASURED, **TESTED})

    def damaged(self, name: str, reason: str) -> CheckpointError:
        """The error for a file that does not hold what was written to it."""
        return CheckpointError(
            f"{self.path / name} is damaged ({reason}); restore it, or move the folder {self.path} away"
        )

    def _check(self, name: str, value: Any, shape: Any) -> None:
        flaw = _flaw(value, shape)
        if flaw is not None:
            raise self.damaged(name, flaw)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Replace the per-epoch metrics, after a resume has gone back to a checkpoint."""
        self.write_text(METRICS, "".join(json.dumps(record) + "\n" for record in history))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one epoch's metrics as a line of JSON.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            with (self.path / METRICS).open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise cannot_write(self.path / METRICS, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """One record per epoch, in order. A finished run's may be packed (`gzip metrics.jsonl`), for keeping.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        path = self.path / METRICS
        packed = path.with_name(PACKED_METRICS)
        path = packed if packed.is_file() and not path.is_file() else path
        try:
            text = gzip.decompress(path.read_bytes()).decode() if path == packed else path.read_text()
            epochs = [json.loads(line) for line in text.splitlines()]
        except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self.damaged(path.name, str(error)) from error
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        self._check(METRICS, epochs, [EPOCH])
        return epochs

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Write tensors and plain values.

        Raises:
            CheckpointError: it cannot be written; the previous version is still there.
        """
        self._write(name, lambda file: torch.save(dict(state), file))

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Read what `save` wrote, without executing code from it.

        Raises:
            CheckpointError: the file is missing, damaged, or holds something else.
        """
        path = self.path / name
        if not path.is_file():
            raise CheckpointError(f"{self.path} has no {name}")
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch.load raises whatever a damaged file makes its parts raise
            reason = (
                str(error).strip().splitlines()[0].partition(". ")[0] if str(error).strip() else type(error).__name__
            )
            again = f"; {START_AGAIN}" if name == CHECKPOINT else ""
            raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason}){again}") from error
        return state

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        (self.path / name).unlink(missing_ok=True)

    @property
    def has_progress(self) -> bool:
        """Whether an epoch was recorded, or a checkpoint saved."""
        metrics = self.path / METRICS
        return (self.path / CHECKPOINT).is_file() or (metrics.is_file() and metrics.stat().st_size > 0)

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        path = self.path / name
        temporary = path.with_name(f".{name}.partial")
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # the latter is PyTorch's
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise cannot_write(path, error, kept=path.is_file()) from error


def _flaw(value: Any, shape: Any, name: str = "it") -> str | None:
    """What is wrong with a value from JSON, if anything; see `RunFolder.read_json` for shapes."""
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return f"{name} is not an object"
        missing = next((key for key in shape if key not in value), None)
        if missing is not None:
            return f"{name} has no {missing}"
        return next(filter(None, (_flaw(value[key], inner, key) for key, inner in shape.items())), None)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        return next(filter(None, (_flaw(item, shape[0], f"{name}[{n}]") for n, item in enumerate(value))), None)
    return None if isinstance(value, shape) else f"{name} is {value!r}"


def find_runs(root: Path) -> Iterator[Path]:
    """Folders of finished runs under `root`, in order of name."""
    yield from sorted(path.parent for path in root.rglob(SUMMARY))


def energy_curve(epochs: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[tuple[float | None, float]]:
    """Gross joules spent up to each validation, with that validation, and its metric in %; for energy to accuracy.

    The loop reads the counter when it has launched the next epoch's first steps, unless it has just done so, and once
    more at the end. Validations in between, closer than the counter is renewed, share what was spent by their updates.
    So do those whose reading is above a later one: until the counter has moved, sampled power stands in for it.
    Joules are None if they were not measured.

    Args:
        epochs: the run's records, one per epoch.
        summary: the run's summary.
    """
    updates = [0, *(epoch["steps"] for epoch in epochs)]
    readings = [*(epoch["joules_at_start"] for epoch in epochs), summary["energy"]["gross_j"]]
    known: dict[int, float] = {}
    for done, joules in reversed(list(zip(updates, readings, strict=True))):
        if joules is not None and joules <= min(known.values(), default=joules):
            known.setdefault(done, joules)
    accuracies = [epoch["validation_accuracy"] for epoch in epochs]
    if readings[-1] is None:
        return [(None, accuracy) for accuracy in accuracies]
    at = sorted(known)
    spent = np.interp(updates[1:], at, [known[done] for done in at])
    return list(zip(spent.tolist(), accuracies, strict=True))


def environment(device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """Versions, hardware and source of this process, for the record. Nothing that names the machine or its user.

    Args:
        device: the device that trains.
        ranks: how many of them train together.
    """
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = torch.backends.cudnn.version()
    from bpfree import __version__

    return {
        "bpfree": __version__,
        "commit": _source_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware(device) if ranks == 1 else f"{ranks} x {hardware(device)}",
        **versions,
    }


def hardware(device: torch.device) -> str:
    """The device that trains, as people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def _source_commit() -> str | None:
    """Commit of the bpfree source in use ("-dirty" when changed), or BPFREE_COMMIT, or None outside a checkout."""
    if commit := os.environ.get("BPFREE_COMMIT"):
        return commit
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
