"""Tuning: what is searched, that the test set is not looked at, and that no kill loses or doubles a trial."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bpfree import data
from bpfree.algorithms import ALGORITHMS, Learner, algorithm
from bpfree.cli import cli
from bpfree.data import Dataset, Part
from bpfree.errors import BpfreeError, DataError, TrainingError, UsageError, WriteError
from bpfree.experiments import records
from bpfree.experiments import run as runs
from bpfree.experiments.config import RunConfig, presets, read_preset, resolve
from bpfree.experiments.search import PARAMETERS, SharedSpace, declare, suggest
from bpfree.experiments.signals import StopRequest
from bpfree.experiments.train import InterruptedRunError, TrainingConfig
from bpfree.experiments.tune import Observer, TuneConfig, Watch, bill, fit_space, tune, worker_devices
from bpfree.networks import build_network

optuna = pytest.importorskip("optuna")

IN_MEMORY = "sqlite://"
QUICK = SharedSpace(batch_sizes=(50,), passes=(2, 4))


def own_data(seed: int = 0, test_seed: int = 1) -> Dataset:
    """Three classes that a line separates, almost; the test part has a seed of its own."""

    def part(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(3, (n,), generator=generator)
        return torch.randn(n, 5, generator=generator) + 3 * torch.nn.functional.one_hot(y, 5), y

    return Dataset.from_arrays(part(500, seed), part(100, test_seed), name="mine")


def study(rule: str = "bp", *, trials: int = 4, shared: SharedSpace = QUICK, **options: Any) -> TuneConfig:
    base = resolve(rule, "digits", "mlp:1x8", preset="none", seed=100, device="cpu", energy="simulated")
    return TuneConfig("study", base, shared, trials=trials, **options)


def points(record: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What was tried and found, without clocks."""
    keys = ("number", "state", "values", "validation_accuracy", "validation_loss", "passes")
    return [tuple(trial.get(key) for key in keys) for trial in record["trials"]]


# -- the search space -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["digits", "cora"])
def test_every_rule_gets_the_same_shared_space(dataset: str) -> None:
    loaded = runs.load_dataset(dataset)
    spaces = {}
    for rule in ALGORITHMS:
        base = resolve(rule.alias, dataset, "mlp:2x20" if dataset == "digits" else "gcn:2x8", preset="none")
        shared = fit_space(SharedSpace(), base, loaded)
        space, corner = declare(base, shared, {})
        own = rule.learner.search_space(Nothing(), {})
        assert not set(own) & {*PARAMETERS, *vars(TrainingConfig())}
        spaces[rule.alias] = {name: limits for name, limits in space.items() if name not in own}
        assert corner.training == replace(base.training, **spaces_values(space, own))
    assert all(space == spaces["bp"] for space in spaces.values())
    assert set(PARAMETERS) <= set(spaces["bp"])
    assert ("batch_size" in spaces["bp"]) == (dataset == "digits")


class Nothing:
    """A trial that only wants to know names."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return low

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return choices[0]


class Draw(Nothing):
    """A trial that draws the ends of ranges, and any choice."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asked: set[str] = set()

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked.add(name)
        return self.random.choice((low, high))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self.suggest_float(name, low, high, log=log))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked.add(name)
        return self.random.choice(choices)


SMALL = {"ccl": "mlp-elu:2x8", "fgnn": "gcn:2x8"}
SEARCHING = [rule.alias for rule in ALGORITHMS if rule.learner.search_space(Nothing(), {})]


def drawn(base: RunConfig, given: Mapping[str, Any], seed: int) -> tuple[Learner, set[str], dict[str, Any]]:
    """A small learner with what a trial drew, what the trial was asked, and the parameters."""
    trial = Draw(seed)
    chosen = suggest(trial, replace(base, parameters={**base.parameters, **given}), SharedSpace(), given)
    rule = algorithm(base.algorithm)
    if base.task == "autoencode":
        shape: tuple[int, ...] = (1, 8, 8)
        classes = 0
        network = build_network("autoencoder:4x6", shape)  # the presets' start orthogonal, which takes seconds
    else:
        classes = 2 if base.parameters.get("variant", "").startswith("link") else 3
        shape = (4,) if rule.alias == "fgnn" else (1, 4, 4)
        network = build_network(SMALL.get(rule.alias, "mlp:2x8"), shape)
    return rule.build(network, classes, shape, **chosen.parameters), trial.asked, chosen.parameters


