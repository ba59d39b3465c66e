"""benchmarks/noprop.py: what it measures of a trained run."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

from bpfree.experiments.config import resolve
from bpfree.experiments.run import run

ROOT = Path(__file__).parent.parent.parent


def tables(*options: str, status: int = 0) -> str:
    command = [sys.executable, "benchmarks/noprop.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_inference_is_measured_with_every_sampler_and_number_of_steps(tmp_path: Path) -> None:
    small = {"epochs": 1, "patience": 1}
    parameters = {"variant": "ct", "steps": 4, "eta": 1.0, "sampler": "mean"}
    config = resolve(preset="noprop-digits", parameters=parameters, training=small)
    record = tmp_path / "inference.json"
    summary = run(config, tmp_path / "runs")
    (path,) = (tmp_path / "runs").iterdir()
    shown = tables("--inference", str(path), "--window", "0.01", "--device", "cpu", "--json", str(record))
    (study,) = json.loads(record.read_text())["inference"]
    assert (study["run"], study["rule"], study["embeddings"]) == (path.name, "ct", "onehot")
    rows = study["rows"]
    found = [(row["sampler"], row["steps"]) for row in rows]
    assert found == list(product(("mean", "stochastic", "ode"), (1, 2, 4)))
    assert all(len(row["validation"]) == len(row["test"]) == 5 for row in rows)
    assert rows[2]["test"] == summary["test_draws"]  # with the sampler and the steps of the run
    assert len({tuple(row["test"]) for row in rows}) == len(rows)
    settings = "variant=ct, steps=4, eta=1, epochs=1, patience=1"  # not the run's sampler, since rows name theirs
    assert shown.count(f"| digits | ct | onehot | {settings} | mean |") == 3
    assert shown.count(f"| digits | ct | onehot | {settings} |") == len(rows)
    figure = tmp_path / "inference.png"
    assert tables("--show", str(record), "--figure", str(figure)) == shown
    assert figure.read_bytes().startswith(b"\x89PNG")
    another = run(config, tmp_path / "more") and next((tmp_path / "more").iterdir())
    tables("--inference", str(another), "--window", "0.01", "--device", "cpu", "--json", str(record))
    tables("--inference", str(path), "--window", "0.01", "--device", "cpu", "--json", str(record))
    assert [study["run"] for study in json.loads(record.read_text())["inference"]] == [path.name, another.name]


def test_what_is_no_run_of_noprop_is_refused_in_a_line(tmp_path: Path) -> None:
    run(resolve("bp", "digits", "mlp:1x8", preset="none", training={"epochs": 1, "patience": 1}), tmp_path)
    (other,) = tmp_path.iterdir()
    for path, message in ((other, "holds no run of noprop, but of bp"), (tmp_path / "nowhere", "nowhere")):
        (line,) = tables("--inference", str(path), "--device", "cpu", status=1).splitlines()
        assert message in line
    (line,) = tables("--runs", str(tmp_path), "--figure", "a.png", status=1).splitlines()
    assert "--figure draws what inference costs" in line
    for option, path, message in (("--show", "nowhere.json", "is not a record"), ("--runs", "none", "no finished run")):
        (line,) = tables(option, str(tmp_path / path), status=1).splitlines()
        assert message in line


def test_runs_with_other_settings_than_their_presets_have_rows_of_their_own(tmp_path: Path) -> None:
    small = {"epochs": 1, "patience": 1}
    for seed, parameters in ((0, {}), (1, {}), (0, {"eta": 0.5}), (0, {"eta": 0.5})):  # the last repeats a seed
        run(resolve(preset="noprop-digits", seed=seed, parameters=parameters, training=small), tmp_path)
    head, _, *rows = tables("--runs", str(tmp_path)).splitlines()
    titles = head.split("|")
    places = [titles.index(f" {name} ") for name in ("settings", "seeds")]
    found = [tuple(row.split("|")[place].strip() for place in places) for row in rows]
    assert found == [("epochs=1, patience=1", "2"), ("eta=0.5, epochs=1, patience=1", "1")]
