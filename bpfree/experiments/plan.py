"""What training on many devices would take, predicted from the measured times of a network's blocks and from a link.

Nothing in here measures, reads or prints: `block_times` makes a `Profile`, and `docs/planning.md` has the formulas with
what they assume. Notation: `L` blocks, `P` devices = `p` stages (layers) x `R` replicas (data), `B` samples per step of
one replica, `m` micro-batches of back-propagation's pipeline.

Scaling is weak in `R`, as the times are those of B samples: with R replicas a step is one of R B samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

from bpfree.errors import DataError, UsageError
from bpfree.experiments.links import Link
from bpfree.experiments.timelines import bucketed, one_forward_one_backward, reduced
from bpfree.networks.partition import cheapest_ends

BACKPROP: Final = "bp"
ONE_PROCESS: Final = "one-process"
LAYER: Final = "layer"
DATA: Final = "data"
COMBINED: Final = "layer x data"
BLOCK: Final = "block"
PIPELINE: Final = "1f1b"
COMBINED_PIPELINE: Final = "1f1b x data"
FORMS: Final = (ONE_PROCESS, LAYER, DATA, BLOCK, PIPELINE)
"""Forms that a measurement can have."""

MICROBATCHES_PER_STAGE: Final = 4
"""Of 1F1B, unless told: from there on GPipe's authors find the bubble negligible (arXiv 1811.06965, section 2.3)."""

FORWARD_SHARE: Final = 1 / 3
"""Of a block's time when only the whole is known: a product forward, and one each for the gradients of inputs and
weights."""

NOTICEABLE: Final = 0.01
"""Share of a step from which on waiting is called what the step waits for."""

BUFFERS: Final = 2
"""Batches of activations that a rank keeps per neighbour, so that it can work on one while the next one travels."""


@dataclass(frozen=True)
class BlockCost:
    """What one block costs one device in one step.

    Attributes:
        name: shown in tables.
        forward_seconds: until its outputs are known.
        gradient_seconds: then, until its gradients are known: local loss and gradients, or the backward pass.
        update_seconds: the optimiser.
        output_bytes: of its outputs for one batch, which the next block needs.
        parameter_bytes: of all that it keeps between steps but the optimiser's state, heads of its own included.
        gradient_bytes: of its gradients.
        optimizer_bytes: of the optimiser's state.
        saved_bytes: what is kept of one batch until its gradients are known.
        message_bytes: what its rule wants from the next block in every step (MAN: its first unit).

    Raises:
        DataError: a number that is negative or not finite, or no time at all.
    """

    name: str
    forward_seconds: float
    gradient_seconds: float
    update_seconds: float = 0.0
    output_bytes: int = 0
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    saved_bytes: int = 0
    message_bytes: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "name" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise DataError(f"{self.name}: {name} must be a number from 0 on, got {value!r}")
        if not self.seconds > 0:
            raise DataError(f"{self.name}: a block must take some time, got {self.seconds} s")

    @property
    def seconds(self) -> float:
        """Of one step of this block alone."""
        return self.forward_seconds + self.gradient_seconds + self.update_seconds

    def timed(self, seconds: float) -> BlockCost:
        """The same block with another time of the whole, a third of it forward, as nothing more is known."""
        forward = FORWARD_SHARE * seconds
        return replace(self, forward_seconds=forward, gradient_seconds=seconds - forward, update_seconds=0.0)


@dataclass(frozen=True)
class Profile:
    """What a plan is made from.

    Attributes:
        algorithm: short name of the rule.
        network: name of the network.
        batch_size: B, samples per step that the times and bytes are of.
        input_bytes: of the inputs of one batch.
        target_bytes: of its targets, which travel with the activations.
        local: blocks of the rule; empty for back-propagation.
        backprop: the same blocks trained by back-propagation; empty if that is not known.
        device: what they were measured on.
        source: how the times came about: "measured here", or which file has them.
        precision: of matrix products.

    Raises:
        DataError: no blocks, or another number of them for back-propagation.
    """

    algorithm: str
    network: str
    batch_size: int
    input_bytes: int
    target_bytes: int
    local: tuple[BlockCost, ...]
    backprop: tuple[BlockCost, ...] = ()
    device: str = "unknown device"
    source: str = "given"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if not self.local and not self.backprop:
            raise DataError("a profile needs the times of at least one block")
        if self.local and self.backprop and len(self.local) != len(self.backprop):
            raise DataError(f"{len(self.local)} blocks of the rule, but {len(self.backprop)} of back-propagation")
        if self.batch_size < 1 or self.input_bytes < 0 or self.target_bytes < 0:
            raise DataError("batch_size must be at least 1, input_bytes and target_bytes not negative")

    @property
    def own(self) -> tuple[BlockCost, ...]:
        """The blocks of the rule that the profile is named after."""
        return self.backprop if self.algorithm == BACKPROP else self.local