@pytest.mark.parametrize("rule", SEARCHING)
def test_every_draw_beside_every_preset_makes_a_learner(rule: str) -> None:
    bases = [resolve(rule, preset="none")]
    bases += [resolve(preset=name) for name, preset in presets().items() if preset.algorithm == rule]
    assert rule == "noprop-bp" or len(bases) > 1
    for base in bases:
        for seed in range(12):
            _, _, parameters = drawn(base, {}, seed)
            kept = {name: value for name, value in parameters.items() if base.parameters.get(name, value) != value}
            assert set(kept) <= {*PARAMETERS, *algorithm(rule).learner.search_space(Nothing(), {})}


@pytest.mark.parametrize(
    ("rule", "given"),
    [
        ("ff", {"loss": "symba"}),
        ("ff", {"loss": "collaboration"}),
        ("cafo", {"ridge": 0.1}),
        ("cafo", {"gram": "float32"}),
        ("cafo", {"lr": 0.1}),
        ("cafo", {"optimizer": "gd"}),
        ("cafo", {"block_training": "dfa"}),
        ("cafo", {"block_training": "dfa", "block_lr": 0.1}),
        ("cafo", {"block_training": "dfa", "weight_decay": 0.1}),
        ("fgnn", {"variant": "ff-vn"}),
        ("ccl", {"decorrelation": 0.5}),
        ("ccl", {"similarity": "dot"}),
        ("ccl", {"clip_scope": "network"}),
    ],
)
def test_draws_go_with_what_the_user_fixes(rule: str, given: dict[str, Any]) -> None:
    base = resolve(rule, preset="none")
    for seed in range(20):
        _, asked, parameters = drawn(base, given, seed)
        assert given.items() <= parameters.items()
        assert not asked & set(given)


def test_what_has_no_effect_is_neither_searched_nor_kept() -> None:
    base = resolve(preset="cafo-mnist-dfa")
    met = set()
    for seed in range(30):
        _, asked, parameters = drawn(base, {}, seed)
        steps = parameters["loss"] != "mse"
        assert {"lr", "weight_decay"} & asked == ({"lr", "weight_decay"} if steps else set())
        assert ("lr" in parameters) == ("weight_decay" in parameters) == steps
        met.add(steps)
    assert met == {True, False}
    space, corner = declare(resolve("cafo", preset="none"), SharedSpace(), {})
    assert space["loss"] == {"choices": ["mse", "ce", "sl"]}
    assert "lr" in space
    assert "lr" not in corner.parameters


def test_parameters_that_no_choice_takes_are_refused_by_the_learner() -> None:
    with pytest.raises(UsageError, match="would have no effect"):
        drawn(resolve("cafo", preset="none"), {"ridge": 0.1, "optimizer": "adam"}, 0)


