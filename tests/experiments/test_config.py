"""Configurations: presets, overrides, and commands that repeat a run."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpfree import data
from bpfree.algorithms import ALGORITHMS, algorithm
from bpfree.algorithms.forward_forward import SquaredGoodness
from bpfree.errors import BpfreeError, CheckpointError, UsageError
from bpfree.experiments.config import (
    RunConfig,
    changes,
    command,
    parse_mixed_settings,
    parse_settings,
    presets,
    published_accuracy,
    read_preset,
    resolve,
    write_preset,
)
from bpfree.experiments.records import RunFolder
from bpfree.experiments.run import run
from bpfree.experiments.train import TrainingConfig
from bpfree.networks import build_network
from tests.data.test_image_folders import image_folder

WHOLE_PRESET = """description = "d"
source = "s"
algorithm = "mf"
dataset = "digits"
network = "mlp:1x8"
"""


@pytest.mark.parametrize("name", presets())
def test_presets_build_what_they_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "orthogonal_", torch.nn.init.normal_)  # which takes seconds for large layers
    config = resolve(preset=name)
    info = data.info(config.dataset)
    rule = algorithm(config.algorithm)
    shape = (info.features,) if isinstance(info, data.GraphInfo) else info.input_shape
    on_disk = isinstance(info, data.FolderInfo)  # ImageNet, which is not here, and whose networks are large
    assert name.split("-")[:2] == [rule.name, info.path.name if on_disk else info.name]
    classes = 1000 if on_disk else 2 if config.training.split == "edges" else info.classes
    with torch.device("meta" if on_disk else "cpu"):
        rule.build(build_network(config.network, shape), classes, shape, **config.parameters)
    assert presets()[name].source
    assert (presets()[name].published is None) == (presets()[name].published_in is None)


@pytest.mark.parametrize(
    ("depth", "k", "parameters", "units"),
    [  # parameters of torchvision's tables, less those of the read-out; units per block with the stem, by the papers
        (50, 2, 25_557_032, None),
        (50, 4, 25_557_032, None),
        (101, 2, 44_549_160, [5, 29]),
        (101, 4, 44_549_160, [7, 10, 8, 9]),
        (152, 2, 60_192_808, [10, 41]),
        (152, 4, 60_192_808, [11, 15, 12, 13]),
    ],
)
def test_imagenet_presets_cut_networks_as_published(
    depth: int, k: int, parameters: int, units: list[int] | None
) -> None:
    config = resolve(preset=f"momentum_auxiliary_network-imagenet-resnet{depth}-k{k}")
    with torch.device("meta"):
        network = build_network(config.network, (3, 224, 224))
        learner = algorithm("man").build(network, 1000, (3, 224, 224), **config.parameters)
    found = [len(block) for block in learner.network]
    assert len(found) == k
    assert units is None or found == units
    assert sum(p.numel() for p in learner.network.parameters()) == parameters - 2048 * 1000 - 1000
    # 5 BCE + 0.75 CE in every auxiliary loss, and InfoPro's head for ImageNet, which ends in 2,048 features
    assert [(loss.reconstruct, loss.classify) for loss in learner.losses] == [(5.0, 0.75)] * (k - 1)
    assert [loss.head[-1].weight.shape[1] for loss in learner.losses] == [2048] * (k - 1)
    training = config.training
    assert (training.batch_size, training.epochs, training.lr_schedule) == (128, 90, "cosine-epochs")
    assert (config.parameters["lr"], config.parameters["weight_decay"], training.warmup_epochs) == (0.05, 1e-4, 0)


def test_an_imagenet_preset_runs_on_a_folder(tmp_path: Path) -> None:
    """The whole way from image files to a record, small: one step of ResNet-50."""
    folder = image_folder(tmp_path / "pets", classes=("cat", "dog"), images=4)
    config = resolve(
        preset="momentum_auxiliary_network-imagenet-resnet50-k2",
        dataset=f"folder:{folder}@32",
        training={"passes": 1, "batch_size": 4, "precision": "fp32", "validation": 2, "patience": 1},
        device="cpu",
        energy="none",
    )
    summary = run(config, tmp_path / "runs", keep_model=False)
    assert (summary["dataset"], summary["variant"]) == (f"folder:{folder}@32", "2 blocks, infopro, EMA + twin")
    assert Path(summary["run_dir"]).parent == tmp_path / "runs"
    assert 0 <= summary["test_accuracy"] <= 100
    assert RunConfig.of_run(RunFolder.open(Path(summary["run_dir"]))).dataset == config.dataset


def test_no_two_presets_share_a_tuned_rate() -> None:
    """A rate that a search found for one configuration and that was copied to another: the reference study did it.

    Rates of a grid have one or two digits, and may well agree.
    Presets of one rule for one network and data set may share.
    """
    places = {
        (p.parameters["lr"], p.algorithm, p.dataset, p.network) for p in presets().values() if "lr" in p.parameters
    }
    searched = [rate for rate, *_ in places if float(f"{rate:.1e}") != rate]
    assert len(searched) >= 3
    assert len(searched) == len(set(searched))


def test_a_plain_preset_goes_before_one_with_a_suffix() -> None:
    assert resolve("bp", "cifar10", "mlp:3x2000").preset == "backprop-cifar10"


def test_the_colon_of_a_network_may_be_left_out() -> None:
    config = resolve("man", "cifar10", "resnet32", parameters={"k": 8})
    assert (config.network, config.preset) == ("resnet:32", "momentum_auxiliary_network-cifar10")
    assert config.parameters["k"] == 8
    assert resolve("bp", "digits", "mlp:2x30").network == "mlp:2x30"


def test_the_fitting_preset_is_taken_and_overridden() -> None:
    plain = resolve("mf", "cifar10")
    assert plain.preset == "mono_forward-cifar10"
    assert plain.network == "mlp:3x2000"
    assert resolve("mf", "cifar10", "cnn:mf").preset == "mono_forward-cifar10-cnn"
    assert resolve("mf", "cifar10", "mlp:1x10").preset is None
    assert resolve("mf", "cifar10", preset="none").parameters == {}
    changed = resolve("mono-forward", "CIFAR10", parameters={"lr": 1.0}, training={"epochs": 2})
    assert (changed.parameters["lr"], changed.training.epochs) == (1.0, 2)
    assert changed.parameters["schedule"] == plain.parameters["schedule"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm_name": "mff"}, "did you mean mf"),
        ({"algorithm_name": "mf", "dataset": "cifar11"}, "did you mean cifar10"),
        ({"preset": "mono_forward-mnst"}, "did you mean mono_forward-mnist"),
        ({}, "say what to train"),
        ({"algorithm_name": "mf", "parameters": {"schedul": "x"}}, "did you mean schedule"),
        ({"algorithm_name": "mf", "training": {"epoch": 3}}, "did you mean epochs"),
    ],
)
def test_unknown_names_come_with_the_nearest(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["bp", "mf-joint"])
def test_a_preset_of_another_rule_is_refused_even_if_the_rule_has_all_its_parameters(rule: str) -> None:
    assert resolve("mono-forward", preset="mono_forward-digits").preset == "mono_forward-digits"
    with pytest.raises(UsageError, match=f"preset mono_forward-digits is for mf, not for {rule}"):
        resolve(rule, preset="mono_forward-digits")


def test_objects_are_no_settings_of_a_run() -> None:
    with pytest.raises(UsageError, match=r"goodness of a run is recorded .* got SquaredGoodness; .* bpfree\.Trainer"):
        resolve("ff", parameters={"goodness": SquaredGoodness()})


def test_settings_are_typed() -> None:
    assert parse_settings(("lr=1e-3", "schedule=sequential", "input-projection=true", "weight_decay=1"), "mf") == {
        "lr": 1e-3,
        "schedule": "sequential",
        "input_projection": True,
        "weight_decay": 1.0,
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "key=value"),
        ("lrr=1", "did you mean lr"),
        ("lr=fast", "lr takes a number, got 'fast'"),
        ("lr=true", "lr takes a number, got 'true'"),
        ("lr=nan", "lr takes a number"),
        (f"lr=1{400 * '0'}", "lr takes a number"),
        (f"lr=1{5000 * '0'}", "lr takes a number"),
        ("schedule=1", "schedule takes simultaneous or sequential, got '1'"),
        ("input_projection=1", "input_projection takes true or false"),
    ],
)
def test_bad_settings(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_settings((setting,), "mf")


@pytest.mark.parametrize(
    ("rule", "settings", "wanted"),
    [
        ("ff", ("theta=abc", "temperature=true", "alpha=inf", "theta=nan"), "a number"),
        ("ff", ("skip_first=no", "skip_first=7"), "true or false"),
        ("ff", ("noise_seed=abc", "noise_seed=1.0", f"noise_seed={1 << 63}"), "a whole number"),
        ("noprop", ("steps=abc", "steps=2.5", "steps=true", "noise_seed=1.5"), "a whole number"),
        ("noprop", ("eta=abc", "eta=none"), "a number"),
        ("noprop", ("sampler=3", "optimizer=3", "optimizer=[1]"), "a name"),
        ("noprop", ("variant=3",), "dt or ct or fm"),
        ("ccl", ("feedback_lr=abc",), "a number"),
    ],
)
def test_settings_without_a_default_are_typed_too(rule: str, settings: tuple[str, ...], wanted: str) -> None:
    for setting in settings:
        name, _, text = setting.partition("=")
        with pytest.raises(UsageError, match=re.escape(f"{name} takes {wanted}, got {text!r}")):
            parse_settings((setting,), rule)


def test_training_settings_of_an_arm_are_typed() -> None:
    assert parse_mixed_settings(("passes=4", "lr=1", "min_delta=1"), "mf") == (
        {"lr": 1.0},
        {"passes": 4, "min_delta": 1.0},
    )
    for setting in ("passes=4.5", "dropout=high", "split=3", "graph=1"):
        with pytest.raises(UsageError, match=f"{setting.partition('=')[0]} takes"):
            parse_mixed_settings((setting,), "mf")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[training]\nepochs = 'many'", "epochs takes a whole number"),
        ("[training]\npasses = 'many'", "passes takes a whole number"),
        ("[training]\nmin_delta = nan", "min_delta takes a number"),
        ("[parameters]\nlr = 'fast'", "lr takes a number"),
        ("[parameters]\nschedule = true", "schedule takes simultaneous or sequential, got True"),
        ("[parameters]\nlrr = 1", "unknown parameter of mono_forward 'lrr'; did you mean lr"),
        ("[training]\nepoch = 3", "unknown training setting 'epoch'; did you mean epochs"),
        ("training = 3", r"training is a table, a line \[training\] with lines such as epochs = 20 below, got 3"),
        ("parameters = 'lr'", r"parameters is a table, a line \[parameters\] with lines such as lr = 0.001 below"),
        ("published = 'high'", "published takes a number, got 'high'"),
        ("tuning_seed = true", "tuning_seed takes a whole number, got True"),
        ("task = 'autoencoding'", "unknown task 'autoencoding'; did you mean autoencode"),
        ("networks = 3", "unknown key 'networks'; did you mean network"),
        ("lr =", r"Invalid value \(at .*line 6, column 5"),
    ],
)
def test_presets_with_values_of_another_type(table: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"{WHOLE_PRESET}{table}\n")
    with pytest.raises(UsageError, match=rf"^{re.escape(str(path))} does not hold a preset: {message}") as caught:
        resolve(preset=str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lacking", [("algorithm",), ("dataset", "network"), ("description", "source")])
def test_a_preset_that_lacks_something_is_told_what_to_add(lacking: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    kept = [line for line in WHOLE_PRESET.splitlines() if line.split()[0] not in lacking]
    path.write_text("\n".join(kept))
    with pytest.raises(UsageError) as caught:
        read_preset(path)
    told, _, example = str(caught.value).partition("; add for example: ")
    assert told == f"{path} does not hold a preset: it lacks {', '.join(lacking)}"
    path.write_text("\n".join([*kept, *example.split(", ")]))  # as the message says
    assert read_preset(path).name == "mine"


def test_a_file_that_is_no_text_is_no_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"mine\.toml does not hold a preset: no UTF-8 text$"):
        read_preset(path)


@pytest.mark.parametrize("name", presets())
def test_every_packaged_preset_would_do_as_a_file(name: str, tmp_path: Path) -> None:
    write_preset(presets()[name], tmp_path / f"{name}.toml")
    assert read_preset(tmp_path / f"{name}.toml") == presets()[name]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"seed": "a"}, CheckpointError, "is damaged .seed is 'a'.; restore it"),
        ({"parameters": 3}, CheckpointError, "is damaged .parameters is 3.; restore it"),
        ({"training": None}, CheckpointError, "is damaged .training is None.; restore it"),
        ({"training": {"epochs": "many"}}, UsageError, r"config\.json: epochs takes a whole number"),
        (
            {"training": {"epoch": 3}},
            UsageError,
            r"config\.json: unknown training setting 'epoch'; did you mean epochs",
        ),
    ],
)
def test_damaged_configurations_of_runs_are_named(
    values: dict[str, Any], error: type[BpfreeError], message: str, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("config.json", {**resolve("mf").to_dict(), **values})
    with pytest.raises(error, match=message):
        RunConfig.of_run(folder)


def test_config_survives_json(tmp_path: Path) -> None:
    config = resolve("mf", "cifar10", seed=3, training={"epochs": 7})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert RunConfig.read(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not hold"),
        ("[]", "not an object"),
        ("{", "does not hold"),
        ('{"algorithm": "mf"}', "it has no dataset"),
        ('{"algorythm": "mf"}', "did you mean algorithm"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        RunConfig.read(tmp_path / "config.json")


def test_the_command_of_a_run_repeats_it() -> None:
    from bpfree.cli import cli

    config = replace(
        resolve("mf", "mnist", seed=4, parameters={"lr": 0.5, "input_projection": True}),
        training=TrainingConfig(lr_schedule="cosine", graph=False, passes=8, augmentation="none"),
        task="autoencode",
    )
    words = shlex.split(command(config))
    assert words[:2] == ["bpfree", "run"]
    context = cli.commands["run"].make_context("run", words[2:])
    given = context.params
    again = resolve(
        given["algorithm_name"],
        given["dataset"],
        given["network"],
        preset=given["preset"],
        seed=given["seeds"][0],
        parameters=parse_settings(given["settings"], given["algorithm_name"]),
        task=given["task"],
        training={k: given[k] for k in vars(config.training) if given[k] is not None},
    )
    assert again == replace(config, preset=None)


def test_every_rule_names_its_source_and_parameters() -> None:
    for entry in ALGORITHMS:
        assert entry.paper.title
        assert "lr" in entry.parameters()


def test_images_to_be_reconstructed_are_left_in_the_unit_interval_unless_one_asks() -> None:
    config = resolve("bp", "usps", task="autoencode")
    assert (config.task, config.network, config.training.standardize) == ("autoencode", "autoencoder", False)
    assert resolve("bp", "usps", task="autoencode", training={"standardize": True}).training.standardize


def test_a_published_accuracy_is_that_of_the_preset_unchanged() -> None:
    assert published_accuracy(resolve(preset="noprop-cifar10", seed=3, device="cpu")) == 79.25
    assert published_accuracy(resolve("noprop", "cifar10")) == 79.25
    assert published_accuracy(resolve(preset="noprop-cifar10", training={"epochs": 149})) is None
    assert published_accuracy(resolve(preset="noprop-cifar10", parameters={"lr": 2e-3})) is None
    assert published_accuracy(resolve(preset="noprop-cifar10", network="noprop:ct")) is None
    assert published_accuracy(resolve("noprop", "cifar10", preset="none")) is None
    assert published_accuracy(resolve(preset="noprop-digits")) is None


def test_changes_are_against_the_preset() -> None:
    def changed(**given: Any) -> dict[str, Any]:
        return changes(resolve(**given))

    assert changed(preset="noprop-cifar10", seed=3) == {}
    assert changed(preset="noprop-cifar10", parameters={"eta": 0.5}, training={"epochs": 2}) == {
        "eta": 0.5,
        "epochs": 2,
    }
    assert changed(preset="noprop-cifar10", parameters={"width": 9}) == {"width": 9}
    assert changed(preset="noprop-cifar10", network="noprop:ct") == {"network": "noprop:ct"}
    plain = {"algorithm_name": "mf", "dataset": "digits", "preset": "none"}
    assert changed(**plain, parameters={"lr": 0.5}, training={"epochs": 2}) == {"lr": 0.5, "epochs": 2}
    lacking = resolve(preset="noprop-cifar10")
    del lacking.parameters["eta"]  # as in a record that is older than this line of the preset
    assert changes(lacking) == {"eta": "default"}


def test_presets_are_found_by_their_task() -> None:
    assert resolve("ccl", "cifar10").preset == "counter_current-cifar10"
    assert resolve("ccl", "cifar10", task="autoencode").preset == "counter_current-cifar10-autoencode"
    assert resolve(preset="backprop-cifar10-autoencode").task == "autoencode"
    assert resolve("ccl", "cifar10", "autoencoder").preset is None
    with pytest.raises(UsageError, match="for the task autoencode"):
        resolve(preset="backprop-cifar10-autoencode", task="classify")
    with pytest.raises(UsageError, match="did you mean autoencode"):
        resolve("ccl", "cifar10", task="autoencoder")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"c\.json does not hold a run's configuration \(not an object\)"),
        ("{", "does not hold a run's configuration"),
        (None, r"cannot read the configuration .*c\.json: No such file"),
    ],
)
def test_what_is_no_configuration_gets_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        RunConfig.read(tmp_path / "c.json")


def test_an_unknown_key_of_a_preset_is_named_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('netwrk = "mlp:1x8"')
    with pytest.raises(UsageError, match=r"p\.toml .*: unknown key 'netwrk'; did you mean network\?"):
        read_preset(tmp_path / "p.toml")


def test_the_command_of_a_number_of_passes_names_no_epochs() -> None:
    config = resolve("mf", "digits", preset="none", training={"epochs": 3, "patience": 2, "passes": 8})
    words = shlex.split(command(config))
    assert ("--epochs" in words, "--patience" in words) == (False, False)
    assert words[words.index("--passes") + 1] == "8"


@pytest.mark.parametrize("given", [{"epochs": 7}, {"patience": 3}, {"epochs": 7, "patience": 3}])
def test_epochs_that_are_asked_for_replace_a_presets_passes(tmp_path: Path, given: dict[str, int]) -> None:
    preset = tmp_path / "tuned.toml"
    preset.write_text(
        'description = "d"\nsource = "s"\nalgorithm = "mf"\ndataset = "digits"\nnetwork = "mlp:1x20"\n'
        "[training]\npasses = 2\nbatch_size = 32\n"
    )
    training = resolve(preset=str(preset), training=given).training
    assert training.passes is None
    assert {name: getattr(training, name) for name in given} == given
    assert training.batch_size == 32
    assert resolve(preset=str(preset), training={"batch_size": 64}).training.passes == 2
