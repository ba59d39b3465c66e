"""One run from configuration to record: data, learner, meter, training, test, run folder."""

from __future__ import annotations

import resource
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from bpfree import data
from bpfree.algorithms import Learner, algorithm
from bpfree.algorithms.learner import DrawsNoise, evaluation_mode
from bpfree.data import Dataset, GraphDataset, GraphInfo
from bpfree.data.batches import Batches
from bpfree.data.fingerprint import fingerprint, same_data
from bpfree.data.graph_batches import AnyBatches, GraphBatches
from bpfree.energy import EnergyMeter, EnergyResult, choose_source
from bpfree.energy.carbon import CarbonTracker, carbon_intensity
from bpfree.energy.simulated import SimulatedSource
from bpfree.energy.sources import PowerSource
from bpfree.errors import CheckpointError, DataError, TrainingError, UsageError
from bpfree.experiments import records
from bpfree.experiments.config import RunConfig, command
from bpfree.experiments.graphs import check_rates_pairs, graph_parts, refuse_graph_settings, revealed_test, task_classes
from bpfree.experiments.pictures import draw_reconstructions, require_matplotlib
from bpfree.experiments.records import RunFolder
from bpfree.experiments.signals import StopRequest
from bpfree.experiments.stepper import numerics, step_precision
from bpfree.experiments.train import TRAIN, VALIDATION, InterruptedRunError, Progress, Trainer, evaluate, evaluate_draws
from bpfree.networks import build_network, set_dropout
from bpfree.networks.flops import FlopCounter
from bpfree.networks.gnn import GraphBlock
from bpfree.parallel import Alone, Ranks, Spread, Team, check_spread, spread_over

MIB: Final = 2**20
AnyDataset = Dataset | GraphDataset

TEST_DRAWS: Final = 5
"""Draws of the noise from which rules that need noise to answer are tested, as in NoProp's paper."""

PICTURED: Final = 10
"""Test images whose reconstructions are drawn."""

DATA: Final = "data"
"""What the record of a run's environment calls the fingerprint of its data."""

OWN_DATA: Final = "a run on data of your own goes on in Python: bpfree.experiments.run.resume(path, dataset=..)"

POLL_HZ: Final = 5.0
"""Rate at which runs sample power and counter, 1/s: half that of the sensors, since reading the counter takes 3 ms
(results/energy)."""


@dataclass(frozen=True)
class Measuring:
    """What is measured beside the run itself.

    Attributes:
        idle_w: powers of the idle device, W, as `measure_idle` found them before the run, for net joules; empty for
            those of the device's calibration, if any.
        idle_after_s: measure the idle device again this long after the run, s; 0 for not at all.
        carbon: country (ISO 3166, three letters) for CO2 equivalents by CodeCarbon; None for none.
        start_temperature_c: the temperature at which runs are meant to start, °C; others are flagged. None for any.
    """

    idle_w: tuple[float, ...] = ()
    idle_after_s: float = 0.0
    carbon: str | None = None
    start_temperature_c: float | None = None


@dataclass(frozen=True)
class Together:
    """The processes of a run, and what each of them does."""

    ranks: Ranks
    spread: Spread


