"""What a run is made of: presets from the papers, overridden by what the user asks for."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from bpfree import data
from bpfree.algorithms import Algorithm, algorithm
from bpfree.algorithms._option_types import WORDS
from bpfree.algorithms.learner import TASKS, Task
from bpfree.errors import UsageError, unknown_name
from bpfree.experiments.records import CONFIG, RunFolder
from bpfree.experiments.train import TrainingConfig
from bpfree.networks.registry import canonical_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_NETWORK: Final = "mlp:2x1000"
DEFAULT_GRAPH_NETWORK: Final = "gcn:2x128"
DEFAULT_AUTOENCODER: Final = "autoencoder"


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved: the same config on the same machine gives the same weights.

    Attributes:
        algorithm: short name of the rule.
        dataset: name of the data set.
        network: name of the network.
        seed: fixes initialisation, order and augmentation; not the validation split, which is always the same.
        parameters: keyword arguments of the learner that differ from the rule's own defaults.
        training: how to train.
        preset: the preset that this started from, if any.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        energy: where joules come from: "auto", "nvml", "rapl", "simulated" or "none".
        task: "classify" (on graphs also links), or "autoencode" for the reconstruction of images in [0, 1].
    """

    algorithm: str
    dataset: str
    network: str
    seed: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preset: str | None = None
    device: str = "auto"
    energy: str = "auto"
    task: Task = "classify"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)

    @property
    def metric(self) -> str:
        """What is validated and tested, in percent, as batches call theirs."""
        if self.task == "autoencode":
            return "R2"
        return "ROC-AUC" if self.training.split == "edges" else "accuracy"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to a run folder's config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The counterpart of `to_dict`.

        Raises:
            UsageError: a key that a run does not have.
            TypeError: a key is missing, or its value of another type.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name("configuration key", name, known)
        kinds: dict[str, type] = dict.fromkeys(("algorithm", "dataset", "network", "device", "energy"), str)
        for key, kind in {**kinds, "seed": int, "parameters": dict, "training": dict}.items():
            if key in ("algorithm", "dataset", "network") and key not in values:
                raise TypeError(f"it has no {key}")
            if not isinstance(values.get(key, kind()), kind):
                raise TypeError(f"{key} is {values[key]!r}")
        return cls(**{**values, "training": training_config(values.get("training", {}))})

    @classmethod
    def of_run(cls, folder: RunFolder) -> RunConfig:
        """The configuration of a recorded run.

        Raises:
            CheckpointError: it is missing or damaged.
            UsageError: it holds what this version does not know.
        """
        try:
            return cls.from_dict(folder.read_json(CONFIG))
        except TypeError as error:
            raise folder.damaged(CONFIG, str(error)) from error
        except UsageError as error:
            raise UsageError(f"{folder.path / CONFIG}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        """The configuration in a run folder's config.json.

        Raises:
            UsageError: the file is missing or does not hold a configuration.
        """
        try:
            values = json.loads(path.read_text())
            if not isinstance(values, dict):
                raise ValueError("not an object")
            return cls.from_dict(values)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        except OSError as error:
            raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} does not hold a run's configuration ({error})") from error


def training_config(values: Mapping[str, Any]) -> TrainingConfig:
    """A `TrainingConfig` from plain values.

    Raises:
        UsageError: unknown key or bad value.
    """
    known = [f.name for f in fields(TrainingConfig)]
    for name in values:
        if name not in known:
            raise unknown_name("training setting", name, known)
    hints = get_type_hints(TrainingConfig)
    typed: dict[str, Any] = {}
    for name, value in values.items():
        nothing = value is None and NoneType in get_args(hints[name])
        typed[name] = None if nothing else _typed(name, value, hints[name], shown=value)
    return TrainingConfig(**typed)


@dataclass(frozen=True)
class Preset:
    """Hyperparameters with a source, for one rule, data set and network.

    Attributes:
        published: test accuracy, %, that was published for this rule, network and data set; with other hyperparameters,
            splits or stopping rules perhaps, which `source` tells of.
        published_in: where.
        tuning_seed: of the trials that it was chosen by, which other runs with that seed are not independent of.
    """

    name: str
    description: str
    source: str
    algorithm: str
    dataset: str
    network: str
    parameters: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    task: Task = "classify"
    published: float | None = None
    published_in: str | None = None
    tuning_seed: int | None = None


NEEDED: Final = {
    "description": "what it is for",
    "source": "where its values come from",
    "algorithm": "mf",
    "dataset": "digits",
    "network": "mlp:2x100",
}
"""What a preset must say, with an example."""
TABLES: Final = {"parameters": "lr = 0.001", "training": "epochs = 20"}


@cache
def presets() -> dict[str, Preset]:
    """Every packaged preset by name."""
    folder = resources.files("bpfree.experiments") / "presets"
    files = {item.name.removesuffix(".toml"): item for item in folder.iterdir() if item.name.endswith(".toml")}
    return {
        name: Preset(name=name, **tomllib.loads(file.read_text(encoding="utf-8")))
        for name, file in sorted(files.items())  # a plain name comes before the same name with a suffix
    }


def read_preset(path: Path) -> Preset:
    """The preset in a TOML file, called like the file.

    Raises:
        UsageError: the file is missing, or does not hold a preset.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the preset {path}: {error.strerror}") from error
    except ValueError as error:
        reason = "no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UsageError(f"{path} does not hold a preset: {reason}") from error
    try:
        _check_preset(values)
    except UsageError as error:
        raise UsageError(f"{path} does not hold a preset: {error}") from error
    return Preset(name=path.stem, **values)


def _check_preset(values: Mapping[str, Any]) -> None:
    """Refuse what a file holds that is no preset, by names and types.

    Raises:
        UsageError: a key is unknown or missing, or its value of another type.
    """
    hints = {name: hint for name, hint in get_type_hints(Preset).items() if name != "name"}
    for key, value in values.items():
        if key not in hints:
            raise unknown_name("key", key, hints)
        if get_origin(hints[key]) is not dict:
            _typed(key, value, hints[key], shown=value)
        elif not isinstance(value, dict):
            raise UsageError(f"{key} is a table, a line [{key}] with lines such as {TABLES[key]} below, got {value!r}")
    if lacking := [key for key in NEEDED if key not in values]:
        lines = ", ".join(f'{key} = "{NEEDED[key]}"' for key in lacking)
        raise UsageError(f"it lacks {', '.join(lacking)}; add for example: {lines}")
    rule, task = algorithm(values["algorithm"]), values.get("task", Preset.task)
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    annotations = rule.annotations()
    for key, value in values.get("parameters", {}).items():
        if key not in annotations:
            raise unknown_name(f"parameter of {rule.name}", key, annotations)
        _typed(key, value, annotations[key], shown=value)
    training_config({**usual_training(task), **values.get("training", {})})


def write_preset(preset: Preset, path: Path) -> None:
    """Write a preset as a TOML file that `read_preset` reads.

    Raises:
        CheckpointError: it cannot be written.
    """
    values = asdict(preset)
    del values["name"]
    tables = {name: values.pop(name) for name in ("parameters", "training")}
    blocks = [_toml_lines(values)]
    blocks += [f"[{name}]\n{_toml_lines(table)}" for name, table in tables.items() if table]
    RunFolder(path.parent).write_text(path.name, "\n".join(blocks))


def _toml_lines(table: Mapping[str, Any]) -> str:
    """Strings, numbers and truth values are written alike in JSON and TOML, which has nothing for None."""
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in table.items() if v is not None)


