"""`bpfree plan` as a user meets it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bpfree.cli import cli
from bpfree.experiments.links import LINKS

BLOCKS = 4


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False)


@pytest.fixture
def times(tmp_path: Path) -> str:
    """Four blocks of 3 ms by the rule and by back-propagation, which neither send nor keep anything."""
    blocks = [{"name": f"block {i}", "forward_seconds": 1e-3, "gradient_seconds": 2e-3} for i in range(BLOCKS)]
    profile = {"algorithm": "mf", "network": "mlp:4x10", "batch_size": 6, "input_bytes": 0, "target_bytes": 0}
    path = tmp_path / "times.json"
    path.write_text(json.dumps({**profile, "local": blocks, "backprop": blocks, "device": "a test's device"}))
    return str(path)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "record.json"
    values = {"form": "layer", "ranks": 2, "batch_size": 6, "network": "mlp:4x10", "algo": "mf", "step_seconds": 8e-3}
    path.write_text(json.dumps(values))
    return path


def forms(found: Result) -> dict[tuple[int, str, str, bool], dict[str, Any]]:
    plans = json.loads(found.stdout)["plans"]
    return {(one["devices"], one["algorithm"], one["form"], one["overlap"]): one for one in plans}


def test_a_scaling_table_of_known_times(times: str) -> None:
    found = plan("--times", times, "--gpus", "1,2,4,8", "--format", "csv", "--microbatches", "6")
    assert found.exit_code == 0
    rows = {(row["GPUs"], row["rule"], row["form"]): row for row in csv.DictReader(io.StringIO(found.stdout))}
    assert rows["1", "mf", "one-process"]["step, ms"] == "12"
    assert rows["1", "mf", "one-process"]["samples/s"] == "500"
    assert rows["4", "mf", "layer"]["step, ms"] == "3"
    assert rows["4", "mf", "layer"]["efficiency, %"] == "100.0"
    assert rows["4", "bp", "1f1b"]["bubble, %"] == "33"  # 3 / (6 + 3)
    assert rows["4", "bp", "1f1b"]["efficiency, %"] == "66.7"
    assert rows["8", "mf", "layer"]["stages x replicas"] == "4 x 2"
    assert rows["8", "mf", "data"]["samples/step"] == "48"
    assert ("8", "mf", "data, no overlap") in rows


def test_one_number_of_gpus_shows_the_ranks_too(times: str) -> None:
    found = plan("--times", times, "--gpus", "2")
    assert "a test's device" in found.stdout
    assert "Everything below is modelled" in found.stdout
    assert "nvlink4, 450 GB/s a direction, 10 us a message" in found.stdout
    ranks = found.stdout.split("Ranks of mf layer, 2 stages x 1 replicas:\n")[1].splitlines()
    assert [line.split()[:3] for line in ranks[1:3]] == [["0", "0-1", "6"], ["1", "2-3", "6"]]
    assert "Ranks of bp 1f1b" in found.stdout
    assert plan("--times", times, "--gpus", "2", "--format", "markdown").stdout.count("\n| rank | blocks |") == 2


def test_more_gpus_than_blocks_are_explained(times: str) -> None:
    found = plan("--times", times, "--gpus", "8")
    assert "Note: 8 GPUs are more than the 4 blocks, so that the rest are replicas: 4 stages x 2." in found.stdout


def test_json_has_everything(times: str) -> None:
    found = plan("--times", times, "--gpus", "2", "--format", "json", "--bandwidth", "3", "--latency", "7")
    assert json.loads(found.stdout)["link"] == {
        "name": "nvlink4, changed",
        "bytes_per_second": 3e9,
        "latency_seconds": pytest.approx(7e-6),
    }
    assert json.loads(found.stdout)["profile"]["batch_size"] == 6
    layer = forms(found)[2, "mf", "layer", True]
    assert layer["ranks"][1]["first"] == 2
    assert layer["step_seconds"] == pytest.approx(6e-3)
    assert layer["speedup"] == pytest.approx(2, rel=1e-3)


def test_the_fill_counts_in_short_runs(times: str) -> None:
    # the first rank fills for a block and a forward pass, 4 ms
    layer = forms(plan("--times", times, "--gpus", "2", "--steps", "1", "--format", "json"))[2, "mf", "layer", True]
    assert layer["bubble"] == pytest.approx(4 / (4 + 6), rel=1e-2)


def test_a_largest_batch_leaves_forms_out(times: str) -> None:
    found = plan("--times", times, "--gpus", "4,7", "--max-batch", "6", "--format", "json")
    assert {key[:3] for key in forms(found)} == {
        (4, "mf", "layer"),
        (4, "mf", "layer x data"),
        (4, "bp", "1f1b"),
        (4, "bp", "1f1b x data"),
    }
    shown = plan("--times", times, "--gpus", "4,7", "--max-batch", "6")
    assert "7 GPUs need more than 6 samples per step in every form" in shown.stderr
    nothing = plan("--times", times, "--gpus", "7", "--max-batch", "6")
    assert nothing.exit_code == 2
    assert "no plan to show" in nothing.stderr


def test_what_is_measured_here_can_be_planned_with_elsewhere(tmp_path: Path) -> None:
    saved = str(tmp_path / "times.json")
    measured = ("--network", "mlp:3x8", "--batch-size", "4", "--device", "cpu", "--save-times", saved)
    first = plan(*measured, "--gpus", "2", "--format", "json")
    assert first.exit_code == 0
    assert json.loads(first.stdout)["profile"]["source"] == "measured here"
    again = plan("--times", saved, "--gpus", "2", "--format", "json")
    assert json.loads(again.stdout)["plans"] == json.loads(first.stdout)["plans"]


def test_back_propagation_alone_can_be_planned() -> None:
    found = forms(plan("--algo", "bp", "--network", "mlp:3x8", "--device", "cpu", "--gpus", "3", "--format", "json"))
    assert {key[1] for key in found} == {"bp"}
    assert found[3, "bp", "1f1b", True]["bubble"] == pytest.approx(2 / (12 + 2))


def test_prediction_and_measurement_side_by_side(times: str, record: Path) -> None:
    found = plan("--compare", str(record), "--times", times)
    title, row, *_ = found.stdout.splitlines()
    assert title.split("  ")[0] == "form"
    assert row.split()[:8] == ["layer", "2", "mf", "mlp:4x10", "6", "6", "8", "-25.0"]
    exact = json.loads(plan("--compare", str(record), "--times", times, "--format", "json").stdout)
    (one,) = exact["comparisons"]
    assert one["error"] == pytest.approx(-0.25)
    assert one["predicted"]["step_seconds"] == pytest.approx(6e-3)


def test_a_record_may_bring_its_own_block_times(record: Path) -> None:
    values = json.loads(record.read_text())
    shared = {**values, "dataset": "mnist", "block_seconds": [1e-3, 2e-3, 3e-3, 4e-3]}
    record.write_text(json.dumps([shared, {**shared, "form": "data"}, {**shared, "form": "one-process", "ranks": 1}]))
    found = json.loads(plan("--compare", str(record), "--format", "json", "--bandwidth", "1e9").stdout)["comparisons"]
    steps = [one["predicted"]["step_seconds"] for one in found]
    assert steps[0] == pytest.approx(6e-3)  # 1 + 2 + 3 and 4
    assert steps[1] == pytest.approx(10e-3, rel=0.05)  # latency of the last block's gradients
    assert steps[2] == pytest.approx(10e-3)
    assert found[0]["times"] == "the record"
    # the first matrix is that of MNIST's images, so the record's data set was looked at
    assert found[2]["predicted"]["ranks"][0]["parameter_bytes"] == 4 * (784 * 10 + 3 * 100 + 4 * (10 + 100))


def test_without_block_times_they_are_measured_here(record: Path) -> None:
    found = plan("--compare", str(record), "--device", "cpu", "--set", "lr=0.01")
    assert found.exit_code == 0
    assert "measured here" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "say how many GPUs to plan for: --gpus 8"),
        (("--gpus", "two"), 2, "--gpus takes numbers from 1 on"),
        (("--gpus", "0"), 2, "--gpus takes numbers from 1 on"),
        (("--gpus", "2", "--network", "mpl:2x10"), 2, "unknown network 'mpl'; did you mean mlp"),
        (("--gpus", "2", "--algo", "mono-fwd"), 2, "unknown algorithm 'mono-fwd'"),
        (("--gpus", "2", "--link", "nvlink"), 2, "unknown link 'nvlink'; did you mean nvlink"),
        (("--gpus", "2", "--bandwidth", "0"), 2, "the bandwidth of a link must be positive, got 0 GB/s"),
        (("--gpus", "2", "--latency", "-1"), 2, "the latency of a link must not be negative, got -1 us"),
        (("--gpus", "2", "--dataset", "cora"), 2, "plans are for images and vectors, and cora is a graph"),
        (("--gpus", "2", "--algo", "ccl"), 2, "ccl has no block times to measure"),
        (("--gpus", "2", "--algo", "cafo", "--set", "loss=ce"), 2, "its blocks send each other nothing"),
        (("--gpus", "2", "--set", "schedule=sequential"), 2, "2 stages one after another"),
        (("--gpus", "2", "--times", "none.json"), 1, "cannot read none.json"),
        (("--gpus", "2", "--times", "none.json", "--network", "mlp"), 2, "--times takes the run as it was recorded"),
        (("--compare", "none.json"), 1, "cannot read none.json"),
        (("--compare", "none.json", "--gpus", "2"), 2, "--compare takes the run as it was recorded; leave out --gpus"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    found = plan(*arguments)
    assert found.exit_code == code
    (line,) = found.stderr.splitlines()
    assert message in line


def test_a_record_of_other_blocks_is_refused(times: str, record: Path) -> None:
    record.write_text(record.read_text().replace("mlp:4x10", "mlp:5x10"))
    found = plan("--compare", str(record), "--times", times)
    assert found.exit_code == 1
    assert "the block times are of network mlp:4x10, the measurement is of mlp:5x10" in found.stderr
    record.write_text(record.read_text().replace('"ranks": 2', '"ranks": 9'))
    own = {**json.loads(record.read_text()), "block_seconds": [1.0] * 5}
    record.write_text(json.dumps(own))
    assert "9 ranks cannot share 5 blocks; use at most 5" in plan("--compare", str(record)).stderr


def test_help_teaches() -> None:
    shown = plan("--help").stdout
    assert "--gpus 1,2,4,8,64,1024" in shown
    assert "(p-1)/(m+p-1)" in shown
    for name in LINKS:
        assert name in shown
