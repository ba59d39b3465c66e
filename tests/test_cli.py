"""The command line as a user meets it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bpfree.algorithms import ALGORITHMS
from bpfree.cli import cli

QUICK = ("run", "--algo", "mf", "--network", "mlp:1x32", "--epochs", "2", "--batch-size", "64", "--energy", "none")


def bpfree(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli, arguments, env=environment, catch_exceptions=False)


def test_result_line(tmp_path: Path) -> None:
    result = bpfree(*QUICK, "--results", str(tmp_path))
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    assert line.startswith("digits mlp:1x32 mf (simultaneous, last) seed 0: test accuracy ")
    assert "energy not measured (no energy measurement was asked for)" in line
    assert str(tmp_path) in line


def test_every_way_of_inference_is_printed(tmp_path: Path) -> None:
    result = bpfree(
        *(
            "run",
            "--algo",
            "ff",
            "--dataset",
            "digits",
            "--network",
            "mlp:3x20",
            "--epochs",
            "1",
            "--results",
            str(tmp_path),
        )
    )
    printed = re.search(r"test accuracy ([\d.]+) % \(softmax ([\d.]+) %, goodness ([\d.]+) %\)", result.stdout)
    assert printed is not None
    assert printed[1] == printed[3]  # the default


def test_several_seeds_are_several_objects(tmp_path: Path) -> None:
    result = bpfree(*QUICK, "--results", str(tmp_path), "--seed", "3", "--seed", "4", "--format", "json", "--quiet")
    assert [json.loads(line)["seed"] for line in result.stdout.splitlines()] == [3, 4]
    assert result.stderr == ""
    rows = json.loads(bpfree("table", str(tmp_path), "--format", "json").stdout)
    assert [(row["n"], row["seeds"]) for row in rows] == [(2, [3, 4])]
    promised = (
        "dataset network algorithm variant n seeds test_accuracy_mean test_accuracy_sd seconds_mean gross_j_mean "
        "hardware runs"
    )
    assert set(promised.split()) <= set(rows[0])
    assert "± " in bpfree("table", str(tmp_path)).stdout
    assert bpfree("table", str(tmp_path), "--format", "markdown").stdout.startswith("| dataset |")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "--algo", "mono-fwd"), 2, "unknown algorithm 'mono-fwd'; did you mean mono-forward"),
        (("run", "--dataset", "digit"), 2, "unknown data set 'digit'; did you mean digits"),
        (("run", "--passes", "2", "--epochs", "3"), 2, "whatever --epochs is"),
        (("run", "--passes", "2", "--patience", "3"), 2, "whatever --patience is"),
        (("run", "--network", "mpl:2x10"), 2, "unknown network 'mpl'; did you mean mlp"),
        (
            ("run", "--preset", "mono_forward-digit"),
            2,
            "unknown preset 'mono_forward-digit'; did you mean mono_forward-digits",
        ),
        (
            ("run", "--set", "shedule=sequential"),
            2,
            "unknown parameter of mono_forward 'shedule'; did you mean schedule",
        ),
        (("run", "--set", "lr=-1"), 2, "lr must be positive"),
        (("run", "--device", "tpu"), 2, "unknown device 'tpu'"),
        (("run", "--algo", "bp", "--preset", "mono_forward-cifar10"), 2, "cifar10 is for mf, not for bp"),
        (("run", "--energy", "none", "--idle-seconds", "10"), 2, "--idle-seconds would have no effect with"),
        (("run", "--network", "mlp:1x99999999999"), 1, "not that much memory; use a smaller network"),
        (("plan", "--gpus", "2", "--network", "mlp:1x99999999999"), 1, "not that much memory"),
        (("table", "--format", "json", "--columns", "accuracy"), 2, "--format json has everything"),
        (("table", ".", "-t", "T1", "--leave-out", "search"), 2, "--leave-out is for the plain list"),
        (("run", "--network", "cnn:mf"), 2, "too small for 4 pooled blocks"),
        (("run", "--batch-size", "5000"), 1, "do not fill one batch of 5000"),
        (("run", "--energy", "nvml", "--device", "cpu"), 2, "nvml"),
        (("run", "--dataset", "cora", "--network", "mlp:1x8"), 2, "has no graph convolutions; use gcn:2x128"),
        (("tune", "--algo", "mf", "--dataset", "cora", "--network", "mlp:1x8"), 2, "has no graph convolutions"),
        (("compare", "--algos", "mf,bp", "--dataset", "cora", "--network", "mlp:1x8"), 2, "has no graph convolutions"),
        (("run", "--resume", "nowhere"), 1, "not a run folder"),
        (("run", "--config", "nowhere.json"), 2, "nowhere.json"),
        (("run", "--config", "x.json", "--algo", "bp"), 2, "leave out --algo"),
        (("data", "path", "minst"), 2, "did you mean mnist"),
    ],
)
def test_bad_input_is_one_line_and_a_code(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = bpfree(*arguments, BPFREE_RUN_RESULTS=str(tmp_path))
    assert result.exit_code == code
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    result = bpfree(*QUICK, "--results", str(tmp_path), "--device", "cuda:99")
    assert result.exit_code == 2
    assert "use --device cpu" in result.stderr


def test_debug_shows_where_an_error_comes_from() -> None:
    from bpfree.errors import UsageError

    with pytest.raises(UsageError):
        bpfree("run", "--algo", "mono", "--debug")


def test_missing_data_says_what_to_fetch_and_where(tmp_path: Path) -> None:
    result = bpfree("run", "--dataset", "cifar10", "--no-download", "--data", str(tmp_path), "--results", str(tmp_path))
    assert result.exit_code == 1
    assert "bpfree data fetch cifar10" in result.stderr
    assert str(tmp_path) in result.stderr


def test_corrupt_data_names_file_and_checksum(tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(b"not gzip")
    result = bpfree("run", "--dataset", "mnist", "--data", str(tmp_path), "--results", str(tmp_path))
    assert result.exit_code == 1
    assert "ubyte.gz" in result.stderr
    verified = bpfree("data", "verify", "mnist", "--data", str(tmp_path), "--format", "json")
    assert verified.exit_code == 1
    assert {row["state"] for row in json.loads(verified.stdout)} == {"corrupt"}


def test_missed_target_exits_with_3(tmp_path: Path) -> None:
    assert bpfree(*QUICK, "--results", str(tmp_path), "--target-accuracy", "1").exit_code == 0
    result = bpfree(*QUICK, "--results", str(tmp_path), "--target-accuracy", "100")
    assert result.exit_code == 3
    assert "below the target of 100 %" in result.stderr
    assert result.stdout.startswith("digits")


def test_options_are_environment_variables_too(tmp_path: Path) -> None:
    environment = {
        "BPFREE_RUN_ALGO": "bp",
        "BPFREE_RUN_NETWORK": "mlp:1x16",
        "BPFREE_RUN_SEED": "4",
        "BPFREE_RUN_SET": "lr=0.01",
        "BPFREE_RUN_EPOCHS": "1",
        "BPFREE_RUN_RESULTS": str(tmp_path),
        "BPFREE_RUN_FORMAT": "json",
    }
    summary = json.loads(bpfree("run", **environment).stdout)
    assert (summary["algorithm"], summary["network"], summary["seed"]) == ("bp", "mlp:1x16", 4)
    assert (summary["passes"], "--set lr=0.01" in summary["command"]) == (1, True)


def test_nan_stops_with_step_and_block_and_keeps_the_run(tmp_path: Path) -> None:
    result = bpfree(*QUICK, "--results", str(tmp_path), "--set", "lr=1e30", "--set", "optimizer=sgd")
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert "block 0 loss is" in error
    assert "step" in error
    assert "lower the learning rate" in error
    (run,) = tmp_path.iterdir()
    assert not (run / "model.pt").exists()  # no epoch was good


def test_config_repeats_a_run(tmp_path: Path) -> None:
    first = json.loads(bpfree(*QUICK, "--results", str(tmp_path), "--format", "json", "--seed", "5").stdout)
    config = str(Path(first["run_dir"]) / "config.json")
    again = json.loads(bpfree("run", "--config", config, "--results", str(tmp_path), "--format", "json").stdout)
    assert again["run_dir"] != first["run_dir"]
    assert again["seed"] == 5
    assert again["test_loss"] == first["test_loss"]


def test_list_shows_what_there_is() -> None:
    things = json.loads(bpfree("list", "--format", "json").stdout)
    assert set(things) == {"algorithms", "datasets", "networks", "presets"}
    assert {row["name"] for row in things["algorithms"]} == {entry.alias for entry in ALGORITHMS}
    for row in things["algorithms"]:
        assert row["locality"] in {"network", "block", "layer"}
        assert row["paper"]
        assert "lr" in row["parameters"]
    assert {"digits", "cifar10"} <= {row["name"] for row in things["datasets"]}
    text = bpfree("list", "algorithms").stdout
    assert "mf" in text
    assert "datasets" not in text


def test_every_command_explains_itself() -> None:
    for command in (
        (), ("run",), ("compare",), ("audit",), ("list",), ("table",), ("plot",), ("report",),
        ("data",), ("data", "fetch"), ("data", "verify"), ("data", "path"),
    ):  # fmt: skip
        result = bpfree(*command, "--help")
        assert result.exit_code == 0
        assert len(result.stdout.splitlines()) > 5


def test_resume_takes_the_run_as_it_was() -> None:
    for option in (("--epochs", "3"), ("--set", "lr=1"), ("--seed", "1"), ("--device", "cpu")):
        result = bpfree("run", "--resume", "somewhere", *option)
        assert result.exit_code == 2
        assert f"leave out {option[0]}" in result.stderr


def test_runs_of_presets_are_laid_beside_what_was_published(tmp_path: Path) -> None:
    study = Path(__file__).parent.parent / "results" / "noprop"
    options = ("--with-reference", "--format", "json")
    rows = json.loads(bpfree("table", str(study), *options).stdout)
    assert {row["preset"]: row["published_accuracy"] for row in rows}["noprop-cifar10"] == 79.25
    assert all(row["published_accuracy"] for row in rows)
    assert "| published, % |" in bpfree("table", str(study), "--with-reference", "--format", "markdown").stdout
    assert "published" not in bpfree("table", str(study), "--format", "markdown").stdout

    bpfree(*QUICK, "--results", str(tmp_path / "kept"))
    bpfree(*QUICK, "--results", str(tmp_path / "searched" / "more"))
    for folder in ("searched", "*/more"):
        listed = bpfree("table", str(tmp_path), "--format", "json", "--leave-out", folder)
        ((run,),) = (row["runs"] for row in json.loads(listed.stdout))
        assert (run.startswith("kept/"), listed.stderr) == (True, "")
    for folder in ("nosuch", str(tmp_path.name)):
        result = bpfree("table", str(tmp_path), "--leave-out", "searched", "--leave-out", folder)
        assert result.exit_code == 0
        assert result.stderr == f"bpfree: warning: there is no finished run to leave out in {tmp_path / folder}\n"
    assert json.loads(bpfree("table", str(tmp_path), "--format", "json", "--dataset", "Digits").stdout)
    for table in ((), ("-t", "T1")):
        other = bpfree("table", str(tmp_path), *table, "--dataset", "mnist")
        assert (other.exit_code, "no finished run on mnist under" in other.stderr) == (1, True)
    nothing = bpfree("table", str(tmp_path), *options)
    assert nothing.exit_code == 1
    assert "is a preset, unchanged, for which an accuracy was published" in nothing.stderr


def test_tables_of_nothing_say_so(tmp_path: Path) -> None:
    result = bpfree("table", str(tmp_path))
    assert result.exit_code == 1
    assert "no finished run" in result.stderr


def test_data_path_follows_the_environment(tmp_path: Path) -> None:
    assert bpfree("data", "path", BPFREE_DATA=str(tmp_path)).stdout.strip() == str(tmp_path)
    assert bpfree("data", "path", "mnist", BPFREE_DATA=str(tmp_path)).stdout.strip() == str(tmp_path / "mnist")
    verified = bpfree("data", "verify", "digits", "fashion-mini")
    assert verified.exit_code == 0
    assert verified.stdout.count("ok") == 2


def on_a_terminal(command: list[str], **environment: str) -> str:
    """What a command shows on a real pseudo-terminal, standard output and error together."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env={**os.environ, **environment}
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a pseudo-terminal with an error
        while chunk := os.read(controller, 4096):
            shown += chunk
    os.close(controller)
    assert process.wait() == 0
    return shown.decode()


