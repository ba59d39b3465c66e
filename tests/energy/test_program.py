"""Measuring a program from outside: its joules, and nothing changed for the program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import bpfree.energy.choose
import bpfree.energy.survey
from bpfree.cli import cli
from bpfree.energy import EnergyMeter, SourceUnavailableError
from bpfree.energy.choose import choose_for_program, visible_sources
from bpfree.energy.program import CannotRunError, _descends_from_us, measure_program

from .fakes import FakeBoard, FakeNvml

MEASURE = [sys.executable, "-m", "bpfree", "energy", "measure", "--source", "simulated"]


def energy(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ("energy", *arguments), catch_exceptions=False)


@pytest.fixture
def _nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without boards (there is no NVML in the tests' environment unless it is faked) and without RAPL."""

    def no_rapl() -> None:
        raise SourceUnavailableError("no RAPL packages")

    def no_board(is_ours: object = None) -> None:
        raise SourceUnavailableError("NVML cannot be started")

    for module in (bpfree.energy.choose, bpfree.energy.survey):
        monkeypatch.setattr(module, "RaplSource", no_rapl)
        monkeypatch.setattr(module, "visible_sources", no_board)


def test_energy_of_a_program() -> None:
    measured = measure_program([sys.executable, "-c", "import time; time.sleep(0.5)"], kind="simulated")
    assert measured.exit_code == 0
    assert measured.energy.seconds >= 0.5
    assert measured.energy.gross_j == pytest.approx(100 * measured.energy.seconds, rel=1e-2)
    assert measured.peak_w == 100
    assert "SIMULATED" in measured.energy.flags


@pytest.mark.usefixtures("_nothing_here")
def test_where_nothing_can_be_measured_the_program_runs_all_the_same() -> None:
    result = energy("measure", "--", sys.executable, "-c", "raise SystemExit(5)")
    assert result.exit_code == 5
    assert "energy not measured (NVML cannot be started; no RAPL packages)" in result.stderr
    assert "exit code 5" in result.stderr


