"""Tables in the documentation are what their command prints from the committed records."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bpfree.cli import cli
from bpfree.experiments.records import find_runs

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.parent for path in (ROOT / "results").glob("*/README.md"))  # not results/runs, a user's own
PAGES = [ROOT / "README.md", *(study / "README.md" for study in STUDIES)]
TABLE = re.compile(r"<!-- made by: ((?:bpfree table|python benchmarks/).+?) -->\n\n((?:\|.*\n)+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_made_from_the_records(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tables = TABLE.findall(page.read_text())
    assert tables
    for command, shown in tables:
        program, *arguments = shlex.split(command)
        if program == "bpfree":
            printed = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
        else:
            printed = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
        assert shown == printed


def test_records_name_hardware_seed_date_source_and_command_but_no_place() -> None:
    paths = [path for study in STUDIES for path in find_runs(study)]
    assert paths
    for path in paths:
        summary = json.loads((path / "summary.json").read_text())
        assert summary["hardware"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", summary["date"])
        assert re.fullmatch(r"[0-9a-f]{7,12}", summary["commit"])  # a clean commit
        assert f"--seed {summary['seed']}" in summary["command"]
        for file in path.iterdir():
            assert not re.search(r'"/(root|home|tmp|work|Users)', file.read_text())