@dataclass(frozen=True)
class Rank:
    """One device of one replica; all replicas are alike.

    Attributes:
        first, last: the blocks that it owns, both ends included.
        busy_seconds: of computing in one step.
        parameter_bytes, gradient_bytes, optimizer_bytes: what it keeps.
        activation_bytes: activations of the batches in its hands, and buffers of those that travel.
        sent_bytes: to the next rank, per step.
        returned_bytes: to the rank before, per step.
        reduced_bytes: that it sends on the ring of its replicas, per step.
    """

    first: int
    last: int
    busy_seconds: float
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: float
    sent_bytes: float = 0.0
    returned_bytes: float = 0.0
    reduced_bytes: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """All of it."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True)
class Prediction:
    """One way to train on P devices.

    Attributes:
        algorithm: short name of the rule.
        form: how the work is shared.
        stages: p.
        replicas: R.
        step_seconds: between two steps when the pipeline is full.
        fill_seconds: before the last stage begins; once in a run for local rules, part of every step in 1F1B.
        bubble: share of the time that devices wait for the pipeline to fill and empty.
        efficiency: samples per second of the whole run over P times those of one device with the same rule.
        samples_per_step: R B.
        samples_per_second: of the whole run.
        bound: what a step waits for: "compute", "link", "all-reduce", or "message".
        ranks: of one replica.
        microbatches: m; 1 unless the form is 1F1B.
        overlap: whether gradients are all-reduced behind the computation.
        note: what the user should know.
    """

    algorithm: str
    form: str
    stages: int
    replicas: int
    step_seconds: float
    fill_seconds: float
    bubble: float
    efficiency: float
    samples_per_step: int
    samples_per_second: float
    bound: str
    ranks: tuple[Rank, ...] = field(repr=False)
    microbatches: int = 1
    overlap: bool = True
    note: str = ""

    @property
    def devices(self) -> int:
        """P."""
        return self.stages * self.replicas

    @property
    def speedup(self) -> float:
        """Samples per second over those of one device with the same rule."""
        return self.efficiency * self.devices

    @property
    def idle(self) -> float:
        """Share of a full pipeline's step in which the average device does not compute."""
        busy = math.fsum(rank.busy_seconds for rank in self.ranks) / len(self.ranks)
        return max(0.0, 1 - busy / self.step_seconds)

    @property
    def imbalance(self) -> float:
        """How much busier than the average the busiest device is: 0 for a perfect cut."""
        busy = [rank.busy_seconds for rank in self.ranks]
        return max(busy) * len(busy) / math.fsum(busy) - 1

    @property
    def memory_bytes(self) -> float:
        """Of the fullest device."""
        return max(rank.memory_bytes for rank in self.ranks)

    @property
    def link_bytes(self) -> float:
        """Per step, over the busiest link between two stages, both directions."""
        pairs = pairwise(self.ranks)
        return max((before.sent_bytes + after.returned_bytes for before, after in pairs), default=0.0)

    @property
    def reduced_bytes(self) -> float:
        """Per step, over the busiest link between two replicas."""
        return max(rank.reduced_bytes for rank in self.ranks)


