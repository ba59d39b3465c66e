"""benchmarks/step.py: which steps it measures, and what its record keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.step import configured, main, merged, preset_rows
from bpfree.experiments.config import changes

TODAY, BEFORE = {"hardware": "card", "date": "2026-11-23"}, {"hardware": "card", "date": "2026-11-22"}


def test_settings_change_parameters_and_training_of_a_preset() -> None:
    assert changes(configured("noprop-digits", [])) == {}
    config = configured("noprop-digits", ["steps=5", "batch_size=32", "lr=1e-3"])
    assert (config.parameters["steps"], config.training.batch_size) == (5, 32)
    assert changes(config) == {"steps": 5, "batch_size": 32}  # the rate is the preset's


def test_a_step_takes_the_place_of_the_same_step_alone(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    # as records were before each row had its environment
    path.write_text(json.dumps({"environment": BEFORE, "presets": [{"preset": name, "ms": 1} for name in "ab"]}))
    rows = [{"preset": "b", "settings": settings, "ms": 2, "environment": TODAY} for settings in ("", "lr=1")]
    path.write_text(json.dumps({"presets": merged(rows, path)}))
    found = [(row["preset"], row["settings"], row["ms"], row["environment"]["date"][-2:]) for row in preset_rows(path)]
    assert found == [("a", "", 1, "22"), ("b", "", 2, "23"), ("b", "lr=1", 2, "23")]
    assert merged(rows, tmp_path / "none.json") == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--set lr=1", "are for steps of --presets"),
        ("--presets nope", "unknown preset 'nope'"),
        ("--presets noprop-digits --set nope=1", "nope"),
        ("--show nowhere.json", "nowhere.json is not a record of steps"),
    ],
)
def test_what_cannot_be_measured_or_shown_is_refused(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", *options.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code not in (0, None)
    assert message in f"{ended.value.code} {capsys.readouterr().err}"