class Reporter:
    """Hears how a run goes; does nothing by itself."""

    def started(self, config: RunConfig, folder: Path, learner: Learner, trainer: Trainer) -> None:
        """Training is about to begin."""

    def steps(self, stage: str, epoch: int, count: int) -> None:
        """`count` more steps of an epoch are done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch has been validated."""

    def finished(self) -> None:
        """Training has ended, one way or another."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no {name} here ({torch.cuda.device_count()} CUDA devices); use --device cpu")
    return device


def load_dataset(name: str, root: Path | None = None, *, download: bool = False) -> AnyDataset:
    """The data set or graph called `name`; arguments and errors are those of `data.load` and `data.load_graph`."""
    load = data.load_graph if isinstance(data.info(name), GraphInfo) else data.load
    loaded: AnyDataset = load(name, root, download=download)
    return loaded


def build_learner(
    config: RunConfig, dataset: AnyDataset, device: torch.device, *, place: torch.device | None = None
) -> Learner:
    """The learner of a run: the seed fixes the network first, so that every rule starts from the same one.

    Args:
        config: the run.
        dataset: what it trains on.
        device: where it will compute.
        place: where to leave the learner, if that is not `device`.
    """
    torch.manual_seed(config.seed)
    if isinstance(dataset, GraphDataset):
        if config.task == "autoencode":
            raise UsageError(f"the task autoencode is for images, and {dataset.name} is a graph")
        input_shape: tuple[int, ...] = (dataset.features.shape[1],)
        classes = task_classes(dataset, config.training)
    else:
        input_shape = dataset.input_shape
        classes = 0 if config.task == "autoencode" else dataset.classes
    network = build_network(config.network, input_shape)
    if isinstance(dataset, GraphDataset) and not any(isinstance(module, GraphBlock) for module in network.modules()):
        raise UsageError(
            f"{dataset.name} is a graph, and {config.network} has no graph convolutions; use gcn:2x128, sage:2x128 or "
            "gat:2x128"
        )
    if config.training.dropout is not None:
        set_dropout(network, config.training.dropout)
    learner = algorithm(config.algorithm).build(network, classes, input_shape, **config.parameters)
    if isinstance(dataset, GraphDataset) and config.training.split == "edges":
        check_rates_pairs(learner)
    convert_conv2d_weight_memory_format(learner, preferred_layout(network, device))
    return learner.to(device if place is None else place)


def preferred_layout(network: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels-last for convolutions on CUDA, where tensor cores want it."""
    convolutional = any(isinstance(module, nn.Conv2d) for module in network.modules())
    return torch.channels_last if convolutional and device.type == "cuda" else torch.contiguous_format


def run(
    config: RunConfig,
    root: Path | str,
    *,
    data_root: Path | None = None,
    dataset: AnyDataset | None = None,
    reporter: Reporter | None = None,
    measuring: Measuring = Measuring(),
    keep_model: bool = True,
    test: bool = True,
    together: Together | None = None,
) -> dict[str, Any]:
    """Do a run and record it in a new folder under `root`.

    Args:
        config: what to run.
        root: where run folders are made.
        data_root: where data sets are; the user's default if left out.
        dataset: a data set that is at hand, instead of the one that `config` names.
        reporter: hears how it goes.
        measuring: what is measured beside the run itself.
        keep_model: whether to keep the trained weights in the folder.
        test: whether to test at the end. Otherwise the test part is not touched, the summary has no test results and
            is called untested.json, which tables do not read: a trial of a tuner.
        together: the processes that do this run together, each of which calls this function; None for this one alone.

    Returns:
        The run's summary, as written to summary.json, and where that is ("run_dir"). Of several processes, those that
        are not the leader get an empty one.

    Raises:
        LostRankError: another process has died or does not answer.
        UsageError: something in `config` is unknown or does not fit.
        DataError: the data set is missing or damaged, or too small. A run that is refused, for this or for its usage,
            before it has anything to go on with leaves no folder.
        TrainingError: a loss is not finite, or memory ran out.
        InterruptedRunError: a signal asked to stop; the run can be resumed.
        CheckpointError: the folder cannot be written.
    """
    root = Path(root)
    if measuring.carbon is not None:
        carbon_intensity(measuring.carbon)  # refused before anything is made
    if dataset is None:
        dataset = load_dataset(config.dataset, data_root)
    config = replace(config, dataset=dataset.name)  # the record names what was trained on
    if config.task == "autoencode":
        require_matplotlib()  # before hours of training, not behind them
    device, learner = _learner_of(config, dataset, together)
    if together is None or together.ranks.rank == 0:
        folder = RunFolder.create(
            root,
            dataset=config.dataset,
            algorithm=algorithm(config.algorithm).alias,
            network=config.network,
            seed=config.seed,
        )
        ranks = 1 if together is None else together.ranks.size
        folder.write_json(records.CONFIG, config.to_dict())
        surroundings = {**records.environment(device, ranks), DATA: fingerprint(dataset)}
        folder.write_json(records.ENVIRONMENT, surroundings)
    if together is not None:
        folder = RunFolder(Path(together.ranks.from_leader(str(folder.path) if together.ranks.rank == 0 else "")))
    state, reporter = None, reporter or Reporter()
    try:
        return _train(config, folder, dataset, learner, device, reporter, measuring, keep_model, test, state, together)
    except (UsageError, DataError):  # refused: not by what was looked at beforehand, but by the first steps
        if (together is None or together.ranks.rank == 0) and not folder.has_progress:
            folder.discard()
        raise


