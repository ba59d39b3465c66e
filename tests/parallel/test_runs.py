"""Whole runs on several processes: records, sums, errors, and what happens when a rank dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from bpfree.cli import cli
from bpfree.cli.launch import _verdict
from bpfree.data import load
from bpfree.energy import EnergyResult
from bpfree.energy.result import Regime
from bpfree.experiments import records, train
from bpfree.experiments.config import resolve
from bpfree.experiments.run import Reporter, Together, _parallel_words, resume, run
from bpfree.experiments.train import InterruptedRunError
from bpfree.parallel import Ranks, Spread
from tests.parallel.pool import Pool

RUN = ("run", "--algo", "mf", "--preset", "none", "--network", "mlp:3x24", "--energy", "simulated", "--device", "cpu")


class Order(Reporter):
    """Notes the validation losses in the order in which they are heard."""

    def __init__(self) -> None:
        self.heard: list[float] = []

    def epoch(self, record: dict[str, Any]) -> None:
        self.heard.append(record["validation_loss"])


def recorded(ranks: Ranks | None, *, root: str, form: str = "layer", algorithm: str = "mf") -> dict[str, Any]:
    """A run of three epochs; its summary and what this process heard of it."""
    training = {"epochs": 3, "batch_size": 64}
    config = resolve(
        algorithm, "digits", "mlp:3x24", preset="none", training=training, energy="simulated", device="cpu"
    )
    order = Order()
    together = None if ranks is None else Together(ranks, Spread(form))
    summary = run(config, Path(root), dataset=load("digits"), reporter=order, together=together)
    return {"summary": summary, "heard": order.heard}


class Stopped(Order):
    """Asks to stop when two epochs have been heard of."""

    def epoch(self, record: dict[str, Any]) -> None:
        super().epoch(record)
        if len(self.heard) == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def resumed(ranks: Ranks, *, root: str, spent: float) -> list[float]:
    """Gross joules that a run noted behind an interruption, before which it had `spent` so many, and at its end."""
    train.JOULES_EVERY_S = 0.0  # type: ignore[misc]
    together = Together(ranks, Spread("layer"))
    training = {"epochs": 6, "batch_size": 64}
    config = resolve("mf", "digits", "mlp:3x24", preset="none", training=training, energy="simulated", device="cpu")
    with pytest.raises(InterruptedRunError):
        run(config, Path(root), dataset=load("digits"), reporter=Stopped(), together=together)
    (path,) = Path(root).iterdir()
    if ranks.rank == 0:
        state = torch.load(path / records.CHECKPOINT, weights_only=True)
        state["energy"]["total"]["gross_j"] = spent
        torch.save(state, path / records.CHECKPOINT)
    done = len(ranks.from_leader((path / records.METRICS).read_text().splitlines()))
    summary = resume(path, dataset=load("digits"), together=together)
    if not summary:
        return []
    folder = records.RunFolder(path)
    readings = [record["joules_at_start"] for record in folder.read_metrics()[done:]]
    return [joules for joules in readings if joules is not None] + [summary["energy"]["gross_j"]]


def weights(path: str) -> dict[str, torch.Tensor]:
    state = torch.load(Path(path) / records.MODEL, weights_only=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def test_one_record_of_a_run_on_two_ranks(pool: Pool, tmp_path: Path) -> None:
    leader, other = pool.run(2, recorded, root=str(tmp_path / "two"))
    alone = recorded(None, root=str(tmp_path / "one"))
    assert other["summary"] == {}
    assert len(list((tmp_path / "two").iterdir())) == 1
    assert leader["heard"] == other["heard"] == alone["heard"]  # same data in the same order, same decisions
    summary, expected = leader["summary"], alone["summary"]
    for key in ("test_accuracy", "passes", "updates", "flops", "stages", "parameters", "validation_loss"):
        assert summary[key] == expected[key]
    found, right = weights(summary["run_dir"]), weights(expected["run_dir"])
    assert all(torch.equal(found[name], right[name]) for name in right)
    lines = (Path(summary["run_dir"]) / records.METRICS).read_text().splitlines()
    assert len(lines) == 3
    assert summary["hardware"].startswith("2 x ")
    assert summary["command"].endswith("--parallel layer --nproc 2")
    assert not (Path(summary["run_dir"]) / records.CHECKPOINT).exists()


@pytest.mark.parametrize(("machines", "said"), [(1, "--nproc 4 --mesh 2x2"), (2, "--nproc 2 --nnodes 2 --mesh 2x2")])
def test_the_command_of_a_record_starts_as_many_processes(machines: int, said: str) -> None:
    ranks = cast(Ranks, SimpleNamespace(size=4, local_size=4 // machines))
    assert _parallel_words(Together(ranks, Spread("layer,data", mesh=(2, 2)))) == f" --parallel layer,data {said}"


def test_energy_is_that_of_all_ranks(pool: Pool, tmp_path: Path) -> None:
    summary = pool.run(2, recorded, root=str(tmp_path), form="data", algorithm="bp")[0]["summary"]
    by_rank = summary["parallel"]["by_rank"]
    assert [rank["rank"] for rank in by_rank] == [0, 1]
    assert all(rank["energy"]["gross_j"] > 0 for rank in by_rank)
    assert summary["energy"]["gross_j"] == pytest.approx(sum(rank["energy"]["gross_j"] for rank in by_rank))
    assert summary["energy"]["seconds"] == max(rank["energy"]["seconds"] for rank in by_rank)
    assert summary["peak_memory_mib"] == max(rank["memory"]["peak_mib"] for rank in by_rank)


def test_joules_to_accuracy_go_on_where_an_interrupted_run_stood(pool: Pool, tmp_path: Path) -> None:
    leader, _ = pool.run(2, resumed, root=str(tmp_path), spent=1e6)
    assert len(leader) > 2
    assert leader == sorted(leader)
    assert leader[0] > 1e6


def test_devices_side_by_side_add_joules_but_not_seconds() -> None:
    one = EnergyResult(100.0, 10.0, "nvml-counter", "gpu board", idle_w=2.0)
    two = EnergyResult(50.0, 8.0, "nvml-counter", "gpu board", idle_w=3.0)
    both = one.beside(two)
    assert (both.gross_j, both.seconds, both.idle_w, both.method) == (150.0, 10.0, 5.0, "nvml-counter")
    assert both.net_j == 100.0
    halves = [replace(one, regime=Regime(utilisation=u, power_limit_w=20.0)) for u in (0.5, 0.7)]
    both = halves[0].beside(halves[1])
    assert (both.power_share, both.regime.utilisation) == (halves[0].power_share, pytest.approx(0.6))
    assert one.beside(EnergyResult(None, 1.0, "none", "none")).gross_j is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--parallel", "layer"), "--nproc"),
        (("--nproc", "2"), "--parallel layer, block or data"),
        (("--nproc", "2", "--parallel", "sideways"), "sideways"),
        (("--nproc", "2", "--parallel", "data", "--cut", "1,2"), "each has all of them"),
        (("--nproc", "4", "--parallel", "layer,data"), "--mesh LxD"),
        (("--nproc", "4", "--parallel", "layer,data", "--mesh", "3x2"), "has 6 processes"),
        (("--nproc", "4", "--parallel", "layer,data", "--mesh", "-2x-2"), "sizes from 1 on"),
        (("--nproc", "4", "--parallel", "layer", "--mesh", "2x2"), "--mesh LxD"),
        (("--nproc", "2", "--parallel", "layer", "--cut", "a"), "numbers of blocks"),
        (("--nproc", "2", "--parallel", "layer", "--seed", "1", "--seed", "2"), "one --seed"),
        (("--nproc", "2", "--parallel", "layer", "--nnodes", "2"), "--rdzv-endpoint"),
        (("--nproc", "2", "--parallel", "layer,data", "--mesh", "2x2", "--nnodes", "2"), "--rdzv-endpoint"),
        (("--nproc", "1", "--nnodes", "2"), "--parallel layer, block or data"),
        (("--nnodes", "2"), "--nnodes spreads a run over processes"),
        (("--rdzv-endpoint", "host:29500"), "--rdzv-endpoint spreads a run over processes"),
    ],
)
def test_options_that_do_not_go_together(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, [*RUN, "--results", str(tmp_path / "runs"), *options])
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "runs").exists()


def start(results: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bpfree", *RUN, "--results", str(results), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_more_ranks_than_blocks_is_one_line_and_nothing_is_made(tmp_path: Path) -> None:
    process = start(tmp_path / "runs", "--network", "mlp:1x24", "--nproc", "2", "--parallel", "layer")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert err.strip().splitlines() == [
        "bpfree: error: 2 ranks are more than the 1 blocks that MonoForward has here; use fewer"
    ]
    assert not (tmp_path / "runs").exists()


def test_a_refusal_of_the_first_step_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    process = start(tmp_path / "runs", "--batch-size", "100000", "--nproc", "2", "--parallel", "layer", "--quiet")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    (said,) = err.strip().splitlines()
    assert "do not fill one batch of 100000" in said
    assert list((tmp_path / "runs").iterdir()) == []


def speaks(ranks: Ranks, *, silent: int) -> bool:
    """Whether this rank is to report a failure that rank `silent` has no part in."""
    if ranks.rank == silent:
        return False
    asked = ranks.may_speak()
    if asked:
        ranks.has_spoken()
    return asked


def test_one_rank_reports_a_failure(pool: Pool) -> None:
    assert pool.run(3, speaks, silent=1) == [True, False, False]
    assert sum(pool.run(3, speaks, silent=0)) == 1


def children(pid: int) -> list[int]:
    """Processes that this one has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()]