def spaces_values(space: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Lowest or first values of the training settings of a space."""
    return {
        name: limits["choices"][0] if "choices" in limits else limits["low"]
        for name, limits in space.items()
        if name not in own and name not in PARAMETERS
    }


def test_dropout_is_searched_where_the_network_has_it() -> None:
    digits = data.load("digits")
    images = Dataset.from_arrays(
        (np.zeros((200, 3, 32, 32), np.uint8), np.arange(200) % 10),
        (np.zeros((20, 3, 32, 32), np.uint8), np.arange(20) % 10),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    base = resolve("bp", "cifar10", "deeper:tiny", preset="none")
    shared = fit_space(SharedSpace(), base, images)
    space, corner = declare(base, shared, {})
    assert space["dropout"] == {"low": 0.0, "high": 0.5, "log": False}
    chosen = replace(corner, training=replace(corner.training, dropout=0.375))
    learner = runs.build_learner(chosen, images, torch.device("cpu"))
    probabilities = {module.p for module in learner.modules() if type(module).__name__ == "StreamDropout"}
    assert probabilities == {0.375}
    assert fit_space(SharedSpace(), resolve("bp", "digits", "mlp:1x8"), digits).dropout is None
    with pytest.raises(UsageError, match="no dropout layer"):
        runs.build_learner(resolve("bp", "digits", "mlp:1x8", training={"dropout": 0.1}), digits, torch.device("cpu"))


def test_what_the_user_fixes_is_not_searched(tmp_path: Path) -> None:
    config = study("mf", trials=2, given={"schedule": "sequential", "lr": 0.01})
    config = replace(config, base=replace(config.base, parameters={"schedule": "sequential", "lr": 0.01}))
    record = tune(config, tmp_path, dataset=own_data())
    assert not {"lr", "schedule"} & set(record["space"])
    for trial in record["trials"]:
        made = RunConfig.read(tmp_path / "study" / "trials" / trial["run"] / records.CONFIG)
        assert (made.parameters["schedule"], made.parameters["lr"]) == ("sequential", 0.01)
    assert read_preset(tmp_path / "study" / "study.toml").parameters["lr"] == 0.01


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"lr": (1e-2, 1e-3)}, "range of lr"),
        ({"passes": (0, 3)}, "range of passes"),
        ({"dropout": (0.0, 1.0)}, "range of dropout"),
        ({"lr_schedules": ("cosin",)}, "did you mean cosine"),
        ({"batch_sizes": (0,)}, "batch sizes"),
    ],
)
def test_spaces_that_make_no_sense(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SharedSpace(**space)


# -- the search -------------------------------------------------------------------------------------------------------


def test_a_planted_learning_rate_is_found(tmp_path: Path) -> None:
    """With 2 passes of 9 steps of plain gradient descent only rates around 1 learn; larger ones diverge."""
    space = SharedSpace(lr=(1e-5, 1e5), weight_decay=(1e-7, 1e-7), batch_sizes=(50,), passes=(2, 2))
    config = study(trials=25, shared=space)
    config = replace(config, base=replace(config.base, parameters={"optimizer": "gd"}))
    record = tune(config, tmp_path, dataset=own_data(), storage=IN_MEMORY)
    assert record["best"]["validation_accuracy"] > 85
    assert 0.02 < record["best"]["values"]["lr"] < 20
    later = [trial["values"]["lr"] for trial in record["trials"][10:]]
    assert sum(0.01 < lr < 100 for lr in later) > len(later) / 2  # a random search would be there in 4 of 10
    assert record["best"] == max(
        (trial for trial in record["trials"] if trial["state"] == "finished"),
        key=lambda trial: (trial["validation_accuracy"], -trial["number"]),
    )


def test_failed_trials_are_accounted_with_their_reasons(tmp_path: Path) -> None:
    space = replace(QUICK, lr=(1e25, 1e30))
    config = study(trials=3, shared=space)
    config = replace(config, base=replace(config.base, parameters={"optimizer": "sgd"}))
    with pytest.raises(TrainingError, match=r"none of 3 trials succeeded.*lower the learning rate"):
        tune(config, tmp_path, dataset=own_data())
    record = json.loads((tmp_path / "study" / "tuning.json").read_text())
    assert [trial["state"] for trial in record["trials"]] == ["failed"] * 3
    assert all("lower the learning rate" in trial["reason"] for trial in record["trials"])
    assert (record["bill"]["failed"], record["best"], record["presets"]) == (3, None, [])
    assert record["bill"]["gross_j"] > 0
    assert not list(tmp_path.rglob("*.pt"))


def test_pruned_trials_are_accounted_and_cost_less(tmp_path: Path) -> None:
    config = study(trials=16, shared=replace(QUICK, passes=(10, 10)))
    record = tune(config, tmp_path, dataset=own_data(), storage=IN_MEMORY)
    pruned = [trial for trial in record["trials"] if trial["state"] == "pruned"]
    assert pruned
    assert all(trial["number"] >= 10 for trial in pruned)  # the first are never judged
    for trial in pruned:
        assert 3 <= trial["passes"] < 10  # not before 3 of 10 reports
        assert "pruned when" in trial["reason"]
        assert trial["gross_j"] > 0
        assert trial["values"].keys() == record["space"].keys()
    spent = record["bill"]
    assert spent["trials"] == spent["finished"] + spent["pruned"] == 16
    assert spent["passes"] == 10 * spent["finished"] + sum(trial["passes"] for trial in pruned)
    assert not list(tmp_path.rglob("*.pt"))


def test_the_bill_counts_every_trial() -> None:
    def trial(state: str, seconds: float, joules: float | None) -> dict[str, Any]:
        cost = {"passes": 2, "seconds": seconds, "gross_j": joules, "method": "simulated"}
        return {"state": state, "wall_s": 10.0, **({} if state == "running" else cost)}

    trials = [trial("finished", 3.0, 1800.0), trial("pruned", 1.0, 1200.0), trial("failed", 0.5, 600.0)]
    spent = bill(trials)
    assert (spent["seconds"], spent["gross_j"], spent["wh"], spent["wall_s"]) == (4.5, 3600.0, 1.0, 30.0)
    assert (spent["trials"], spent["finished"], spent["pruned"], spent["failed"]) == (3, 1, 1, 1)
    partly = bill([*trials, trial("finished", 1.0, None), trial("running", 0.0, None)])
    assert (partly["gross_j"], partly["wh"], partly["unmeasured"], partly["running"]) == (None, None, 1, 1)


def test_joules_as_second_objective(tmp_path: Path) -> None:
    config = study(trials=12, shared=replace(QUICK, passes=(1, 30)), pareto=True, pruner="none")
    record = tune(config, tmp_path, dataset=own_data(), storage=IN_MEMORY)
    finished = [trial for trial in record["trials"] if trial["state"] == "finished"]
    assert len(finished) == 12

    def beaten(trial: Mapping[str, Any]) -> bool:
        ours = (-trial["validation_accuracy"], trial["gross_j"])
        others = [(-other["validation_accuracy"], other["gross_j"]) for other in finished]
        return any(a <= ours[0] and b <= ours[1] and (a, b) != ours for a, b in others)

    assert record["front"] == [trial["number"] for trial in finished if not beaten(trial)]
    for number, name in zip(record["front"], sorted_presets(record), strict=True):
        preset = read_preset(tmp_path / "study" / name)
        assert preset.parameters["lr"] == record["trials"][number]["values"]["lr"]
        assert preset.training["passes"] == record["trials"][number]["values"]["passes"]


def sorted_presets(record: Mapping[str, Any]) -> list[str]:
    """The presets of a front in the order of its trials."""
    best = record["best"]["number"]
    return ["study.toml" if number == best else f"study-trial{number}.toml" for number in record["front"]]


def test_joules_to_a_target_as_objective(tmp_path: Path) -> None:
    """A trial ends with the first validation at the target; what gets there with the fewest joules is the best."""
    target = 80.0
    config = study(trials=14, shared=replace(QUICK, lr=(1e-5, 1.0), passes=(1, 12)), target=target, pruner="none")
    record = tune(config, tmp_path, dataset=own_data())
    assert record["objectives"] == ["gross joules to 80 %"]
    told = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}").trials
    finished = [trial for trial in record["trials"] if trial["state"] == "finished"]
    others = [trial for trial in record["trials"] if trial["state"] != "finished"]
    assert finished
    assert others
    for trial in record["trials"]:
        lines = (tmp_path / "study" / "trials" / trial["run"] / records.METRICS).read_text().splitlines()
        course = [json.loads(line)["validation_accuracy"] for line in lines]
        assert len(course) == trial["passes"] <= trial["values"]["passes"]
        assert all(accuracy < target for accuracy in course[:-1])
        assert (course[-1] >= target) == (trial["state"] == "finished")
        shortfall = {} if trial["state"] == "finished" else {1: target - max(course)}
        assert told[trial["number"]].intermediate_values == pytest.approx(shortfall)  # what TPE ranks the others by
    for trial in others:
        assert trial["state"] == "pruned"
        assert "below the target" in trial["reason"]
        if trial["passes"] < trial["values"]["passes"]:
            assert "more than the best trial" in trial["reason"]
    assert record["best"]["gross_j"] == min(trial["gross_j"] for trial in finished)
    preset = read_preset(tmp_path / "study" / "study.toml")
    assert preset.training["passes"] == record["best"]["values"]["passes"]
    assert preset.tuning_seed == record["seed"]
    assert f"for {record['best']['gross_j']:.0f} J" in preset.description


@pytest.mark.parametrize(
    ("spent", "accuracy", "ends"), [(9.0, 10.0, None), (11.0, 10.0, "11 J below"), (11.0, 80.0, "80")]
)
def test_a_trial_ends_where_it_cannot_be_the_best(spent: float, accuracy: float, ends: str | None) -> None:
    trial = optuna.create_study(storage=IN_MEMORY).ask()
    watch = Watch(trial, Observer(), judged=False, target=80.0, ceiling=10.0, stop=StopRequest())
    watch._trainer = SimpleNamespace(fraction=0.1)  # type: ignore[assignment]
    record = {"validation_accuracy": accuracy, "validation_loss": 1.0, "joules_at_start": spent}
    with pytest.raises(BpfreeError, match=ends) if ends else contextlib.nullcontext():
        watch.epoch(record)


def test_a_target_that_no_trial_reaches_is_named_with_the_best(tmp_path: Path) -> None:
    config = study(trials=2, shared=replace(QUICK, lr=(1e-6, 1e-6), passes=(1, 1)), target=100.0, pruner="none")
    with pytest.raises(TrainingError, match=r"none of 2 trials reached 100 %, the best \d+\.\d\d %; lower --target"):
        tune(config, tmp_path, dataset=own_data(), storage=IN_MEMORY)


def test_a_trial_that_goes_on_remembers_its_best() -> None:
    trial = optuna.create_study(storage=IN_MEMORY).ask()
    watch = Watch(trial, Observer(), judged=False, target=80.0, ceiling=10.0, stop=StopRequest())
    earlier = SimpleNamespace(history=[{"validation_accuracy": value} for value in (60.0, 71.0, 65.0)])
    watch.started(resolve("mf", "digits"), Path("run"), None, SimpleNamespace(progress=earlier))  # type: ignore[arg-type]
    assert watch.best == 71.0


def test_what_is_sought_has_the_name_of_the_metric() -> None:
    base = resolve("bp", "digits", "autoencoder", task="autoencode")
    assert list(TuneConfig("a", base).objectives) == ["validation R2"]
    assert list(TuneConfig("a", resolve("bp", "digits")).objectives) == ["validation accuracy"]
    links = resolve("bp", "cora", training={"split": "edges"})
    assert list(TuneConfig("a", links, pareto=True, pruner="none").objectives) == ["validation ROC-AUC", "gross joules"]
    with pytest.raises(UsageError, match="a validation ROC-AUC in percent, got 120"):
        TuneConfig("a", links, target=120.0, pruner="none")


def test_a_target_excludes_other_ways_of_judging() -> None:
    for options, message in (
        ({"target": 0.0, "pruner": "none"}, "accuracy in percent"),
        ({"target": 60.0}, "use no pruner"),
        ({"target": 60.0, "pareto": True, "pruner": "none"}, "one objective"),
    ):
        with pytest.raises(UsageError, match=message):
            study(**options)


def test_joules_must_be_measured_to_be_an_objective(tmp_path: Path) -> None:
    config = study(pareto=True, pruner="none")
    with pytest.raises(UsageError, match="no energy measurement was asked for"):
        tune(replace(config, base=replace(config.base, energy="none")), tmp_path, dataset=own_data())
    with pytest.raises(UsageError, match="a device for each worker"):
        tune(config, tmp_path, dataset=own_data(), workers=2)
    with pytest.raises(UsageError, match="use no pruner"):
        study(pareto=True)
    assert not list(tmp_path.iterdir())


def test_versions_sampler_and_pruner_are_recorded(tmp_path: Path) -> None:
    record = tune(study(trials=1), tmp_path, dataset=own_data())
    assert record["optuna"] == optuna.__version__
    assert record["sampler"] == {
        "name": "TPESampler",
        "n_startup_trials": 10,
        "n_ei_candidates": 24,
        "multivariate": True,
        "constant_liar": True,
        "seed": [100, "trial number"],
    }
    assert (record["pruner"]["name"], record["pruner"]["n_startup_trials"]) == ("MedianPruner", 10)
    assert record["environment"]["torch"] == torch.__version__
    assert record["settings"]["shared"]["passes"] == [2, 4]


# -- the test set -----------------------------------------------------------------------------------------------------


class Tripwire:
    """In the place of a test part: whoever looks at it, is caught."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the test part was asked for its {name}")

    def __len__(self) -> int:
        raise AssertionError("the test part was counted")


