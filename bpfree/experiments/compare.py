"""Comparisons: paired seeds, arms in random order within each seed, resumable, and everything about them on record.

One comparison is one folder:

    comparison.json   arms, seeds, protocols, margins and targets, fixed before the first run
    ledger.jsonl      every start of a run in the order in which they happened, and every failure
    runs/             the run folders

A run is known by its configuration, and its folder says whether it is finished; the ledger only remembers order and
failures. So whatever moment a comparison is killed at, the same call goes on without a lost or doubled run.
"""

from __future__ import annotations

import fcntl
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Final

import torch

from bpfree.energy import choose_source
from bpfree.energy.thermal import ThermalStart
from bpfree.errors import BpfreeError, CheckpointError, TrainingError, UsageError, WriteError, cannot_write
from bpfree.experiments import records
from bpfree.experiments import run as runs
from bpfree.experiments.arms import BOTH, MATCHED, PROTOCOLS, TUNED, Arm, checked, interleaved, unequal_settings
from bpfree.experiments.config import RunConfig
from bpfree.experiments.finished import Say, read_or_leave_out
from bpfree.experiments.records import MAYBE, NUMBER, RunFolder
from bpfree.experiments.run import AnyDataset, Measuring, Reporter
from bpfree.experiments.signals import StopRequest
from bpfree.experiments.train import InterruptedRunError
from bpfree.words import count_of

PLAN: Final = "comparison.json"
PLANNED: Final[dict[str, Any]] = {
    "dataset": str,
    "hardware": [str],
    "arms": [{"label": str, "config": dict, "skipped": (str, NoneType)}],
    "seeds": [int],
    "protocols": [str],
    "analysis": {"baseline": str, "margin_accuracy": NUMBER, "margin_relative": NUMBER, "targets": [NUMBER]},
    "matched_passes": dict,
    "start_temperature_c": MAYBE,
}
"""What a plan has at least, see `RunFolder.read_json`."""

LEDGER: Final = "ledger.jsonl"
RUNS: Final = "runs"

STARTED: Final = "started"
FAILED: Final = "failed"


@dataclass(frozen=True)
class Analysis:
    """What a comparison is judged by. Fixed before the first run; another choice needs another folder.

    Attributes:
        baseline: label of the arm that the others are paired with.
        margin_accuracy: differences of accuracy up to this are equivalent, percentage points.
        margin_relative: ratios of time and energy between 1 / (1 + this) and 1 + this are equivalent.
        targets: validation accuracies for energy to accuracy, %; none takes the baseline's median less one point.
    """

    baseline: str = "bp"
    margin_accuracy: float = 0.25
    margin_relative: float = 0.05
    targets: tuple[float, ...] = ()