def local_plan(
    profile: Profile,
    link: Link,
    stages: int = 1,
    replicas: int = 1,
    *,
    overlap: bool = True,
    steps: float = math.inf,
    form: str = LAYER,
) -> Prediction:
    """A rule whose blocks learn from nothing but earlier activations, on `stages` x `replicas` devices.

    Args:
        profile: times and bytes of `local` blocks.
        link: between any two devices.
        stages: p ranks of consecutive blocks, cut where the slowest rank or link is fastest.
        replicas: R copies of that, whose gradients are all-reduced block by block.
        overlap: all-reduce a block's gradients behind the work on the next one.
        steps: of the run, over which the one fill is spread.
        form: how to call it. "block" is for rules whose blocks need nothing of each other: nothing is sent.

    Raises:
        UsageError: more stages than blocks, or a number that is not positive.
    """
    blocks = profile.local
    _check_layout(len(blocks), stages, replicas, steps)
    sends = form != BLOCK
    reductions = [link.all_reduce(block.gradient_bytes, replicas) for block in blocks]

    work = [block.forward_seconds + block.gradient_seconds for block in blocks]

    def rank_seconds(start: int, stop: int) -> float:
        return reduced(0.0, work[start:stop], reductions[start:stop], overlap) + _updates(blocks[start:stop])

    def ahead(start: int, stop: int) -> float:
        """Seconds from the beginning of a rank's step until it can send its last outputs, which is before it learns."""
        inner = slice(start, stop - 1)
        before = math.fsum(work[inner]) if overlap else reduced(0.0, work[inner], reductions[inner], overlap)
        return before + blocks[stop - 1].forward_seconds

    def arrival(start: int) -> float:
        """Seconds that the activations which the block `start` reads take from another rank."""
        return link.transfer(blocks[start - 1].output_bytes + profile.target_bytes) if start and sends else 0.0

    ends = cheapest_ends(len(blocks), stages, lambda start, stop: max(rank_seconds(start, stop), arrival(start)))
    runs = _runs(ends)
    waits = {
        "compute": max(_seconds(blocks[start:stop]) for start, stop in runs),
        "all-reduce": max(rank_seconds(start, stop) for start, stop in runs),
        "link": max(arrival(start) for start, _ in runs),
        "message": 0.0,
    }
    fill = 0.0
    for (start, stop), (_, next_stop) in pairwise(runs) if sends else ():
        last = blocks[stop - 1]
        hop = ahead(start, stop) + arrival(stop)
        fill += hop
        if last.message_bytes:
            # This rank may be only one step ahead of the next, whose weights it reads: two steps take a whole round.
            round_trip = hop + rank_seconds(stop, next_stop) + link.transfer(last.message_bytes)
            waits["message"] = max(waits["message"], round_trip / 2)
    step = max(waits.values())
    inputs = [profile.input_bytes, *(blocks[start - 1].output_bytes for start, _ in runs[1:])]
    ranks = tuple(
        Rank(
            first=start,
            last=stop - 1,
            busy_seconds=_seconds(blocks[start:stop]),
            **_kept(blocks[start:stop]),
            activation_bytes=max(block.saved_bytes for block in blocks[start:stop])
            + BUFFERS * (arriving + profile.target_bytes)
            + (BUFFERS * blocks[stop - 1].output_bytes if sends and stop < len(blocks) else 0),
            sent_bytes=blocks[stop - 1].output_bytes + profile.target_bytes if sends and stop < len(blocks) else 0,
            returned_bytes=blocks[start - 1].message_bytes if sends and start else 0,
            reduced_bytes=_ring_bytes(blocks[start:stop], replicas),
        )
        for (start, stop), arriving in zip(runs, inputs, strict=True)
    )
    # the last rank begins after the fill and does a batch in every step
    bubble = fill / (fill + steps * step) if math.isfinite(steps) else 0.0
    per_second = replicas * profile.batch_size / step * (1 - bubble)
    return Prediction(
        algorithm=profile.algorithm,
        form=form,
        stages=stages,
        replicas=replicas,
        step_seconds=step,
        fill_seconds=fill,
        bubble=bubble,
        efficiency=per_second * _seconds(blocks) / (profile.batch_size * stages * replicas),
        samples_per_step=replicas * profile.batch_size,
        samples_per_second=per_second,
        bound=next(name for name, seconds in waits.items() if seconds >= step * (1 - NOTICEABLE)),
        ranks=ranks,
        overlap=overlap,
    )