def _learner_of(config: RunConfig, dataset: AnyDataset, together: Together | None) -> tuple[torch.device, Learner]:
    """Device and learner of this process; refuses what cannot be spread as asked, before anything is made."""
    if together is None:
        device = pick_device(config.device)
        return device, build_learner(config, dataset, device)
    ranks, spread = together.ranks, together.spread
    place = None if spread.whole else torch.device("cpu")
    learner = build_learner(config, dataset, ranks.device, place=place)
    graph = isinstance(dataset, GraphDataset)
    check_spread(spread, learner, ranks.size, config.training.batch_size, graph=graph)
    if config.training.diagnose and not spread.whole:
        raise UsageError("diagnostics of every epoch need the whole network on every rank; leave out --diagnose")
    return ranks.device, learner


def resume(
    path: Path,
    *,
    data_root: Path | None = None,
    dataset: AnyDataset | None = None,
    reporter: Reporter | None = None,
    measuring: Measuring = Measuring(),
    keep_model: bool = True,
    test: bool = True,
    together: Together | None = None,
) -> dict[str, Any]:
    """Go on with an interrupted run; its weights end up as if it had never stopped.

    A run that is finished already just returns its summary. The number of processes may be another than before, and
    the form as well; of several, all must see the run's folder. See `run` for arguments and errors.

    Raises:
        CheckpointError: `path` is not a run folder, its checkpoint is damaged, or it began on other data.
    """
    folder = RunFolder.open(path)
    if (path / summary_name(test)).is_file():
        return {**folder.read_summary(summary_name(test)), "run_dir": str(path)}
    config = RunConfig.of_run(folder)
    surroundings = folder.read_json(records.ENVIRONMENT, records.SURROUNDINGS)  # which the summary needs, in the end
    if config.task == "autoencode":
        require_matplotlib()
    if dataset is None:
        try:
            dataset = load_dataset(config.dataset, data_root)
        except UsageError as error:
            raise UsageError(f"{path}: {error}; {OWN_DATA}") from error
    if DATA in surroundings:  # runs of earlier versions have no fingerprint
        began = folder.read_json(records.ENVIRONMENT, {DATA: {"digest": str, "sums": [records.NUMBER]}})[DATA]
        if not same_data(began, fingerprint(dataset)):
            raise CheckpointError(
                f"{path} began with other data than {dataset.name} here; go on with those; {OWN_DATA}"
            )
    device, learner = _learner_of(config, dataset, together)
    # a run that was stopped before its first checkpoint starts over
    state = folder.load(records.CHECKPOINT) if (path / records.CHECKPOINT).is_file() else None
    return _train(
        config, folder, dataset, learner, device, reporter or Reporter(), measuring, keep_model, test, state, together
    )


def summary_name(test: bool) -> str:
    """The file that holds the summary of a run that was tested, or was not."""
    return records.SUMMARY if test else records.UNTESTED


