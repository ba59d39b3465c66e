"""Tuning: the same search, the same budget and the same rules of selection for every rule. Validation data only.

A trial is a run (`experiments.run`) that is not tested and whose weights are not kept. Studies outlive their processes:
`tune` with the same settings goes on where it was stopped, in whatever way.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from bpfree.algorithms import Learner, algorithm
from bpfree.data import GraphDataset
from bpfree.energy import EnergyMeter, choose_source
from bpfree.energy.choose import choose_for_program
from bpfree.energy.result import JOULES_PER_WH
from bpfree.energy.sources import NullSource
from bpfree.errors import BpfreeError, CheckpointError, DataError, TrainingError, UsageError, cannot_write, unknown_name
from bpfree.experiments import records
from bpfree.experiments import run as runs
from bpfree.experiments.config import Preset, RunConfig, differing, write_preset
from bpfree.experiments.records import RunFolder
from bpfree.experiments.run import AnyDataset, Reporter
from bpfree.experiments.search import SharedSpace, declare, suggest
from bpfree.experiments.signals import StopRequest, stop_without
from bpfree.experiments.train import InterruptedRunError, Trainer
from bpfree.networks import build_network, dropout_layers
from bpfree.words import count_of

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

    from bpfree.experiments.study import Direction, SharedStudy

PRUNERS: Final = ("median", "none")
RECORD: Final = "tuning.json"
TRIALS: Final = "trials"
TUNING_SEED: Final = 100
"""Seed of trials and sampler unless another is given; runs that are reported have others."""

RESULT, FAILED, RUN, WALL_S = "result", "failed", "run", "wall_s"  # attributes of a trial in the storage


@dataclass(frozen=True)
class TuneConfig:
    """One study: what is searched, how, and how long.

    Attributes:
        name: of the study, of its folder and of the preset that comes of it.
        base: everything that is not searched.
        shared: the part of the space that every rule has.
        given: parameters of the learner that the user set, which are not searched.
        trials: how many, finished, pruned or failed.
        pareto: minimise joules beside maximising validation accuracy.
        target: minimise the joules up to the first validation at this accuracy, %, instead; trials end there, or where
            they have spent more than the best one.
        pruner: "median" or "none".
    """

    name: str
    base: RunConfig
    shared: SharedSpace = field(default_factory=SharedSpace)
    given: dict[str, Any] = field(default_factory=dict)
    trials: int = 50
    pareto: bool = False
    target: float | None = None
    pruner: str = "median"

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise UsageError(f"the name of a study is that of one folder in --results, got {self.name!r}")
        if self.trials < 1:
            raise UsageError(f"tuning takes 1 trial or more, got {self.trials}")
        if self.pruner not in PRUNERS:
            raise unknown_name("pruner", self.pruner, PRUNERS)
        if self.pareto and self.pruner != "none":
            raise UsageError("with two objectives no trial is better than another until both are known; use no pruner")
        if self.target is None:
            return
        if not 0 < self.target <= 100:
            raise UsageError(f"the target is a validation {self.base.metric} in percent, got {self.target:g}")
        if self.pareto:
            raise UsageError("joules to a target are one objective: leave out the target, or the front")
        if self.pruner != "none":
            raise UsageError("the median pruner compares accuracies; with a target the cost decides, so use no pruner")

    @property
    def objectives(self) -> dict[str, Direction]:
        """What is sought, and which way."""
        if self.target is not None:
            return {f"gross joules to {self.target:g} %": "minimize"}
        return {
            f"validation {self.base.metric}": "maximize",
            **({"gross joules": "minimize"} if self.pareto else {}),
        }

    @property
    def needs_joules(self) -> bool:
        """Whether joules are an objective."""
        return self.pareto or self.target is not None

    def values(self, trial: Mapping[str, Any]) -> list[float]:
        """A finished trial's value of each objective."""
        if self.target is not None:
            return [trial["gross_j"]]
        return [trial["validation_accuracy"], *([trial["gross_j"]] if self.pareto else [])]

    def best_of(self, trials: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The finished trial of the best first objective, of equals the first."""
        sign = 1 if self.target is None else -1
        finished = [trial for trial in trials if trial["state"] == "finished"]
        return max(finished, key=lambda trial: sign * self.values(trial)[0], default=None)

    def settings(self) -> dict[str, Any]:
        """What makes the study what it is, as plain values; the number of trials, the device and the meter do not."""
        values = asdict(self)
        for name in ("name", "trials"):
            del values[name]
        for name in ("device", "energy", "preset"):
            del values["base"][name]
        values["space"], _ = declare(self.base, self.shared, self.given)  # with what the rule declares by now
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


def study_name(base: RunConfig, *, convergence: bool = False, pareto: bool = False, target: float | None = None) -> str:
    """The usual name of a study, fit for files."""
    words = [base.dataset, algorithm(base.algorithm).alias, base.network]
    words += [] if base.task == RunConfig.task else [base.task]
    words += ["convergence"] if convergence else []
    words += ["pareto"] if pareto else []
    words += [] if target is None else [f"to-{target:g}"]
    return re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(words))


def fit_space(shared: SharedSpace, base: RunConfig, dataset: AnyDataset) -> SharedSpace:
    """The shared space without what has no meaning here, which the rule has no part in.

    That is dropout in networks without such layers, batches on graphs, and batches of more than half the training set.
    """
    if isinstance(dataset, GraphDataset):
        input_shape: tuple[int, ...] = (dataset.features.shape[1],)
        sizes: tuple[int, ...] = ()
    else:
        input_shape = dataset.input_shape
        samples = len(dataset.split(base.training.validation)[0])
        sizes = tuple(size for size in shared.batch_sizes if 2 * size <= samples)
        if not sizes:
            raise DataError(f"{samples} training samples do not fill two batches of {min(shared.batch_sizes)}")
    layers = dropout_layers(build_network(base.network, input_shape))
    return replace(shared, batch_sizes=sizes, dropout=shared.dropout if layers else None)


class Observer:
    """Hears how tuning goes; does nothing by itself. Copies of it listen in other processes."""

    def started(self, config: TuneConfig, folder: Path, space: Mapping[str, Any], done: int) -> None:
        """Trials are about to begin; `done` of them were done before."""

    def trial_started(self, number: int, run: RunConfig) -> None:
        """A trial begins or goes on."""

    def trial_progress(self, fraction: float, record: Mapping[str, Any]) -> None:
        """An epoch of a trial has been validated; `fraction` of the planned ones are done."""

    def trial_ended(self, trial: Mapping[str, Any], ended: int, best: Mapping[str, Any] | None) -> None:
        """A trial, as in the record, has ended: the `ended`-th; `best` is the best until now."""


class PrunedTrialError(BpfreeError):
    """Enough has been seen of a trial."""


class TargetReachedError(BpfreeError):
    """A trial is at the accuracy that was asked for.

    Args:
        record: of the epoch.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__(f"reached {record['validation_accuracy']:.2f} %")
        self.found = {name: record[name] for name in ("validation_accuracy", "validation_loss")}


class Watch(Reporter):
    """Listens to a trial's run: tells the study how it goes, ends it when the pruner says so, knows what it cost.

    Args:
        trial: of the study.
        observer: hears of every epoch.
        judged: whether there is a pruner to ask.
        target: validation accuracy that ends the trial, %, or None.
        ceiling: joules above which the trial is no better than others; infinite for any.
        stop: whether the whole worker has been asked to stop.
    """

    def __init__(
        self,
        trial: Trial,
        observer: Observer,
        *,
        judged: bool,
        target: float | None,
        ceiling: float,
        stop: StopRequest,
    ) -> None:
        from bpfree.experiments.study import REPORTS

        self.cost: dict[str, Any] = {"seconds": 0.0, "gross_j": 0.0, "net_j": None, "method": "none", "flags": []}
        self.passes = 0
        self.best = 0.0
        self._trial, self._observer, self._stop = trial, observer, stop
        self._target, self._ceiling = target, ceiling
        self._reports = REPORTS if judged else 0
        # what a worker that died has reported already; the one report that it may not have asked about is the last
        self._known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values if judged else {}
        self._asked = max(self._known, default=0) - 1
        self._reported = 0

    def started(self, config: RunConfig, folder: Path, learner: Learner, trainer: Trainer) -> None:
        self._trainer = trainer
        self.best = max((record["validation_accuracy"] for record in trainer.progress.history), default=0.0)
        self._trial.set_user_attr(RUN, folder.name)
        if self._stop():  # before the run began to listen
            raise InterruptedRunError(f"stopped by {self._stop.name}")

    def epoch(self, record: dict[str, Any]) -> None:
        fraction = self._trainer.fraction
        self._observer.trial_progress(fraction, record)
        self.best = max(self.best, record["validation_accuracy"])
        if self._target is not None:
            self._weigh(record, self._target)
        due = int(self._reports * fraction + 1e-9)
        if due > self._reported:
            with self._trainer.meter.paused():  # a database takes its time, which is not the rule's
                self._report(due, record["validation_accuracy"])

    def _weigh(self, record: Mapping[str, Any], target: float) -> None:
        """End the trial at its target, or when it can only be worse than others."""
        if record["validation_accuracy"] >= target:
            raise TargetReachedError(record)
        spent = record["joules_at_start"]
        if spent is not None and spent > self._ceiling:
            raise PrunedTrialError(f"spent {spent:.0f} J below the target, more than the best trial needs to reach it")

    def _report(self, due: int, accuracy: float) -> None:
        """Report for every tenth that has passed, so that trials of any length can be compared."""
        for step in range(self._reported + 1, due + 1):
            if step not in self._known:
                self._trial.report(accuracy, step)
        self._reported = due
        if self._asked < due < self._reports and self._trial.should_prune():
            raise PrunedTrialError(f"pruned when {due} of {self._reports} were done, at {accuracy:.2f} %")

    def finished(self) -> None:
        meter = cast(EnergyMeter, self._trainer.meter)
        self.passes = self._trainer.passes
        if "total" in (totals := meter.totals()):
            self.cost = cost(totals["total"].as_dict())


def cost(energy: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run's energy."""
    return {name: energy[name] for name in ("seconds", "gross_j", "net_j", "method", "flags")}


def found(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run's summary."""
    names = ("validation_accuracy", "validation_loss", "passes", "hardware")
    return {**{name: summary[name] for name in names}, **cost(summary["energy"])}


class Worker:
    """Does trials of a study until there are none left.

    Args:
        config: the study.
        study: as this worker shares it.
        folder: where trials leave their runs.
        dataset: what to train on.
        observer: hears how it goes.
    """

    def __init__(
        self, config: TuneConfig, study: SharedStudy, folder: Path, dataset: AnyDataset, observer: Observer
    ) -> None:
        self.config, self.study, self.dataset, self.observer = config, study, dataset, observer
        self.root = folder / TRIALS
        self.device = runs.pick_device(config.base.device)
        self.hardware = records.hardware(self.device)

    def work(self, stop: StopRequest) -> None:
        """Do trials.

        Raises:
            InterruptedRunError: asked to stop; the trial in hand can be taken up again.
            CheckpointError: records cannot be written.
        """
        with self.study.working():
            while (trial := self.study.take()) is not None:
                self._do(trial, stop)
                ended = self.study.ended()
                best = self.config.best_of([describe(other) for other in ended])
                self.observer.trial_ended(describe(_frozen(self.study, trial)), len(ended), best)
                if self.device.type == "cuda":
                    gc.collect()  # graphs and optimisers refer to each other in cycles
                    torch.cuda.empty_cache()
                if stop():
                    raise InterruptedRunError(f"stopped by {stop.name}")

    def _do(self, trial: Trial, stop: StopRequest) -> None:
        """Do one trial, and tell the study how it ended."""
        config = suggest(trial, self.config.base, self.config.shared, self.config.given)
        self.observer.trial_started(trial.number, config)
        target = self.config.target
        best = None if target is None else self.config.best_of([describe(other) for other in self.study.ended()])
        watch = Watch(
            trial,
            self.observer,
            judged=self.config.pruner != "none",
            target=target,
            ceiling=math.inf if best is None else best["gross_j"],
            stop=stop,
        )
        started = time.monotonic()
        result: dict[str, Any] = {}
        defect: Exception | None = None
        try:
            result = found(self._run(trial, config, watch))
            if target is not None:
                result["reason"] = f"ended at {result['validation_accuracy']:.2f} %, below the target"
        except TargetReachedError as reached:
            result = reached.found
        except PrunedTrialError as error:
            result = {"reason": str(error)}
        except (TrainingError, UsageError, DataError) as error:  # of this configuration
            trial.set_user_attr(FAILED, str(error))
        except (InterruptedRunError, CheckpointError):
            raise
        except Exception as error:
            trial.set_user_attr(FAILED, f"{type(error).__name__}: {error}")
            defect = error
        finally:
            trial.set_user_attr(WALL_S, trial.user_attrs.get(WALL_S, 0.0) + time.monotonic() - started)
        self._end(trial, {"hardware": self.hardware, "passes": watch.passes, **watch.cost, **result}, watch.best)
        if defect is not None:
            raise defect

    def _run(self, trial: Trial, config: RunConfig, watch: Watch) -> dict[str, Any]:
        """Run a trial, or go on with the run that another worker left behind."""
        options: dict[str, Any] = {"dataset": self.dataset, "reporter": watch, "keep_model": False, "test": False}
        left = self.root / trial.user_attrs.get(RUN, "")
        if RUN in trial.user_attrs and (left / records.CONFIG).is_file():
            return runs.resume(left, **options)
        return runs.run(config, self.root, **options)

    def _end(self, trial: Trial, result: dict[str, Any], best: float) -> None:
        """Record how a trial ended, whose highest accuracy was `best`; what a run needs to go on can be removed."""
        if RUN in trial.user_attrs:
            RunFolder(self.root / trial.user_attrs[RUN]).remove(records.CHECKPOINT)
        rated = "validation_accuracy" in result and "reason" not in result
        if rated and self.config.needs_joules and result["gross_j"] is None:
            trial.set_user_attr(FAILED, "its joules could not be measured")
            rated = False
        trial.set_user_attr(RESULT, result)
        if rated:
            self.study.finish(trial, self.config.values(result))
        elif FAILED in trial.user_attrs or self.config.target is None:
            self.study.abandon(trial)
        else:  # of a run that another worker had ended no epoch has been heard
            best = max(best, result.get("validation_accuracy", 0.0))
            self.study.abandon(trial, shortfall=self.config.target - best)


def tune(
    config: TuneConfig,
    root: Path,
    *,
    dataset: AnyDataset | None = None,
    data_root: Path | None = None,
    storage: str | None = None,
    workers: int = 1,
    apart: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Do the trials of a study that are left to do, and write its record and its presets.

    Args:
        config: the study.
        root: where the folders of studies are; this one's is called `config.name`.
        dataset: a data set that is at hand, instead of the one that `config.base` names.
        data_root: where data sets are; the user's default if left out.
        storage: database URL, or path of a journal file; a SQLite file in the study's folder if left out.
        workers: processes that share the study: one per GPU if there are several, otherwise all on one device.
        apart: refuse more workers than there are devices, so that no two trials share one.
        observer: hears how it goes.

    Returns:
        The record, as written to tuning.json, and where that is ("folder").

    Raises:
        UsageError: something in `config` is unknown or does not fit, or the study exists with other settings.
        DataError: the data set is missing or damaged. Nothing has been started then, nor for any `UsageError`.
        TrainingError: no trial succeeded, or a worker failed.
        InterruptedRunError: a signal asked to stop; calling this again goes on.
        CheckpointError: the folder cannot be written.
    """
    _require_optuna()
    if dataset is None:
        dataset = runs.load_dataset(config.base.dataset, data_root)
    config = replace(config, base=replace(config.base, dataset=dataset.name))
    devices = worker_devices(config.base.device, workers)
    shared_device = len(set(devices)) < workers
    if apart and shared_device:
        count = len(set(devices))
        raise UsageError(
            f"--nproc 1 gives each trial a device of its own, and {workers} workers have {count} here; use --workers "
            f"{count}, or leave out --nproc to let them share, without joules"
        )
    config = _checked(config, dataset, shared_device=shared_device)
    folder = root / config.name
    try:
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    where = storage or f"sqlite:///{folder.absolute() / 'study.db'}"
    from bpfree.experiments.study import told_of_storage

    with told_of_storage():
        record = _search(config, folder, where, dataset, devices, observer or Observer())
    if record["best"] is None:
        trials = record["trials"]
        reached = [trial["validation_accuracy"] for trial in trials if "validation_accuracy" in trial]
        if config.target is not None and reached:
            raise TrainingError(
                f"none of {count_of(len(trials), 'trial')} reached {config.target:g} %, the best {max(reached):.2f} %; "
                "lower --target, or allow more trials or passes"
            )
        (reason, count), *_ = Counter(trial["reason"] for trial in trials).most_common()
        raise TrainingError(f"none of {count_of(len(trials), 'trial')} succeeded; {count} of them: {reason}")
    return {**record, "folder": str(folder)}


def _search(
    config: TuneConfig, folder: Path, storage: str, dataset: AnyDataset, devices: Sequence[str], observer: Observer
) -> dict[str, Any]:
    """Do the trials that are left, with a worker for each of `devices`, and write the record, whatever happens."""
    study = _open(config, folder, storage)
    space, _ = declare(config.base, config.shared, config.given)
    observer.started(config, folder, space, len(study.ended()))
    stop = StopRequest()
    try:
        with stop:
            if len(devices) == 1:
                Worker(_on(config, devices[0]), study, folder, dataset, observer).work(stop)
            else:
                begin = partial(_work_apart, folder=folder, storage=storage, dataset=dataset, observer=observer)
                _wait_for([partial(begin, _on(config, device), threads=len(devices)) for device in devices], stop)
        if left := study.running():
            raise TrainingError(f"workers died and left {count_of(len(left), 'trial')}; the same command goes on")
    except InterruptedRunError as error:
        done = f"{len(study.ended())} of {count_of(config.trials, 'trial')} done"
        # a trial is no run to be resumed by itself
        raise InterruptedRunError(error.where, f"{done}, the same command goes on") from None
    finally:
        record = _write_record(config, study, folder, space, len(devices), devices)
    return record


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UsageError('tuning needs Optuna: pip install "bpfree[tune]"') from error


def worker_devices(device: str, workers: int) -> list[str]:
    """Where each worker trains: on a GPU of its own as long as there are some, unless one device is named.

    Raises:
        UsageError: no such device here.
    """
    boards = torch.cuda.device_count()
    if device in {"auto", "cuda"} and workers > 1 and boards > 1:
        return [f"cuda:{index % boards}" for index in range(workers)]
    runs.pick_device(device)
    return [device] * workers


def _on(config: TuneConfig, device: str) -> TuneConfig:
    return replace(config, base=replace(config.base, device=device))


def _checked(config: TuneConfig, dataset: AnyDataset, *, shared_device: bool) -> TuneConfig:
    """The study as it can be done here; whatever would make every trial fail is found before there is one."""
    config = replace(config, shared=fit_space(config.shared, config.base, dataset))
    _, corner = declare(config.base, config.shared, config.given)
    runs.build_learner(corner, dataset, torch.device("cpu"))
    runs.load_batches(corner, dataset, torch.device("cpu"), torch.contiguous_format, test=False)
    if shared_device:  # a meter sees the whole device
        if config.needs_joules:
            raise UsageError("joules as an objective need a device for each worker; use fewer workers")
        return replace(config, base=replace(config.base, energy="none"))
    if config.needs_joules:
        on_gpu = runs.pick_device(config.base.device).type == "cuda"
        # without a CUDA context, which the meters of workers would take for a stranger
        choose = choose_for_program if on_gpu else choose_source
        with closing(choose(config.base.energy)) as source:
            if isinstance(source, NullSource):
                raise UsageError(f"joules as an objective need to be measured, and cannot be: {source.reason}")
    return config


def _open(config: TuneConfig, folder: Path, storage: str) -> SharedStudy:
    from bpfree.experiments.study import SharedStudy

    return SharedStudy(
        config.name,
        storage,
        folder,
        settings=config.settings(),
        trials=config.trials,
        seed=config.base.seed,
        pruner=config.pruner,
        directions=list(config.objectives.values()),
    )


# -- workers in processes of their own ----------------------------------------------------------------------------


def _wait_for(workers: Sequence[Any], stop: StopRequest) -> None:
    """Run workers side by side until all have ended; pass a signal on to them once.

    Raises:
        TrainingError: one of them failed; the others have ended their work.
        InterruptedRunError: asked to stop, and all have stopped.
    """
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    processes = [context.Process(target=work, kwargs={"failures": failures}) for work in workers]
    # Workers inherit what is blocked: while they import PyTorch, Ctrl-C would be a stack trace of each of them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    told = False
    while alive := [process for process in processes if process.is_alive()]:
        multiprocessing.connection.wait([process.sentinel for process in alive], timeout=0.5)
        if stop() and not told:
            told = True
            for process in alive:
                process.terminate()
    if stop():
        raise InterruptedRunError(f"stopped by {stop.name}")
    if not failures.empty():
        raise TrainingError(f"a worker failed: {failures.get()}")


def _work_apart(
    config: TuneConfig,
    *,
    folder: Path,
    storage: str,
    dataset: AnyDataset,
    observer: Observer,
    threads: int,
    failures: Any,
) -> None:
    """One worker, in a process of its own."""
    os.setsid()  # Ctrl-C reaches the parent, which passes it on: a second signal would stop a run before it is saved
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    stop_without(parent.pid)
    if not torch.cuda.is_available() or config.base.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // threads))
    from bpfree.experiments.study import told_of_storage

    try:
        with told_of_storage(), StopRequest() as stop:
            Worker(config, _open(config, folder, storage), folder, dataset, observer).work(stop)
    except InterruptedRunError:
        return
    except BpfreeError as error:
        failures.put(str(error))
    except Exception as error:
        failures.put(f"{type(error).__name__}: {error}")
        raise


# -- the record ---------------------------------------------------------------------------------------------------


def _frozen(study: SharedStudy, trial: Trial) -> FrozenTrial:
    return study.all()[trial.number]


def describe(trial: FrozenTrial) -> dict[str, Any]:
    """A trial as the record has it: what was tried, how it ended and why, what it reached and cost."""
    attributes = trial.user_attrs
    result = dict(attributes.get(RESULT, {}))
    reason = attributes.get(FAILED) or result.pop("reason", None)
    if not trial.state.is_finished():
        state = "running"
    elif FAILED in attributes:
        state = "failed"
    else:
        state = "finished" if reason is None else "pruned"
    result.pop("reason", None)
    return {
        "number": trial.number,
        "state": state,
        "reason": reason,
        "values": trial.params,
        **result,
        "wall_s": attributes.get(WALL_S),
        "run": attributes.get(RUN),
    }


def bill(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tuning cost: every trial counts, whatever became of it.

    Returns:
        "trials" begun and by state, data "passes", "seconds" and "gross_j" of training and validation as in a run's
        summary, "wh", "wall_s" with all that surrounds them, and "unmeasured", the number of trials without joules; if
        there are such, joules are None.
    """
    states = Counter(trial["state"] for trial in trials)
    ended = [trial for trial in trials if trial["state"] != "running"]
    joules = [trial["gross_j"] for trial in ended]
    gross = None if None in joules else sum(joules)
    return {
        "trials": len(trials),
        **{state: states[state] for state in ("finished", "pruned", "failed", "running")},
        "passes": sum(trial["passes"] for trial in ended),
        "seconds": sum(trial["seconds"] for trial in ended),
        "wall_s": sum(trial["wall_s"] or 0.0 for trial in trials),
        "gross_j": gross,
        "wh": None if gross is None else gross / JOULES_PER_WH,
        "unmeasured": joules.count(None),
        "method": " + ".join(dict.fromkeys(trial["method"] for trial in ended)),
    }


def _write_record(
    config: TuneConfig, study: SharedStudy, folder: Path, space: Mapping[str, Any], workers: int, devices: Sequence[str]
) -> dict[str, Any]:
    """Write tuning.json and the presets of what has been found so far."""
    import optuna

    trials = [describe(trial) for trial in study.all()]
    best = config.best_of(trials)
    front = sorted(trial.number for trial in study.study.best_trials) if config.pareto else []
    environment = records.environment(runs.pick_device(devices[0]))
    record: dict[str, Any] = {
        "study": config.name,
        "algorithm": config.base.algorithm,
        "dataset": config.base.dataset,
        "network": config.base.network,
        "objectives": list(config.objectives),
        "seed": config.base.seed,
        "settings": config.settings(),
        "space": dict(space),
        "sampler": {"name": "TPESampler", **study.sampler.settings, "seed": [config.base.seed, "trial number"]},
        "pruner": {"name": type(study.pruner).__name__, **study.pruner_settings},
        "optuna": optuna.__version__,
        "workers": workers,
        "workers_per_device": workers // len(set(devices)),
        "asked": config.trials,
        "bill": bill(trials),
        "best": best,
        "front": front,
        "presets": [],
        "environment": environment,
        "trials": trials,
    }
    kept = {best["number"]: config.name} if best else {}
    kept.update({number: f"{config.name}-trial{number}" for number in front if number not in kept})
    for number, name in kept.items():
        write_preset(_preset(config, study.all()[number], trials[number], name, record), folder / f"{name}.toml")
        record["presets"].append(f"{name}.toml")
    RunFolder(folder).write_json(RECORD, record)
    return record


def _preset(
    config: TuneConfig, frozen: FrozenTrial, trial: Mapping[str, Any], name: str, record: Mapping[str, Any]
) -> Preset:
    from optuna.trial import FixedTrial

    chosen = suggest(FixedTrial(frozen.params), config.base, config.shared, config.given)
    spent = record["bill"]
    joules = "joules not measured" if spent["gross_j"] is None else f"{spent['gross_j']:.0f} J"
    length = f"in {count_of(trial['passes'], 'pass')}"
    if config.target is not None:
        length += f" of {chosen.training.passes or chosen.training.epochs}, for {trial['gross_j']:.0f} J"
    return Preset(
        name=name,
        description=f"Tuned: validation {config.base.metric} {trial['validation_accuracy']:.2f} %, {length}",
        source=f"bpfree tune, trial {trial['number']} of {spent['trials']} (TPE, seed {config.base.seed}, "
        f"{spent['seconds']:.0f} s, {joules}), chosen on validation data",
        algorithm=config.base.algorithm,
        dataset=config.base.dataset,
        network=config.base.network,
        parameters=chosen.parameters,
        training=differing(chosen.training),
        task=config.base.task,
        tuning_seed=config.base.seed,
    )