def test_colour_is_for_terminals_that_want_it() -> None:
    command = [sys.executable, "-m", "bpfree", "list", "networks"]
    assert "\x1b" in on_a_terminal(command, NO_COLOR="", TERM="xterm")
    assert "\x1b" not in on_a_terminal(command, NO_COLOR="1", TERM="xterm")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout


def test_progress_is_live_on_a_terminal_and_plain_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bpfree", *QUICK, "--results", str(tmp_path), "--set", "schedule=sequential"]
    shown = on_a_terminal(command, TERM="xterm")
    assert "block 0 (1/1)" in shown
    assert "validation loss" in shown
    assert "\r" in shown
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr
    assert "block 0, epoch 1: validation loss" in done.stderr
    quiet = bpfree(*command[3:], "--quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")


def test_import_is_cheap() -> None:
    """By what it pulls in, not by the clock: heavy libraries stay out until they are used."""
    code = (
        "import sys, bpfree; print(*sys.modules.keys() & {'torch', 'numpy'}, end=''); "
        "import torch; before = set(sys.modules); from bpfree import *; Trainer, data.load; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} "
        "& {'pynvml', 'pooch', 'tqdm', 'click', 'optuna', 'matplotlib', 'codecarbon', 'torch_geometric', 'requests'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--batch-size", "0"), "Invalid value for '--batch-size': 0 is not in the range x>=1; see "),
        (("run", "--epochs", "0"), "Invalid value for '--epochs': 0 is not in the range x>=1; see "),
        (("run", "--nosuch"), "--nosuch"),
        (("run", "--min-delta", "nan"), "Invalid value for '--min-delta': nan is not a number; see "),
        (("tune", "--algo", "mf", "--weight-decay", "0", "nan"), "'--weight-decay': nan is not a number; see "),
        (("nosuch",), "No such command 'nosuch'; see "),
        (("--nosuch",), "--nosuch"),
        (("data", "fetch"), "Missing argument 'NAMES...'; see "),
        (("table", "nosuch"), "Directory 'nosuch' does not exist; see "),
    ],
)
def test_wrong_usage_is_one_line_too(arguments: tuple[str, ...], said: str) -> None:
    result = bpfree(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("bpfree: error: ")
    assert said in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bpfree", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "bpfree: error: No space left on device; --debug shows what it was for\n"


def test_an_error_of_the_system_is_one_line_and_a_trace_with_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("bpfree.experiments.run.load_dataset", broken)
    result = bpfree(*QUICK)
    assert result.exit_code == 1
    assert result.stderr == "bpfree: error: Permission denied (/some/file); --debug shows what it was for\n"
    with pytest.raises(PermissionError):
        bpfree(*QUICK, "--debug")


def with_torch(code: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m bpfree list` where importing PyTorch does this."""
    (folder / "torch.py").write_text(code)
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    command = [sys.executable, "-m", "bpfree", "list"]
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)


def test_control_c_while_torch_is_imported_is_one_line(tmp_path: Path) -> None:
    """Even where the import swallows exceptions."""
    code = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    # a shell that started the tests in the background has made them ignore it
    done = with_torch(code, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "bpfree: stopped before anything was started\n"


def test_who_ignores_control_c_may_go_on(tmp_path: Path) -> None:
    code = "import os, signal\nprint(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)\nos._exit(0)\n"
    done = with_torch(code, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert done.stdout == "True\n"


def test_control_c_later_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bpfree.experiments.run.load_dataset", stopped)
    result = bpfree(*QUICK)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "bpfree: stopped\n")


@pytest.mark.data
def test_mnist_reaches_the_smoke_target(tmp_path: Path) -> None:
    result = bpfree(
        "run", "--algo", "mf", "--dataset", "mnist", "--network", "mlp:2x1000", "--epochs", "2", "--format", "json",
        "--results", str(tmp_path), "--preset", "none", "--target-accuracy", "96.5", "--no-keep-model",
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout
