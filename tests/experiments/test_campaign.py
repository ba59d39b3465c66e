"""benchmarks/campaign.py: what it runs, once, in one process or in several."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.campaign import campaign_parser, jobs_of, main
from bpfree.errors import UsageError
from tests.experiments.synthetic import make_run

QUICK = "--presets mono_forward-digits --training epochs=1 patience=1"
ROOT = Path(__file__).parent.parent.parent


def campaign(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/campaign.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_grid_of_every_preset_and_seed_without_what_is_recorded(tmp_path: Path) -> None:
    line = f"--out {tmp_path} --presets mono_forward-digits backprop-mnist --seeds 0 1 --vary lr=0.1,0.2"
    jobs = jobs_of(campaign_parser().parse_args(line.split()))
    found = {(job.config.algorithm, job.config.seed, job.config.parameters["lr"]) for job in jobs}
    assert found == {(rule, seed, lr) for rule in ("mf", "bp") for seed in (0, 1) for lr in (0.1, 0.2)}
    path = make_run(tmp_path, "mf", 0)
    wanted = next(job.config for job in jobs if job.config.algorithm == "mf")
    (path / "config.json").write_text(json.dumps(wanted.to_dict()))
    left = jobs_of(campaign_parser().parse_args(line.split()))
    assert len(left) == len(jobs) - 1
    assert wanted not in [job.config for job in left]


def test_several_processes_take_the_runs_of_several_campaigns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "campaigns.txt"
    lines.write_text(
        f"--out {tmp_path}/a {QUICK} --seeds 0 1  # two seeds\n\n--out {tmp_path}/b {QUICK} --vary lr=-1.0\n"
        f"--out {tmp_path}/c {QUICK} --keep\n"
    )
    result = campaign("--workers", "2", "--file", str(lines))
    assert result.returncode == 1
    assert "lr must be positive" in result.stderr
    assert result.stdout.count("% in the test") == 3
    assert len(list(tmp_path.glob("a/*/summary.json"))) == 2
    assert [path.parent.parent.name for path in tmp_path.glob("*/*/model.pt")] == ["c"]
    monkeypatch.setattr(sys, "argv", ["campaign.py", "--out", f"{tmp_path}/a", *QUICK.split(), "--seeds", "0", "1"])
    with pytest.raises(SystemExit) as again:
        main()
    assert again.value.code == 0
    printed = capsys.readouterr().out
    assert "% in the test, 1" not in printed
    assert "0, 1 (n = 2)" in printed


def test_a_run_that_was_interrupted_goes_on_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["campaign.py", "--out", f"{tmp_path}", *QUICK.split()])
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        (folder,) = tmp_path.iterdir()  # the second time as well
        (folder / "summary.json").unlink()  # fails if the run was not finished
    assert capsys.readouterr().out.count("% in the test, 1 passes") == 2


def test_workers_of_a_killed_campaign_save_their_runs_and_end(tmp_path: Path) -> None:
    options = f"--out {tmp_path} --presets mono_forward-digits --seeds 0 1 --workers 2 --training epochs=10000"
    command = [sys.executable, "benchmarks/campaign.py", *options.split(), "patience=10000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("*/metrics.jsonl"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    _, said = process.communicate()  # whose end is that of the last process that could still say something
    assert said.count("the run is saved") == 2
    assert len(list(tmp_path.glob("*/checkpoint.pt"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "needs --presets and --out"),
        (QUICK, "needs --presets and --out"),
        (f"{QUICK} --out x --workers 2 --idle 10", "--idle is for joules"),
        ("--file nowhere.txt", "there is no file nowhere.txt"),
    ],
)
def test_campaigns_that_make_no_sense_are_refused(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["campaign.py", *options.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--presets mono-forward", "unknown preset"),
        ("--presets mono_forward-digits --training monitor=metric", "JSON value"),
    ],
)
def test_what_a_campaign_cannot_resolve_is_refused(options: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        jobs_of(campaign_parser().parse_args([*options.split(), "--out", str(tmp_path)]))
