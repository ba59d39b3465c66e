"""`bpfree audit` as a user meets it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import nn

from bpfree.algorithms import ALGORITHMS, Algorithm, Learner, _registry
from bpfree.cli import cli
from bpfree.experiments.audit import usual_config
from tests.algorithms.test_audit import Toy

DEEP = ("--network", "mlp:3x16", "--preset", "none", "--warm-up", "2")


def audit(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["audit", *arguments], catch_exceptions=False)


def rows(found: Result) -> dict[str, dict[str, str]]:
    return {row["rule"]: row for row in csv.DictReader(io.StringIO(found.stdout))}


def test_rules_beside_each_other() -> None:
    found = audit("--algo", "bp", "--algo", "mf", "--algo", "dfa", "--algo", "man", *DEEP, "--format", "csv")
    assert found.exit_code == 0
    table = rows(found)
    assert list(table) == ["bp", "mf", "dfa", "man"]
    told = ("blocks", "declared", "measured", "reach", "channels", "verdict")
    assert {rule: tuple(row[name] for name in told) for rule, row in table.items()} == {
        "bp": ("3", "network", "network", "2", "gradient", "as declared"),
        "mf": ("3", "block", "layer", "0", "", "as declared"),
        "dfa": ("3", "network", "network", "2", "output error", "as declared"),
        "man": ("3", "block", "layer", "0, later 1", "momentum copy", "as declared, by channel"),
    }


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_one_rule_shows_the_matrix_of_its_blocks(form: str) -> None:
    found = audit("--algo", "man", *DEEP, "--format", form)
    lines = [line.replace("|", " ").split() for line in found.stdout.splitlines()]
    assert ["update", "of", "0", "1", "2"] in lines
    for row in ("block 0 1 2 .", "block 1 1 1 2", "block 2 1 1 1", "auxiliaries 0 1 1 .", "readout 1 1 1"):
        assert row.split() in lines
    assert "behind 2 of warm-up" in found.stdout
    assert "Channel momentum copy: weights of the next block's first unit" in found.stdout


def test_json_has_everything() -> None:
    found = audit("--algo", "mf", *DEEP, "--seed", "3", "--set", "schedule=sequential", "--format", "json")
    (one,) = json.loads(found.stdout)
    assert one["algorithm"] == "mf"
    assert (one["dataset"], one["network"], one["seed"]) == ("digits", "mlp:3x16", 3)
    assert one["parameters"] == {"schedule": "sequential"}
    assert one["first_changes"] == [[1, None, None], [1, 1, None], [1, 1, 1]]
    assert (one["reach"], one["late_reach"], one["measured"], one["agrees"]) == (0, 0, "layer", True)
    assert one["channels"] == one["upward"] == one["faults"] == []


class Leaking(Toy):
    """Declares to be local, on any network, and hears the last block's weights."""

    def __init__(self, network: nn.Sequential, classes: int, *, lr: float = 0.1, input_shape: Any = None) -> None:
        super().__init__("weights", lr=lr, blocks=network, classes=classes, input_shape=input_shape)


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch) -> str:
    learner: type[Learner] = Leaking
    entry = Algorithm("leaking", "leaking", learner, "a rule that is not what it says", Leaking.paper)
    monkeypatch.setattr(_registry, "ALGORITHMS", (*ALGORITHMS, entry))
    return "leaking"


def test_a_rule_that_does_what_it_does_not_declare_fails(leaking: str) -> None:
    found = audit("--algo", leaking, *DEEP)
    assert found.exit_code == 1
    lines = [line.split() for line in found.stdout.splitlines()]
    assert ["block", "0", "1", "2!", "1!"] in lines
    assert "leaking: the update of block 0 depends on block 1 in step 2" in found.stdout
    assert found.stderr == "bpfree: not what is declared, of 1 audited: leaking\n"
    both = audit("--algo", "mf", "--algo", leaking, *DEEP, "--format", "csv")
    assert both.exit_code == 1
    assert {rule: row["verdict"] for rule, row in rows(both).items()} == {
        "mf": "as declared",
        leaking: "NOT as declared",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algo", "mfx"), "unknown algorithm 'mfx'"),
        (("--algo", "ff", "--network", "cnn:8"), "its layers are Linear-ReLU"),
        (("--algo", "mf", "--set", "lrr=1"), "unknown parameter of mono_forward 'lrr'"),
        (("--set", "lrr=1"), "unknown parameter of backprop 'lrr'"),  # which no rule has
        (("--algo", "mf", "--steps", "0"), "--steps"),
    ],
)
def test_bad_input_exits_with_2(arguments: tuple[str, ...], message: str) -> None:
    found = audit(*arguments)
    assert found.exit_code == 2
    assert message in found.stderr
    assert not found.stdout


def test_all_rules_are_audited_but_those_that_cannot_train_the_network() -> None:
    pytest.importorskip("torch_geometric")
    found = audit("--dataset", "cora", "--network", "gcn:2x8", "--preset", "none", "--warm-up", "2", "--format", "csv")
    assert found.exit_code == 0
    trained = {"bp", "bp-ds", "mf-joint", "mf", "cafo", "fgnn", "dfa"}
    assert set(rows(found)) == trained
    left_out = {line.split()[1]: line for line in found.stderr.splitlines()}
    assert set(left_out) == {entry.alias for entry in ALGORITHMS} - trained
    assert "is left out: noprop cannot train this network: its blocks read one input per label" in left_out["noprop"]


def test_a_preset_says_which_rule() -> None:
    assert list(rows(audit("--preset", "forward_forward-digits", "--format", "csv"))) == ["ff"]


def test_links_and_closed_forms_and_reconstructions() -> None:
    pytest.importorskip("torch_geometric")
    links = audit("--preset", "forward_gnn-cora-links", "--warm-up", "1", "--format", "csv")
    solved = audit("--algo", "cafo", "--network", "mlp:2x16", "--preset", "none", "--format", "csv")
    images = audit("--algo", "ccl", "--task", "autoencode", "--network", "autoencoder:4x8", "--format", "csv")
    assert rows(links)["fgnn"]["reach"] == "0"
    assert rows(solved)["cafo"]["measured"] == "nothing learns"
    assert rows(images)["ccl"]["channels"] == "feedback stream"
    assert links.exit_code == solved.exit_code == images.exit_code == 0


def test_rules_are_audited_on_packaged_data_that_they_can_learn() -> None:
    pytest.importorskip("torch_geometric")
    assert usual_config("mf").dataset == "digits"
    assert usual_config("fgnn").dataset == "cora"


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    found = audit("--algo", "mf", "--dataset", "mnist", "--data", str(tmp_path), "--no-download")
    assert found.exit_code == 1
    assert "mnist" in found.stderr
