"""Runs under a folder, gathered into arms that can be paired: what tables, figures and reports are made from."""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, Final

from bpfree.errors import UsageError
from bpfree.experiments.arms import MATCHED, OWN, TUNED, arm_label
from bpfree.experiments.compare import LEDGER, PLAN, RUNS, Analysis, Ledger, Plan, Slot, config_key
from bpfree.experiments.config import RunConfig
from bpfree.experiments.finished import (
    Run,
    Say,
    finished_runs,
    nothing_to_show,
    read_or_leave_out,
    shared_its_board,
)
from bpfree.experiments.records import MAYBE, NUMBER, RunFolder

TUNING: Final = "tuning.json"
STUDY: Final[dict[str, Any]] = {
    **dict.fromkeys(("study", "dataset", "network", "algorithm"), str),
    "objectives": [str],
    "bill": {"trials": int, "pruned": int, "failed": int, "seconds": NUMBER, "wh": MAYBE},
    "best": (dict, NoneType),
    "environment": {"hardware": str},
}
"""What a study's record has at least, see `RunFolder.read_json`."""

BUSY_SHARE: Final = 0.8
"""Share of the time with a kernel running below which a row ranks implementations, not algorithms."""


def _inside(*names: str) -> Callable[[dict[str, Any]], float | None]:
    """A number somewhere in a summary; None where an older record, or another device, does not have it."""

    def read(summary: dict[str, Any]) -> float | None:
        value: Any = summary
        for name in names:
            value = (value or {}).get(name)
        return value

    return read


def _cost(*names: str) -> Callable[[dict[str, Any]], float | None]:
    """A number that tells of the run only if it had the board to itself, and is None otherwise."""
    read = _inside(*names)
    return lambda summary: None if shared_its_board(summary) else read(summary)


def _allocator_mib(summary: dict[str, Any]) -> float | None:
    """The peak of the device's allocator. On a CPU the process's peak belongs to all arms that it has run."""
    memory = summary["memory"]
    return memory["peak_mib"] if memory["method"] == "torch allocator" else None


QUANTITIES: Final[dict[str, Callable[[dict[str, Any]], float | None]]] = {
    "accuracy": _inside("test_accuracy"),
    "validation_accuracy": _inside("validation_accuracy"),
    "passes": _inside("passes"),
    "best_epochs": lambda summary: sum(stage["best_epoch"] for stage in summary["stages"]),
    "seconds": _cost("seconds"),
    "gross_j": _cost("energy", "gross_j"),
    "net_j": _cost("energy", "net_j"),
    "idle_w": _inside("energy", "idle_w"),
    "mean_w": _cost("energy", "mean_w"),
    "j_per_sample": _cost("energy", "j_per_sample"),
    "utilisation": _cost("energy", "regime", "utilisation"),
    "co2e_g": _cost("carbon", "g_co2e"),
    "device_mib": _inside("memory", "device_mib"),
    "allocator_mib": _allocator_mib,
    "flops": _inside("flops"),
    "forward_flops": _inside("forward_flops"),
    "blocks": _inside("blocks"),
}
"""What can be asked of an arm, by name: a function of a run's summary."""


