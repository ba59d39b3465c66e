"""Whole runs: what they record, and that killing a real process loses nothing."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bpfree import data
from bpfree.algorithms.learner import Stage
from bpfree.cli import cli
from bpfree.data import Dataset
from bpfree.energy import EnergyMeter
from bpfree.energy.simulated import SimulatedSource
from bpfree.errors import CheckpointError, DataError, TrainingError, UsageError
from bpfree.experiments import records, train
from bpfree.experiments import run as runs
from bpfree.experiments.config import command, resolve
from bpfree.experiments.records import RunFolder
from bpfree.experiments.run import Measuring, Reporter, load_batches, resume, run, told_of_memory
from bpfree.experiments.tables import readable, result_rows
from bpfree.experiments.train import InterruptedRunError, TrainingConfig
from tests.data.test_image_folders import image_folder

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "BPFREE_RUN_NETWORK": "mlp:2x64",
    "BPFREE_RUN_SET": "schedule=sequential",
    "BPFREE_RUN_BATCH_SIZE": "16",
    "BPFREE_RUN_EPOCHS": "12",
    "BPFREE_RUN_PATIENCE": "12",
    "BPFREE_RUN_ENERGY": "simulated",
    "BPFREE_RUN_FORMAT": "json",
}


def start(results: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **SETTINGS, "BPFREE_RUN_RESULTS": str(results)}
    command = [sys.executable, "-m", "bpfree", "run", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def only_run(results: Path) -> Path:
    (path,) = results.iterdir()
    return path


def wait_for_epoch(process: subprocess.Popen[str], results: Path, epochs: int) -> Path:
    """Wait until a run has recorded some epochs; the process is still running then."""
    for _ in range(6000):
        found = list(results.glob(f"*/{records.METRICS}"))
        if found and len(found[0].read_text().splitlines()) >= epochs:
            return found[0].parent
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("the run records nothing")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    results = tmp_path_factory.mktemp("straight")
    out, err = (process := start(results, "--quiet")).communicate()
    assert process.returncode == 0, err
    return only_run(results), json.loads(out)


def final_weights(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path / records.MODEL, weights_only=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_killed_process_resumes_to_the_same_weights(
    number: signal.Signals, tmp_path: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    # SIGKILL leaves no time to save, so there the checkpoint is the one of the clock
    every = "0" if number == signal.SIGKILL else "1000"
    process = start(tmp_path, "--checkpoint-every", every)
    path = wait_for_epoch(process, tmp_path, 5)
    process.send_signal(number)
    out, err = process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert out == ""
        last = err.strip().splitlines()[-1]
        assert f"bpfree run --resume {path}" in last
        assert number.name in last
    assert not (path / records.SUMMARY).exists()
    assert (path / records.CHECKPOINT).exists()

    # in this process: it knows no more of the killed one than another does, and has imported PyTorch
    environment = {**SETTINGS, "BPFREE_RUN_RESULTS": str(tmp_path)}
    done = CliRunner().invoke(cli, ["run", "--resume", str(path)], env=environment)
    assert done.exit_code == 0, done.output
    expected_path, expected = straight
    got, reference = final_weights(path), final_weights(expected_path)
    assert got.keys() == reference.keys()
    assert all(torch.equal(got[name], reference[name]) for name in reference)
    summary = json.loads(done.stdout)
    for key in ("test_accuracy", "passes", "updates", "flops", "stages"):
        assert summary[key] == expected[key]
    lines = [json.loads(line) for line in (path / records.METRICS).read_text().splitlines()]
    reference_lines = [json.loads(line) for line in (expected_path / records.METRICS).read_text().splitlines()]
    assert [{**line, "joules_at_start": None} for line in lines] == [
        {**line, "joules_at_start": None} for line in reference_lines
    ]
    joules = [line["joules_at_start"] for line in lines if line["joules_at_start"] is not None]
    assert joules == sorted(joules)
    assert summary["energy"]["gross_j"] > joules[-1]
    assert not (path / records.CHECKPOINT).exists()


def test_json_result_has_what_is_promised(straight: tuple[Path, dict[str, Any]]) -> None:
    path, summary = straight
    promised = (
        "algorithm dataset network variant seed test_accuracy passes seconds energy peak_memory_mib hardware run_dir"
    )
    assert set(promised.split()) <= set(summary)
    assert {"gross_j", "net_j", "method", "flags"} <= set(summary["energy"])
    assert (summary["algorithm"], summary["locality"]) == ("mf", "block")
    assert summary["energy"]["method"] == "simulated"
    assert 90 < summary["test_accuracy"] <= 100
    assert {**json.loads((path / records.SUMMARY).read_text()), "run_dir": str(path)} == summary
    for name in (records.CONFIG, records.ENVIRONMENT, records.METRICS, records.MODEL):
        assert (path / name).is_file()


def test_phases_and_the_curve_of_joules_are_recorded(straight: tuple[Path, dict[str, Any]]) -> None:
    path, summary = straight
    energy = summary["energy"]
    assert list(energy["phases"]) == ["train", "validation"]
    parts = sum(phase["gross_j"] for phase in energy["phases"].values())
    assert 0 < parts < energy["gross_j"]  # how much of it is no matter of ours: the machine may be busy
    assert energy["j_per_step"] == pytest.approx(energy["gross_j"] / summary["updates"])
    curve = records.energy_curve(RunFolder.open(path).read_metrics(), summary)
    joules = [spent for spent, _ in curve if spent is not None]
    assert len(joules) == len(curve) == summary["passes"]
    assert joules == sorted(joules)
    assert joules[-1] == energy["gross_j"]
    assert max(accuracy for _, accuracy in curve) >= summary["validation_accuracy"]


def test_training_and_validation_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only they move, 1 s a step and 10 s a validation, and not the steps of the rehearsal."""
    now = 0.0

    def taking(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return call(*arguments, **options)

        return taken

    monkeypatch.setattr(Stage, "step", taking(1.0, Stage.step))
    monkeypatch.setattr(train, "rate", taking(10.0, train.rate))
    source = SimulatedSource(100.0, clock=lambda: now)
    monkeypatch.setattr(runs, "choose_source", lambda kind, device: source)
    monkeypatch.setattr(runs, "EnergyMeter", partial(EnergyMeter, clock=lambda: now))
    settings = {"epochs": 3, "batch_size": 100}
    config = resolve("mf", "digits", "mlp:1x16", preset="none", training=settings, device="cpu", energy="simulated")
    summary = run(config, tmp_path, dataset=own_data(), keep_model=False)
    energy, steps = summary["energy"], summary["updates"]
    assert (steps, summary["passes"]) == (12, 3)
    assert energy["phases"]["train"]["gross_j"] == pytest.approx(100 * steps)
    assert energy["phases"]["validation"]["gross_j"] == pytest.approx(1000 * 3)
    assert energy["gross_j"] == pytest.approx(100 * steps + 1000 * 3)
    (row,) = readable(result_rows(tmp_path), ("time", "power", "busy"))
    assert row == {"time, s": "42.0", "mean power, W": "100", "GPU busy, %": ""}


def test_idle_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    config = resolve(
        "mf", "digits", "mlp:1x16", preset="none", training={"epochs": 1}, device="cpu", energy="simulated"
    )

    def idle(meter: EnergyMeter, seconds: float) -> float:
        slept.append(seconds)
        meter._idle_w.append(90.0)
        return 90.0

    monkeypatch.setattr(EnergyMeter, "measure_idle", idle)
    measuring = Measuring(idle_w=(80.0,), idle_after_s=12.0)
    energy = run(config, tmp_path, dataset=own_data(), measuring=measuring, keep_model=False)["energy"]
    assert slept == [12.0]
    assert energy["source"]["idle_w"] == [80.0, 90.0]
    assert energy["net_j"] == pytest.approx(energy["gross_j"] - 85.0 * energy["seconds"])
    assert "IDLE_DRIFT" in energy["flags"]


def test_co2_of_a_run_in_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    config = resolve("mf", "digits", "mlp:1x16", preset="none", training={"epochs": 1}, device="cpu", energy="none")
    summary = run(config, tmp_path, dataset=own_data(), measuring=Measuring(carbon="POL"), keep_model=False)
    carbon = summary["carbon"]
    assert carbon["parts"]["cpu"]["how"].startswith(("modelled", "measured"))
    assert carbon["g_co2e"] == pytest.approx(carbon["kwh"] * 661.926)  # energy_protocol, section 5
    assert (Path(summary["run_dir"]) / carbon["file"]).is_file()


def test_an_unknown_country_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    config = resolve("mf", "digits", "mlp:1x16", preset="none", device="cpu", energy="none")
    with pytest.raises(UsageError, match="no carbon intensity for country 'XYZ'"):
        run(config, tmp_path / "runs", dataset=own_data(), measuring=Measuring(carbon="XYZ"))
    assert not (tmp_path / "runs").exists()


def test_finished_runs_are_not_trained_again(straight: tuple[Path, dict[str, Any]]) -> None:
    path, summary = straight
    before = (path / records.MODEL).stat().st_mtime_ns
    assert resume(path) == summary
    assert (path / records.MODEL).stat().st_mtime_ns == before


def own_data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (600,), generator=generator)
    x = torch.randn(600, 5, generator=generator) + 3 * torch.nn.functional.one_hot(y, 5)
    return Dataset.from_arrays((x[:500], y[:500]), (x[500:], y[500:]), name="mine")


