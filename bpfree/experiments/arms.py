"""Arms of a comparison: a rule with its hyperparameters, on one data set and network."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from bpfree import data
from bpfree.algorithms import algorithm
from bpfree.algorithms.learner import Task
from bpfree.data import GraphDataset
from bpfree.errors import UsageError
from bpfree.experiments.config import RunConfig, named_preset, parse_mixed_settings, presets_elsewhere, resolve
from bpfree.experiments.graphs import own_split
from bpfree.experiments.run import AnyDataset, build_learner
from bpfree.experiments.train import TrainingConfig
from bpfree.networks import build_network

T = TypeVar("T")

OWN: Final = "own"
MATCHED: Final = "matched"
TUNED: Final = "tuned"
PROTOCOLS: Final = (OWN, MATCHED, TUNED)
"""Every arm stops by the same rule on its own validation loss, or all see the data equally often, or each as often as
its preset says."""
BOTH: Final = (OWN, MATCHED)
"""Those that need nothing but a rule."""

COMMON: Final = ("epochs", "patience", "min_delta", "validation")
"""Training settings that are the comparison's, and not those of a preset that nobody named: when an arm has converged,
and on how many samples."""

NAME: Final = r"[A-Za-z]"
"""How rules begin, and rests of lists of numbers do not."""


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        label: see `arm_label`, such as "mf" or "mf@preset:patience=4"; with the network it names the arm.
        config: its runs, apart from seed and protocol.
        skipped: why it cannot run; None if it can.
        tuning_seed: seed of the trials that its preset was chosen by, if that is known.
    """

    label: str
    config: RunConfig
    skipped: str | None = None
    tuning_seed: int | None = field(default=None, compare=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.label, self.config.network

    @property
    def origin(self) -> str:
        """Where its hyperparameters come from, in words."""
        return "the rule's defaults" if self.config.preset is None else f"preset {self.config.preset}"

    @property
    def elsewhere(self) -> str:
        """For an arm that takes the rule's defaults, since no preset is for its network: those of networks like it."""
        if self.config.preset is not None or "@" in self.label:
            return ""
        others = presets_elsewhere(algorithm(self.config.algorithm), self.config.dataset, self.config.task)
        family = self.config.network.partition(":")[0]
        like = [preset for preset in others if preset.network.partition(":")[0] == family]
        return ", ".join(f"{self.config.algorithm}@{preset.name} of {preset.network}" for preset in like)

    @property
    def stretched(self) -> str:
        """For an arm whose preset nobody named, what the comparison's cap does to a schedule made for other epochs."""
        training, name = self.config.training, self.config.preset
        if name is None or "@" in self.label or training.lr_schedule == "constant" or training.passes is not None:
            return ""
        epochs = named_preset(name).training.get("epochs", TrainingConfig.epochs)
        if epochs == training.epochs:
            return ""
        return (
            f"the {training.lr_schedule} schedule of {name} was made for {epochs} epochs and is over {training.epochs} "
            f"here; {self.config.algorithm}@{name} keeps its own"
        )

    def run_config(self, seed: int, passes: int | None) -> RunConfig:
        """One run: at its own convergence, or for `passes` data passes."""
        return replace(self.config, seed=seed, training=replace(self.config.training, passes=passes))


def interleaved(arms: Sequence[T], *block: Any) -> list[T]:
    """The arms in an order that is random, and always the same for the same block: drift hits all of them alike."""
    return random.Random(repr(block)).sample(arms, len(arms))


def split_arms(text: str) -> list[str]:
    """The arms in a list such as `bp,mf:patience=4,man:ends="3,7,15"`: commas between quotes belong to a value.

    Raises:
        UsageError: a quote without its end, or what looks like the rest of a value that should have been quoted.
    """
    arms = [part.strip() for part in _split(text, ",") if part.strip()]
    for position, arm in enumerate(arms[1:], 1):
        name, equals, value = arms[position - 1].rpartition("=")
        if equals and not re.match(NAME, arm):
            rest = itertools.takewhile(lambda part: not re.match(NAME, part), arms[position:])
            whole = f'{name}="{",".join([value, *rest])}"'
            raise UsageError(
                f"{arm!r} is no rule; if it belongs to the value before it, quote that, and all arms for the shell: "
                f"--algos '{whole}'"
            )
    return arms


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that are not in quotes."""
    parts = [""]
    for piece in re.findall(rf"""{separator}|"[^"]*"|'[^']*'|[^"'{separator}]+|.""", text):
        if piece in ('"', "'"):
            raise UsageError(f"there is a quote without its end in {text}")
        if piece == separator:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def make_arms(
    texts: Sequence[str],
    dataset: str | None = None,
    network: str | None = None,
    *,
    baseline: str = "bp",
    training: Mapping[str, Any] | None = None,
    device: str = "auto",
    energy: str = "auto",
) -> list[Arm]:
    """Arms from what the user wrote: `RULE[@PRESET][:KEY=VALUE..]`, such as "mf@my.toml:patience=4".

    A preset's path or a value with a colon in it is quoted, with single or double quotes. Of a preset that is not named
    an arm takes all but `COMMON`, which is the same for all; on graphs, where an epoch is a step and the usual cap far
    too low, that as well.

    The task and, on graphs, the split are those of the presets that are named.

    Args:
        texts: the arms.
        dataset: data set of all arms; that of the presets named, or digits, if left out.
        network: network of all arms; without it each arm has that of its preset, and the baseline all of them.
        baseline: the arm that the others are paired with.
        training: training settings of all arms, over those of the presets, under those that an arm names itself.
        device: see `RunConfig`.
        energy: see `RunConfig`.

    Raises:
        UsageError: an unknown name, a setting that a rule does not have, two arms that are the same, presets of
            different tasks or splits, or arms some of which predict links and others classify nodes.
    """
    given = {arm_label(text): text for text in texts}
    baseline = arm_label(baseline)
    presets = [named_preset(preset) for _, preset, _ in map(_parsed, texts) if preset not in ("", "none")]
    task = _common("task", (preset.task for preset in presets), "classify")
    dataset = dataset or _common("dataset", (preset.dataset for preset in presets), "digits")
    split = None
    if isinstance(data.info(dataset), data.GraphInfo) and "split" not in (training or {}):
        split = _common("split", (_split_of(preset.training, dataset) for preset in presets), None)
    shared: dict[str, Any] = {
        "training": training or {},
        "device": device,
        "energy": energy,
        "task": task,
        "split": split,
    }
    arms = [_make_arm(text, dataset, network, **shared) for text in texts]
    if network is None:
        others = dict.fromkeys(arm.config.network for arm in arms if arm.label != baseline)
        own = [arm for arm in arms if arm.label != baseline]
        if others and len(own) < len(arms):
            arms = [*own, *(_make_arm(given[baseline], dataset, name, **shared) for name in others)]
    for position, arm in enumerate(arms):
        for other in arms[:position]:
            _refuse_links_with_nodes(arm, other)
            if arm.config == other.config:
                raise UsageError(f"arms {other.label} and {arm.label} are the same configuration; leave one out")
            if arm.key == other.key:
                raise UsageError(f"two arms are called {arm.label}; give one of their presets another name")
    return arms


