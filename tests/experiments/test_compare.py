"""Comparisons: order, resume, skips, failures, and what is fixed beforehand."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bpfree.cli import cli
from bpfree.data import Dataset, load
from bpfree.errors import CheckpointError, UsageError, WriteError, cannot_write
from bpfree.experiments import compare as comparisons
from bpfree.experiments.arms import interleaved, make_arms, split_arms, unequal_settings
from bpfree.experiments.collect import collect
from bpfree.experiments.compare import Analysis, Comparison, Conditions, Ledger, Outcome, Plan
from bpfree.experiments.records import CONFIG, METRICS, SUMMARY, RunFolder, find_runs
from bpfree.experiments.run import Reporter
from bpfree.experiments.study_tables import make_tables
from bpfree.experiments.train import InterruptedRunError

TRAINING = {"epochs": 2, "batch_size": 64}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def comparison(root: Path, digits: Dataset, *texts: str, seeds: Sequence[int] = (0, 1), **options: Any) -> Comparison:
    arms = make_arms(
        texts or ("mf", "bp"), "digits", "mlp:2x16", training=TRAINING, device="cpu", energy="simulated", baseline="bp"
    )
    return Comparison(root, arms, seeds, digits, **{"say": lambda line: None, **options})


def ledger(root: Path) -> list[dict[str, Any]]:
    return Ledger(root / "ledger.jsonl").lines


def slots(root: Path) -> Counter[tuple[str, int | None, int]]:
    """How often each configuration was run to its end."""
    configs = [RunFolder.open(path).read_json(CONFIG) for path in find_runs(root)]
    return Counter((c["algorithm"], c["training"]["passes"], c["seed"]) for c in configs)


def bpfree(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


QUICK = ("--network", "mlp:2x16", "--epochs", "2", "--batch-size", "64", "--energy", "simulated", "--device", "cpu")


# Arms


def test_arms_take_presets_files_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    file.write_text(
        'description = "mine"\nsource = "mine"\nalgorithm = "mf"\ndataset = "digits"\nnetwork = "mlp:1x8"\n'
        "[parameters]\nlr = 0.5\n[training]\npatience = 3\n"
    )
    plain, preset, own, tweaked = make_arms(
        ["mf@none", "mf", f"mf@{file}", f"mf@{file}:schedule=sequential:patience=4"], "digits", training={"epochs": 7}
    )
    assert plain.config.preset is None
    assert preset.config.preset == "mono_forward-digits"
    assert (own.config.network, own.config.parameters, own.config.training.patience) == ("mlp:1x8", {"lr": 0.5}, 3)
    assert tweaked.config.parameters == {"lr": 0.5, "schedule": "sequential"}
    assert tweaked.config.training.patience == 4
    assert {arm.config.training.epochs for arm in (plain, preset, own, tweaked)} == {7}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["mf", "bb"], "unknown algorithm 'bb'"),
        (["mf@nothing"], "unknown preset"),
        (["mf@nothing.toml"], "cannot read the preset"),
        (["mf@backprop-cifar10"], "is for bp, not for mf"),
        (["mf:rate=1"], "unknown setting of mono_forward 'rate'"),
        (["mf:patience"], "key=value"),
        (["mf::patience=4"], "key=value"),
        (["mf:patience=many"], "patience takes a whole number"),
        (["mf", "mono_forward"], "same configuration"),
        (["mono_forward@mono_forward-digits", "mf@mono_forward-digits"], "same configuration"),
    ],
)
def test_bad_arms_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_arms(texts, "digits")


def test_commas_and_colons_between_quotes_belong_to_a_value(tmp_path: Path) -> None:
    assert split_arms(" bp ,mf:patience=4:lr=1,, ") == ["bp", "mf:patience=4:lr=1"]
    assert split_arms("""man:ends="1,3":head='a,b',bp""") == ["""man:ends="1,3":head='a,b'""", "bp"]
    folder = tmp_path / "a, b: c"
    folder.mkdir()
    (folder / "tuned.toml").write_text(
        'description = "mine"\nsource = "mine"\nalgorithm = "man"\ndataset = "cifar10"\nnetwork = "resnet:20"\n'
    )
    texts = split_arms(f"""man@none:ends="3,9":patience=4,man@'{folder}/tuned.toml':k=2""")
    quoted, filed = make_arms(texts, "cifar10", "resnet:20")
    assert (quoted.label, filed.label) == (texts[0], "man@tuned:k=2")  # tables and records have no paths
    assert (quoted.config.parameters, quoted.config.training.patience) == ({"ends": "3,9"}, 4)
    assert (filed.config.preset, filed.config.parameters) == ("tuned", {"k": 2})
    other = tmp_path / "tuned.toml"
    other.write_text((folder / "tuned.toml").read_text() + "\n[parameters]\nk = 4\n")
    with pytest.raises(UsageError, match="two arms are called man@tuned; give one"):
        make_arms([f"man@'{folder}/tuned.toml'", f"man@{other}"], "cifar10", "resnet:20")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bp,man:ends=3,7,15", """'7' is no rule; .* --algos 'man:ends="3,7,15"'"""),
        ("man:k=2:ends=3,7,bp", """--algos 'man:k=2:ends="3,7"'"""),
        ('man:ends="3,7', "a quote without its end"),
        ("man:ends=3,7',bp", "a quote without its end"),
    ],
)
def test_a_value_with_commas_is_refused_unless_quoted(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split_arms(text)


NAMED = "ff@forward_forward-mnist"


def test_the_stopping_rule_is_that_of_the_comparison_unless_a_preset_is_named() -> None:
    """Forward-Forward's preset has 60 epochs and no early stopping; the baseline would have 100 and patience 20."""

    def stops(text: str, dataset: str = "digits", **training: Any) -> tuple[int, int, float]:
        (arm,) = make_arms([text], dataset, training=training)
        assert arm.config.preset is not None
        found = arm.config.training
        return found.epochs, found.patience, found.min_delta

    assert stops("ff") == stops("bp@backprop-cifar10", "digits") == (100, 20, 0.0)
    assert make_arms(["ff"], "digits")[0].config.training.lr_schedule == "cooldown"  # which goes with its learning rate
    assert stops("ff@forward_forward-digits") == (60, 60, 0.0)
    assert stops("ff:patience=7") == (100, 7, 0.0)
    assert stops("ff:patience=7", patience=3, epochs=4, min_delta=0.5) == (4, 7, 0.5)
    assert stops("ff@forward_forward-digits", patience=3) == (60, 3, 0.0)
    held_out = {text: make_arms([text], "mnist")[0].config.training.validation for text in ("ff", "bp", NAMED)}
    assert held_out == {"ff": None, "bp": None, NAMED: 10000}  # the data set's own, unless the preset is named
    assert stops("fgnn", "cora") == stops("bp", "cora") == (500, 100, 0.0)  # epochs of a single step