def test_the_folder_of_runs_may_be_a_string(tmp_path: Path) -> None:
    config = replace(resolve("mf", network="mlp:1x8", preset="none", training={"epochs": 1}), energy="none")
    summary = run(config, str(tmp_path / "runs"), dataset=own_data(), keep_model=False)
    assert Path(summary["run_dir"]).parent == tmp_path / "runs"


def test_own_data_sets_and_tables(tmp_path: Path) -> None:
    accuracies = []
    for seed in (0, 1, 2):
        config = resolve("mf", "digits", "mlp:1x16", preset="none", seed=seed, training={"epochs": 5, "batch_size": 50})
        accuracies.append(run(config, tmp_path, dataset=own_data(), keep_model=False)["test_accuracy"])
    config = resolve("bp", "digits", "mlp:1x16", preset="none", training={"epochs": 5, "batch_size": 50})
    run(config, tmp_path, dataset=own_data(), keep_model=False)
    assert not list(tmp_path.rglob("*.pt"))
    bp, mf = result_rows(tmp_path)
    assert (bp["dataset"], mf["dataset"]) == ("mine", "mine")
    assert (bp["algorithm"], bp["n"], bp["test_accuracy_sd"]) == ("bp", 1, None)
    assert (mf["algorithm"], mf["n"], mf["seeds"]) == ("mf", 3, [0, 1, 2])
    mean = sum(accuracies) / 3
    assert mf["test_accuracy_mean"] == pytest.approx(mean)
    variance = sum((value - mean) ** 2 for value in accuracies) / 2
    assert mf["test_accuracy_sd"] == pytest.approx(variance**0.5)
    assert len(mf["runs"]) == 3