def find_preset(rule: Algorithm, dataset: str, network: str | None, task: Task = "classify") -> Preset | None:
    """The preset for a rule on a data set: that of `network`, or the one named after rule, data set and task alone."""
    if network is None:
        return presets().get(f"{rule.name}-{dataset}" + ("" if task == "classify" else f"-{task}"))
    wanted = (rule.alias, dataset, network, task)
    return next((p for p in presets().values() if (p.algorithm, p.dataset, p.network, p.task) == wanted), None)


def published_accuracy(config: RunConfig) -> float | None:
    """Test accuracy, %, that was published for a run like this, which must be a packaged preset unchanged."""
    preset = presets().get(config.preset or "")
    if preset is None or preset.published is None:
        return None
    plain = resolve(preset=preset.name, seed=config.seed, device=config.device, energy=config.energy)
    return preset.published if config == plain else None


def presets_elsewhere(rule: Algorithm, dataset: str, task: Task = "classify") -> list[Preset]:
    """The presets that are found for a rule on a data set if no network is asked for: the plain one of each network."""
    found: dict[str, Preset] = {}
    for preset in presets().values():
        if (preset.algorithm, preset.dataset, preset.task) == (rule.alias, dataset, task):
            found.setdefault(preset.network, preset)
    return list(found.values())