def backprop_plan(
    profile: Profile,
    link: Link,
    stages: int = 1,
    replicas: int = 1,
    *,
    microbatches: int = 0,
    overlap: bool = True,
    form: str = PIPELINE,
) -> Prediction:
    """Back-propagation on the same blocks: DDP with one stage, the 1F1B pipeline with several.

    Args:
        profile: times and bytes of `backprop` blocks.
        link: between any two devices.
        stages: p.
        replicas: R; with several stages their gradients are all-reduced behind the last micro-batch.
        microbatches: m; 0 is four per stage, or as many as there are samples.
        overlap: with one stage, all-reduce a block's gradients behind the backward pass of those before it.
        form: how to call it.

    Raises:
        UsageError: more stages than blocks, more micro-batches than samples, or a number that is not positive.
    """
    blocks = profile.backprop
    _check_layout(len(blocks), stages, replicas, math.inf)
    usual = min(MICROBATCHES_PER_STAGE * stages, profile.batch_size)
    pieces = 1 if stages == 1 else microbatches or usual
    if not 0 < pieces <= profile.batch_size or microbatches < 0:
        raise UsageError(f"{pieces} micro-batches cannot be made of {profile.batch_size} samples")
    whole = _seconds(blocks)
    runs = _runs(cheapest_ends(len(blocks), stages, lambda start, stop: _passes(blocks[start:stop])))
    hops = [link.transfer(blocks[stop - 1].output_bytes / pieces) for _, stop in runs[:-1]]
    if stages == 1:
        going_forward = math.fsum(block.forward_seconds for block in blocks)
        going_back = [block.gradient_seconds for block in reversed(blocks)]
        buckets = bucketed([block.gradient_bytes for block in reversed(blocks)], link, replicas)
        step = reduced(going_forward, going_back, buckets, overlap) + _updates(blocks)
        fill, bubble, bound = 0.0, 0.0, "all-reduce" if step * (1 - NOTICEABLE) > whole else "compute"
    else:
        forward, backward = (
            [math.fsum(getattr(block, name) for block in blocks[start:stop]) / pieces for start, stop in runs]
            for name in ("forward_seconds", "gradient_seconds")
        )
        updates = [_updates(blocks[start:stop]) for start, stop in runs]
        reductions = [
            link.all_reduce(sum(block.gradient_bytes for block in blocks[start:stop]), replicas) for start, stop in runs
        ]
        passes = one_forward_one_backward(forward, backward, hops, pieces)
        step = max(map(math.fsum, zip(passes, reductions, updates, strict=True)))
        near = one_forward_one_backward(forward, backward, [0.0] * len(hops), pieces)
        fill = math.fsum([*forward[:-1], *hops])
        bubble = (stages - 1) / (pieces + stages - 1)
        alone = max(map(math.fsum, zip(near, updates, strict=True)))
        linked = max(map(math.fsum, zip(passes, updates, strict=True)))
        waits = {"compute": alone, "link": linked, "all-reduce": step}
        bound = next(name for name, seconds in waits.items() if seconds >= step * (1 - NOTICEABLE))
    ranks = []
    for rank, (start, stop) in enumerate(runs):
        arriving = blocks[start - 1].output_bytes if start else profile.input_bytes
        leaving = blocks[stop - 1].output_bytes if stop < len(blocks) else 0
        in_flight = min(pieces, stages - rank)
        saved = sum(block.saved_bytes for block in blocks[start:stop])
        ranks.append(
            Rank(
                first=start,
                last=stop - 1,
                busy_seconds=_seconds(blocks[start:stop]),
                **_kept(blocks[start:stop]),
                activation_bytes=(saved * in_flight + BUFFERS * (arriving + leaving)) / pieces + profile.target_bytes,
                sent_bytes=leaving,
                returned_bytes=arriving if start else 0,
                reduced_bytes=_ring_bytes(blocks[start:stop], replicas),
            )
        )
    per_second = replicas * profile.batch_size / step
    return Prediction(
        algorithm=BACKPROP,
        form=form,
        stages=stages,
        replicas=replicas,
        step_seconds=step,
        fill_seconds=fill,
        bubble=bubble,
        efficiency=per_second * whole / (profile.batch_size * stages * replicas),
        samples_per_step=replicas * profile.batch_size,
        samples_per_second=per_second,
        bound=bound,
        ranks=tuple(ranks),
        microbatches=pieces,
        overlap=overlap,
    )