def _parsed(text: str) -> tuple[str, str, list[str]]:
    """Rule, preset ("" if none is named) and settings."""
    head, *settings = _split(text, ":")
    name, _, preset = head.partition("@")
    return name, preset.strip("\"'"), settings


def arm_label(text: str) -> str:
    """An arm as the user wrote it, a preset's file by the name of the preset: where it lies is no part of the arm."""
    name, preset, settings = _parsed(text)
    return ":".join([f"{name}@{Path(preset).stem}", *settings]) if preset.endswith(".toml") else text


def _common(what: str, values: Iterable[T], usual: T) -> T:
    """What the presets that arms name have in common; the usual where they name none."""
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        remedy = "compare arms of one task" if what == "task" else f"choose with --{what}"
        kinds = "the splits " if what == "split" else ""
        raise UsageError(f"the presets of the arms are for {kinds}{' and '.join(map(str, found))}; {remedy}")
    return found[0] if found else usual


def _split_of(training: Mapping[str, Any], dataset: str) -> str | None:
    """The split of a graph that these training settings take; None where data sets have no such thing."""
    entry = data.info(dataset)
    own = own_split(entry.public) if isinstance(entry, data.GraphInfo) else None
    return training.get("split") or own


def _refuse_links_with_nodes(*arms: Arm) -> None:
    links = {_split_of(asdict(arm.config.training), arm.config.dataset) == "edges": arm.label for arm in arms}
    if len(links) > 1:
        raise UsageError(
            f"{links[True]} predicts links (split=edges) and {links[False]} classifies nodes; leave out the split of "
            "single arms and choose one for all with --split"
        )