def test_streams_belong_to_the_program(tmp_path: Path) -> None:
    echo = "import sys; print(sys.stdin.read().upper(), end='')"
    output = tmp_path / "energy.json"
    done = subprocess.run(
        [*MEASURE, "--format", "json", "--output", str(output), "--", sys.executable, "-c", echo],
        input="through",
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("THROUGH", "")
    record = json.loads(output.read_text())
    assert record["program"] == [sys.executable, "-c", echo]
    assert (record["method"], record["exit_code"]) == ("simulated", 0)
    assert record["gross_j"] == pytest.approx(record["mean_w"] * record["seconds"])


@pytest.mark.parametrize(
    ("sent", "exit_code"), [(signal.SIGTERM, 7), (signal.SIGHUP, 7), (signal.SIGINT, 7), (signal.SIGKILL, 137)]
)
def test_signals_end_the_program_and_its_energy_is_told(sent: signal.Signals, exit_code: int) -> None:
    waits = (
        "import os, signal, sys, time\n"
        "for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):\n"
        "    signal.signal(number, lambda *_: sys.exit(7))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [*MEASURE, "--", sys.executable, "-c", waits],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as measuring:
        assert measuring.stdout is not None
        program = int(measuring.stdout.readline())
        if sent is signal.SIGINT:  # the terminal sends it to both
            os.killpg(measuring.pid, sent)
        else:
            os.kill(program if sent is signal.SIGKILL else measuring.pid, sent)
        _, told = measuring.communicate(timeout=30)
    assert measuring.returncode == exit_code
    assert "J gross (simulated" in told
    assert f"exit code {exit_code}" in told


def test_programs_that_cannot_run(tmp_path: Path) -> None:
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    plain.write_text("no program")
    broken.write_bytes(b"\x00not a program")
    broken.chmod(0o755)
    for command, code in (("no-such-program", 127), (str(plain), 126), (str(broken), 126)):
        with pytest.raises(CannotRunError) as caught:
            measure_program([command], kind="simulated")
        assert caught.value.exit_code == code
        result = energy("measure", "--source", "simulated", "--", command)
        assert result.exit_code == code
        assert result.stderr.startswith(f"bpfree: error: {command} ")


def test_options_after_the_program_are_its_own() -> None:
    result = energy("measure", "--source", "simulated", "--", sys.executable, "--version")
    assert result.exit_code == 0
    assert energy("measure").exit_code == 2


@pytest.mark.parametrize(("visible", "joules"), [(None, 1 + 2), ("1", 2), ("0", 1), ("1,0", 3), ("GPU-b", 2)])
def test_boards_of_the_program_without_a_context(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, joules: float
) -> None:
    boards = [FakeBoard(uuid="GPU-a", millijoules=lambda: 1000), FakeBoard(uuid="GPU-b", millijoules=lambda: 2000)]
    FakeNvml(monkeypatch, boards, visible=[])  # torch is not asked
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_for_program("nvml").energy_j() == joules


def test_boards_of_several_kinds_are_all_measured_if_all_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = [FakeBoard(uuid="GPU-a", name="A"), FakeBoard(uuid="GPU-b", name="B")]
    FakeNvml(monkeypatch, boards, visible=[])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(visible_sources()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # which of them is CUDA's number 1?
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    with pytest.raises(SourceUnavailableError, match="set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible_sources()


def test_hidden_boards(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch, [FakeBoard()])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SourceUnavailableError, match="no NVIDIA board is visible"):
        visible_sources()
    assert nvml.users == 0


def test_the_programs_own_processes_are_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    board = FakeBoard(pids=[os.getpid(), 1])
    FakeNvml(monkeypatch, [board])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    source = choose_for_program("nvml", is_ours=lambda pid: pid == os.getpid())
    assert source.status().foreign_processes == 1
    with EnergyMeter(source, sync=lambda: None) as meter:
        pass
    assert "FOREIGN_PROCESS" in meter.result.flags


def test_descent() -> None:
    code = "import time; print('up', flush=True); time.sleep(30)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert _descends_from_us(child.pid)
        child.kill()
    assert _descends_from_us(os.getpid())
    assert not _descends_from_us(os.getppid())
    assert _descends_from_us(2**22 + 1)  # a number that is no process here


@pytest.mark.usefixtures("_nothing_here")
def test_env_says_why_not() -> None:
    rows = json.loads(energy("env", "--format", "json").stdout)
    assert [(row["what"], row["measured"], row["how"]) for row in rows[:2]] == [
        ("gpu board", False, "NVML cannot be started"),
        ("cpu package + dram", False, "no RAPL packages"),
    ]
    assert "NVML cannot be started" in energy("env").stdout


def test_env_names_counter_powers_and_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch, [FakeBoard(pids=[1])], visible=[])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    row = json.loads(energy("env", "--format", "json").stdout)[0]
    assert row["what"] == "gpu board cuda:0"
    assert row["measured"] is True
    assert row["how"].startswith("nvml-counter, new every 100 ms; also nvml-power-instant, nvml-power-average")
    assert row["how"].endswith("other processes compute on it")
    assert (row["details"]["board"], row["details"]["calibration"]) == ("NVIDIA H200", None)


def test_calibrate_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpfree.energy.calibration.SETTLE_S", 0.0)
    output = tmp_path / "calibration.json"
    arguments = ("calibrate", "--source", "simulated", "--device", "cpu", "--seconds", "1", "--output", str(output))
    result = energy(*arguments)
    assert result.exit_code == 0
    assert "sensor" in result.stdout
    assert f"saved as {output}" in result.stderr
    assert json.loads(output.read_text())["device"]["method"] == "simulated"


def test_what_was_measured_is_told_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpfree.energy.calibration.SETTLE_S", 0.0)
    nowhere = str(tmp_path / "missing" / "energy.json")
    result = energy("measure", "--source", "simulated", "--output", nowhere, "--", sys.executable, "-c", "")
    assert result.exit_code == 1
    assert "J gross (simulated" in result.stderr
    assert f"cannot write {nowhere}: No such file" in result.stderr
    (tmp_path / "file").touch()
    blocked = str(tmp_path / "file" / "calibration.json")
    result = energy(
        "calibrate",
        "--source",
        "simulated",
        "--device",
        "cpu",
        "--seconds",
        "1",
        "--format",
        "json",
        "--output",
        blocked,
    )
    assert result.exit_code == 1
    assert json.loads(result.stdout)["device"]["method"] == "simulated"
    assert "cannot write the calibration" in result.stderr