def _train(
    config: RunConfig,
    folder: RunFolder,
    dataset: AnyDataset,
    learner: Learner,
    device: torch.device,
    reporter: Reporter,
    measuring: Measuring,
    keep_model: bool,
    test: bool,
    state: dict[str, Any] | None,
    together: Together | None,
) -> dict[str, Any]:
    """Train from the start or from a checkpoint's state, test if asked to, and write the record."""
    stop = StopRequest()
    leader = together is None or together.ranks.rank == 0
    with told_of_memory(config, device), closing(_source(config, device, together)) as source:
        train, validation, *held = load_batches(config, dataset, device, preferred_layout(learner, device), test=test)
        team = _team(config, learner, train, together)
        earlier: dict[str, EnergyResult] = {}
        if state is not None:
            with checkpoint_of(folder):
                earlier = {name: EnergyResult.from_dict(r) for name, r in state["energy"].items()}
        meter = EnergyMeter(
            source,
            device=device,
            idle_w=measuring.idle_w,
            earlier=earlier if together is None else {},
            poll_hz=POLL_HZ,
            start_temperature_c=measuring.start_temperature_c,
        )

        def totals() -> dict[str, EnergyResult]:
            return (
                meter.totals()
                if together is None
                else _totals(meter, together.ranks, earlier, _counts(config, together))
            )

        def save(progress: dict[str, Any]) -> None:
            spent = {name: result.as_dict() for name, result in totals().items()}
            if leader:
                folder.save(records.CHECKPOINT, {**progress, "energy": spent})

        def on_epoch(record: dict[str, Any]) -> None:
            if leader:
                folder.append_metrics(record)
            reporter.epoch(record)

        trainer = Trainer(
            learner,
            train,
            validation,
            config.training,
            seed=config.seed,
            meter=meter,
            on_epoch=on_epoch,
            on_steps=reporter.steps,
            save=save,
            interrupted=stop,
            team=team,
            joules_before=0.0 if together is None or not earlier else earlier["total"].gross_j,
        )
        if state is not None:
            with checkpoint_of(folder):
                trainer.load_state_dict(state)
        if leader:
            folder.write_metrics(trainer.progress.history)
        reporter.started(config, folder.path, learner, trainer)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        tracker = None
        if measuring.carbon is not None and leader:
            tracker = CarbonTracker(measuring.carbon, folder=folder.path)
        try:
            with ExitStack() as running:
                if tracker is not None:
                    running.enter_context(tracker)
                running.enter_context(stop)
                running.enter_context(meter.window("total"))
                progress = trainer.run()
        except InterruptedRunError as error:
            how = f"the run is saved, go on with: {shlex.join(['bpfree', 'run', '--resume', str(folder.path)])}"
            raise InterruptedRunError(f"{error.where} ({stop.name or 'asked by another rank'})", how) from None
        except TrainingError:
            if keep_model and trainer.has_best:
                team.collect(learner)
                if leader:
                    folder.save(records.MODEL, learner.state_dict())
            raise
        finally:
            reporter.finished()
        if measuring.idle_after_s:
            meter.measure_idle(measuring.idle_after_s)
        spent = totals()
        data_mib = stored_bytes(train, validation, *held) / MIB
        memory = {**peak_memory(device), "data_mib": data_mib}
        measured: dict[str, Any] = {
            "energy": _energy(spent, meter, progress, train.step_size(config.training.batch_size)),
            "memory": memory,
        }
        if together is not None:
            team.collect(learner)
            measured["parallel"] = {**team.describe(), **_by_rank(meter, memory, device, together.ranks)}
            measured["memory"]["peak_mib"] = max(rank["memory"]["peak_mib"] for rank in measured["parallel"]["by_rank"])
            together.ranks.leave()  # what is left is for the leader, which holds the whole learner by now
            if not leader:
                return {}
            learner.to(device)
        if tracker is not None:
            measured["carbon"] = tracker.report(spent["total"])
        summary = {
            **_summary(config, folder, learner, progress, measured),
            "metric": validation.metric,
            "criterion": validation.criterion,
            "forward_flops": forward_flops(learner, validation, config.training.precision),
        }
        if together is not None:
            summary["command"] += _parallel_words(together)
        for part in held:
            summary.update(_tested(config, dataset, learner, part))
            if isinstance(part, Batches) and part.reconstruct:
                images, _ = next(iter(part.in_order(PICTURED)))
                draw_reconstructions(folder.path / records.PICTURE, images, learner.scores(images))
    if keep_model:
        folder.save(records.MODEL, learner.state_dict())
    folder.write_json(summary_name(test), summary)
    folder.remove(records.CHECKPOINT)
    return {**summary, "run_dir": str(folder.path)}


@contextmanager
def checkpoint_of(folder: RunFolder) -> Iterator[None]:
    """Turn what a checkpoint of another run, or of something else, makes its readers raise into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, UsageError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[1].strip() if len(lines) > 1 and lines[0].endswith(":") else lines[0]  # PyTorch's is a list
        reason = f"it has no {reason}" if isinstance(error, KeyError) else reason
        path = folder.path / records.CHECKPOINT
        raise CheckpointError(f"{path} is not a checkpoint of this run ({reason}); {records.START_AGAIN}") from error


def _team(config: RunConfig, learner: Learner, train: AnyBatches, together: Together | None) -> Team:
    """The processes that train together, each with its part."""
    if together is None:
        return Alone()
    training, device = config.training, together.ranks.device
    sample = next(iter(train.in_order(training.batch_size)))
    with numerics(training.precision), step_precision(training.precision, device):
        return spread_over(
            together.ranks,
            together.spread,
            learner,
            sample,
            batch_size=training.batch_size,
            graphs=training.graph,
        )


def _counts(config: RunConfig, together: Together) -> bool:
    """Whether this rank's joules count: processors of a machine are measured once, boards each for itself."""
    ranks = together.ranks
    return ranks.device.type == "cuda" or ranks.local_rank == 0 or config.energy == "simulated"