def _make_arm(
    text: str,
    dataset: str,
    network: str | None,
    *,
    training: Mapping[str, Any],
    task: Task,
    split: str | None,
    device: str,
    energy: str,
) -> Arm:
    name, preset, settings = _parsed(text)
    named = named_preset(preset) if preset not in ("", "none") else None
    parameters, own_training = parse_mixed_settings(tuple(settings), name)
    config = resolve(
        name,
        dataset,
        network,
        preset=preset or None,
        parameters=parameters,
        training={**training, **own_training},
        device=device,
        energy=energy,
        task=task,
    )
    if not preset and not isinstance(data.info(config.dataset), data.GraphInfo):
        settled = {**training, **own_training}
        usual = {name: settled.get(name, getattr(TrainingConfig, name)) for name in COMMON}
        config = replace(config, training=replace(config.training, **usual))
    if split is not None and "split" not in own_training and _split_of(asdict(config.training), dataset) != split:
        config = replace(config, training=replace(config.training, split=split))
    return Arm(arm_label(text), config, tuning_seed=None if named is None else named.tuning_seed)


def checked(arm: Arm, dataset: AnyDataset) -> Arm:
    """The arm, marked as skipped if its rule cannot train its network.

    Raises:
        UsageError: the network does not fit the data, or a parameter has a bad value.
    """
    shape = dataset.features.shape[1:] if isinstance(dataset, GraphDataset) else dataset.input_shape
    with torch.random.fork_rng(devices=()):
        support = algorithm(arm.config.algorithm).learner.supports(build_network(arm.config.network, tuple(shape)))
        if not support.ok:
            return replace(arm, skipped=support.reason)
        try:
            build_learner(arm.config, dataset, torch.device("cpu"))
        except UsageError as error:
            raise UsageError(f"{arm.label}: {error}") from error
    return arm


def unequal_settings(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Training settings in which arms differ, by setting and label: what the rule alone does not explain."""
    settings = [(arm.label, _in_effect(arm.config)) for arm in arms if arm.skipped is None]
    return {
        name: {label: values[name] for label, values in settings}
        for name in (settings[0][1] if settings else {})
        if name != "checkpoint_every" and any(values[name] != settings[0][1][name] for _, values in settings)
    }


def _in_effect(config: RunConfig) -> dict[str, Any]:
    """Training settings, those that are left to the data set as it has them."""
    settings, entry = asdict(config.training), data.DATASETS.get(config.dataset)
    if isinstance(entry, data.GraphInfo):
        settings["split"] = _split_of(settings, config.dataset)
    if isinstance(entry, data.DatasetInfo):
        settings["augmentation"] = settings["augmentation"] or entry.augmentation
        settings["validation"] = settings["validation"] or entry.validation
    return settings
