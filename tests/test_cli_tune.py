"""`bpfree tune` as a user meets it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bpfree import console
from bpfree.cli import cli
from bpfree.experiments.config import presets, read_preset

pytest.importorskip("optuna")

QUICK = ("--network", "mlp:1x8", "--passes", "1", "2", "--trials", "2", "--device", "cpu")


def tune(results: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["tune", "--results", str(results), *arguments], catch_exceptions=False)


def test_result_and_progress(tmp_path: Path) -> None:
    done = tune(tmp_path, "--algo", "mf", *QUICK, "--energy", "simulated")
    assert done.exit_code == 0
    header, row, spent, command, warning, confirmation = done.stdout.splitlines()
    assert {"trial", "lr", "batch_size", "schedule"} <= set(header.split())
    assert len(row.split()) == len(header.replace("validation accuracy, %", "a").replace(", ", ",").split())
    assert spent.startswith("2 trials (2 finished, 0 pruned, 0 failed), ")
    assert "J (simulated)" in spent
    assert "lr: 1e-05 to 2.0 by logarithm" in done.stderr
    assert "[2/2] trial 1 finished: " in done.stderr
    words = command.split()
    assert words[:3] == ["bpfree", "run", "--preset"]
    ran = CliRunner().invoke(cli, [*words[1:], "--results", str(tmp_path / "runs"), "--format", "json"])
    summary = json.loads(ran.stdout)
    assert (summary["algorithm"], summary["preset"]) == ("mf", "digits-mf-mlp-1x8")
    assert "fresh seeds" in warning
    assert confirmation == f"bpfree compare --algos mf@{words[3]},bp@ITS_PRESET --protocol tuned"
    again = tune(tmp_path, "--algo", "mf", *QUICK, "--energy", "simulated")
    assert "2 of them done already" in again.stderr
    assert again.stdout == done.stdout


def test_a_study_of_the_baseline_to_convergence_is_confirmed_against_a_rule_at_its_own(tmp_path: Path) -> None:
    options = ("--network", "mlp:1x8", "--trials", "1", "--device", "cpu", "--protocol", "convergence", "--epochs", "1")
    *_, preset, _, confirmation = tune(tmp_path, "--algo", "bp", *options).stdout.splitlines()
    path = preset.split()[-1]
    assert confirmation == f"bpfree compare --algos bp@{path},mf@ITS_PRESET --protocol own"


def test_one_pass_of_one_trial_is_told_in_the_singular(tmp_path: Path) -> None:
    quick = ("--network", "mlp:1x8", "--passes", "1", "1", "--trials", "1", "--device", "cpu")
    done = tune(tmp_path, "--algo", "bp", *quick)
    said = done.stdout + done.stderr
    assert "1 trial -> " in done.stderr
    assert ", 1 pass, " in done.stderr
    assert "\n1 trial (1 finished" in done.stdout
    (preset,) = tmp_path.glob("*/*.toml")
    assert read_preset(preset).description.endswith(", in 1 pass")
    command = ["run", "--preset", str(preset), "--device", "cpu", "--results", str(tmp_path / "runs")]
    said += CliRunner().invoke(cli, command).output
    assert not re.search(r"\b1 (trials|passes|runs)\b", said)


def test_record_as_json_and_nothing_else(tmp_path: Path) -> None:
    done = tune(tmp_path, "--algo", "bp", *QUICK, "--format", "json", "--quiet", "--name", "mine")
    assert done.stderr == ""
    record = json.loads(done.stdout)
    written = json.loads((tmp_path / "mine" / "tuning.json").read_text())
    assert record == {**written, "folder": str(tmp_path / "mine")}
    assert record["bill"]["trials"] == len(record["trials"]) == 2


def test_what_two_studies_found_is_confirmed_by_the_command_that_they_print(tmp_path: Path) -> None:
    """Each arm trains for the passes that its study chose, on seeds of its own; T7 has the joules to the target."""
    presets_of, studies = {}, tmp_path / "studies: mf, bp"  # commands are printed as a shell takes them
    for rule in ("mf", "bp"):
        found = tune(studies, "--algo", rule, *QUICK, "--energy", "simulated", "--target", "5")
        presets_of[rule] = shlex.split(found.stdout.splitlines()[3])[-1]
        if rule == "mf":
            command = found.stdout.splitlines()[-1]
    words = [word.replace("bp@ITS_PRESET", f'bp@"{presets_of["bp"]}"') for word in shlex.split(command)]
    assert words[-4:] == ["--protocol", "tuned", "--target", "5"]
    options = ["--seeds", "3", "--device", "cpu", "--energy", "simulated", "--warm-up", "0", "--quiet"]
    root = str(tmp_path / "confirmed")
    done = CliRunner().invoke(cli, [*words[1:], *options, "--results", root], catch_exceptions=False)
    assert done.exit_code == 0
    table = CliRunner().invoke(cli, ["table", root, "-t", "T7", "-t", "T1", "--format", "json"], catch_exceptions=False)
    to_target, performance = (found["rows"] for found in json.loads(table.stdout))
    (row,) = to_target
    assert (row["algorithm"], row["network"], row["target"]) == (f"mf@{Path(presets_of['mf']).stem}", "mlp:1x8", 5)
    assert (row["protocol"], row["n"], row["baseline_n"]) == ("tuned", 3, 3)
    files = {rule: Path(path) for rule, path in presets_of.items()}
    chosen = {f"{rule}@{path.stem}": read_preset(path).training["passes"] for rule, path in files.items()}
    assert {row["algorithm"]: row["passes"] for row in performance} == chosen
    assert all(row["seeds"] == [0, 1, 2] for row in performance)


def test_convergence_searches_no_passes(tmp_path: Path) -> None:
    done = tune(
        tmp_path, "--algo", "bp", "--network", "mlp:1x8", "--trials", "1", "--format", "json",
        "--protocol", "convergence", "--epochs", "3", "--patience", "2", "--lr-schedules", "cosine",
    )  # fmt: skip
    record = json.loads(done.stdout)
    assert record["study"] == "digits-bp-mlp-1x8-convergence"
    assert "passes" not in record["space"]
    training = record["settings"]["base"]["training"]
    assert (training["epochs"], training["patience"], training["passes"]) == (3, 2, None)
    assert record["best"]["passes"] <= 3
    assert record["best"]["values"]["lr_schedule"] == "cosine"


def test_a_preset_gives_the_rule_its_parameters_and_not_the_training(tmp_path: Path) -> None:
    """Of two rules one would otherwise be trained with other settings than the other."""
    preset = presets()["forward_forward-digits"]
    done = tune(tmp_path, "--preset", preset.name, "--trials", "1", "--passes", "1", "1", "--format", "json")
    base = json.loads(done.stdout)["settings"]["base"]
    assert (base["network"], base["parameters"]) == (preset.network, preset.parameters)
    assert preset.training
    plain = json.loads(tune(tmp_path, "--algo", "bp", *QUICK, "--format", "json").stdout)["settings"]["base"]
    assert base["training"] == plain["training"]


@pytest.mark.parametrize(
    ("metric", "what"),
    [
        ("ROC-AUC", ("--dataset", "cora", "--network", "gcn:1x8", "--split", "edges", "--set", "readout=dot")),
        ("R2", ("--task", "autoencode", "--network", "autoencoder:4x8")),
    ],
)
def test_progress_and_result_name_the_metric(
    metric: str, what: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_geometric" if metric == "ROC-AUC" else "matplotlib")
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    quick = ("--preset", "none", "--passes", "2", "2", "--trials", "1", "--device", "cpu")
    done = tune(tmp_path, "--algo", "bp", *what, *quick)
    assert f"done, validation {metric} " in done.stderr
    assert f"trial 0 finished: {metric} " in done.stderr
    assert f"validation {metric}, %" in done.stdout.splitlines()[0]
    (preset,) = (read_preset(path) for path in tmp_path.glob("*/*.toml"))
    assert f"validation {metric} " in preset.description
    assert "accuracy" not in done.stdout + done.stderr + preset.description


@pytest.mark.parametrize("by", ["preset", "task"])
def test_an_autoencoder_stays_one(by: str, tmp_path: Path) -> None:
    """Its trials reconstruct images as they are, and so does the preset that comes of them."""
    pytest.importorskip("matplotlib")
    what = ("--preset", "backprop-digits-autoencode") if by == "preset" else ("--algo", "bp", "--task", "autoencode")
    quick = ("--network", "autoencoder:4x8", "--passes", "1", "1", "--trials", "1", "--device", "cpu")
    done = tune(tmp_path, *what, *quick, "--format", "json")
    record = json.loads(done.stdout)
    assert record["study"] == "digits-bp-autoencoder-4x8-autoencode"
    base = record["settings"]["base"]
    assert (base["task"], base["training"]["standardize"]) == ("autoencode", False)
    preset = str(Path(record["folder"]) / record["presets"][0])
    command = ["run", "--preset", preset, "--seed", "100", "--device", "cpu", "--results", str(tmp_path / "runs")]
    ran = CliRunner().invoke(cli, [*command, "--format", "json", "--quiet"], catch_exceptions=False)
    summary = json.loads(ran.stdout)
    assert (summary["task"], summary["criterion"]) == ("autoencode", "MSE")
    assert summary["validation_loss"] == record["best"]["validation_loss"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--preset", "backprop-digits-autoencode", "--task", "classify"), 2, "is for the task autoencode"),
        (("--algo", "bp", "--preset", "mono_forward-digits"), 2, "mono_forward-digits is for mf, not for bp"),
        (("--algo", "mono-fwd"), 2, "unknown algorithm 'mono-fwd'; did you mean mono-forward"),
        ((), 2, "say what to tune"),
        (("--algo", "bp", "--dataset", "digit"), 2, "did you mean digits"),
        (("--algo", "bp", "--dataset", "cifar10", "--no-download"), 1, "bpfree data fetch cifar10"),
        (("--algo", "bp", "--network", "mpl:2x10"), 2, "did you mean mlp"),
        (("--algo", "fgnn", "--network", "mlp:1x8"), 2, "cannot train this network"),
        (("--algo", "bp", "--set", "lrr=1"), 2, "did you mean lr"),
        (("--algo", "bp", "--patience", "3"), 2, "--patience has no meaning with --protocol passes"),
        (("--algo", "bp", "--protocol", "convergence", "--passes", "1", "2"), 2, "--passes has no meaning"),
        (("--algo", "bp", "--lr", "1", "0.1"), 2, "range of lr"),
        (("--algo", "mf", "--set", "lr=0.1", "--lr", "0.001", "0.002"), 2, "--lr has nothing to search"),
        (
            ("--algo", "mf", "--set", "weight_decay=0", "--weight-decay", "1e-5", "1e-3"),
            2,
            "--weight-decay has nothing",
        ),
        (("--algo", "bp", "--set", "dropout=0.1", "--dropout", "0", "0.3"), 2, "--dropout has nothing to search"),
        (("--algo", "bp", "--lr-schedules", "cosin"), 2, "did you mean cosine"),
        (("--algo", "bp", "--batch-sizes", "64,x"), 2, "--batch-sizes takes whole numbers"),
        (("--algo", "bp", "--batch-sizes", "64,4096"), 2, "batches of 4096 do not fit"),
        (("--algo", "bp", "--network", "mlp:1x8", "--dropout", "0", "0.3"), 2, "no dropout layer"),
        (("--algo", "bp", "--device", "cuda:99"), 2, "use --device cpu"),
        (("--algo", "bp", "--pareto", "--energy", "none"), 2, "joules as an objective need to be measured"),
        (("--algo", "bp", "--pareto", "--pruner", "median"), 2, "use no pruner"),
        (("--algo", "bp", "--target", "60", "--energy", "none"), 2, "joules as an objective need to be measured"),
        (("--algo", "bp", "--target", "60", "--pareto"), 2, "one objective"),
        (("--algo", "bp", "--name", "a/b"), 2, "the name of a study is that of one folder"),
        (("--algo", "bp", "--workers", "2", "--nproc", "2"), 2, "a trial is one process, not 2"),
        (("--algo", "bp", "--workers", "2", "--nproc", "1", "--device", "cpu"), 2, "2 workers have 1 here"),
        (("--algo", "bp", "--storage", "nosuchdb://host/name"), 2, "cannot open the storage nosuchdb"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = tune(tmp_path / "results", *arguments, "--data", str(tmp_path / "data"))
    assert done.exit_code == code
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("results/**/trials/*"))


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = tune(tmp_path, "--algo", "bp", *QUICK)
    assert done.exit_code == 2
    assert 'pip install "bpfree[tune]"' in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_teaches() -> None:
    shown = CliRunner().invoke(cli, ["tune", "--help"]).stdout
    for words in ("validation data only", "The same command goes on", "bpfree run --preset", "--workers"):
        assert words in " ".join(shown.split())
