"""Damaged records: they are left out with a word, and hide nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bpfree.cli import cli
from bpfree.experiments.collect import TUNING
from bpfree.experiments.compare import LEDGER, PLAN
from bpfree.experiments.finished import finished_runs
from bpfree.experiments.records import CONFIG, METRICS, SUMMARY
from tests.experiments.synthetic import make_run


def bpfree(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def without(text: str) -> str:
    """The record without what tables cannot do without."""
    values = json.loads(text)
    del values["energy"]["flags"]
    return json.dumps(values)


def of_another_type(text: str) -> str:
    return json.dumps({**json.loads(text), "test_accuracy": "high", "algorithm": ["mf"]})


DAMAGES: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[:-9],
    "empty": lambda text: "",
    "null": lambda text: "null",
    "list": lambda text: f"[{text}]",
    "binary": lambda text: "\x00\x1f",
    "keys": without,
    "types": of_another_type,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two arms of two seeds."""
    for rule in ("bp", "mf"):
        for seed in (0, 1):
            make_run(tmp_path, rule, seed)
    return tmp_path


def damage(folder: Path, name: str, how: str) -> Path:
    """Damage a file of one run; its path."""
    path = sorted(folder.glob(f"*mf*seed1*/{name}"))[0]
    path.write_text(DAMAGES[how](path.read_text()))
    return path


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_summary_is_left_out_of_tables_with_one_line(folder: Path, how: str) -> None:
    path = damage(folder, SUMMARY, how)
    for options in ((), ("-t", "T1")):
        result = bpfree("table", str(folder), "--format", "json", *options)
        assert result.exit_code == 0
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"bpfree: warning: left out the run {path.parent}: {path} is damaged")
        assert line.endswith(f"restore it, or move the folder {path.parent} away")
    rows = {
        row["algorithm"]: row["seeds"] for row in json.loads(bpfree("table", str(folder), "--format", "json").stdout)
    }
    assert rows == {"bp": [0, 1], "mf": [0]}


@pytest.mark.parametrize("name", [SUMMARY, METRICS, CONFIG])
def test_a_damaged_record_is_left_out_of_figures_and_reports_with_one_line(folder: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = damage(folder, name, "truncated")
    for command in ("plot", "report"):
        result = bpfree(command, str(folder))
        assert result.exit_code == 0
        assert result.stderr.count("bpfree: warning:") == len(result.stderr.splitlines()) == 1
        assert str(path) in result.stderr
        assert "restore it" in result.stderr


def test_the_command_says_what_is_wrong_with_a_value(folder: Path) -> None:
    damage(folder, SUMMARY, "keys")
    damage(folder, METRICS, "empty").write_text('{"steps": 1, "joules_at_start": null}\n')
    assert "is damaged (energy has no flags)" in bpfree("table", str(folder)).stderr
    for path in folder.glob(f"*mf*seed1*/{SUMMARY}"):
        path.write_text((next(folder.glob(f"*mf*seed0*/{SUMMARY}"))).read_text())
    assert "is damaged (it[0] has no validation_accuracy)" in bpfree("table", str(folder), "-t", "T1").stderr


@pytest.mark.parametrize("command", ["table", "plot", "report"])
def test_if_nothing_remains_that_is_an_error(command: str, tmp_path: Path) -> None:
    make_run(tmp_path, "mf", 1)
    path = damage(tmp_path, SUMMARY, "empty")
    result = bpfree(command, str(tmp_path))
    assert result.exit_code == 1
    warning, error = result.stderr.splitlines()
    assert str(path) in warning
    assert error.startswith(f"bpfree: error: no finished run under {tmp_path} that can be shown; make some with")


def test_damaged_comparisons_and_studies_are_left_out(folder: Path) -> None:
    studies = {
        "first": (PLAN, "{"),
        "second": (PLAN, '{"arms": 3}'),
        "third": (LEDGER, "{]\n"),
        "fourth": (TUNING, "{}"),
    }
    for name, (file, text) in studies.items():
        make_run(folder / name / "runs", "cafo", 0)
        (folder / name / file).write_text(text)
    plan = {"dataset": "cifar10", "hardware": [], "arms": [], "seeds": [], "protocols": [], "matched_passes": {}}
    analysis = {"baseline": "bp", "margin_accuracy": 1, "margin_relative": 1, "targets": []}
    (folder / "third" / PLAN).write_text(json.dumps({**plan, "analysis": analysis, "start_temperature_c": None}))
    result = bpfree("report", str(folder))
    assert result.exit_code == 0
    for (name, (file, _)), what in zip(studies.items(), ["comparison"] * 3 + ["study"], strict=True):
        (line,) = [line for line in result.stderr.splitlines() if f"left out the {what} {folder / name}" in line]
        assert str(folder / name / file) in line
    assert len(result.stderr.splitlines()) == 4
    page = (folder / "report.html").read_text()
    assert "Comparison" not in page


def test_a_finished_run_with_a_damaged_summary_is_no_trace_when_resumed(folder: Path) -> None:
    path = damage(folder, SUMMARY, "keys")
    result = bpfree("run", "--resume", str(path.parent))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert f"{path} is damaged (energy has no flags); restore it" in result.stderr


def test_a_library_call_warns(folder: Path) -> None:
    damage(folder, SUMMARY, "empty")
    with pytest.warns(UserWarning, match="left out the run"):
        assert len(finished_runs(folder)) == 3