def named_preset(name: str) -> Preset:
    """The packaged preset called `name`, or the one in the file of that path, which ends in .toml.

    Raises:
        UsageError: there is none.
    """
    if name.endswith(".toml"):
        return read_preset(Path(name))
    if name not in presets():
        raise unknown_name("preset", name, presets())
    return presets()[name]


def resolve(
    algorithm_name: str | None = None,
    dataset: str | None = None,
    network: str | None = None,
    *,
    preset: str | None = None,
    seed: int = 0,
    parameters: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    device: str = "auto",
    energy: str = "auto",
    task: Task | None = None,
) -> RunConfig:
    """A run's configuration: the fitting preset, or the defaults, with everything given on top.

    Args:
        algorithm_name: short or long name of a rule; may be left to `preset`.
        dataset: name of a data set; may be left to `preset`.
        network: name of a network; the preset's, or `mlp:2x1000` (on graphs `gcn:2x128`, for the task "autoencode"
            `autoencoder`) if left out.
        preset: name of a preset, or path of a file that ends in .toml; "none" for the rule's defaults. Left out, the
            preset for this rule, data set and network is taken if there is one.
        seed: see `RunConfig`.
        parameters: learner parameters that override the preset's.
        training: training settings that override the preset's.
        device: see `RunConfig`.
        energy: see `RunConfig`.
        task: see `RunConfig`; may be left to `preset`. Images to be reconstructed are in [0, 1] if `training` does not
            say that they are to be standardised.

    Raises:
        UsageError: an unknown name, neither a rule nor a preset given, or a preset of another rule or task.
    """
    start: Preset | None = None
    if preset not in (None, "none"):
        start = named_preset(str(preset))
    if algorithm_name is None and start is None:
        raise UsageError("say what to train: --algo NAME or --preset NAME (see `bpfree list`)")
    rule = algorithm(algorithm_name or (start.algorithm if start else ""))
    entry = data.info(dataset or (start.dataset if start else "digits"))
    chosen = entry.name
    asked: Task = task or (start.task if start else "classify")
    network = None if network is None else canonical_name(network)
    if preset is None:
        start = find_preset(rule, chosen, network, asked)
    elif start is not None and algorithm(start.algorithm) is not rule:
        raise UsageError(f"preset {start.name} is for {start.algorithm}, not for {rule.alias}")
    elif start is not None and start.task != asked:
        raise UsageError(f"preset {start.name} is for the task {start.task}, not for {asked}")
    usual = DEFAULT_GRAPH_NETWORK if isinstance(entry, data.GraphInfo) else DEFAULT_NETWORK
    settings = overridden({**usual_training(asked), **(start.training if start else {})}, training or {})
    if asked == "autoencode":
        usual = DEFAULT_AUTOENCODER
    overrides = dict(parameters or {})
    for name in overrides:
        if name not in rule.parameters():
            raise unknown_name(f"parameter of {rule.name}", name, rule.parameters())
        if not isinstance(overrides[name], RECORDED):
            raise UsageError(
                f"{name} of a run is recorded and so has a name or a value, got {type(overrides[name]).__name__}; give "
                "objects to the learner itself, and that to bpfree.Trainer"
            )
    return RunConfig(
        algorithm=rule.alias,
        dataset=chosen,
        network=network or (start.network if start else usual),
        seed=seed,
        parameters={**(start.parameters if start else {}), **overrides},
        training=training_config(settings),
        preset=start.name if start else None,
        device=device,
        energy=energy,
        task=asked,
    )