@dataclass(frozen=True)
class Entry:
    """One arm under one protocol on one kind of hardware.

    Attributes:
        study: the comparison's folder, relative to where was looked; "." for runs that belong to none.
        label: name of the arm.
        config: its configuration, whatever the seed.
        protocol: "own", "matched" or "tuned".
        hardware: the device.
        analysis: what the comparison has fixed beforehand.
        runs: finished runs by seed.
        failed: reasons by seed.
        skipped: why the arm could not run.
        missing: seeds planned and not run.
    """

    study: str
    label: str
    config: RunConfig
    protocol: str
    hardware: str
    analysis: Analysis = field(default_factory=Analysis)
    runs: dict[int, list[Run]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    skipped: str | None = None
    missing: tuple[int, ...] = ()

    @property
    def place(self) -> tuple[str, str, str, str, str]:
        """What paired arms have in common."""
        return self.study, self.config.dataset, self.config.network, self.protocol, self.hardware

    @property
    def is_baseline(self) -> bool:
        return self.label == self.analysis.baseline

    @property
    def metric(self) -> str:
        """What accuracy is here: "accuracy", or what is in its place for links of graphs or for reconstructions."""
        return next((run.summary.get("metric", "accuracy") for run in self.all_runs()), "accuracy")

    def all_runs(self) -> list[Run]:
        return [run for repeats in self.runs.values() for run in repeats]

    def per_seed(self, quantity: str) -> dict[int, float]:
        """A quantity by seed, of repeats their mean; without seeds for which it is not known."""
        read = QUANTITIES[quantity]
        found = {seed: [read(run.summary) for run in repeats] for seed, repeats in self.runs.items()}
        return {
            seed: statistics.fmean(known)
            for seed, values in found.items()
            if len(known := [value for value in values if value is not None]) == len(values)
        }

    def values(self, quantity: str) -> list[float]:
        """A quantity of every seed; empty unless it is known for all of them."""
        known = self.per_seed(quantity)
        return list(known.values()) if len(known) == len(self.runs) else []

    def mean(self, quantity: str) -> float | None:
        values = self.values(quantity)
        return statistics.fmean(values) if values else None

    def sd(self, quantity: str) -> float | None:
        """Standard deviation over seeds; None with fewer than two."""
        values = self.values(quantity)
        return statistics.stdev(values) if len(values) > 1 else None

    def flags(self) -> list[str]:
        return list(dict.fromkeys(flag for run in self.all_runs() for flag in run.summary["energy"]["flags"]))

    def boards(self) -> set[str]:
        """The boards that it ran on, by the hashes in their records, where those name one."""
        sources = [run.summary["energy"].get("source") or {} for run in self.all_runs()]
        return {source["uuid_hash"] for source in sources if source.get("uuid_hash")}

    def regime(self) -> str | None:
        """ "busy" or "host-bound", by the seeds of which it is known; None where it is known of none."""
        shares = self.per_seed("utilisation").values()
        if not shares:
            return "host-bound" if "HOST_BOUND" in self.flags() else None
        return "busy" if statistics.fmean(shares) >= BUSY_SHARE else "host-bound"


def pairs(ours: Entry, baseline: Entry, quantity: str) -> tuple[list[float], list[float]]:
    """A quantity of both arms over the seeds for which both have it."""
    a, b = ours.per_seed(quantity), baseline.per_seed(quantity)
    seeds = sorted(known_pairs(ours, baseline, quantity))
    return [a[seed] for seed in seeds], [b[seed] for seed in seeds]


def known_pairs(ours: Entry, baseline: Entry, quantity: str) -> set[int]:
    """The seeds for which both arms have a quantity."""
    return ours.per_seed(quantity).keys() & baseline.per_seed(quantity).keys()


def baseline_of(entry: Entry, entries: Iterable[Entry]) -> Entry | None:
    """The arm that `entry` is paired with.

    Raises:
        UsageError: several could be meant.
    """
    here = [other for other in entries if (other.place, other.metric) == (entry.place, entry.metric) and other.runs]
    named = [other for other in here if other.is_baseline]
    alike = [other for other in here if other.config.algorithm == entry.analysis.baseline]
    if not named and len(alike) > 1:
        raise UsageError(
            f"on {entry.config.dataset} {entry.config.network} several arms could be the baseline: "
            f"{', '.join(other.label for other in alike)}; choose one with --baseline"
        )
    return next(iter([*named, *alike]), None)


def collect(
    root: Path,
    *,
    baseline: str | None = None,
    mixed_hardware: bool = False,
    datasets: Collection[str] = (),
    say: Say = warnings.warn,
) -> list[Entry]:
    """Every arm under a folder: of the comparisons there, and of runs that belong to none.

    Args:
        root: where to look.
        baseline: label of the arm to pair with, instead of those that the comparisons name.
        mixed_hardware: allow arms of several kinds of hardware; they are never paired.
        datasets: whose arms are wanted; none for all.
        say: told of what cannot be read, and is left out.

    Raises:
        DataError: nothing there.
        UsageError: several kinds of hardware, without being asked for.
    """
    found = finished_runs(root, epochs=True, say=say)
    entries: list[Entry] = []
    for folder in _studies(root):
        own = [run for run in found if run.path.is_relative_to(folder / RUNS)]
        found = [run for run in found if not run.path.is_relative_to(folder)]
        study = read_or_leave_out("comparison", folder, _plan_and_ledger, say)
        if study is not None:
            entries += _planned(folder.relative_to(root).as_posix(), *study, own)
    entries += _loose(found)
    entries = [entry for entry in entries if not datasets or entry.config.dataset in datasets]
    if not entries:
        raise nothing_to_show(root, datasets)
    hardware = sorted({entry.hardware for entry in entries if entry.runs})
    if len(hardware) > 1 and not mixed_hardware:
        raise UsageError(f"runs of {' and '.join(hardware)} do not belong in one table; --mixed-hardware labels them")
    if baseline is not None:
        baseline = arm_label(baseline)
        if baseline not in {entry.label for entry in entries}:
            raise UsageError(f"no arm is called {baseline}: {', '.join(dict.fromkeys(e.label for e in entries))}")
        entries = [replace(entry, analysis=replace(entry.analysis, baseline=baseline)) for entry in entries]
    return entries


def _plan_and_ledger(folder: Path) -> tuple[Plan, Ledger]:
    return Plan.read(folder), Ledger(folder / LEDGER)


def read_plans(root: Path) -> dict[str, Plan]:
    """The comparisons under a folder, by their folder's name, without those that `collect` says it has left out."""
    found = {
        folder.relative_to(root).as_posix(): read_or_leave_out(
            "comparison", folder, _plan_and_ledger, lambda text: None
        )
        for folder in _studies(root)
    }
    return {name: study[0] for name, study in found.items() if study is not None}


def _studies(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.rglob(PLAN))


def _planned(study: str, plan: Plan, ledger: Ledger, found: Sequence[Run]) -> list[Entry]:
    """The arms of one comparison, in the order of its plan."""
    by_key = defaultdict(list)
    for run in found:
        by_key[config_key(run.config)].append(run)
    entries = []
    for protocol in plan.protocols:
        for arm in plan.arms:
            passes = plan.passes(arm, protocol)
            known = protocol == OWN or passes is not None
            runs = {seed: by_key[config_key(arm.run_config(seed, passes))] for seed in plan.seeds if known}
            done = {seed: repeats for seed, repeats in runs.items() if repeats}
            reasons = {seed: ledger.failure(Slot(arm, protocol, seed, passes).name) for seed in plan.seeds}
            failed = {seed: why for seed, why in reasons.items() if why is not None and seed not in done}
            hardware = dict.fromkeys(run.summary["hardware"] for repeats in done.values() for run in repeats)
            for device in hardware or plan.hardware[:1]:
                here = {seed: [r for r in repeats if r.summary["hardware"] == device] for seed, repeats in done.items()}
                entries.append(
                    Entry(
                        study,
                        arm.label,
                        arm.run_config(0, passes),
                        protocol,
                        device,
                        plan.analysis,
                        {seed: repeats for seed, repeats in here.items() if repeats},
                        failed,
                        arm.skipped,
                        () if arm.skipped else tuple(s for s in plan.seeds if s not in done and s not in failed),
                    )
                )
    return entries


def _loose(found: Sequence[Run]) -> list[Entry]:
    """Runs of `bpfree run`: those that differ only in their seed make an arm.

    How a run was spread over devices is in no configuration, and yet part of what an arm is.
    """
    groups: dict[tuple[str, str, str], dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in found:
        form = run.summary.get("parallel", {}).get("form", "")
        key = config_key(replace(run.config, seed=0)), run.summary["hardware"], form
        groups[key][run.config.seed].append(run)
    entries = []
    for (_, hardware, form), runs in groups.items():
        config = replace(next(iter(runs.values()))[0].config, seed=0)
        protocol = OWN if config.training.passes is None else MATCHED
        label = f"{config.algorithm}, {form}" if form else config.algorithm
        entries.append(Entry(".", label, config, protocol, hardware, runs=dict(sorted(runs.items()))))
    entries = [replace(entry, protocol=_loose_protocol(entry, entries)) for entry in entries]
    return [replace(entry, label=_loose_label(entry, entries)) for entry in entries]


def _loose_protocol(entry: Entry, entries: Sequence[Entry]) -> str:
    """What of arms beside each other may be said: numbers of passes that were given match if they are the same."""
    passes = {other.config.training.passes for other in entries if other.place == entry.place}
    return entry.protocol if len(passes) == 1 else TUNED


def _loose_label(entry: Entry, entries: Sequence[Entry]) -> str:
    """As short as tells it from its neighbours."""
    alike = [other for other in entries if (other.place, other.label) == (entry.place, entry.label)]
    if len(alike) == 1:
        return entry.label
    label = f"{entry.label}@{entry.config.preset or 'none'}"
    same_preset = [other for other in alike if other.config.preset == entry.config.preset]
    return label if len(same_preset) == 1 else f"{label}#{same_preset.index(entry) + 1}"


def tuning_records(root: Path, *, say: Say = warnings.warn) -> list[dict[str, Any]]:
    """What `bpfree tune` has recorded under a folder; `say` is told of what cannot be read, and is left out."""

    def read(folder: Path) -> dict[str, Any]:
        return RunFolder(folder).read_json(TUNING, STUDY)

    paths = sorted(root.rglob(TUNING))
    found = [read_or_leave_out("study", path.parent, read, say) for path in paths]
    return [record for record in found if record is not None]