def _source(config: RunConfig, device: torch.device, together: Together | None) -> PowerSource:
    """Where this process's joules come from: nowhere, if another process measures the same device."""
    if together is None or _counts(config, together):
        return choose_source(config.energy, device)
    return SimulatedSource(0.0)  # which knows for certain that it adds nothing


def _totals(
    meter: EnergyMeter, ranks: Ranks, earlier: dict[str, EnergyResult], counts: bool
) -> dict[str, EnergyResult]:
    """What all ranks have spent, by the name of the window; all of them must call this."""
    own = {name: result.as_dict() for name, result in meter.totals().items()} if counts else {}
    sums: dict[str, EnergyResult] = {}
    for spent in ranks.of_all(own):
        for name, result in spent.items():
            part = EnergyResult.from_dict(result)
            sums[name] = sums[name].beside(part) if name in sums else part
    later = {name: earlier[name] + result if name in earlier else result for name, result in sums.items()}
    return {**earlier, **later}


def _by_rank(meter: EnergyMeter, memory: dict[str, Any], device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Energy since this start and peak memory of every rank, for the record; all of them must call this."""
    own = {
        "device": str(device),
        "hardware": records.hardware(device),
        "energy": meter.totals()["total"].as_dict(),
        "memory": memory,
    }
    return {"by_rank": [{"rank": rank, **known} for rank, known in enumerate(ranks.of_all(own))]}


def _parallel_words(together: Together) -> str:
    """The options that spread a run like this one."""
    cut = f" --cut {','.join(map(str, together.spread.cut))}" if together.spread.cut else ""
    mesh = f" --mesh {'x'.join(map(str, together.spread.mesh))}" if together.spread.mesh else ""
    ranks = together.ranks
    machines = f" --nnodes {ranks.size // ranks.local_size}" if ranks.size > ranks.local_size else ""
    return f" --parallel {together.spread.form} --nproc {ranks.local_size}{machines}{mesh}{cut}"


def trained(
    path: Path, device: torch.device, *, data_root: Path | None = None
) -> tuple[RunConfig, Learner, tuple[AnyBatches, ...]]:
    """Configuration and learner of a finished run that has kept its model; training, validation and test data.

    Raises:
        CheckpointError: `path` is not a run folder, or has no model.
    """
    folder = RunFolder.open(path)
    config = RunConfig.of_run(folder)
    dataset = load_dataset(config.dataset, data_root)
    learner = build_learner(config, dataset, device)
    learner.load_state_dict(folder.load(records.MODEL, device))
    return config, learner, load_batches(config, dataset, device, preferred_layout(learner, device))


def _tested(config: RunConfig, dataset: AnyDataset, learner: Learner, test: AnyBatches) -> dict[str, Any]:
    """What the summary says of the test part."""
    precision = config.training.precision
    diagnostics = evaluate(learner, test, precision)
    tested: dict[str, Any] = {
        "test_accuracy": diagnostics.pop("accuracy"),
        "test_loss": diagnostics.pop("loss"),
        "test_diagnostics": diagnostics,
    }
    if isinstance(learner, DrawsNoise):
        tested["test_draws"] = evaluate_draws(learner, test, precision, TEST_DRAWS)
    if isinstance(dataset, GraphDataset):
        revealed = revealed_test(dataset, config.training, config.seed, test.device)
        if revealed is not None:  # the same for rules to which labels are no input
            tested["test_revealed"] = evaluate(learner, revealed, precision)
    return tested


def load_batches(
    config: RunConfig, dataset: AnyDataset, device: torch.device, layout: torch.memory_format, *, test: bool = True
) -> tuple[AnyBatches, ...]:
    """Training, validation and, unless it is to be left alone, test part on the device; only training samples are
    augmented."""
    if isinstance(dataset, GraphDataset):
        return graph_parts(dataset, config.training, config.seed, device)[: 3 if test else 2]
    refuse_graph_settings(config.training)
    train, validation, held = dataset.split(config.training.validation)
    shared: dict[str, Any] = {"device": device, "layout": layout, "reconstruct": config.task == "autoencode"}
    training = config.training
    if training.mean is not None and training.std is not None:
        channels = dataset.input_shape[0]
        shared.update(mean=(training.mean,) * channels, std=(training.std,) * channels)
    elif training.standardize:
        shared.update(mean=dataset.mean, std=dataset.std)
    augmentation = config.training.augmentation or dataset.augmentation
    return (
        Batches(train.inputs, train.targets, augmentation=augmentation, **shared),
        Batches(validation.inputs, validation.targets, **shared),
        *(Batches(part.inputs, part.targets, **shared) for part in [held] if test),
    )


def stored_bytes(*parts: AnyBatches) -> int:
    """Bytes of the data on the device; the parts of a graph share its features and edges."""
    shared = parts[1:] if isinstance(parts[0], GraphBatches) else ()
    return sum(part.nbytes for part in parts) - sum(part.nbytes - part.targets.nbytes for part in shared)


def _energy(
    totals: Mapping[str, EnergyResult], meter: EnergyMeter, progress: Progress, step_size: int
) -> dict[str, Any]:
    """The energy of the whole run, of its training and validation, per step and per sample, and its source."""
    total = totals["total"]
    per_step = None if total.gross_j is None else total.gross_j / progress.steps
    per_sample = None if per_step is None else per_step / step_size
    return {
        **total.as_dict(),
        "phases": {name: totals[name].as_dict() for name in (TRAIN, VALIDATION)},
        "j_per_step": per_step,
        "j_per_sample": per_sample,
        "source": meter.info(),
    }


def _summary(
    config: RunConfig,
    folder: RunFolder,
    learner: Learner,
    progress: Progress,
    measured: dict[str, Any],
) -> dict[str, Any]:
    environment = folder.read_json(records.ENVIRONMENT)
    kept = progress.finished[-1]
    return {
        "algorithm": config.algorithm,
        "task": config.task,
        "dataset": config.dataset,
        "network": config.network,
        "variant": learner.variant,
        "locality": learner.locality,
        "preset": config.preset,
        "seed": config.seed,
        "validation_accuracy": kept["best_validation_accuracy"],
        "validation_loss": kept["best_validation_loss"],
        "passes": sum(stage["epochs"] for stage in progress.finished),
        "updates": progress.steps,
        "seconds": measured["energy"]["seconds"],
        "peak_memory_mib": measured["memory"]["peak_mib"],
        **measured,
        "flops": progress.flops,
        "parameters": sum(parameter.numel() for parameter in learner.parameters()),
        "blocks": len(learner.blocks()),
        "stages": progress.finished,
        "hardware": environment["hardware"],
        "date": environment["date"],
        "commit": environment["commit"],
        "command": command(config),
    }


@torch.no_grad()
def forward_flops(learner: Learner, batches: AnyBatches, precision: str) -> int:
    """Floating-point operations of the scores of one sample, by PyTorch's counter; of a graph, of all its nodes."""
    inputs, _ = next(iter(batches.in_order(1)))
    with (
        evaluation_mode(learner),
        step_precision(precision, batches.device),
        FlopCounter() as counter,
    ):
        learner.scores(inputs)
    return int(counter.get_total_flops())


def measure_idle(config: RunConfig, seconds: float, device: torch.device | None = None) -> tuple[float, ...]:
    """Mean power of the idle device with its context alive, W, for `run`; empty where it cannot be measured.

    Args:
        config: names the device and the source.
        seconds: how long to measure; a counter wants at least 10 s.
        device: instead of the one that `config` names.
    """
    device = pick_device(config.device) if device is None else device
    torch.zeros(1, device=device)  # a context draws power even when nothing runs
    with closing(choose_source(config.energy, device)) as source:
        watts = EnergyMeter(source, device=device).measure_idle(seconds)
    return () if watts is None else (watts,)


@contextmanager
def told_of_memory(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn running out of device memory into one line that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated(device) / MIB
        whole = torch.cuda.get_device_properties(device).total_memory / MIB
        size = config.training.batch_size
        raise TrainingError(
            f"CUDA ran out of memory: {peak:.0f} MiB of {whole:.0f} MiB were in use with batches of {size}; "
            f"try --batch-size {max(1, size // 2)}"
        ) from None


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak memory since the last reset, in MiB, and how it was told.

    On CUDA "peak_mib" is what the allocator handed out at most, "reserved_mib" what it held (CUDA graphs keep
    their buffers there), "device_mib" what is in use on the whole device. On the CPU it is the process's peak.
    """
    if device.type == "cpu":
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
        return {"peak_mib": kilobytes / 1024, "method": "peak resident set of the process"}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "peak_mib": torch.cuda.max_memory_allocated(device) / MIB,
        "reserved_mib": torch.cuda.max_memory_reserved(device) / MIB,
        "device_mib": (total - free) / MIB,
        "method": "torch allocator",
    }
