"""Tables in the documentation are what their command prints from the committed records."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bpfree.cli import cli
from bpfree.experiments.records import find_runs

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.parent for path in (ROOT / "results").glob("*/README.md"))  # not results/runs, a user's own
PAGES = [ROOT / "README.md", *(study / "README.md" for study in STUDIES)]
TABLE = re.compile(r"<!-- made by: ((?:bpfree table|python benchmarks/).+?) -->\n\n((?:\|.*\n)+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_made_from_the_records(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    tables = TABLE.findall(page.read_text())
    assert tables
    for command, shown in tables:
        program, *arguments = shlex.split(command)
        if program == "bpfree":
            printed = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
        else:
            monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where Python looks first for what a script imports
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
            printed = capsys.readouterr().out
        # tables of a comparison have a title and notes around them, for which the page has words of its own
        assert shown.splitlines() == [line for line in printed.splitlines() if line.startswith("|")]


def _summaries() -> list[dict[str, Any]]:
    """Of every run folder, and of every line of collected runs."""
    folders = [path / "summary.json" for study in STUDIES for path in find_runs(study)]
    collected = [file for study in STUDIES for file in study.glob("*.jsonl")]
    return [json.loads(path.read_text()) for path in folders] + [
        json.loads(line) for file in collected for line in file.read_text().splitlines()
    ]


def test_records_name_hardware_seed_date_source_and_command() -> None:
    summaries = _summaries()
    assert summaries
    for summary in summaries:
        assert summary["hardware"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", summary["date"])
        assert re.fullmatch(r"[0-9a-f]{7,12}", summary["commit"])  # a clean commit
        assert f"--seed {summary['seed']}" in summary["command"]


def test_records_name_no_place() -> None:
    files = [path for study in STUDIES for path in study.rglob("*") if path.suffix in {".json", ".jsonl"}]
    assert files
    for file in files:
        assert not re.search(r'"/(root|home|tmp|work|Users)', file.read_text())