def test_inputs_are_standardised_by_the_numbers_given() -> None:
    digits = data.load("digits")
    config = resolve("mf", training={"mean": 0.25, "std": 0.5})
    parts = load_batches(config, digits, torch.device("cpu"), torch.contiguous_format)
    for part, source in zip(parts, digits.split(), strict=True):
        (served, _), *_ = part.in_order(len(source))
        torch.testing.assert_close(served, (source.inputs / 255 - 0.25) / 0.5)
    assert "--mean 0.25 --std 0.5" in command(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": 0.5}, "give both"),
        ({"std": 0.5}, "give both"),
        ({"mean": 0.5, "std": 0.5, "standardize": False}, "leave out no-standardize"),
        ({"mean": 0.5, "std": 0.0}, "std positive"),
        ({"mean": math.nan, "std": 1.0}, "mean must be finite"),
    ],
)
def test_numbers_that_do_not_standardise_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingConfig(**settings)


@pytest.mark.parametrize("standardize", [True, False])
def test_images_are_standardised_or_left_in_the_unit_interval(standardize: bool) -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(256, size=(40, 1, 8, 8), dtype=np.uint8), np.arange(40) % 4
    dataset = Dataset.from_arrays((images, labels), (images, labels), validation=8)
    config = resolve("mf", training={"standardize": standardize})
    for part in load_batches(config, dataset, torch.device("cpu"), torch.contiguous_format):
        ((inputs, _),) = part.in_order(40)
        assert (inputs.min() < -1) == standardize
        assert (inputs.max() > 1) == standardize