@pytest.mark.parametrize("rule", ["bp", "cafo"])
def test_the_test_set_is_not_touched(rule: str, tmp_path: Path) -> None:
    dataset = own_data()
    object.__setattr__(dataset, "test", Tripwire())
    record = tune(study(rule, trials=2), tmp_path, dataset=dataset)
    assert record["bill"]["finished"] == 2
    (first, second) = (tmp_path / "study" / "trials").iterdir()
    assert not [
        key for trial in (first, second) for key in json.loads((trial / records.UNTESTED).read_text()) if "test" in key
    ]
    assert not [key for trial in record["trials"] for key in trial if "test" in key]
    with pytest.raises(AssertionError, match="the test part was asked"):  # the wire works
        runs.run(study().base, tmp_path / "runs", dataset=dataset)


def test_another_test_set_changes_nothing(tmp_path: Path) -> None:
    first, second = (
        points(tune(study(trials=5), tmp_path / str(n), dataset=own_data(test_seed=n), storage=IN_MEMORY))
        for n in (1, 2)
    )
    assert first == second


def test_labels_of_test_nodes_change_nothing(tmp_path: Path) -> None:
    cora = data.load_graph("cora")
    nodes = cora.public_split().test
    labels = cora.labels.clone()
    labels[nodes] = (labels[nodes] + 1) % cora.classes
    base = resolve("bp", "cora", "gcn:1x8", preset="none", seed=100, device="cpu", energy="none")
    config = TuneConfig("study", base, SharedSpace(passes=(2, 3)), trials=3)
    first, second = (
        points(tune(config, tmp_path / name, dataset=dataset, storage=IN_MEMORY))
        for name, dataset in (("true", cora), ("false", replace(cora, labels=labels)))
    )
    assert first == second