def test_the_data_set_is_that_of_the_presets_named() -> None:
    assert {arm.config.dataset for arm in make_arms(["mf@mono_forward-mnist", "bp"])} == {"mnist"}
    assert make_arms(["mf@mono_forward-mnist"], "digits")[0].config.dataset == "digits"
    assert make_arms(["mf@none", "bp"])[0].config.dataset == "digits"
    with pytest.raises(UsageError, match="for mnist and cifar10; choose with --dataset"):
        make_arms(["mf@mono_forward-mnist", "bp@backprop-cifar10"])


def test_the_task_is_that_of_the_presets_named() -> None:
    """A baseline that told classes apart would be compared by its accuracy with the others' R squared."""
    arms = make_arms(["ccl@counter_current-digits-autoencode", "bp"])
    assert [(arm.config.task, arm.config.network) for arm in arms] == [("autoencode", "autoencoder:16x32")] * 2
    assert arms[1].config.preset == "backprop-digits-autoencode"
    assert not any(arm.config.training.standardize for arm in arms)
    assert {arm.config.task for arm in make_arms(["ccl", "bp"])} == {"classify"}
    with pytest.raises(UsageError, match="for autoencode and classify; compare arms of one task"):
        make_arms(["ccl@counter_current-digits-autoencode", "bp@backprop-mnist"])


def test_the_split_is_that_of_the_presets_named() -> None:
    """An arm that classified nodes would be compared by its accuracy with the others' ROC-AUC."""
    links = "fgnn@forward_gnn-cora-links"
    arms = make_arms([links, "bp:readout=dot", "mf@none"])
    assert [arm.config.training.split for arm in arms] == ["edges"] * 3
    assert [arm.config.training.split for arm in make_arms([links, "bp"], training={"split": "random"})] == [
        "random"
    ] * 2
    for texts in ([links, "bp@backprop-cora"], ["bp@backprop-cora", links]):
        with pytest.raises(UsageError, match=r"presets .* the splits (edges and public|public and edges); .* --split"):
            make_arms(texts)
    with pytest.raises(UsageError, match=f"^{links} predicts links .* and bp:split=folds classifies nodes; .*--split"):
        make_arms([links, "bp:split=folds"])


