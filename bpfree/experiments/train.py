"""The one fit loop: every learning rule, every stage, the same stopping rule, restore and bookkeeping."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any, Final, Protocol, get_type_hints

import torch
from torch import Tensor

from bpfree.algorithms._option_types import check_types
from bpfree.algorithms.learner import (
    Batch,
    DrawsNoise,
    Learner,
    LooksAtData,
    Metrics,
    Stage,
    check_kind,
    check_learner,
    evaluation_mode,
)
from bpfree.data.batches import Batches
from bpfree.data.graph_batches import VALIDATE_EVERY, AnyBatches, GraphBatches
from bpfree.energy.result import add_known
from bpfree.errors import EXIT_STOPPED, BpfreeError, DataError, TrainingError, UsageError, unknown_name
from bpfree.experiments.schedules import EarlyStopping, learning_rate_factor
from bpfree.experiments.stepper import Stepper, numerics, step_precision
from bpfree.networks.flops import FlopCounter
from bpfree.parallel.team import Alone, Team

EVALUATION_BATCH: Final = 2000
MONITORS: Final = ("loss", "metric")
SPLITS: Final = ("public", "folds", "random", "edges")
JOULES_EVERY_S: Final = 0.05  # a counter takes 4 ms to answer: too long to ask at every epoch of a millisecond

TRAIN: Final = "train"
VALIDATION: Final = "validation"
"""Names of the phases of the energy meter's window."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train, apart from the rule: the same for every arm of a comparison.

    Attributes:
        batch_size: samples per step; the last, smaller batch of an epoch is dropped.
        epochs: cap on epochs per stage; a stage in closed form takes one, or if inputs are augmented, all of them.
        patience: epochs without a better validation loss after which a stage ends.
        min_delta: how much lower than the best a validation loss must be to count as better.
        passes: train for this many data passes instead, shared equally by the stages and rounded up, without early
            stopping (the best state is still restored).
        lr_schedule: "constant", "cosine", "cosine-epochs", "step" or "cooldown", over the cap of each stage.
        warmup_epochs: linear warm-up at the start of each stage.
        precision: "fp32", "tf32" or "bf16".
        augmentation: "none", "crop-flip" or "shift"; None takes the data set's own.
        standardize: subtract the data set's mean and divide by its standard deviation; otherwise images are in [0, 1].
        mean: subtract this from all channels in place of the data set's mean; of images in [0, 1].
        std: divide all channels by this in place of the data set's deviation; goes with `mean`.
        validation: number of validation samples; None takes the data set's own.
        cache: compute what frozen blocks make of the inputs once per stage and keep it on the device, unless inputs are
            augmented; otherwise those blocks run in every step and validation. A stage in closed form, which sees every
            sample once, only ever keeps what they make of validation data.
        graph: replay training steps as CUDA graphs where that is possible.
        checkpoint_every: seconds between checkpoints.
        diagnose: note the rule's own diagnostics of validation data after every epoch, beside those of the test.
        monitor: what "better" means on validation data: a lower "loss" (MSE of reconstructions), or a higher "metric"
            (accuracy; ROC-AUC for pairs of nodes; R squared of reconstructions).
        split: graphs: "public" is Planetoid's split, "folds" are ForwardGNN's five, fold seed modulo 5, "random" is
            60/20/20 by seed, "edges" asks for links between nodes, fold seed modulo 5; None takes the data set's own.
        validate_every: graphs: full-batch steps per epoch, that is between validations.
        graph_parts: graphs: cut the nodes into this many random parts and take one at a time, in training and testing,
            for graphs that do not fit the device; 1 serves the graph whole.
        reveal_validation: graphs: show labels of validation nodes to rules that use known labels when testing, as
            ForwardGNN's code does.
        dropout: probability of the network's dropout layers; None leaves them as the network has them.
    """

    batch_size: int = 128
    epochs: int = 100
    patience: int = 20
    min_delta: float = 0.0
    passes: int | None = None
    lr_schedule: str = "constant"
    warmup_epochs: float = 0.0
    precision: str = "tf32"
    augmentation: str | None = None
    standardize: bool = True
    mean: float | None = None
    std: float | None = None
    validation: int | None = None
    cache: bool = True
    graph: bool = True
    checkpoint_every: float = 60.0
    diagnose: bool = False
    monitor: str = "loss"
    split: str | None = None
    validate_every: int = VALIDATE_EVERY
    graph_parts: int = 1
    reveal_validation: bool = False
    dropout: float | None = None

    def __post_init__(self) -> None:
        check_types(_setting_types(), vars(self))
        for name in ("batch_size", "epochs", "patience", "validate_every", "graph_parts"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.passes is not None and self.passes < 1:
            raise UsageError(f"passes must be at least 1, got {self.passes}")
        if not all(value >= 0 for value in (self.min_delta, self.warmup_epochs, self.checkpoint_every)):
            raise UsageError("min_delta, warmup_epochs and checkpoint_every must be 0 or more")
        if (self.mean is None) != (self.std is None) or (self.mean is not None and not self.standardize):
            raise UsageError("mean and std standardise inputs together: give both, and leave out no-standardize")
        if self.mean is not None and not (math.isfinite(self.mean) and 0 < (self.std or 0.0) < math.inf):
            raise UsageError(f"mean must be finite and std positive, got {self.mean} and {self.std}")
        if self.monitor not in MONITORS:
            raise unknown_name("monitor", self.monitor, MONITORS)
        if self.split is not None and self.split not in SPLITS:
            raise unknown_name("split", self.split, SPLITS)

    def epochs_per_stage(self, stages: int) -> int:
        """The cap on epochs of each of `stages` stages."""
        return self.epochs if self.passes is None else math.ceil(self.passes / stages)


@cache
def _setting_types() -> dict[str, Any]:
    return get_type_hints(TrainingConfig)


class Meter(Protocol):
    """What the loop needs of an energy meter."""

    def paused(self) -> AbstractContextManager[Any]: ...

    def phase(self, name: str) -> AbstractContextManager[Any]: ...

    def joules(self) -> float | None: ...


class NoMeter:
    """A meter that measures nothing."""

    def paused(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def phase(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def joules(self) -> float | None:
        return None


class InterruptedRunError(BpfreeError):
    """Training was asked to stop and its state has been saved. Exit code 130.

    Args:
        where: what was stopped, and by what.
        how: how to go on. Whatever trained as a part of something larger goes on with that: who catches the error of a
            part raises another one, with the same `where`.
    """

    exit_code = EXIT_STOPPED

    def __init__(self, where: str, how: str | None = None) -> None:
        super().__init__(where if how is None else f"{where}; {how}")
        self.where = where


@dataclass
class Progress:
    """Where training stands: everything but tensors, as plain values that a checkpoint can hold.

    Attributes:
        stage: index of the stage in training; the number of stages when done.
        epoch: epochs of that stage that are complete.
        step: steps of the current epoch that are complete.
        steps: updates done in all stages.
        flops: floating-point operations of all updates, by PyTorch's counter (validation not included).
        stopping: state of the stage's stopping rule.
        history: one record per finished epoch.
        finished: one record per finished stage.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    steps: int = 0
    flops: int = 0
    stopping: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a learner, stage after stage.

    Args:
        learner: what to train, on the device of the batches.
        train: training samples.
        validation: validation samples, never augmented.
        config: how to train.
        seed: fixes the order and augmentation of every epoch.
        meter: energy meter with a window open around `run`.
        on_epoch: called with each epoch's record.
        on_steps: called with the stage's name, its epoch and the number of steps just done.
        save: called with the whole state when a checkpoint is due.
        interrupted: asked between steps whether to save and stop.
        team: the processes that train together, each with a trainer of its own; None for this one alone.
        joules_before: gross joules of an earlier part of this training that `meter` does not know of; None if they were
            not measured.
    """

    def __init__(
        self,
        learner: Learner,
        train: AnyBatches,
        validation: AnyBatches,
        config: TrainingConfig,
        *,
        seed: int = 0,
        meter: Meter | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
        on_steps: Callable[[str, int, int], None] | None = None,
        save: Callable[[dict[str, Any]], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        team: Team | None = None,
        joules_before: float | None = 0.0,
    ) -> None:
        _check_fit("a trainer", learner, train, validation)
        if not train.steps_per_epoch(config.batch_size):
            raise DataError(
                f"{len(train)} training samples do not fill one batch of {config.batch_size}; "
                "use a smaller --batch-size"
            )
        if len(validation) == 0:
            raise DataError("there is no validation sample, so no epoch can be called best; use --validation 1 or more")
        self.learner, self.train, self.validation, self.config, self.seed = learner, train, validation, config, seed
        self.meter: Meter = meter or NoMeter()
        self.team = team or Alone()
        self._joules_before = joules_before
        self._stages = self.team.stages(learner)
        self._on_epoch = on_epoch or (lambda record: None)
        self._on_steps = on_steps or (lambda stage, epoch, steps: None)
        self._save = save
        self._interrupted = interrupted or (lambda: False)
        self.progress = Progress()
        self._best: list[Tensor] | None = None  # copies of what this process trains of the stage in training
        self._epoch_metrics: Tensor | None = None  # (steps, metrics) of the epoch in training
        self._epoch_joules: float | None = None  # gross joules spent when that epoch began, if they were read
        self._joules_read = -math.inf  # when they were last read
        self._last_save = time.monotonic()
        self.steps_per_epoch = self.planned_steps = 0  # of the stage in training; planned at most

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, with any number of processes: tensors and plain values only.

        Of several processes all must call this, and the leader's is the state.
        """
        self.team.collect(self.learner)
        best: list[Tensor] = []
        if self._best is not None:
            best = self.team.collect_copies(_tensors(self._stages[self.progress.stage]), self._best)
        metrics = self._epoch_metrics
        generators = {"cpu": torch.get_rng_state()}
        if self.train.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.train.device)
        return {
            "learner": self.learner.state_dict(),
            "progress": asdict(self.progress),
            "samples": self._samples,
            "best": best,
            "epoch_metrics": None if metrics is None else self.team.share_metrics(metrics),
            "generators": generators,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of an interrupted training; the counterpart of `state_dict`.

        Raises:
            UsageError: it was trained with another number of samples.
        """
        trained, validated = state.get("samples", self._samples)
        if [trained, validated] != self._samples:
            raise UsageError(
                f"it is of {trained} training and {validated} validation samples, and here are "
                f"{' and '.join(map(str, self._samples))}"
            )
        self.learner.load_state_dict(state["learner"])
        self.progress = Progress(**state["progress"])
        self.team.settle(self.learner)
        if state["best"]:
            places = zip(_tensors(self._stages[self.progress.stage]), state["best"], strict=True)
            self._best = [best.to(tensor.device) for tensor, best in places if self.team.owns(tensor)]
        metrics = state["epoch_metrics"]
        kept = None if metrics is None else self.team.keep_metrics(metrics.to(self.train.device))
        self._epoch_metrics = kept
        torch.set_rng_state(state["generators"]["cpu"])
        if "cuda" in state["generators"] and self.train.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.train.device)

    @property
    def _samples(self) -> list[int]:
        """Numbers of training and validation samples: with others, epochs would not go on as they began."""
        return [len(self.train), len(self.validation)]

    @property
    def fraction(self) -> float:
        """Share of the epochs planned at most that are done, 0 to 1; every stage counts alike."""
        stages = len(self._stages)
        within = self.progress.epoch * self.steps_per_epoch / self.planned_steps if self.planned_steps else 0.0
        return (self.progress.stage + within) / stages

    @property
    def passes(self) -> int:
        """Data passes done, in all stages."""
        return sum(stage["epochs"] for stage in self.progress.finished) + self.progress.epoch

    @property
    def has_best(self) -> bool:
        """Whether the stage in training has a best state, so that a failure leaves good weights."""
        return self._best is not None

    def _save_if(self, due: bool) -> None:
        if self._save is not None and due:
            with self.meter.paused():
                self._save(self.state_dict())
            self._last_save = time.monotonic()

    def _save_if_due(self) -> None:
        (due,) = self.team.decide(self._checkpoint_due())
        self._save_if(due)

    def _checkpoint_due(self) -> bool:
        return time.monotonic() - self._last_save >= self.config.checkpoint_every

    # -- training ---------------------------------------------------------------------------------------------

    def run(self) -> Progress:
        """Train all stages to their end, from wherever the state stands.

        Raises:
            InterruptedRunError: `interrupted` said so; the state has been saved.
            TrainingError: a loss is not finite, or memory ran out.
        """
        stages = self._stages
        with numerics(self.config.precision):
            if isinstance(self.learner, LooksAtData) and self.progress.steps == 0:
                self._load_libraries()
                with (
                    self.meter.phase(TRAIN),
                    self.team.assembled(self.learner),
                    FlopCounter() as counter,
                ):
                    self.learner.prepare(self.train.in_order(EVALUATION_BATCH))
                self.progress.flops += counter.get_total_flops()
            while self.progress.stage < len(stages):
                stage = stages[self.progress.stage]
                if stage.finish is None:
                    self._run_stage(stage, len(stages))
                else:
                    self._run_passes(stage, stage.finish, len(stages))
                self._start_next_stage()
        return self.progress

    def _load_libraries(self) -> None:
        """Have at hand what a learner needs to look at its data, as a rehearsal has before a stage: training must not
        pay for it."""
        inputs, _ = next(iter(self.validation.in_order(1)))
        with (
            self.meter.paused(),
            step_precision(self.config.precision, self.train.device),
            FlopCounter(),  # its first use imports a compiler
        ):
            if self.team.whole:
                self.learner.scores(inputs)
            else:  # whose only stage answers for it
                with evaluation_mode(self.learner), torch.no_grad():
                    self._stages[0].scores_of_inputs(inputs)

    def _start_next_stage(self) -> None:
        self.progress.stage += 1
        self.progress.epoch = self.progress.step = 0
        self.progress.stopping = {}
        self._best = self._epoch_metrics = None

    def _prefixed(self, prefix: Callable[[Any], Any] | None, batches: AnyBatches) -> tuple[AnyBatches, int]:
        """Batches of stage inputs, computed once, and the FLOPs that took."""
        if prefix is None:
            return batches, 0
        with (
            step_precision(self.config.precision, batches.device),
            evaluation_mode(self.learner),
            FlopCounter() as counter,
        ):
            return batches.map(prefix, EVALUATION_BATCH), counter.get_total_flops()

    def _run_stage(self, stage: Stage, stages: int) -> None:
        config, progress = self.config, self.progress
        if stage.whole_graph and not self.train.fixed_shapes:
            raise UsageError(f"{stage.name} keeps something for each node of the graph; leave out graph_parts")
        keep_prefix = config.cache and self.train.augmentation == "none"
        with self.meter.phase(TRAIN):
            train, flops = self._prefixed(stage.step_prefix, self.train) if keep_prefix else (self.train, 0)
        with self.meter.phase(VALIDATION):
            validation, _ = self._prefixed(stage.prefix, self.validation) if config.cache else (self.validation, 0)
        (made,) = self.team.add([flops])  # each process has counted what it did
        if progress.epoch == progress.step == 0:  # not again after a resume
            progress.flops += int(made or 0)
        stepper = Stepper(
            self.learner,
            stage,
            train,
            live_prefix=None if keep_prefix else stage.step_prefix,
            batch_size=config.batch_size,
            precision=config.precision,
            scheduled=config.lr_schedule != "constant" or config.warmup_epochs > 0,
            graph=config.graph,
            team=self.team,
        )
        with self.meter.paused():
            stepper.rehearse(train.draw(self.seed, progress.stage, 0))
        if self._epoch_metrics is None:
            self._epoch_metrics = torch.zeros(stepper.steps_per_epoch, len(stepper.metric_names), device=train.device)
        epochs = config.epochs_per_stage(stages)
        self.steps_per_epoch, self.planned_steps = stepper.steps_per_epoch, epochs * stepper.steps_per_epoch
        patience = config.patience if config.passes is None else None
        stopping = (
            EarlyStopping(**progress.stopping) if progress.stopping else EarlyStopping(patience, config.min_delta)
        )
        trained = self._trained(stage)
        scores = stage.scores if config.cache else stage.scores_of_inputs
        while progress.epoch < epochs and not stopping.stop:
            with self.meter.phase(TRAIN):
                self._run_epoch(stage, stepper, train, epochs)
            with self.meter.phase(VALIDATION):
                record = self._close_epoch(stage, scores, stepper, validation, epochs)
                if config.diagnose:
                    record.update(diagnose(self.learner, self.validation, config.precision))
            record["best"] = stopping.update(progress.epoch, self._rating(record))
            if record["best"]:
                self._keep_best(trained)
            progress.stopping = asdict(stopping)
            progress.history.append(record)
            progress.epoch, progress.step = progress.epoch + 1, 0
            self._on_epoch(record)
            self._save_if_due()
        self._restore_best(trained)
        self._note_finished(stage, stopped_early=stopping.stop, graph=stepper.use_graph)
        stepper.close()

    def _note_finished(self, stage: Stage, **facts: Any) -> None:
        best = self._best_record(stage)
        self.progress.finished.append(
            {
                "stage": stage.name,
                "epochs": self.progress.epoch,
                "updates": self.progress.epoch * self.steps_per_epoch,
                "best_epoch": best["epoch"],
                "best_validation_loss": best["validation_loss"],
                "best_validation_accuracy": best["validation_accuracy"],
                **facts,
            }
        )

    def _run_passes(self, stage: Stage, finish: Callable[[Iterable[Batch]], Metrics], stages: int) -> None:
        """Train a stage in closed form: every sample once, then the solution.

        Samples that are augmented look different each time, so that all epochs add to what is collected.
        """
        config, progress = self.config, self.progress
        passes = 1 if self.train.augmentation == "none" else config.epochs_per_stage(stages)
        self.steps_per_epoch = math.ceil(self.train.steps_per_epoch(1) / config.batch_size)  # the last may be smaller
        self.planned_steps = passes * self.steps_per_epoch
        with self.meter.paused():
            self._rehearse_passes()
        while progress.epoch < passes:
            draw = self.train.draw(self.seed, progress.stage, progress.epoch)
            with self.meter.phase(TRAIN):
                if progress.step == 0:
                    self._read_joules()
                for inputs, targets in self.train.epoch(draw, config.batch_size, progress.step):
                    with (
                        step_precision(config.precision, targets.device),
                        FlopCounter() as counter,
                    ):
                        stage.step((stage.prepared(inputs), targets))
                    (flops,) = self.team.add([counter.get_total_flops()])
                    progress.flops += int(flops or 0)
                    self._count_steps(stage, 1)
            progress.epoch, progress.step = progress.epoch + 1, 0
        with self.meter.phase(VALIDATION):
            validation, _ = self._prefixed(stage.prefix, self.validation)
        with self.meter.phase(TRAIN):  # which includes choosing hyperparameters
            if self.train.device.type == "cuda":
                torch.cuda.synchronize(self.train.device)  # the passes are over
            started = time.perf_counter()
            with step_precision(config.precision, self.train.device), FlopCounter() as counter:
                made = finish(validation.in_order(EVALUATION_BATCH))
            found = {name: value.item() for name, value in made.items()}  # waits for the device
            seconds = time.perf_counter() - started
        (flops,) = self.team.add([counter.get_total_flops()])
        progress.flops += int(flops or 0)
        with self.meter.phase(VALIDATION):
            rating = self._rate(stage, stage.scores, validation).tolist()
        if not math.isfinite(rating[0]):
            raise TrainingError(f"validation loss of {stage.name} is {rating[0]}; check the inputs")
        record = self._record(stage, passes, found, rating, 1.0)
        progress.history.append({**record, "best": True})
        self._on_epoch(progress.history[-1])
        self._note_finished(stage, stopped_early=False, finish_seconds=seconds)

    def _rehearse_passes(self) -> None:
        """Load and set up the libraries, which training must not pay for, on a copy that is thrown away."""
        stage = copy.deepcopy(self.learner).stages()[self.progress.stage]
        assert stage.finish is not None
        inputs, targets = next(iter(self.train.in_order(self.config.batch_size)))
        with (
            step_precision(self.config.precision, self.train.device),
            FlopCounter(),
            suppress(TrainingError),  # one batch alone may have no solution
        ):
            batch = (stage.prepared(inputs), targets)
            stage.step(batch)
            stage.finish([batch])

    def _rating(self, record: dict[str, Any]) -> float:
        """What the stopping rule wants low."""
        loss, metric = float(record["validation_loss"]), float(record["validation_accuracy"])
        return loss if self.config.monitor == "loss" else -metric

    def _best_record(self, stage: Stage) -> dict[str, Any]:
        return [record for record in self.progress.history if record["stage"] == stage.name and record["best"]][-1]

    def _trained(self, stage: Stage) -> list[Tensor]:
        """What this process trains of a stage."""
        return list(filter(self.team.owns, _tensors(stage)))

    @torch.no_grad()
    def _keep_best(self, trained: list[Tensor]) -> None:
        if self._best is None:
            self._best = [torch.empty_like(tensor) for tensor in trained]
        for best, tensor in zip(self._best, trained, strict=True):
            best.copy_(tensor)

    @torch.no_grad()
    def _restore_best(self, trained: list[Tensor]) -> None:
        if self._best is None:  # nothing to go back to
            return
        for tensor, best in zip(trained, self._best, strict=True):
            tensor.copy_(best)

    def _run_epoch(self, stage: Stage, stepper: Stepper, train: AnyBatches, epochs: int) -> None:
        progress, metrics = self.progress, self._epoch_metrics
        assert metrics is not None
        draw = train.draw(self.seed, progress.stage, progress.epoch)
        while progress.step < stepper.steps_per_epoch:
            first = progress.step
            count = min(stepper.capacity, stepper.steps_per_epoch - first)
            factors = [self._factor(first + position, stepper, epochs) for position in range(count)]
            stepper.stage_batches(draw, first, count, factors)
            # processes that train together stop together, between these calls
            rows = stepper.run(count, self._interrupted if self.team.size == 1 else lambda: False)
            metrics[first : first + len(rows)] = rows
            if first == 0:
                self._read_joules()
            progress.flops += len(rows) * stepper.flops_per_step
            self._count_steps(stage, len(rows))

    def _read_joules(self) -> None:
        """Note what has been spent when an epoch began, while the device works: a counter takes milliseconds."""
        now = time.monotonic()
        due = now - self._joules_read >= JOULES_EVERY_S
        self._epoch_joules, self._joules_read = (self.meter.joules(), now) if due else (None, self._joules_read)

    def _count_steps(self, stage: Stage, count: int) -> None:
        """Note that `count` more steps are done; save when that is due, and stop when asked to."""
        progress = self.progress
        progress.step += count
        progress.steps += count
        self._on_steps(stage.name, progress.epoch, count)
        interrupted, due = self.team.decide(self._interrupted(), self._checkpoint_due())
        self._save_if(interrupted or due)
        if interrupted:
            raise InterruptedRunError(
                f"stopped in {stage.name}, epoch {progress.epoch + 1}, after step {progress.step}"
            )

    def _factor(self, step: int, stepper: Stepper, epochs: int) -> float:
        moment = self.progress.epoch + (step + 0.5) / stepper.steps_per_epoch
        return learning_rate_factor(self.config.lr_schedule, moment, epochs, self.config.warmup_epochs)

    def _close_epoch(
        self, stage: Stage, scores: Callable[[Any], Tensor], stepper: Stepper, validation: AnyBatches, epochs: int
    ) -> dict[str, Any]:
        """Validate; read the epoch's numbers from the device, once; refuse to go on if one is not finite."""
        metrics, progress = self._epoch_metrics, self.progress
        assert metrics is not None
        # nothing that waits for all processes before this: one that is done with its steps goes on to validate
        rating = self.team.share_rating(self._rate(stage, scores, validation))
        metrics = self.team.share_metrics(metrics)
        (together,) = self.team.add([self._epoch_joules])
        self._epoch_joules = add_known(self._joules_before, together)
        numbers = torch.cat([rating, metrics.double().flatten()]).cpu()
        validation_loss, validation_accuracy = numbers[:2].tolist()
        steps = numbers[2:].view(metrics.shape)
        bad = (~steps.isfinite()).nonzero()
        if len(bad) or not math.isfinite(validation_loss):
            self._restore_best(self._trained(stage))
            kept = f"the best state, of epoch {self._best_record(stage)['epoch']}, is kept; " if self.has_best else ""
            where = (
                f"{stepper.metric_names[bad[0, 1]]} is {steps[bad[0, 0], bad[0, 1]].item()} at step {bad[0, 0] + 1}"
                if len(bad)
                else f"validation loss is {validation_loss}"
            )
            raise TrainingError(
                f"{where} of epoch {progress.epoch + 1} of {stage.name}; {kept}"
                "lower the learning rate or check the inputs"
            )
        means = dict(zip(stepper.metric_names, steps.mean(0).tolist(), strict=True))
        factor = self._factor(stepper.steps_per_epoch - 1, stepper, epochs)
        return self._record(stage, progress.epoch + 1, means, [validation_loss, validation_accuracy], factor)

    def _rate(self, stage: Stage, scores: Callable[[Any], Tensor], validation: AnyBatches) -> Tensor:
        """See `rate`; what the stage chooses on validation data is chosen before."""
        precision = self.config.precision
        if stage.select is not None:
            with evaluation_mode(self.learner), step_precision(precision, validation.device):
                self.team.share_rating(stage.select(self.validation.in_order(EVALUATION_BATCH)))
        return rate(scores, validation, precision, self.learner)

    def _record(
        self, stage: Stage, epoch: int, numbers: dict[str, float], rating: Sequence[float], factor: float
    ) -> dict[str, Any]:
        """What is kept of an epoch."""
        return {
            "stage": stage.name,
            "epoch": epoch,
            **numbers,
            "validation_loss": rating[0],
            "validation_accuracy": 100 * rating[1],
            "lr_factor": factor,
            "steps": self.progress.steps,
            "joules_at_start": self._epoch_joules,
        }


def _check_fit(what: str, learner: Learner, *parts: AnyBatches) -> None:
    """Refuse what is no learner, no batches, or batches of another kind than the network takes.

    Raises:
        UsageError: it is.
    """
    check_learner(learner, what)
    for part in parts:
        if not isinstance(part, (Batches, GraphBatches)):
            raise UsageError(f"{what} takes bpfree.Batches or bpfree.GraphBatches, got {type(part).__name__}")
        check_kind(part.graph if isinstance(part, GraphBatches) else part.inputs, graphs=learner.takes_graphs)


def _tensors(stage: Stage) -> list[Tensor]:
    """The parameters and buffers of a stage."""
    return [tensor for module in stage.modules for tensor in (*module.parameters(), *module.buffers())]


@torch.no_grad()
def rate(scores: Callable[[Any], Tensor], batches: AnyBatches, precision: str, learner: Learner) -> Tensor:
    """Mean of the batches' criterion and of their metric, as a fraction: (2,) float64 on the device.

    That is cross-entropy and accuracy; for node pairs ROC-AUC; for reconstructions MSE and R squared.
    """
    total = torch.zeros(2, dtype=torch.float64, device=batches.device)
    with evaluation_mode(learner):
        for inputs, targets in batches.in_order(EVALUATION_BATCH):
            with step_precision(precision, batches.device):
                logits = scores(inputs).float()
            if not len(logits):  # of a learner that is spread, another process knows them
                continue
            total += torch.stack([batches.losses(logits, targets), batches.hits(logits, targets)])
    return total / len(batches)


@torch.no_grad()
def evaluate(learner: Learner, batches: AnyBatches, precision: str) -> dict[str, float]:
    """Loss and metric of the learner's scores, and the rule's own diagnostics, averaged over all samples.

    Returns:
        "loss", "accuracy" (the batches' metric, in %), and the learner's diagnostics by name (accuracies in %).

    Raises:
        UsageError: no learner, no batches, or inputs of another kind than the network takes.
    """
    _check_fit("evaluate", learner, batches)
    with numerics(precision):
        loss, fraction = rate(learner, batches, precision, learner).tolist()
        return {"loss": loss, "accuracy": 100 * fraction, **diagnose(learner, batches, precision)}


@torch.no_grad()
def diagnose(learner: Learner, batches: AnyBatches, precision: str) -> dict[str, float]:
    """The rule's own diagnostics by name, averaged over all samples; accuracies in %."""
    sums: dict[str, Tensor] = {}
    with evaluation_mode(learner):
        for inputs, targets in batches.in_order(EVALUATION_BATCH):
            with step_precision(precision, batches.device):
                report = learner.diagnostics((inputs, targets))
            for name, value in report.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(targets)
    percent = {name: 100 if name.endswith(("accuracy", "ROC-AUC")) else 1 for name in sums}
    return {name: percent[name] * (value / len(batches)).item() for name, value in sums.items()}


def evaluate_draws(learner: DrawsNoise, batches: AnyBatches, precision: str, draws: int) -> list[float]:
    """Accuracy, in %, from each of the first `draws` draws of the noise."""
    assert isinstance(learner, Learner)
    with numerics(precision):
        every = [rate(partial(learner.sample, draw=draw), batches, precision, learner)[1] for draw in range(draws)]
    return [100 * fraction.item() for fraction in every]