def test_repeats_of_a_seed_count_once(tmp_path: Path) -> None:
    for seed in (0, 0, 1):
        config = resolve("mf", "digits", "mlp:1x8", preset="none", seed=seed, training={"epochs": 1, "batch_size": 50})
        run(config, tmp_path, dataset=own_data(), keep_model=False)
    (row,) = result_rows(tmp_path)
    assert (row["n"], len(row["runs"])) == (2, 3)


def test_seeds_change_initialisation_and_order_but_not_the_split(tmp_path: Path) -> None:
    configs = [resolve("mf", "digits", "mlp:1x8", preset="none", seed=s, training={"epochs": 1}) for s in (0, 1)]
    first, second = (run(config, tmp_path, dataset=own_data()) for config in configs)
    weights = [final_weights(Path(summary["run_dir"]))["network.0.1.weight"] for summary in (first, second)]
    assert not torch.equal(*weights)
    parts = []
    for seed in (0, 1):
        own = own_data()
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the legacy generator is the one that a seed could leak through
        parts.append(own.split()[1].inputs)
    assert torch.equal(*parts)


def test_running_out_of_device_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The board is faked: 1 GiB, all of it in use."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**30))
    config = resolve("mf", "digits", training={"batch_size": 4096})
    with (
        pytest.raises(TrainingError, match=r"1024 MiB of 1024 MiB .* batches of 4096; try --batch-size 2048"),
        told_of_memory(config, torch.device("cuda")),
    ):
        raise torch.OutOfMemoryError


@pytest.mark.parametrize("rule", ["ccl", "bp"])
def test_an_autoencoder_records_its_error_and_draws_its_reconstructions(rule: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parameters = {"lr": 0.03, "optimizer": "momentum"}
    training = {"batch_size": 50, "epochs": 4}
    config = resolve(rule, "digits", "autoencoder:8x16", task="autoencode", parameters=parameters, training=training)
    summary = run(replace(config, energy="none"), tmp_path)
    path = Path(summary["run_dir"])
    assert (summary["task"], summary["criterion"], summary["metric"]) == ("autoencode", "MSE", "R2")
    assert 0 < summary["test_loss"] < 0.15
    assert (path / records.PICTURE).read_bytes().startswith(b"\x89PNG")
    epochs = RunFolder.open(path).read_metrics()
    assert epochs[-1]["validation_loss"] < epochs[0]["validation_loss"]
    assert readable(result_rows(tmp_path), ["accuracy"])[0]["test accuracy, %"].endswith("R2")


def test_records_from_before_there_were_tasks_belong_to_the_same_row(tmp_path: Path) -> None:
    for seed in (0, 1):
        config = resolve("bp", "digits", "mlp:8", seed=seed, training={"epochs": 1})
        path = Path(run(replace(config, energy="none"), tmp_path, keep_model=False)["run_dir"])
    values = json.loads((path / records.CONFIG).read_text())
    del values["task"]
    (path / records.CONFIG).write_text(json.dumps(values))
    assert [row["seeds"] for row in result_rows(tmp_path)] == [[0, 1]]


def test_graphs_are_not_reconstructed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="is a graph"):
        run(resolve("bp", "cora", "gcn:1x8", task="autoencode"), tmp_path)