@dataclass
class Plan:
    """The content of comparison.json.

    Attributes:
        dataset: name of the data set.
        hardware: the device that trains.
        arms: everything that has been asked for, skipped arms with their reason.
        seeds: of all calls.
        protocols: of all calls.
        analysis: see `Analysis`.
        matched_passes: data passes of the matched protocol by network, once they are known.
        start_temperature_c: at which runs start, °C; None where the device does not tell.
    """

    dataset: str
    hardware: list[str]
    arms: list[Arm]
    seeds: list[int]
    protocols: list[str]
    analysis: Analysis
    matched_passes: dict[str, int] = field(default_factory=dict)
    start_temperature_c: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the settings in which arms of a network differ."""
        networks = dict.fromkeys(arm.config.network for arm in self.arms)
        groups = {name: [arm for arm in self.arms if arm.config.network == name] for name in networks}
        unequal = {name: unequal_settings(arms) for name, arms in groups.items()}
        if TUNED not in self.protocols:  # the others replace the passes of an arm
            for found in unequal.values():
                found.pop("passes", None)
        return {**asdict(self), "unequal_settings": {name: found for name, found in unequal.items() if found}}

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of a comparison's folder.

        Raises:
            CheckpointError: there is none, or it is damaged.
            UsageError: it holds what this version does not know.
        """
        values = RunFolder(folder).read_json(PLAN, PLANNED)
        try:
            arms = [
                Arm(arm["label"], RunConfig.from_dict(arm["config"]), arm["skipped"], arm.get("tuning_seed"))
                for arm in values["arms"]
            ]
            analysis = Analysis(**{**values["analysis"], "targets": tuple(values["analysis"]["targets"])})
        except TypeError as error:
            raise RunFolder(folder).damaged(PLAN, str(error)) from error
        plain = {f.name: values[f.name] for f in fields(cls)}
        return cls(**{**plain, "arms": arms, "analysis": analysis})

    def passes(self, arm: Arm, protocol: str) -> int | None:
        """Data passes of an arm's runs; None for its own convergence, and for matched ones that are not known yet."""
        if protocol == TUNED:
            return arm.config.training.passes
        return self.matched_passes.get(arm.config.network) if protocol == MATCHED else None

    def joined(self, asked: Plan, *, mixed_hardware: bool) -> Plan:
        """This plan, extended by what a later call asks for.

        Raises:
            UsageError: the call contradicts it.
        """
        if asked.dataset != self.dataset:
            raise UsageError(f"this folder compares arms on {self.dataset}; use another --results for {asked.dataset}")
        if asked.analysis != self.analysis:
            raise UsageError(
                "baseline, margins and targets were fixed before the first run "
                f"({_settings_words(self.analysis)}); use another --results for others"
            )
        if not mixed_hardware and set(asked.hardware) != set(self.hardware):
            raise UsageError(
                f"this folder has runs of {', '.join(self.hardware)}, this machine has {asked.hardware[0]}; "
                "use another --results, or --mixed-hardware"
            )
        known = {arm.key: arm for arm in self.arms}
        for arm in asked.arms:
            if arm.key in known and known[arm.key] != arm:
                raise UsageError(f"arm {arm.label} is recorded with other settings; use another --results")
        return replace(
            self,
            hardware=list(dict.fromkeys([*self.hardware, *asked.hardware])),
            arms=[*self.arms, *(arm for arm in asked.arms if arm.key not in known)],
            seeds=sorted({*self.seeds, *asked.seeds}),
            protocols=[name for name in PROTOCOLS if name in {*self.protocols, *asked.protocols}],
            matched_passes={**self.matched_passes, **asked.matched_passes},
        )


def _settings_words(analysis: Analysis) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(analysis).items())


@dataclass(frozen=True)
class Slot:
    """One run that a comparison consists of."""

    arm: Arm
    protocol: str
    seed: int
    passes: int | None

    @property
    def config(self) -> RunConfig:
        return self.arm.run_config(self.seed, self.passes)

    @property
    def name(self) -> dict[str, Any]:
        """What the ledger calls it."""
        label, network = self.arm.key
        return {"arm": label, "network": network, "protocol": self.protocol, "seed": self.seed}