def test_trials_are_no_rows_of_a_table(tmp_path: Path) -> None:
    record = tune(study(trials=1), tmp_path, dataset=own_data())
    assert not list(records.find_runs(tmp_path))
    (trial,) = (tmp_path / "study" / "trials").iterdir()
    folder = records.RunFolder.open(trial)
    curve = records.energy_curve(folder.read_metrics(), folder.read_summary(records.UNTESTED))
    assert len(curve) == record["best"]["passes"]
    assert curve[-1][0] == record["best"]["gross_j"]


def test_a_storage_that_is_full_is_one_line_and_the_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    from sqlalchemy.exc import OperationalError

    def full(*arguments: object, **options: object) -> None:
        try:
            try:
                raise sqlite3.OperationalError("database or disk is full")
            except sqlite3.OperationalError as error:
                raise OperationalError("COMMIT", {}, error) from error
        except OperationalError as error:
            raise optuna.exceptions.StorageInternalError("invalid data in the commit") from error

    with monkeypatch.context() as patch:
        patch.setattr(optuna.storages.RDBStorage, "set_trial_intermediate_value", full)
        patch.setattr(optuna.storages.RDBStorage, "set_trial_user_attr", full)
        with pytest.raises(WriteError, match=r"fails \(database or disk is full\); free some space .* again$"):
            tune(study(trials=2), tmp_path, dataset=own_data())
    record = tune(study(trials=2), tmp_path, dataset=own_data())
    assert [trial["number"] for trial in record["trials"]] == [0, 1]