def predict(
    profile: Profile,
    link: Link,
    devices: int,
    *,
    steps: float = math.inf,
    microbatches: int = 0,
    largest_batch: float = math.inf,
) -> list[Prediction]:
    """Every form of training on `devices` devices, the rule's own first, back-propagation for comparison.

    Layer-parallel training of fewer blocks than devices takes replicas for the rest, and says so. The combined forms
    are the best of all factorisations P = p R.

    Args:
        profile: times and bytes.
        link: between any two devices.
        devices: P.
        steps: of the run.
        microbatches: m of 1F1B; 0 is four per stage.
        largest_batch: leave out what needs more samples per step, all replicas together.

    Raises:
        UsageError: a number that is not positive, or a batch that is larger than `largest_batch`.
    """
    if devices < 1:
        raise UsageError(f"the number of GPUs must be at least 1, got {devices}")
    most = largest_batch / profile.batch_size
    if most < 1:
        raise UsageError(f"the batch of one replica has {profile.batch_size} samples, more than {largest_batch:g}")
    found: list[Prediction] = []
    if profile.local:

        def local(form: str, stages: int, overlap: bool = True) -> Prediction:
            return local_plan(profile, link, stages, devices // stages, overlap=overlap, steps=steps, form=form)

        found += _forms(devices, len(profile.local), most, local, (ONE_PROCESS, LAYER, DATA, COMBINED))
    if profile.backprop:

        def backprop(form: str, stages: int, overlap: bool = True) -> Prediction:
            pieces = 0 if stages == 1 else microbatches
            replicas = devices // stages
            return backprop_plan(profile, link, stages, replicas, microbatches=pieces, overlap=overlap, form=form)

        names = (ONE_PROCESS, PIPELINE, DATA, COMBINED_PIPELINE)
        found += _forms(devices, len(profile.backprop), most, backprop, names)
    return found


@dataclass(frozen=True)
class Measurement:
    """A training step that was measured, to hold a plan against.

    Attributes:
        form: "one-process", "layer", "data", "block" or "1f1b".
        ranks: number of devices.
        batch_size: samples per step of one replica, which is what `block_seconds` are of.
        network: name of the network.
        algorithm: short name of the rule.
        step_seconds: between two steps.
        block_seconds: of one step of each block alone on one device; empty if that is not known.
        microbatches: m of 1F1B; 0 is four per stage.
        dataset: that gave the inputs their shape, if known.
        precision: of matrix products, if known.

    Raises:
        DataError: an unknown form, or a number that is not positive.
    """

    form: str
    ranks: int
    batch_size: int
    network: str
    algorithm: str
    step_seconds: float
    block_seconds: tuple[float, ...] = ()
    microbatches: int = 0
    dataset: str | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise DataError(f"a measurement's form is one of {', '.join(FORMS)}, got {self.form!r}")
        if self.ranks < 1 or self.batch_size < 1 or not 0 < self.step_seconds < math.inf or self.microbatches < 0:
            raise DataError("a measurement's ranks, batch_size and step_seconds must be positive")
        if self.form == ONE_PROCESS and self.ranks != 1:
            raise DataError(f"a measurement of one process has one rank, not {self.ranks}")
        if self.form == PIPELINE and self.algorithm != BACKPROP:
            raise DataError(f"1f1b is a schedule of back-propagation, not of {self.algorithm}")
        if self.form in {LAYER, BLOCK} and self.algorithm == BACKPROP:
            raise DataError(f"back-propagation has no {self.form}-parallel form; its pipeline is 1f1b")


@dataclass(frozen=True)
class Comparison:
    """A measurement beside its prediction."""

    measured: Measurement
    predicted: Prediction

    @property
    def error(self) -> float:
        """Relative: positive where the plan promises a longer step than there was."""
        return self.predicted.step_seconds / self.measured.step_seconds - 1


def compare(measured: Measurement, profile: Profile, link: Link) -> Comparison:
    """Predict the step that was measured.

    Args:
        measured: what was done.
        profile: times and bytes of its blocks; that the measurement may have block times too does not count here.
        link: between the devices.

    Raises:
        DataError: the profile is of another rule, network or batch size.
        UsageError: more ranks than blocks.
    """
    for name in ("algorithm", "network", "batch_size"):
        ours, theirs = getattr(profile, name), getattr(measured, name)
        if ours != theirs:
            raise DataError(f"the block times are of {name} {ours}, the measurement is of {theirs}")
    stages = 1 if measured.form in {ONE_PROCESS, DATA} else measured.ranks
    replicas = measured.ranks if measured.form == DATA else 1
    if profile.algorithm == BACKPROP:
        pieces = measured.microbatches if stages > 1 else 0
        predicted = backprop_plan(profile, link, stages, replicas, microbatches=pieces, form=measured.form)
    else:
        predicted = local_plan(profile, link, stages, replicas, form=measured.form)
    return Comparison(measured, predicted)


def with_block_seconds(profile: Profile, seconds: Sequence[float], source: str) -> Profile:
    """A profile whose own blocks take these times, a third of them forward.

    Raises:
        DataError: another number of blocks.
    """
    if len(seconds) != len(profile.own):
        raise DataError(f"{len(seconds)} block times, but {profile.network} has {len(profile.own)} blocks")
    timed = tuple(block.timed(each) for block, each in zip(profile.own, seconds, strict=True))
    changed: dict[str, Any] = {"backprop" if profile.algorithm == BACKPROP else "local": timed}
    return replace(profile, **changed, source=source)


def _forms(
    devices: int, blocks: int, most: float, plan: Callable[..., Prediction], names: tuple[str, str, str, str]
) -> list[Prediction]:
    """The forms of one rule, called (one process, layers, data, both); `plan` takes form, stages and overlap."""
    alone, layers, data, both = names
    if devices == 1:
        return [plan(alone, 1)]
    # replicas are alike, so stages divide the devices
    possible = [stages for stages in range(1, min(devices, blocks) + 1) if devices % stages == 0]
    possible = [stages for stages in possible if devices // stages <= most]
    found = []
    if possible and possible[-1] > 1:
        deepest = possible[-1]
        note = ""
        if devices > blocks:
            note = (
                f"{devices} GPUs are more than the {blocks} blocks, so that the rest are replicas: "
                f"{deepest} stages x {devices // deepest}"
            )
        found.append(replace(plan(layers, deepest), note=note))
    if devices <= most:
        found += [plan(data, 1), plan(data, 1, overlap=False)]
    if possible:
        best = max((plan(both, stages) for stages in possible), key=lambda one: one.samples_per_second)
        alike = f"{devices} GPUs are no number of equal replicas of 2 to {blocks} stages"
        found.append(replace(best, note=alike if possible == [1] and blocks > 1 and devices <= most else ""))
    return found


def _check_layout(blocks: int, stages: int, replicas: int, steps: float) -> None:
    if not blocks:
        raise UsageError("there are no times of this rule's blocks to plan with")
    if stages < 1 or replicas < 1 or not steps >= 1:
        raise UsageError(f"stages, replicas and steps must be at least 1, got {stages}, {replicas} and {steps:g}")
    if stages > blocks:
        raise UsageError(
            f"{stages} ranks cannot share {blocks} blocks; use at most {blocks}, and replicas for the rest"
        )


def _runs(ends: Sequence[int]) -> list[tuple[int, int]]:
    """Units that end a run -> (start, stop) of each run."""
    return [(before + 1, end + 1) for before, end in pairwise([-1, *ends])]


def _seconds(blocks: Iterable[BlockCost]) -> float:
    return math.fsum(block.seconds for block in blocks)


def _passes(blocks: Iterable[BlockCost]) -> float:
    """Seconds of the forward and the backward pass."""
    return math.fsum(block.forward_seconds + block.gradient_seconds for block in blocks)


def _updates(blocks: Iterable[BlockCost]) -> float:
    return math.fsum(block.update_seconds for block in blocks)


def _kept(blocks: Sequence[BlockCost]) -> dict[str, int]:
    names = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
    return {name: sum(getattr(block, name) for block in blocks) for name in names}


def _ring_bytes(blocks: Iterable[BlockCost], replicas: int) -> float:
    """What one device sends in a ring all-reduce of these blocks' gradients."""
    return 2 * (replicas - 1) / replicas * sum(block.gradient_bytes for block in blocks)