def overridden(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Training settings with those on top that are given; a cap on epochs or a patience replaces a number of passes."""
    replaced = {"passes"} if {"epochs", "patience"} & given.keys() else set()
    return {**{name: value for name, value in settings.items() if name not in replaced}, **given}


def usual_training(task: Task) -> dict[str, Any]:
    """Training settings that go with a task unless others are given: images are reconstructed as they are."""
    return {"standardize": False} if task == "autoencode" else {}


def command(config: RunConfig) -> str:
    """The shell command that makes a run again, with every setting spelt out, so that no later preset changes it."""
    words = ["bpfree", "run", "--algo", config.algorithm, "--dataset", config.dataset, "--network", config.network]
    words += ["--preset", "none", "--seed", str(config.seed)]
    if config.task != RunConfig.task:
        words += ["--task", config.task]
    for name, value in config.parameters.items():
        words += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    settings = differing(config.training)
    if config.task == "autoencode":  # whose default is not that of `TrainingConfig`
        settings["standardize"] = config.training.standardize
    if config.training.passes is not None:  # which leaves these without a meaning, and is refused beside them
        settings = {name: value for name, value in settings.items() if name not in ("epochs", "patience")}
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def differing(training: TrainingConfig) -> dict[str, Any]:
    """The training settings that are not the default."""
    return {
        f.name: getattr(training, f.name)
        for f in fields(TrainingConfig)
        if getattr(training, f.name) != getattr(TrainingConfig, f.name)
    }


def changes(config: RunConfig) -> dict[str, Any]:
    """What is not as the run's packaged preset says; "default" for a parameter that the preset alone names.

    Of a run of no packaged preset: all parameters, and the training settings that are not the default.
    """
    preset = presets().get(config.preset or "")
    if preset is None:
        return {**config.parameters, **differing(config.training)}
    usual = resolve(preset=preset.name)
    mine, theirs = (
        {
            "dataset": each.dataset,
            "network": each.network,
            "task": each.task,
            **each.parameters,
            **vars(each.training),
        }
        for each in (config, usual)
    )
    return {
        name: mine.get(name, "default")
        for name in {**mine, **theirs}
        if name not in mine or name not in theirs or mine[name] != theirs[name]
    }


def parse_settings(settings: tuple[str, ...], algorithm_name: str) -> dict[str, Any]:
    """`("lr=1e-3", "schedule=sequential")` as learner parameters of the right types.

    Raises:
        UsageError: not of the form key=value, a key that the rule does not have (with the nearest it has), or a
            value of another kind than the parameter's.
    """
    rule = algorithm(algorithm_name)
    return _parse(settings, rule.annotations(), f"parameter of {rule.name}")


def parse_mixed_settings(settings: tuple[str, ...], algorithm_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`("lr=1e-3", "patience=4")` as learner parameters and training settings; errors as in `parse_settings`."""
    rule = algorithm(algorithm_name)
    parsed = _parse(settings, {**get_type_hints(TrainingConfig), **rule.annotations()}, f"setting of {rule.name}")
    own = {name: value for name, value in parsed.items() if name in rule.parameters()}
    return own, {name: value for name, value in parsed.items() if name not in own}


def _parse(settings: tuple[str, ...], known: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Values by name, as the annotations in `known` want them."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"settings are key=value, got {setting!r}")
        if name not in known:
            raise unknown_name(kind, name, known)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except ValueError:  # no TOML, or a number of thousands of digits
            value = text.strip()
        parsed[name] = _typed(name, value, known[name], shown=text)
    return parsed


RECORDED: Final = (str, float, int, list, tuple, dict, type(None))  # bool is an int


def _typed(name: str, value: Any, annotation: Any, *, shown: object) -> Any:
    """A value as an annotation wants it.

    Raises:
        UsageError: it is of another type, or a number that PyTorch cannot hold.
    """
    kinds, choices = _wanted(annotation)
    if float in kinds and type(value) is int:
        value = float(str(value))  # infinite, and no error, if it is too large
    fits = math.isfinite(value) if type(value) is float else type(value) is not int or -(2**63) <= value < 2**63
    if type(value) not in kinds or not fits:
        wanted = " or ".join(choices or [WORDS[kind] for kind in WORDS if kind in kinds])
        raise UsageError(f"{name} takes {wanted}, got {shown!r}")
    return value


def _wanted(annotation: Any) -> tuple[set[type], list[str]]:
    """The types that a value given as text may have, and its names if they are listed.

    None and functions are what only Python code can give.
    """
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return {type(choice) for choice in choices}, [str(choice) for choice in choices]
    if get_origin(annotation) in (Union, UnionType):
        parts = [_wanted(part) for part in get_args(annotation)]
        return set().union(*(kinds for kinds, _ in parts)), [choice for _, choices in parts for choice in choices]
    return {annotation} & set(WORDS), []