def test_a_missing_drawing_library_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpfree.experiments.pictures.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="matplotlib"):
        run(resolve("bp", "digits", task="autoencode"), tmp_path)
    assert not list(tmp_path.iterdir())


class StopAtOnce(Reporter):
    """Asks its own process to stop behind the first epoch."""

    def epoch(self, record: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def stopped(tmp_path: Path) -> RunFolder:
    """A run that can be resumed."""
    config = resolve("mf", network="mlp:1x8", training={"epochs": 3}, device="cpu", energy="none")
    with pytest.raises(InterruptedRunError):
        run(config, tmp_path, reporter=StopAtOnce())
    return RunFolder(only_run(tmp_path))


def test_how_to_go_on_is_told_as_a_shell_takes_it(tmp_path: Path) -> None:
    config = resolve("mf", network="mlp:1x8", training={"epochs": 3}, device="cpu", energy="none")
    with pytest.raises(InterruptedRunError) as stopped:
        run(config, tmp_path / "my runs", reporter=StopAtOnce())
    assert shlex.split(str(stopped.value))[-4:] == ["bpfree", "run", "--resume", str(only_run(tmp_path / "my runs"))]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": 1}, r"it has no 'energy'"),
        ({"energy": {}}, r"it has no 'learner'"),
        ({"energy": {}, "learner": {}}, r"Missing key\(s\) in state_dict: .*"),
        ({"energy": 3}, r".*"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(content: dict[str, Any], reason: str, stopped: RunFolder) -> None:
    stopped.save(records.CHECKPOINT, content)
    with pytest.raises(
        CheckpointError, match=rf"is not a checkpoint of this run \({reason}\); delete it, and"
    ) as caught:
        resume(stopped.path)
    assert "\n" not in str(caught.value)
    stopped.remove(records.CHECKPOINT)
    assert resume(stopped.path)["passes"] == 3  # as the message has promised


@pytest.mark.parametrize(("key", "value"), [("network", "mlp:1x9"), ("algorithm", "bp")])
def test_a_checkpoint_of_another_run_is_one_line(key: str, value: str, stopped: RunFolder) -> None:
    stopped.write_json(records.CONFIG, {**stopped.read_json(records.CONFIG), key: value, "parameters": {}})
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of this run \(.*\); delete it, and") as caught:
        resume(stopped.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("earlier_version", [False, True])
def test_a_run_does_not_go_on_with_a_folder_that_holds_other_images(
    earlier_version: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path means another folder elsewhere."""
    pytest.importorskip("PIL")
    first, second = (image_folder(tmp_path / name / "pets", ("a", "b"), 20) for name in ("first", "second"))
    (second / "train" / "a" / "0.png").unlink()
    monkeypatch.chdir(first.parent)
    training = {"epochs": 3, "batch_size": 8}
    config = resolve("mf", "folder:pets@8", "mlp:1x8", training=training, device="cpu", energy="none")
    with pytest.raises(InterruptedRunError):
        run(config, tmp_path / "runs", reporter=StopAtOnce())
    path = only_run(tmp_path / "runs")
    monkeypatch.chdir(second.parent)
    with pytest.raises(CheckpointError, match="began with other data than folder:pets@8 here"):
        resume(path)
    if earlier_version:
        without_fingerprint(RunFolder(path))
        message = "it is of 36 training and 4 validation samples, and here are 36 and 3"
        with pytest.raises(CheckpointError, match=message):
            resume(path)
    monkeypatch.chdir(first.parent)
    assert resume(path)["passes"] == 3


def without_fingerprint(run: RunFolder) -> None:
    environment = run.read_json(records.ENVIRONMENT)
    del environment["data"]
    run.write_json(records.ENVIRONMENT, environment)


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_run_on_own_data_does_not_go_on_with_packaged_data_of_the_same_name_and_sizes(
    with_checkpoint: bool, tmp_path: Path
) -> None:
    digits = data.load("digits")
    labels = (digits.train.targets + 1) % 10
    own = replace(digits, train=replace(digits.train, targets=labels))
    config = resolve("mf", network="mlp:1x8", training={"epochs": 3}, device="cpu", energy="none")
    with pytest.raises(InterruptedRunError):
        run(config, tmp_path, dataset=own, reporter=StopAtOnce())
    folder = RunFolder(only_run(tmp_path))
    if not with_checkpoint:  # killed before its first
        folder.remove(records.CHECKPOINT)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    result = CliRunner().invoke(cli, ["run", "--resume", str(folder.path)])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "began with other data than digits here" in line
    assert "resume(path, dataset=..)" in line
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before
    assert resume(folder.path, dataset=own)["passes"] == 3


def test_a_run_without_a_fingerprint_goes_on(stopped: RunFolder) -> None:
    without_fingerprint(stopped)
    assert resume(stopped.path)["passes"] == 3


@pytest.mark.parametrize("fingerprint", [3, {"digest": "ab"}, {"digest": "ab", "sums": [None]}])
def test_a_damaged_fingerprint_is_one_line(fingerprint: object, stopped: RunFolder) -> None:
    stopped.write_json(records.ENVIRONMENT, {**stopped.read_json(records.ENVIRONMENT), "data": fingerprint})
    with pytest.raises(CheckpointError, match=r"environment\.json is damaged"):
        resume(stopped.path)


def test_a_run_without_a_record_of_its_environment_is_not_trained_in_vain(stopped: RunFolder) -> None:
    state = (stopped.path / records.CHECKPOINT).read_bytes()
    stopped.remove(records.ENVIRONMENT)
    with pytest.raises(CheckpointError, match=r"cannot read .*environment\.json: No such file .*; restore it, or move"):
        resume(stopped.path)
    assert (stopped.path / records.CHECKPOINT).read_bytes() == state


def test_a_run_on_own_data_says_how_it_goes_on(stopped: RunFolder) -> None:
    stopped.write_json(records.CONFIG, {**stopped.read_json(records.CONFIG), "dataset": "mine"})
    with pytest.raises(UsageError, match=r"unknown data set 'mine'; .*; a run on data of your own goes on in Python"):
        resume(stopped.path)


class Refusing(Reporter):
    """Refuses to go on, at the first steps or behind the first epoch."""

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once

    def steps(self, stage: str, epoch: int, count: int) -> None:
        if self.at_once or epoch:
            raise UsageError("no further")


@pytest.mark.parametrize(("batch_size", "said"), [(16, "no further"), (100_000, "do not fill one batch")])
def test_a_run_refused_at_its_first_steps_leaves_no_folder(batch_size: int, said: str, tmp_path: Path) -> None:
    config = resolve("mf", "digits", "mlp:1x8", preset="none", training={"batch_size": batch_size}, device="cpu")
    with pytest.raises((UsageError, DataError), match=said):
        run(config, tmp_path, reporter=Refusing(at_once=True))
    assert list(tmp_path.iterdir()) == []


def test_a_run_refused_later_keeps_what_it_has(tmp_path: Path) -> None:
    config = resolve("mf", "digits", "mlp:1x8", preset="none", training={"epochs": 3}, device="cpu")
    with pytest.raises(UsageError, match="no further"):
        run(config, tmp_path, reporter=Refusing(at_once=False))
    assert len(RunFolder(only_run(tmp_path)).read_metrics()) == 1