# -- presets ----------------------------------------------------------------------------------------------------------


def test_the_preset_repeats_the_best_trial(tmp_path: Path) -> None:
    dataset = own_data()
    record = tune(study("mf", trials=4), tmp_path, dataset=dataset)
    path = tmp_path / "study" / "study.toml"
    config = resolve(dataset="digits", preset=str(path), seed=100, device="cpu", energy="none")
    made = RunConfig.read(tmp_path / "study" / "trials" / record["best"]["run"] / records.CONFIG)
    assert (config.parameters, config.training) == (made.parameters, made.training)
    assert (config.algorithm, config.network) == ("mf", "mlp:1x8")
    summary = runs.run(config, tmp_path / "runs", dataset=dataset, keep_model=False)
    assert summary["validation_loss"] == record["best"]["validation_loss"]
    assert summary["preset"] == "study"
    assert "test_accuracy" in summary


# -- resuming ---------------------------------------------------------------------------------------------------------


class StopAt(Observer):
    """Does something at the n-th event of a kind."""

    def __init__(self, event: str, n: int, act: Callable[[], None]) -> None:
        self.seen: list[int] = []
        self._event, self._n, self._act = event, n, act

    def _count(self, event: str, number: int) -> None:
        if event == self._event:
            self.seen.append(number)
            if len(self.seen) == self._n:
                self._act()

    def trial_started(self, number: int, run: RunConfig) -> None:
        self._number = number
        self._count("started", number)

    def trial_progress(self, fraction: float, record: Mapping[str, Any]) -> None:
        self._count("progress", self._number)

    def trial_ended(self, trial: Mapping[str, Any], ended: int, best: Mapping[str, Any] | None) -> None:
        self._count("ended", trial["number"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    return points(tune(twelve(), tmp_path_factory.mktemp("straight"), dataset=own_data()))


def twelve(trials: int = 12) -> TuneConfig:
    """Ten random trials and two by TPE."""
    return study(trials=trials, pruner="none")


@pytest.mark.parametrize(("event", "n"), [("started", 11), ("progress", 19), ("progress", 20)])
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(
    event: str, n: int, tmp_path: Path, uninterrupted: list[tuple[Any, ...]]
) -> None:
    stopper = StopAt(event, n, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(InterruptedRunError, match="of 12 trials done, the same command goes on") as caught:
        tune(twelve(), tmp_path, dataset=own_data(), observer=stopper)
    assert "--resume" not in str(caught.value)  # that would test the trial, and leave the study without it
    assert json.loads((tmp_path / "study" / "tuning.json").read_text())["bill"]["finished"] < 12
    assert points(tune(twelve(), tmp_path, dataset=own_data())) == uninterrupted


def test_more_trials_prolong_a_study(tmp_path: Path, uninterrupted: list[tuple[Any, ...]]) -> None:
    assert points(tune(twelve(trials=5), tmp_path, dataset=own_data())) == uninterrupted[:5]
    assert points(tune(twelve(), tmp_path, dataset=own_data())) == uninterrupted
    assert points(tune(twelve(), tmp_path, dataset=own_data())) == uninterrupted  # nothing is left to do


def test_a_journal_file_does_as_well(tmp_path: Path, uninterrupted: list[tuple[Any, ...]]) -> None:
    journal = str(tmp_path / "deep" / "journal.log")
    assert points(tune(twelve(trials=5), tmp_path, dataset=own_data(), storage=journal)) == uninterrupted[:5]
    assert (tmp_path / "deep" / "journal.log").is_file()
    assert not (tmp_path / "study" / "study.db").exists()


def test_a_study_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    tune(study(trials=1), tmp_path, dataset=own_data())
    with pytest.raises(UsageError, match=r"a study 'study' with passes \[2, 4\] instead of \[2, 5\]"):
        tune(study(trials=2, shared=replace(QUICK, passes=(2, 5))), tmp_path, dataset=own_data())
    record = json.loads((tmp_path / "study" / "tuning.json").read_text())
    assert record["bill"]["trials"] == 1


SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "BPFREE_TUNE_ALGO": "bp",
    "BPFREE_TUNE_NETWORK": "mlp:1x16",
    "BPFREE_TUNE_PASSES": "3 6",
    "BPFREE_TUNE_BATCH_SIZES": "64,128",
    "BPFREE_TUNE_ENERGY": "simulated",
    "BPFREE_TUNE_DEVICE": "cpu",
    "BPFREE_TUNE_FORMAT": "json",
}


def start(results: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **SETTINGS, "BPFREE_TUNE_RESULTS": str(results)}
    command = [sys.executable, "-m", "bpfree", "tune", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(results: Path, *options: str) -> dict[str, Any]:
    """The record of the same command, in this process."""
    done = CliRunner().invoke(cli, ["tune", *options], env={**SETTINGS, "BPFREE_TUNE_RESULTS": str(results)})
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def wait_for_trials(process: subprocess.Popen[str], results: Path, count: int) -> None:
    """Wait until the n-th trial has begun to train."""
    for _ in range(6000):
        if len(list(results.glob(f"*/trials/*/{records.METRICS}"))) >= count:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("tuning records nothing")


def lives(pid: str) -> bool:
    """Whether a process is there, and not only its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_trials_that_are_to_have_a_gpu_each_do_not_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert worker_devices("auto", 2) == ["cuda:0", "cuda:1"]
    config = study()
    config = replace(config, base=replace(config.base, device="auto"))
    with pytest.raises(UsageError, match="3 workers have 2 here; use --workers 2"):
        tune(config, tmp_path, dataset=own_data(), workers=3, apart=True)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_loses_and_doubles_no_trial(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    process = start(killed, "--trials", "12")
    wait_for_trials(process, killed, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    record = finished(killed, "--trials", "12")
    assert [trial["number"] for trial in record["trials"]] == list(range(12))
    assert record["bill"]["finished"] + record["bill"]["pruned"] == 12
    assert points(record) == points(finished(tmp_path / "straight", "--trials", "12"))


class StopParent(Observer):
    """In the workers' processes: one of them asks their parent to stop once there are enough trials."""

    def __init__(self, asked: Path) -> None:
        self._asked = asked

    def trial_ended(self, trial: Mapping[str, Any], ended: int, best: Mapping[str, Any] | None) -> None:
        if ended >= 5:
            with contextlib.suppress(FileExistsError):
                self._asked.touch(exist_ok=False)
                os.kill(os.getppid(), signal.SIGTERM)


def test_two_workers_share_one_study_and_end_with_their_parent(tmp_path: Path) -> None:
    config = study(trials=200, pruner="none")
    with pytest.raises(InterruptedRunError, match=r"stopped by SIGTERM; .* of 200 trials done"):
        tune(config, tmp_path, dataset=own_data(), workers=2, observer=StopParent(tmp_path / "asked"))
    trials = tmp_path / "study" / "trials"
    begun = len(list(trials.iterdir()))
    assert 5 <= begun < 200
    record = tune(replace(config, trials=begun + 2), tmp_path, dataset=own_data())
    assert [trial["number"] for trial in record["trials"]] == list(range(begun + 2))
    assert record["bill"]["finished"] == begun + 2
    tried = {json.dumps(trial["values"], sort_keys=True) for trial in record["trials"]}
    assert len(tried) == begun + 2  # two workers with one seed would draw the same
    folders = {path.name for path in trials.iterdir() if (path / records.METRICS).is_file()}
    assert {trial["run"] for trial in record["trials"]} == folders
    assert record["bill"]["unmeasured"] >= 5  # a meter sees what both do
    assert record["bill"]["gross_j"] is None


def deaf_to_control_c(process: str) -> bool:
    (blocked,) = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return bool(int(blocked, 16) & 1 << signal.SIGINT - 1)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "--trials", "200", "--workers", "2")
    wait_for_trials(process, tmp_path, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert sum(map(deaf_to_control_c, children)) == 2  # which their parent passes on
    process.send_signal(signal.SIGKILL)
    process.communicate()  # ends when the last process that holds the pipe does
    assert len(children) >= 2
    for _ in range(1000):  # a process that exits closes its files some time before it is gone
        if not any(map(lives, children)):
            return
        time.sleep(0.01)
    raise AssertionError("a worker outlives its parent")


# -- nothing starts ---------------------------------------------------------------------------------------------------


def test_data_that_cannot_be_tuned_on_starts_nothing(tmp_path: Path) -> None:
    tiny = own_data()
    tiny = replace(tiny, train=Part(tiny.train.inputs[:60], tiny.train.targets[:60]), validation=10)
    with pytest.raises(DataError, match="do not fill two batches"):
        tune(study(), tmp_path, dataset=tiny)
    with pytest.raises(UsageError, match="cannot train this network"):
        tune(study("fgnn"), tmp_path, dataset=own_data())
    assert not list(tmp_path.iterdir())


def test_a_storage_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot open the storage nosuchdb") as refused:
        tune(study(), tmp_path, dataset=own_data(), storage="nosuchdb://user:secret@host/name")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("preset", sorted(presets()))
def test_the_shared_space_holds_what_presets_have(preset: str) -> None:
    """A tuner that keeps a preset's optimiser must be able to reach its rate."""
    space, parameters = SharedSpace(), resolve(preset=preset).parameters
    for name in PARAMETERS:
        low, high = getattr(space, name)
        assert not parameters.get(name) or low <= parameters[name] <= high