def test_a_stopped_run_says_so_once_and_exits_like_one_process(tmp_path: Path) -> None:
    settings = ("--epochs", "100000", "--patience", "100000", "--checkpoint-every", "0", "--batch-size", "16")
    process = start(tmp_path / "runs", *settings, "--nproc", "2", "--parallel", "layer", "--rank-timeout", "30")
    while not list((tmp_path / "runs").glob(f"*/{records.CHECKPOINT}")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    (said,) = [line for line in err.splitlines() if "error" in line.lower()]
    assert "(SIGTERM); the run is saved, go on with: bpfree run --resume" in said


def test_ranks_save_and_stop_when_what_started_them_is_killed(tmp_path: Path) -> None:
    settings = ("--epochs", "100000", "--patience", "100000", "--checkpoint-every", "0", "--batch-size", "16")
    process = start(tmp_path / "runs", *settings, "--nproc", "2", "--parallel", "layer", "--rank-timeout", "30")
    while not list((tmp_path / "runs").glob(f"*/{records.CHECKPOINT}")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    _, err = process.communicate(timeout=60)  # ranks that live on would hold its standard error open
    (said,) = [line for line in err.splitlines() if "error" in line.lower()]
    assert "(SIGTERM); the run is saved, go on with: bpfree run --resume" in said


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({0: (4, 0), 1: (-signal.SIGKILL, 0)}, "rank 1 was ended by SIGKILL"),
        ({0: (4, 0), 1: (-signal.SIGKILL, 30)}, "rank 1 did not answer, and was killed when it did not end by itself"),
        ({0: (-signal.SIGTERM, 1), 1: (-signal.SIGABRT, 0)}, "rank 1 was ended by SIGABRT"),
        ({0: (4, 0), 1: (-signal.SIGTERM, 1)}, "a rank died, or did not answer in time"),
    ],
)
def test_how_a_rank_ended_is_told_as_it_was(
    codes: dict[int, tuple[int, int]], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that hangs is killed by torchrun, 30 s after the others have failed for want of it."""
    failures = {}
    for rank, (code, after_s) in codes.items():
        failures[rank] = ProcessFailure(local_rank=rank, pid=0, exitcode=code, error_file="")
        failures[rank].timestamp = 1_000_000 + after_s
    assert _verdict(failures) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bpfree: error: {said}; all ranks have been stopped")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the ranks in /proc")
def test_a_killed_rank_ends_the_run_and_the_checkpoint_goes_on(tmp_path: Path) -> None:
    """Then the run is finished by one process, with the weights of a run that nothing happened to."""
    settings = ("--epochs", "20", "--patience", "20", "--checkpoint-every", "0", "--batch-size", "16")
    process = start(tmp_path / "runs", *settings, "--nproc", "2", "--parallel", "layer", "--rank-timeout", "30")
    for _ in range(6000):
        found = list((tmp_path / "runs").glob(f"*/{records.CHECKPOINT}"))
        if found:
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    (path,) = (tmp_path / "runs").iterdir()
    os.kill(children(process.pid)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    errors = [line for line in err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, err
    assert "was ended by SIGKILL" in errors[0]
    assert "Traceback" not in err
    assert "torch" not in err
    assert (path / records.CHECKPOINT).exists()
    assert not (path / records.SUMMARY).exists()

    runner = CliRunner()
    resumed = runner.invoke(cli, ["run", "--resume", str(path), "--quiet", "--format", "json"])
    straight = runner.invoke(cli, [*RUN, *settings, "--results", str(tmp_path / "one"), "--quiet", "--format", "json"])
    assert resumed.exit_code == straight.exit_code == 0, resumed.output + straight.output
    found_weights = weights(str(path))
    right = weights(json.loads(straight.output)["run_dir"])
    assert all(torch.equal(found_weights[name], right[name]) for name in right)