def test_a_graphs_own_split_is_no_other_one_when_it_is_spelt_out() -> None:
    arms = make_arms(["fgnn@forward_gnn-cora", "bp@none"])
    assert [arm.config.training.split for arm in arms] == ["public", None]  # Cora comes with Planetoid's
    assert "split" not in unequal_settings(arms)
    other = make_arms(["fgnn@none:split=folds", "bp@none"], "cora")
    assert unequal_settings(other)["split"] == {"fgnn@none:split=folds": "folds", "bp@none": "public"}
    assert "split" not in unequal_settings(make_arms(["fgnn@none:split=folds", "bp@none"], "cora_ml"))


def test_an_arm_without_a_read_out_for_links_is_named_before_anything_is_started(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    command = ("compare", "--algos", "fgnn@forward_gnn-cora-links,bp:readout=dot,mf", "--device", "cpu", "-q")
    result = bpfree(*command, "--network", "gcn:1x8", "--results", str(tmp_path / "c"))
    assert result.exit_code == 2
    assert result.stderr.startswith("bpfree: error: mf: the graph asks about pairs of nodes")
    assert not (tmp_path / "c").exists()


def test_without_a_network_each_rule_has_its_own_and_the_baseline_all() -> None:
    arms = make_arms(["mf", "cafo", "bp"], "digits")
    assert [arm.key for arm in arms] == [
        ("mf", "mlp:2x1000"),
        ("cafo", "cnn:cafo"),
        ("bp", "mlp:2x1000"),
        ("bp", "cnn:cafo"),
    ]


def test_settings_that_the_rule_does_not_explain_are_named() -> None:
    arms = make_arms(["mf:patience=4", "bp"], "digits", "mlp:2x16", training=TRAINING)
    assert unequal_settings(arms) == {"patience": {"mf:patience=4": 4, "bp": 20}}


def test_the_data_sets_own_setting_is_no_other_one_when_it_is_spelt_out() -> None:
    spelt_out = "mf:augmentation=crop-flip:validation=5000"
    assert unequal_settings(make_arms([spelt_out, "bp"], "cifar10", "mlp:2x16")) == {}
    other = make_arms(["mf:augmentation=none", "bp"], "cifar10", "mlp:2x16")
    assert unequal_settings(other) == {"augmentation": {"mf:augmentation=none": "none", "bp": "crop-flip"}}


# Order


def test_order_is_random_balanced_and_reproducible() -> None:
    arms = ["bp", "ff", "mf"]
    orders = [tuple(interleaved(arms, "own", seed)) for seed in range(600)]
    assert orders == [tuple(interleaved(arms, "own", seed)) for seed in range(600)]
    counts = Counter(orders)
    assert len(counts) == 6
    # chi-squared with 5 degrees of freedom exceeds 20.5 once in 1000
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5
    assert orders != [tuple(interleaved(arms, "matched", seed)) for seed in range(600)]


def test_a_global_seed_changes_no_order() -> None:
    random.seed(1)
    first = interleaved(range(10), 0)
    random.seed(2)
    assert interleaved(range(10), 0) == first


def test_arms_are_interleaved_within_each_seed_and_the_order_is_recorded(tmp_path: Path, digits: Dataset) -> None:
    seeds = range(4)
    outcome = comparison(tmp_path, digits, "mf", "bp", "dfa", seeds=seeds, protocols=("own",)).run()
    assert (outcome.done, outcome.left, outcome.failed, outcome.skipped) == (12, 0, [], [])
    lines = ledger(tmp_path)
    assert [line["seed"] for line in lines] == [seed for seed in seeds for _ in range(3)]
    blocks = [[line["arm"] for line in lines if line["seed"] == seed] for seed in seeds]
    assert all(sorted(block) == ["bp", "dfa", "mf"] for block in blocks)
    assert len({tuple(block) for block in blocks}) > 1
    dates = [RunFolder.open(path).read_json(SUMMARY)["date"] for path in find_runs(tmp_path)]
    assert sorted(dates)[0] <= lines[-1]["time"]


# Protocols


def test_matched_passes_are_the_rounded_up_mean_of_the_baseline(tmp_path: Path, digits: Dataset) -> None:
    arms = make_arms(
        ["mf:schedule=sequential:epochs=1", "bp:lr=0.05"],
        "digits",
        "mlp:3x16",
        training={**TRAINING, "epochs": 12, "patience": 1},
        device="cpu",
        energy="simulated",
    )
    analysis = Analysis(baseline="bp:lr=0.05")
    Comparison(tmp_path, arms, range(3), digits, analysis=analysis, say=lambda line: None).run()
    summaries = [RunFolder.open(path).read_json(SUMMARY) for path in find_runs(tmp_path)]
    configs = [RunFolder.open(path).read_json(CONFIG) for path in find_runs(tmp_path)]
    both = list(zip(summaries, configs, strict=True))
    own = [s["passes"] for s, c in both if c["algorithm"] == "bp" and c["training"]["passes"] is None]
    expected = -(-sum(own) // 3)
    assert len(set(own)) > 1  # or rounding would not show
    assert json.loads((tmp_path / "comparison.json").read_text())["matched_passes"] == {"mlp:3x16": expected}
    matched = {c["algorithm"]: s["passes"] for s, c in both if c["training"]["passes"] is not None}
    assert matched["bp"] == expected
    assert matched["mf"] == 3 * -(-expected // 3)  # equal stages


def test_more_seeds_do_not_move_the_matched_passes(tmp_path: Path, digits: Dataset) -> None:
    comparison(tmp_path, digits, passes=1).run()
    comparison(tmp_path, digits, seeds=(0, 1, 2)).run()
    assert all(count == 1 for count in slots(tmp_path).values())
    assert {passes for _, passes, _ in slots(tmp_path)} == {None, 1}
    with pytest.raises(UsageError, match="matched passes are"):
        comparison(tmp_path, digits, passes=2)


def test_matched_passes_need_a_baseline(tmp_path: Path, digits: Dataset) -> None:
    with pytest.raises(UsageError, match="add it, or --passes"):
        comparison(tmp_path, digits, "mf")
    failing = comparison(tmp_path, digits, "mf", "bp", "dfa", analysis=Analysis(baseline="dfa"), protocols=("matched",))
    outcome = failing.run()
    assert outcome.done == 0
    assert {skipped["reason"] for skipped in outcome.skipped} == {"dfa has no run whose passes could be matched"}


def test_tuned_arms_train_for_the_passes_of_their_own_presets(tmp_path: Path, digits: Dataset) -> None:
    root = tmp_path / "c"
    said: list[str] = []
    texts = ("mf:passes=3:lr_schedule=cosine", "bp:passes=2")
    tuned = comparison(root, digits, *texts, protocols=("tuned",), say=said.append)
    assert tuned.run() == Outcome(done=4)
    assert not any("only --protocol tuned" in line for line in said)
    assert f"note: on mlp:2x16 the arms differ in passes: {texts[0]} 3, bp:passes=2 2" in said
    assert slots(root) == {("mf", 3, seed): 1 for seed in (0, 1)} | {("bp", 2, seed): 1 for seed in (0, 1)}
    (row,) = make_tables(["T3"], collect(root))[0].rows
    assert (row["algorithm"], row["protocol"], row["n"]) == ("mf:passes=3:lr_schedule=cosine", "tuned", 2)
    comparison(root, digits, *texts, seeds=(0,), protocols=("own",), say=said.append).run()
    assert "note: bp:passes=2 is set to 2 passes, which only --protocol tuned keeps" in said
    said.clear()
    comparison(tmp_path / "own", digits, *texts, seeds=(0,), protocols=("own",), say=said.append).run()
    assert not any("differ in passes" in line for line in said)
    with pytest.raises(UsageError, match=r"bp does not say for how many data passes; .* bp:passes=N"):
        comparison(tmp_path / "d", digits, "mf:passes=3", "bp", protocols=("tuned",))
    assert not (tmp_path / "d").exists()


def test_a_baseline_that_is_no_arm_is_refused(tmp_path: Path, digits: Dataset) -> None:
    with pytest.raises(UsageError, match=r"no arm is called nope, .*: mf, bp"):
        comparison(tmp_path / "c", digits, "mf", "bp", analysis=Analysis(baseline="nope"))
    assert not (tmp_path / "c").exists()


def test_an_arm_is_not_compared_on_the_seed_that_it_was_tuned_on(tmp_path: Path, digits: Dataset) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'description = ""\nsource = ""\nalgorithm = "mf"\ndataset = "digits"\nnetwork = "mlp:2x16"\ntuning_seed = 1\n'
    )
    with pytest.raises(UsageError, match=r"mf@mine was chosen by trials with seed 1, .* --first-seed 2"):
        comparison(tmp_path / "c", digits, f"mf@{file}", "bp")
    assert not (tmp_path / "c").exists()
    for _ in range(2):  # going on is the same comparison
        assert comparison(tmp_path / "c", digits, f"mf@{file}", "bp", seeds=(2,)).run().done
        assert [arm.tuning_seed for arm in Plan.read(tmp_path / "c").arms] == [1, None]
    file.write_text(file.read_text().replace("tuning_seed = 1", 'tuning_seed = "1"'))
    with pytest.raises(UsageError, match="tuning_seed takes a whole number"):
        make_arms([f"mf@{file}"])


def test_a_baseline_from_a_file_stays_what_the_file_says(tmp_path: Path) -> None:
    """Also where the file is called like a packaged preset, and where the baseline is made for the arms' networks."""
    mine = 'description = ""\nsource = ""\ndataset = "digits"\n'
    (tmp_path / "backprop-mnist.toml").write_text(
        mine + 'algorithm = "bp"\nnetwork = "mlp:1x8"\n[parameters]\nlr = 0.123\n'
    )
    (tmp_path / "mf.toml").write_text(mine + 'algorithm = "mf"\nnetwork = "mlp:2x16"\n')
    baseline = f"bp@{tmp_path / 'backprop-mnist.toml'}"
    arms = make_arms([f"mf@{tmp_path / 'mf.toml'}", baseline], baseline=baseline)
    assert [arm.key for arm in arms] == [("mf@mf", "mlp:2x16"), ("bp@backprop-mnist", "mlp:2x16")]
    assert arms[1].config.parameters["lr"] == 0.123


def test_arms_that_differ_in_their_passes_alone_are_refused_where_those_are_replaced(
    tmp_path: Path, digits: Dataset
) -> None:
    texts = ("mf:passes=2", "mf:passes=3", "bp:passes=2")
    with pytest.raises(UsageError, match="mf:passes=2 and mf:passes=3 differ in nothing but passes"):
        comparison(tmp_path, digits, *texts, protocols=("own",))
    assert comparison(tmp_path, digits, *texts, seeds=(0,), protocols=("tuned",)).run() == Outcome(done=3)


# Going on


def test_a_finished_comparison_is_not_repeated_and_can_grow(tmp_path: Path, digits: Dataset) -> None:
    assert comparison(tmp_path, digits, passes=1).run() == Outcome(done=8)
    first = ledger(tmp_path)
    assert comparison(tmp_path, digits, passes=1).run() == Outcome(done=8)
    assert ledger(tmp_path) == first
    assert comparison(tmp_path, digits, "mf", "bp", "dfa", passes=1).run() == Outcome(done=12)
    assert {line["arm"] for line in ledger(tmp_path)[len(first) :]} == {"dfa"}
    assert all(count == 1 for count in slots(tmp_path).values())


def test_an_arm_added_later_is_matched_with_what_is_known_of_the_baseline(tmp_path: Path, digits: Dataset) -> None:
    comparison(tmp_path, digits, "bp").run()
    assert comparison(tmp_path, digits, "mf", protocols=("matched",)).run() == Outcome(done=2)
    (row,) = make_tables(["T4"], collect(tmp_path))[0].rows
    assert (row["algorithm"], row["n"], row["passes"]) == ("mf", 2, row["baseline_passes"])


def test_the_budget_leaves_runs_for_another_call(tmp_path: Path, digits: Dataset) -> None:
    outcome = comparison(tmp_path, digits, conditions=Conditions(budget_s=-1.0)).run()
    assert (outcome.done, outcome.left) == (0, 8)
    assert comparison(tmp_path, digits).run() == Outcome(done=8)


def test_what_was_fixed_beforehand_stays(tmp_path: Path, digits: Dataset) -> None:
    comparison(tmp_path, digits, seeds=(0,), protocols=("own",)).run()
    with pytest.raises(UsageError, match="margins and targets were fixed"):
        comparison(tmp_path, digits, analysis=Analysis(margin_accuracy=1.0))
    arms = make_arms(["mf", "bp"], "digits", "mlp:2x16", training={**TRAINING, "epochs": 3}, energy="simulated")
    with pytest.raises(UsageError, match="other settings"):
        Comparison(tmp_path, arms, (0,), digits)


def test_other_hardware_is_refused_unless_asked_for(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison(tmp_path, digits, seeds=(0,), protocols=("own",)).run()
    monkeypatch.setattr(comparisons.records, "hardware", lambda device: "NVIDIA H200")
    with pytest.raises(UsageError, match="this machine has NVIDIA H200"):
        comparison(tmp_path, digits)
    mixed = comparison(tmp_path, digits, seeds=(1,), protocols=("own",), conditions=Conditions(mixed_hardware=True))
    assert len(mixed.plan.hardware) == 2


def test_two_at_once_are_refused(tmp_path: Path, digits: Dataset) -> None:
    first, second = comparison(tmp_path, digits), comparison(tmp_path, digits)
    with first._alone(), pytest.raises(UsageError, match="another comparison is at work"):
        second.run()


def test_a_ledger_that_was_cut_off_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"event": "started"}\n{"event": "sta')
    assert Ledger(path).lines == [{"event": "started"}]
    assert path.read_text() == '{"event": "started"}\n'


class Impatient(Reporter):
    """Asks its own process to stop after some epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def epoch(self, record: dict[str, Any]) -> None:
        self.epochs -= 1
        if self.epochs == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_comparison_that_is_told_to_stop_goes_on_where_it_was(tmp_path: Path, digits: Dataset) -> None:
    starts: list[int] = []
    for epochs in (3, 1):  # within the second run, and at the very end of it, where nothing of it is left to stop
        with pytest.raises(InterruptedRunError, match=r"\(SIGTERM\); the same command goes on"):
            comparison(tmp_path, digits, passes=1, reporter=Impatient(epochs)).run()
        starts.append(len(ledger(tmp_path)))
    assert starts == [2, 3]
    assert comparison(tmp_path, digits, passes=1).run() == Outcome(done=8)
    assert all(count == 1 for count in slots(tmp_path).values())
    assert sum(1 for _ in tmp_path.rglob(CONFIG)) == 8  # no run was begun twice either
    assert sum("resumed" in line for line in ledger(tmp_path)) == 1


def test_a_killed_comparison_loses_and_doubles_nothing(tmp_path: Path) -> None:
    command = ["compare", "--algos", "mf,bp", "--seeds", "2", "--protocol", "own", "--checkpoint-every", "0", "-q"]
    command += ["--network", "mlp:2x64", "--epochs", "8", "--batch-size", "16", "--energy", "simulated"]
    command += ["--device", "cpu", "--results", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "bpfree", *command], env=environment)
    while process.poll() is None and sum(1 for _ in tmp_path.rglob(METRICS)) < 2:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert bpfree(*command).exit_code == 0
    assert slots(tmp_path) == {(rule, None, seed): 1 for rule in ("mf", "bp") for seed in (0, 1)}
    assert sum(1 for _ in tmp_path.rglob(CONFIG)) == 4
    assert sum("resumed" in line for line in ledger(tmp_path)) == 1


@pytest.mark.parametrize("name", [SUMMARY, CONFIG])
def test_a_run_whose_record_is_damaged_is_made_again_and_its_folder_kept(
    name: str, tmp_path: Path, digits: Dataset
) -> None:
    comparison(tmp_path, digits, protocols=["own"]).run()
    damaged = next(path for path in find_runs(tmp_path) if "-mf-" in path.name and "seed1" in path.name)
    (damaged / name).write_text("{")
    said: list[str] = []
    again = comparison(tmp_path, digits, protocols=["own"], say=said.append)
    assert again.run() == Outcome(done=4)
    assert [line for line in said if str(damaged / name) in line and line.endswith("now it is made again")]
    assert (damaged / name).read_text() == "{"
    assert len(list(find_runs(tmp_path))) == 5
    lines = len(ledger(tmp_path))
    assert comparison(tmp_path, digits, protocols=["own"]).run() == Outcome(done=4)
    assert len(ledger(tmp_path)) == lines  # not a third time


def test_a_damaged_ledger_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"event": "started"}\n{"eve\n{"event": "started"}\n')
    with pytest.raises(CheckpointError, match=r"ledger.jsonl has a damaged line, .*; delete it"):
        Ledger(path)


def test_a_full_disk_stops_everything_and_is_no_failure_of_an_arm(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(run: RunFolder, record: dict[str, Any]) -> None:
        raise cannot_write(run.path, OSError(errno.ENOSPC, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", full)
        with pytest.raises(WriteError, match=r"No space left on device; free some space"):
            comparison(tmp_path, digits, protocols=["own"]).run()
    assert [line["event"] for line in ledger(tmp_path)] == ["started"]
    assert comparison(tmp_path, digits, protocols=["own"]).run() == Outcome(done=4)


def test_where_hyperparameters_come_from_is_told(tmp_path: Path) -> None:
    told = bpfree(
        "compare", "--algos", "mf,mf@none:patience=4,ff,bp", "--network", "mlp:2x1000", "--budget", "0",
        "--device", "cpu", "--energy", "none", "--results", str(tmp_path),
    ).stderr  # fmt: skip
    assert "mf on mlp:2x1000 takes preset mono_forward-digits\n" in told
    assert "mf@none:patience=4 on mlp:2x1000 takes the rule's defaults\n" in told
    assert "ff on mlp:2x1000 takes the rule's defaults; there is ff@forward_forward-digits of mlp:3x300\n" in told
    assert "bp on mlp:2x1000 takes the rule's defaults\n" in told
    assert "schedule" not in told


def test_a_schedule_over_other_epochs_than_it_was_made_for_is_told() -> None:
    def stretched(arm: str, **training: Any) -> str:
        (made,) = make_arms([arm], "mnist", "mlp:2x1000", baseline="bp", training=training)
        return made.stretched

    words = "the cosine schedule of backprop-mnist was made for 20 epochs and is over 100 here; bp@backprop-mnist keeps"
    assert stretched("bp").startswith(words)
    assert stretched("bp", epochs=20) == stretched("bp@backprop-mnist") == stretched("bp@none") == ""
    assert stretched("bp:lr_schedule=constant") == ""


@pytest.mark.parametrize(
    ("arms", "network"),
    [
        ("cafo,cafo@cafo-digits-ce,cafo@cafo-digits-ce:block_training=dfa,bp", "cnn:cafo"),
        ("ff@forward_forward-digits,bp", "mlp:4x20"),
        (
            "mf:schedule=simultaneous,mf:schedule=sequential,mf:schedule=sequential:cache=false,bp-ds,mf-joint,bp",
            "mlp:3x20",
        ),
        ("ff,mf,cafo,ccl,noprop,man,bp", None),
    ],
)
def test_arms_of_every_rule_end_in_all_tables_and_a_report(arms: str, network: str | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = [] if network is None else ["--network", network]
    done = bpfree(
        "compare", "--algos", arms, *options, "--seeds", "1", "--epochs", "1", "--target", "5", "--warm-up", "0",
        "--energy", "simulated", "--device", "cpu", "--results", str(tmp_path), "--quiet",
    )  # fmt: skip
    assert (done.exit_code, done.stderr) == (0, "")
    labels = [label for label in arms.split(",") if label != "bp"]
    printed = json.loads(bpfree("table", str(tmp_path), "-t", "all", "--format", "json").stdout)
    tables = {table["table"]: table["rows"] for table in printed}
    for name, protocols in {"T3": 2, "T4": 1, "T5": 1, "T7": 2, "T9": 2}.items():
        assert [row["algorithm"] for row in tables[name]] == labels * protocols, name
    for name in ("T1", "T2"):
        assert {row["algorithm"] for row in tables[name]} == {*labels, "bp"}
        assert not any(row.get("status") for row in tables[name])
    networks = {row["network"] for row in tables["T3"]}
    assert len(networks) == (1 if network else 5)  # Mono-Forward and MAN have one in common
    page = bpfree("report", str(tmp_path)).stdout.strip()
    assert all(f'<h2 id="{name}">' in Path(page).read_text() for name in ("T1", "T2", "T3", "T4", "T5", "T7", "T9"))


def test_quiet_comparisons_say_what_failed(tmp_path: Path) -> None:
    command = ("compare", "--algos", "bp:lr=1e30,bp", "--seeds", "1", "--protocol", "own", *QUICK, "-q")
    result = bpfree(*command, "--results", str(tmp_path))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("bp:lr=1e30 on mlp:2x16, own, seed 0 failed: loss is nan")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = bpfree("compare", "--algos", "mf,bp", "--seeds", "1", *QUICK, "--results", str(tmp_path / "file" / "c"))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"bpfree: error: cannot write {tmp_path / 'file' / 'c'}: Not a directory; make that possible"
    )


# Skips and failures


def test_skips_and_failures_end_nothing_and_are_told(tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    command = ("compare", "--algos", "mf,fgnn,bp:lr=1e30,bp", "--seeds", "2", "--passes", "1", *QUICK)
    result = bpfree(*command, "--results", folder, "--format", "json")
    assert result.exit_code == 1
    outcome = json.loads(result.stdout)
    assert outcome["done"] == 8
    assert [(f["arm"], f["protocol"], f["seed"]) for f in outcome["failed"]] == [
        ("bp:lr=1e30", protocol, seed) for protocol in ("own", "matched") for seed in (0, 1)
    ]
    assert all("lower the learning rate" in failure["reason"] for failure in outcome["failed"])
    (skipped,) = outcome["skipped"]
    assert skipped["arm"] == "fgnn"
    assert "graph convolutions" in skipped["reason"]

    starts = sum(line["event"] == "started" for line in ledger(tmp_path / "c"))
    again = bpfree(*command, "--results", folder, "--format", "json")  # nothing is tried a second time ...
    assert (again.exit_code, json.loads(again.stdout)) == (1, outcome)
    assert sum(line["event"] == "started" for line in ledger(tmp_path / "c")) == starts
    bpfree(*command, "--results", folder, "--retry-failed")  # ... unless asked for
    assert sum(line["event"] == "started" for line in ledger(tmp_path / "c")) == starts + 4

    performance, efficiency, changes = json.loads(
        bpfree("table", folder, "-t", "T1", "-t", "T2", "-t", "T3", "--format", "json").stdout
    )
    told = {row["algorithm"]: row["status"] for row in performance["rows"]}
    assert told["fgnn"].startswith("skipped: it needs graph convolutions")
    assert told["bp:lr=1e30"].startswith("2 failed: loss is nan")
    assert told["mf"] is told["bp"] is None
    assert {(row["algorithm"], row["n"]) for row in efficiency["rows"]} == {("mf", 2), ("bp", 2)}
    assert all("SIMULATED" in row["flags"] for row in efficiency["rows"])
    assert [(row["algorithm"], row["protocol"], row["n"]) for row in changes["rows"]] == [
        ("mf", "own", 2),
        ("mf", "matched", 2),
    ]


def test_rules_of_graphs_are_compared_too(tmp_path: Path) -> None:
    command = ("compare", "--algos", "fgnn@none,bp@none,mf@none", "--baseline", "bp@none", "--dataset", "cora")
    options = ("--network", "gcn:2x8", "--seeds", "1", "--epochs", "1", "--device", "cpu", "--protocol", "own", "-q")
    result = bpfree(*command, *options, "--results", str(tmp_path), "--format", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["done"] == 3


def test_a_defect_in_one_arm_is_a_failure_of_that_arm(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = comparisons.runs.run

    def run(config: Any, *arguments: Any, **options: Any) -> Any:
        if config.algorithm == "mf":
            raise RuntimeError("shapes\ndo not fit")
        return whole(config, *arguments, **options)

    monkeypatch.setattr(comparisons.runs, "run", run)
    outcome = comparison(tmp_path, digits, protocols=("own",)).run()
    assert outcome.done == 2
    assert {failure["reason"] for failure in outcome.failed} == {"RuntimeError: shapes do not fit"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algos", "mf,nosuch"), "unknown algorithm 'nosuch'"),
        (("--algos", "mf,bp", "--dataset", "cifar100", "--no-download"), "nothing was started"),
        (("--algos", "mf,bp", "--dataset", "nosuch"), "unknown data set"),
        (("--algos", "mf,bp", "--network", "nosuch"), "unknown network"),
        (("--algos", "mf:lr=-1,bp",), "lr"),
        (("--algos", "fgnn",), "nothing to run"),
        (("--algos", ",",), "names no arm"),
        (("--algos", "bp,man:ends=3,7",), """--algos 'man:ends="3,7"'"""),
        (("--algos", "mf,bp", "--protocol", "own", "--passes", "3"), "--passes belongs to matched"),
        (("--algos", "mf,bp", "--idle-seconds", "3"), "takes 10 or more"),
        (("--algos", "mf,bp", "--energy", "none", "--idle-seconds", "10"), "no effect with --energy none"),
    ],
)  # fmt: skip
def test_bad_input_starts_nothing(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    folder = tmp_path / "c"
    given = arguments if "--network" in arguments else (*arguments, "--network", "mlp:2x16")
    result = bpfree("compare", *given, "--results", str(folder), "--data", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not folder.exists()