class Ledger:
    """The lines of ledger.jsonl. A line that a kill has cut off was never there.

    Raises:
        CheckpointError: it is damaged in another way.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []
        if not path.is_file():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        self.lines = [self._parsed(line) for line in whole.splitlines()]
        if whole != text:
            path.write_text(whole)

    def _parsed(self, line: str) -> dict[str, Any]:
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                return event
        raise CheckpointError(
            f"{self._path} has a damaged line, {line!r}; delete it: lines only tell the order of runs, and why some "
            "failed"
        )

    def add(self, event: str, slot: Slot, **facts: Any) -> None:
        """Note what has happened.

        Raises:
            CheckpointError: it cannot be written.
        """
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"event": event, **slot.name, "time": now, **facts}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self.lines.append(line)

    def failure(self, name: dict[str, Any]) -> str | None:
        """Why the latest attempt at a slot failed; None if it did not, or none was made."""
        events = [line for line in self.lines if all(line.get(key) == value for key, value in name.items())]
        return events[-1].get("reason") if events and events[-1].get("event") == FAILED else None


@dataclass
class Outcome:
    """How a call of `compare` ended.

    Attributes:
        done: finished runs of the arms, seeds and protocols asked for.
        left: runs that the budget left for another call.
        failed: slots that failed, with "reason".
        skipped: arms that cannot run, with "reason" and the "protocols" that this concerns.
    """

    done: int = 0
    left: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Conditions:
    """Under which conditions the runs of a call are made; no part of what is compared.

    Attributes:
        idle_s: measure the idle device this long before the first run and after each run, s; 0 for not at all.
        carbon: country for CO2 equivalents, see `Measuring`.
        warm_up_s: load the device this long before the first run, s.
        wait_s: wait for the start temperature at most this long, s.
        start_temperature_c: at which runs start, °C; None takes that of the warmed-up device.
        budget_s: start no run after this time, s.
        retry_failed: try again what has failed in an earlier call.
        mixed_hardware: go on with a comparison that other hardware has begun.
    """

    idle_s: float = 0.0
    carbon: str | None = None
    warm_up_s: float = 30.0
    wait_s: float = 120.0
    start_temperature_c: float | None = None
    budget_s: float = math.inf
    retry_failed: bool = False
    mixed_hardware: bool = False


class Comparison:
    """A comparison about to be run. Making one checks everything and starts nothing.

    Args:
        root: the comparison's folder.
        arms: from `make_arms`.
        seeds: paired seeds.
        dataset: the data set of all arms.
        protocols: "own", "matched" and "tuned", or some of them.
        passes: data passes of the matched protocol; None takes the baseline's mean at its own convergence.
        analysis: what is fixed beforehand.
        conditions: how runs are made.
        say: told what happens, one line each.
        reporter: hears how each run goes.

    Raises:
        UsageError: something does not fit, or contradicts what the folder holds.
    """

    def __init__(
        self,
        root: Path,
        arms: Sequence[Arm],
        seeds: Sequence[int],
        dataset: AnyDataset,
        *,
        protocols: Sequence[str] = BOTH,
        passes: int | None = None,
        analysis: Analysis = Analysis(),
        conditions: Conditions = Conditions(),
        say: Callable[[str], object] = print,
        reporter: Reporter | None = None,
    ) -> None:
        self.root = root
        self._dataset, self._conditions, self._say, self._reporter = dataset, conditions, say, reporter
        self._arms = [checked(arm, dataset) for arm in arms]
        self._seeds, self._protocols = list(seeds), [name for name in PROTOCOLS if name in protocols]
        self._running = [arm for arm in self._arms if arm.skipped is None]
        if not self._running:
            raise UsageError(f"there is nothing to run: {self._arms[0].label}: {self._arms[0].skipped}")
        labels = [arm.label for arm in self._arms]
        if analysis.baseline not in (Analysis.baseline, *labels):
            raise UsageError(f"no arm is called {analysis.baseline}, to pair the others with: {', '.join(labels)}")
        for arm in self._running:
            if arm.tuning_seed in self._seeds:
                raise UsageError(
                    f"{arm.label} was chosen by trials with seed {arm.tuning_seed}, which flatters it; compare on "
                    f"others: --first-seed {max(self._seeds) + 1}"
                )
        self._device = runs.pick_device(self._running[0].config.device)
        networks = dict.fromkeys(arm.config.network for arm in self._running)
        if self._protocols != [TUNED]:
            self._refuse_twins()
        for arm in self._running if TUNED in self._protocols else ():
            if arm.config.training.passes is None:
                raise UsageError(
                    f"{arm.label} does not say for how many data passes; give it a preset of `bpfree tune`, or "
                    f"{arm.label}:passes=N"
                )
        asked = Plan(
            dataset.name,
            [records.hardware(self._device)],
            self._arms,
            self._seeds,
            self._protocols,
            analysis,
            {} if passes is None else dict.fromkeys(networks, passes),
        )
        self.plan = asked
        if (root / PLAN).is_file():
            earlier = Plan.read(root)
            if passes is not None and any(earlier.matched_passes.get(name, passes) != passes for name in networks):
                raise UsageError(f"matched passes are {earlier.matched_passes} already; use another --results")
            start_c = conditions.start_temperature_c
            if earlier.start_temperature_c is not None and start_c not in (None, earlier.start_temperature_c):
                raise UsageError(f"runs here start at {earlier.start_temperature_c:g} °C; use another --results")
            self.plan = earlier.joined(asked, mixed_hardware=conditions.mixed_hardware)
        to_match = networks.keys() - self.plan.matched_passes.keys() if MATCHED in self._protocols else ()
        if to_match and analysis.baseline not in {arm.label for arm in arms}:
            raise UsageError(f"matched passes are those of {analysis.baseline}, which is no arm; add it, or --passes")
        self._outcome = Outcome()
        self._idle_w: tuple[float, ...] = ()

    def _refuse_twins(self) -> None:
        """Two arms that differ in their passes alone, which a protocol replaces, would share their runs."""
        seen: dict[str, Arm] = {}
        for arm in self._running:
            twin = seen.setdefault(config_key(arm.run_config(0, None)), arm)
            if twin is not arm:
                raise UsageError(
                    f"{twin.label} and {arm.label} differ in nothing but passes, which only --protocol tuned keeps; "
                    "leave one out"
                )

    def run(self) -> Outcome:
        """Make the runs that are missing.

        Raises:
            UsageError: another process is at work in this folder.
            InterruptedRunError: a signal asked to stop; another call goes on.
            TrainingError: the device no longer answers.
            WriteError: the disk is full, or the folder cannot be written; another call goes on.
        """
        with closing(choose_source(self._running[0].config.energy, self._device)) as self._source, self._alone():
            self._save_plan()
            self._ledger = Ledger(self.root / LEDGER)
            self._recorded = recorded(self.root / RUNS, self._say)
            for arm in self._arms:
                if arm.skipped is not None:
                    self._skip([arm], arm.skipped, *self._protocols)
            for arm in self._running:
                others = f"; there is {arm.elsewhere}" if arm.elsewhere else ""
                self._say(f"{arm.label} on {arm.config.network} takes {arm.origin}{others}")
                if arm.stretched:
                    self._say(f"note: {arm.stretched}")
                passes = arm.config.training.passes
                if passes is not None and self._protocols != [TUNED]:
                    self._say(
                        f"note: {arm.label} is set to {count_of(passes, 'pass')}, which only --protocol tuned keeps"
                    )
            for network, unequal in self.plan.as_dict()["unequal_settings"].items():
                for name, values in unequal.items():
                    words = ", ".join(f"{label} {value}" for label, value in values.items())
                    self._say(f"note: on {network} the arms differ in {name}: {words}")
            self._deadline = time.monotonic() + self._conditions.budget_s
            self._start: ThermalStart | None = None
            for protocol in self._protocols:
                self._run_protocol(protocol)
        return self._outcome

    def _run_protocol(self, protocol: str) -> None:
        arms = [arm for arm in self._running if protocol != MATCHED or self._passes(arm.config.network) is not None]
        unmatched = [arm for arm in self._running if arm not in arms]
        if self._outcome.left:  # the budget has ended before it was known how many passes to match
            self._outcome.left += len(unmatched) * len(self._seeds)
        else:
            self._skip(unmatched, f"{self.plan.analysis.baseline} has no run whose passes could be matched", protocol)
        for seed in self._seeds:
            for arm in interleaved(arms, protocol, seed):
                self._run_slot(Slot(arm, protocol, seed, self.plan.passes(arm, protocol)))

    def _skip(self, arms: Sequence[Arm], reason: str, *protocols: str) -> None:
        for arm in arms:
            label, network = arm.key
            skipped = {"arm": label, "network": network, "protocols": list(protocols), "reason": reason}
            self._outcome.skipped.append(skipped)
            self._say(f"{label} on {network} is skipped ({' and '.join(protocols)}): {reason}")

    def _passes(self, network: str) -> int | None:
        """Data passes of the matched protocol: once fixed, always the same; None if the baseline is not finished."""
        if network not in self.plan.matched_passes and not self._outcome.left:
            baseline = [arm for arm in self._running if arm.key == (self.plan.analysis.baseline, network)]
            paths = [
                self._recorded.get(config_key(arm.run_config(seed, None))) for arm in baseline for seed in self._seeds
            ]
            done = [path for path in paths if path is not None and is_finished(path)]
            if not done:
                return None
            counted = [RunFolder.open(path).read_summary()["passes"] for path in done]
            self.plan.matched_passes[network] = math.ceil(statistics.fmean(counted))
            self._save_plan()
        return self.plan.matched_passes.get(network)

    def _run_slot(self, slot: Slot) -> None:
        path = self._recorded.get(config_key(slot.config))
        if path is not None and is_finished(path):
            self._outcome.done += 1
            return
        reason = self._ledger.failure(slot.name)
        if reason is None or self._conditions.retry_failed:
            if time.monotonic() > self._deadline:
                self._outcome.left += 1
                return
            reason = self._attempt(slot, path)
        if reason is None:
            self._outcome.done += 1
        else:
            self._outcome.failed.append({**slot.name, "reason": reason})

    def _attempt(self, slot: Slot, path: Path | None) -> str | None:
        """Make a run, or go on with one; the reason if it fails."""
        measuring = self._prepared()
        self._ledger.add(
            STARTED, slot, temperature_c=self._temperature_c, **({} if path is None else {"resumed": path.name})
        )
        options: dict[str, Any] = {
            "dataset": self._dataset,
            "measuring": measuring,
            "keep_model": False,
            "reporter": self._reporter,
        }
        what = f"{slot.arm.label} on {slot.arm.config.network}, {slot.protocol}, seed {slot.seed}"
        stop = StopRequest()
        try:
            with stop:
                if path is None:
                    summary = runs.run(slot.config, self.root / RUNS, **options)
                else:
                    summary = runs.resume(path, **options)
        except InterruptedRunError as error:
            raise InterruptedRunError(error.where, "the same command goes on") from None
        except WriteError:  # which is no fault of this arm, and would be taken for one of every other
            raise
        except BpfreeError as error:
            return self._failed(slot, what, str(error))
        except Exception as error:  # a defect of one arm must not end a night of others
            return self._failed(slot, what, " ".join(f"{type(error).__name__}: {error}".split()))
        if self._conditions.idle_s:  # after this run is before the next
            self._idle_w = tuple(summary["energy"]["source"]["idle_w"][-1:])
        joules = summary["energy"]["gross_j"]
        self._say(
            f"{what}: test {summary['metric']} {summary['test_accuracy']:.2f} %, "
            f"{count_of(summary['passes'], 'pass')}, {summary['seconds']:.1f} s, "
            f"{'energy not measured' if joules is None else f'{joules:.0f} J'}"
        )
        self._recorded[config_key(slot.config)] = Path(summary["run_dir"])
        if stop():
            raise InterruptedRunError(f"stopped behind {what} ({stop.name})", "the same command goes on")
        return None

    def _failed(self, slot: Slot, what: str, reason: str) -> str:
        self._ledger.add(FAILED, slot, reason=reason)
        self._say(f"{what} failed: {reason}")
        self._recorded = recorded(self.root / RUNS, lambda damaged: None)  # the folder it has left behind
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError:  # after a fault in a kernel nothing works in this process
                raise TrainingError(f"{self._device} no longer answers after {reason}; run the command again") from None
        return reason

    def _prepared(self) -> Measuring:
        """The device as every run finds it: nothing left of the run before, idle power known, start temperature."""
        conditions = self._conditions
        if self._start is None:
            target = self.plan.start_temperature_c
            self._start = ThermalStart(
                self._source,
                self._device,
                target_c=conditions.start_temperature_c if target is None else target,
                warm_up_s=conditions.warm_up_s,
                wait_s=conditions.wait_s,
            )
            self.plan.start_temperature_c = self._start.target_c
            self._save_plan()
        if conditions.idle_s and not self._idle_w:
            self._idle_w = runs.measure_idle(self._running[0].config, conditions.idle_s)
        self._temperature_c = self._start.settle()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what the load and the run before hold would count as this run's
        return Measuring(self._idle_w, conditions.idle_s, conditions.carbon, self._start.target_c)

    def _save_plan(self) -> None:
        RunFolder(self.root).write_json(PLAN, self.plan.as_dict())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time: two would make the same runs."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            opened = (self.root / LEDGER).open("a")
        except OSError as error:
            raise cannot_write(self.root, error) from error
        with opened as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"another comparison is at work in {self.root}") from None
            yield


def is_finished(path: Path) -> bool:
    """Whether a run folder holds a finished run."""
    return (path / records.SUMMARY).is_file()


def recorded(root: Path, say: Say = warnings.warn) -> dict[str, Path]:
    """Run folders under `root`, finished or not, by their configuration; of several the finished or latest one.

    Args:
        root: where to look.
        say: told of each run that cannot be read, and is not among them: it has to be made again.
    """
    found: dict[str, Path] = {}
    for file in sorted(root.rglob(records.CONFIG), key=lambda file: (is_finished(file.parent), file)):
        key = read_or_leave_out("run", file.parent, _key_of, lambda why: say(f"{why}; now it is made again"))
        if key is not None:
            found[key] = file.parent
    return found


def _key_of(path: Path) -> str:
    folder = RunFolder(path)
    if is_finished(path):
        folder.read_summary()
    return config_key(RunConfig.of_run(folder))


def config_key(config: RunConfig) -> str:
    """What tells configurations apart."""
    return json.dumps(config.to_dict(), sort_keys=True)
