"""Run folders: atomic, loadable without trust, honest about failures."""

from __future__ import annotations

import gzip
import itertools
import pickle
import secrets
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bpfree.errors import CheckpointError
from bpfree.experiments import records
from bpfree.experiments.records import RunFolder


def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, dataset="digits", algorithm="mf", network="mlp:2x10", seed=3)


def test_names_are_unique_and_plain(tmp_path: Path) -> None:
    paths = {folder(tmp_path).path.name for _ in range(20)}
    assert len(paths) == 20
    assert all(name.startswith("digits-mf-mlp-2x10-seed3-") for name in paths)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    run = folder(tmp_path)
    state = {"tensor": torch.randn(3), "list": [1, 2.5, None, "x"], "nested": {"a": torch.arange(2)}}
    run.save("state.pt", state)
    loaded = run.load("state.pt")
    assert torch.equal(loaded["tensor"], state["tensor"])
    assert loaded["list"] == state["list"]
    run.write_json("x.json", {"a": 1.5})
    assert run.read_json("x.json") == {"a": 1.5}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_record_is_named_with_a_remedy(tmp_path: Path, text: str) -> None:
    run = folder(tmp_path)
    (run.path / records.SUMMARY).write_text(text)
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged .*; restore it, or move the folder .* away$"):
        run.read_json(records.SUMMARY)
    (run.path / records.METRICS).write_text("{")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged .*; restore it"):
        run.read_metrics()


def test_metrics_that_were_packed_are_read_all_the_same(tmp_path: Path) -> None:
    run = folder(tmp_path)
    epochs = [{"epoch": n, "steps": n, "validation_accuracy": 50.0 + n, "joules_at_start": None} for n in (1, 2)]
    run.write_metrics(epochs)
    packed = run.path / records.PACKED_METRICS
    packed.write_bytes(gzip.compress((run.path / records.METRICS).read_bytes()))
    (run.path / records.METRICS).unlink()
    assert run.read_metrics() == epochs
    whole = packed.read_bytes()
    for damaged in (whole[:-9], whole[:12] + b"\xff" * 8 + whole[20:], b"plain text", whole[:5]):
        packed.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl\.gz is damaged .*; restore it"):
            run.read_metrics()


def test_a_damaged_checkpoint_is_named_with_a_remedy(tmp_path: Path) -> None:
    run = folder(tmp_path)
    (run.path / records.CHECKPOINT).write_bytes(b"PK\x03\x04" + bytes(100))  # as of a zip file that was cut off
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged .*; delete it, and --resume") as caught:
        run.load(records.CHECKPOINT)
    assert "internal miniz" not in str(caught.value)  # PyTorch's paragraph is cut to its first sentence


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("make", ["truncated", "garbage", "empty", "hostile", "hostile zip"])
def test_damaged_or_hostile_checkpoints_are_refused(tmp_path: Path, make: str) -> None:
    run = folder(tmp_path)
    run.save("state.pt", {"tensor": torch.randn(100)})
    path, marker = run.path / "state.pt", tmp_path / "executed"
    if make == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif make == "garbage":
        path.write_bytes(b"not a checkpoint" * 50)
    elif make == "empty":
        path.write_bytes(b"")
    elif make == "hostile":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save({"x": Evil(marker)}, path)
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        run.load("state.pt")
    assert not marker.exists()


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no checkpoint\.pt"):
        folder(tmp_path).load(records.CHECKPOINT)
    run = folder(tmp_path)
    (run.path / records.SUMMARY).write_text("{broken")
    with pytest.raises(CheckpointError, match=r"summary\.json"):
        run.read_json(records.SUMMARY)


def test_a_full_disk_leaves_the_previous_version(tmp_path: Path) -> None:
    """A real limit of the operating system on the size of a file, in a process of its own."""
    run = folder(tmp_path)
    run.save("state.pt", {"tensor": torch.zeros(10)})
    code = f"""
        import resource, sys, torch
        from pathlib import Path
        from bpfree.errors import CheckpointError
        from bpfree.experiments.records import RunFolder
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            RunFolder(Path({str(run.path)!r})).save("state.pt", {{"tensor": torch.ones(10_000_000)}})
        except CheckpointError as error:
            print(error)
            sys.exit(7)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "File too large; the previous version is kept; free some space" in done.stdout  # not what PyTorch says of it
    assert len(done.stdout.splitlines()) == 1
    assert torch.equal(run.load("state.pt")["tensor"], torch.zeros(10))
    assert [path.name for path in run.path.iterdir()] == ["state.pt"]


def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*; make that possible, or choose another place"):
        folder(tmp_path / "file")


def test_environment_names_no_machine(tmp_path: Path) -> None:
    described = records.environment(torch.device("cpu"))
    assert described["torch"] == torch.__version__
    assert described["hardware"].startswith("CPU")
    assert not {"hostname", "user", "cwd", "path"} & set(described)


def test_runs_that_start_together_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name is drawn four times, by threads that start at once in a root that is not there yet."""
    names = itertools.cycle(f"{number // 4:04x}" for number in range(64))
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(names))
    start = threading.Barrier(64)

    def run(number: int) -> Path | None:
        start.wait()
        try:
            made = folder(tmp_path / "runs")
        except CheckpointError:  # refused, which is not shared
            return None
        made.write_json(records.CONFIG, {"number": number})
        return made.path

    with ThreadPoolExecutor(64) as pool:
        made = {number: path for number, path in enumerate(pool.map(run, range(64))) if path}
    assert len(made) >= 16
    assert len(set(made.values())) == len(made) == len(list((tmp_path / "runs").iterdir()))
    assert all(RunFolder.open(path).read_json(records.CONFIG) == {"number": n} for n, path in made.items())


@pytest.mark.parametrize(
    ("at_start", "expected"),
    [
        ([0, 10, 20], [10, 20, 30]),
        ([0, None, 20], [10, 20, 30]),
        ([2, 67, 60], [31, 60, 30 + 60]),  # power stood in for a counter that had not moved: 67 is not to be had
        ([None, 95, 60], [60, 60, 90]),
    ],
)
def test_joules_of_a_curve_never_decrease(at_start: list[float | None], expected: list[float]) -> None:
    epochs = [
        {"steps": 5 * epoch, "joules_at_start": joules, "validation_accuracy": 50.0 + epoch}
        for epoch, joules in enumerate(at_start, start=1)
    ]
    curve = records.energy_curve(epochs, {"energy": {"gross_j": expected[-1]}})
    assert [accuracy for _, accuracy in curve] == [51, 52, 53]
    assert [joules for joules, _ in curve] == pytest.approx(expected)
