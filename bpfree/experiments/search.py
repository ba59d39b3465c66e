"""What a tuner searches: a part that every rule shares, word for word, and what the rule declares of its own."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from bpfree.algorithms import algorithm
from bpfree.algorithms.learner import Trial
from bpfree.errors import UsageError, unknown_name
from bpfree.experiments.config import RunConfig
from bpfree.experiments.schedules import SCHEDULES

Range = tuple[float, float]

PARAMETERS: Final = ("lr", "weight_decay")
"""What learners take; the rest of the shared part are training settings."""


class FullTrial(Trial, Protocol):
    """What the shared part needs of a tuner's trial (Optuna's `Trial` has it)."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class SharedSpace:
    """The part of the search space that is the same for every rule, back-propagation included.

    Ranges are closed and searched by logarithm, dropout uniformly; a range whose ends agree is a fixed value. Those of
    the learning rate and of weight decay hold what the presets have.

    Attributes:
        lr: learning rates.
        weight_decay: weight decays; the lowest is next to none.
        lr_schedules: names of schedules.
        batch_sizes: samples per step; () where the data set is not trained in batches.
        dropout: probabilities of the network's dropout layers; None for a network without such.
        passes: numbers of data passes; None if training runs to its own convergence.
    """

    lr: Range = (1e-5, 2.0)
    weight_decay: Range = (1e-7, 1e-1)
    lr_schedules: tuple[str, ...] = ("constant", "cosine")
    batch_sizes: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    dropout: Range | None = (0.0, 0.5)
    passes: tuple[int, int] | None = (5, 100)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "passes"):
            if (limits := getattr(self, name)) is not None and not 0 < limits[0] <= limits[1]:
                raise UsageError(f"the range of {name} must have 0 < LOW <= HIGH, got {limits[0]:g} {limits[1]:g}")
        if self.dropout is not None and not 0 <= self.dropout[0] <= self.dropout[1] < 1:
            raise UsageError(f"the range of dropout must have 0 <= LOW <= HIGH < 1, got {self.dropout}")
        if not self.lr_schedules or any(size < 1 for size in self.batch_sizes):
            raise UsageError("the search needs one or more schedules, and batch sizes of 1 or more")
        for schedule in self.lr_schedules:
            if schedule not in SCHEDULES:
                raise unknown_name("learning-rate schedule", schedule, SCHEDULES)

    def suggest(self, trial: FullTrial, idle: Container[str] = ()) -> dict[str, Any]:
        """Values for one trial by name: `PARAMETERS` of the learner that are not `idle`, and training settings."""
        found: dict[str, Any] = {
            name: trial.suggest_float(name, *getattr(self, name), log=True) for name in PARAMETERS if name not in idle
        }
        found["lr_schedule"] = trial.suggest_categorical("lr_schedule", self.lr_schedules)
        if self.batch_sizes:
            found["batch_size"] = trial.suggest_categorical("batch_size", self.batch_sizes)
        if self.dropout is not None:
            found["dropout"] = trial.suggest_float("dropout", *self.dropout)
        if self.passes is not None:
            found["passes"] = trial.suggest_int("passes", *self.passes, log=True)
        return found


@dataclass
class Pinned:
    """A tuner's trial in which some values are given and only the others are asked for.

    Attributes:
        trial: asked for the others.
        given: values by name.
    """

    trial: FullTrial
    given: Mapping[str, Any]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self.given[name] if name in self.given else self.trial.suggest_float(name, low, high, log=log)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return self.given[name] if name in self.given else self.trial.suggest_int(name, low, high, log=log)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.given[name] if name in self.given else self.trial.suggest_categorical(name, choices)


@dataclass
class Declared:
    """A tuner's trial that writes down what it is asked, and answers with the lowest or first value.

    Attributes:
        chosen: other answers by name.
        space: what was asked for by name, in plain words for a record.
    """

    chosen: Mapping[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.space[name] = {"low": low, "high": high, "log": log}
        return low

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        self.space[name] = {"low": low, "high": high, "log": log, "integer": True}
        return low

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.space[name] = {"choices": list(choices)}
        return self.chosen.get(name, choices[0])


def suggest(trial: FullTrial, base: RunConfig, shared: SharedSpace, given: Mapping[str, Any]) -> RunConfig:
    """The run of one trial.

    Args:
        trial: where values come from.
        base: everything that is not searched.
        shared: the part of the space that every rule has.
        given: parameters of the learner that are not searched, because the user set them.
    """
    pinned = Pinned(trial, given)
    # a preset's own rates are searched too; where they would have no effect they must not stay behind
    fixed = {name: value for name, value in base.parameters.items() if name in given or name not in PARAMETERS}
    learner = algorithm(base.algorithm).learner
    known = {**fixed, "classes": 0} if base.task == "autoencode" else fixed
    parameters = {**fixed, **learner.search_space(pinned, known)}
    found = shared.suggest(pinned, learner.idle(parameters))
    parameters.update({name: found.pop(name) for name in PARAMETERS if name in found})
    return replace(base, parameters=parameters, training=replace(base.training, **found))


def declare(base: RunConfig, shared: SharedSpace, given: Mapping[str, Any]) -> tuple[dict[str, Any], RunConfig]:
    """The whole search space as plain values, and the run at its lowest corner.

    What is searched beside one choice only is a part of the space too.
    """
    declared = Declared()
    corner = suggest(declared, base, shared, given)
    space = dict(declared.space)
    for name, limits in declared.space.items():
        for choice in limits.get("choices", [])[1:]:
            branch = Declared({name: choice})
            suggest(branch, base, shared, given)
            space.update(branch.space)
    return space, corner
