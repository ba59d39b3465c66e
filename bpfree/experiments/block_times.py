"""Times and bytes of a network's blocks as `plan.Profile`: measured here, counted, or read from a file.

A block is measured as it would be trained if it were alone on a device: as a learner of its own, built by the rule from
this block. A rule may treat the last block unlike the others (it has no auxiliary network) or read the next one (MAN).
What a block costs is then what it adds to a learner of its successor.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from bpfree.algorithms import (
    Algorithm,
    Backprop,
    ForwardForward,
    Learner,
    LocalLearning,
    MonoForward,
)
from bpfree.algorithms._optim import make_optimizer, set_gradients, trained
from bpfree.algorithms.local_units import HasLocalUnits
from bpfree.errors import DataError, UsageError
from bpfree.experiments.plan import BACKPROP, BlockCost, Measurement, Profile, with_block_seconds
from bpfree.experiments.records import RunFolder, hardware
from bpfree.experiments.run import preferred_layout
from bpfree.experiments.stepper import numerics, step_precision
from bpfree.networks import build_network
from bpfree.networks.blocks import Shape, as_blocks, block_output_shapes
from bpfree.networks.heads import Head
from bpfree.networks.partition import first_unit
from bpfree.networks.timing import least_seconds

READINGS: Final = 5
"""Readings of the clock, of which the shortest counts: what disturbs one only makes it longer."""

CPU_ROUNDS: Final = 3
"""Times that all blocks are measured on a CPU, where other programs disturb for longer than the readings take."""

READING_SECONDS: Final = 0.01
"""What one reading covers at least, so that waiting for the device does not count."""

COUNTED: Final = 4
"""Samples of the smaller one of two batches whose bytes are counted; bytes grow along a line with the batch."""

CONSTANT: Final = 0.01
"""What weights are where their values do not matter: not zero, which some layers divide by."""

OF_THE_WHOLE: Final = frozenset({"k", "ends", "stem"})
"""Parameters on how to cut a network, which its blocks are no longer to be."""

LOCAL: Final = (MonoForward, ForwardForward, LocalLearning)
"""Learners whose blocks are told apart by what they cost alone."""


@dataclass(frozen=True)
class Subject:
    """A rule and a network to be planned for.

    Attributes:
        rule: the rule.
        network: name of the network.
        input_shape: of one sample.
        classes: C.
        batch_size: B.
        parameters: of the rule, where they are not its defaults.
        precision: "fp32", "tf32" or "bf16".
        device: that measures.
    """

    rule: Algorithm
    network: str
    input_shape: Shape
    classes: int
    batch_size: int
    parameters: Mapping[str, Any]
    precision: str
    device: torch.device

    def learner(self, blocks: Sequence[nn.Module], input_shape: Shape) -> Learner:
        """A learner of copies of these blocks, on the device."""
        parameters = {name: value for name, value in self.parameters.items() if name not in OF_THE_WHOLE}
        if "first_layer" in self.rule.parameters():  # which layers are read says nothing of how one learns
            parameters["first_layer"] = 0
        network = nn.Sequential(*copy.deepcopy(list(blocks)))
        learner = self.rule.build(network, self.classes, input_shape, **parameters)
        convert_conv2d_weight_memory_format(learner, preferred_layout(network, self.device))
        return learner.to(self.device).train()


def measure(subject: Subject, readings: int = READINGS) -> Profile:
    """What every block takes on this machine, by the rule and by back-propagation.

    Raises:
        UsageError: a rule whose blocks cannot work side by side, or be told apart like this, with the reason.
    """
    parts = _Parts.of(subject)
    rounds = [_profile(subject, parts, readings) for _ in range(CPU_ROUNDS if subject.device.type == "cpu" else 1)]

    def fastest(kind: str) -> tuple[BlockCost, ...]:
        alike = zip(*(getattr(profile, kind) for profile in rounds), strict=True)
        return tuple(min(block, key=lambda one: one.seconds) for block in alike)

    return replace(rounds[0], local=fastest("local"), backprop=fastest("backprop"))


def count(subject: Subject, seconds: Sequence[float], source: str) -> Profile:
    """The same without a clock, for times of the rule's own blocks that are known: only bytes are counted.

    That takes two steps of a few samples of one block of each kind, so that a GPU's times can be planned with where
    there is none.

    Args:
        subject: what the times are of.
        seconds: of one step of each block.
        source: where they come from.

    Raises:
        UsageError: see `measure`.
        DataError: not one time for each block.
    """
    with _Constants():
        parts = _Parts.of(subject)
    few, more = (_profile(replace(subject, batch_size=size), parts, 0) for size in (COUNTED, 2 * COUNTED))
    profile = _along_a_line(few, more, subject.batch_size)
    if subject.rule.alias != BACKPROP:
        profile = replace(profile, backprop=())  # of which no times are known
    return with_block_seconds(profile, seconds, source)


def _along_a_line(few: Profile, more: Profile, batch_size: int) -> Profile:
    """Two profiles of different batch sizes -> that of another one, as far as bytes go."""
    share = (batch_size - few.batch_size) / (more.batch_size - few.batch_size)

    def bytes_at(a: Any, b: Any) -> dict[str, Any]:
        names = [f.name for f in fields(a) if f.name.endswith("_bytes")]
        return {name: round(getattr(a, name) + share * (getattr(b, name) - getattr(a, name))) for name in names}

    def blocks_at(a: Sequence[BlockCost], b: Sequence[BlockCost]) -> tuple[BlockCost, ...]:
        return tuple(replace(one, **bytes_at(one, other)) for one, other in zip(a, b, strict=True))

    local, backprop = blocks_at(few.local, more.local), blocks_at(few.backprop, more.backprop)
    return replace(few, batch_size=batch_size, local=local, backprop=backprop, **bytes_at(few, more))


@dataclass(frozen=True)
class _Parts:
    """A network to be taken apart, which stays as it is.

    Attributes:
        whole: the rule's learner of it; None for back-propagation.
        blocks: of that learner.
        shapes: of the inputs of each block, and of the last one's outputs.
    """

    whole: Learner | None
    blocks: Sequence[nn.Module]
    shapes: Sequence[Shape]

    @classmethod
    def of(cls, subject: Subject) -> _Parts:
        """The parts of a subject's network.

        Raises:
            UsageError: see `measure`.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = build_network(subject.network, subject.input_shape)
            if subject.rule.alias == BACKPROP:
                _refuse_unknown_backprop(subject.parameters)
                whole, blocks = None, list(as_blocks(network))
            else:
                whole = subject.rule.build(network, subject.classes, subject.input_shape, **subject.parameters)
                _refuse_unmeasurable(subject, whole)
                blocks = list(whole.blocks())
            return cls(whole, blocks, [subject.input_shape, *block_output_shapes(blocks, subject.input_shape)])


def _profile(subject: Subject, parts: _Parts, readings: int) -> Profile:
    device = subject.device
    with torch.random.fork_rng(), numerics(subject.precision):
        torch.manual_seed(0)
        inputs = torch.rand(subject.batch_size, *subject.input_shape, device=device)
        targets = torch.randint(subject.classes, (subject.batch_size,), device=device)
        signal = inputs
        if inputs.ndim == 4:
            signal = inputs.contiguous(memory_format=preferred_layout(nn.ModuleList(parts.blocks), device))
        local, backprop = [], []
        known: dict[Any, tuple[BlockCost, BlockCost | None, Tensor]] = {}
        for index in range(len(parts.blocks)):
            # what is alike takes the same bytes, but readings of the clock are of each
            alike = None if readings else _structure(parts.blocks[index : index + 2], parts.shapes[index], index > 0)
            found = known.get(alike) or _costs(subject, parts, index, signal, targets, readings)
            if not readings:
                known[alike] = found
            backward, cost, signal = found
            backprop.append(replace(backward, name=f"block {index}"))
            if cost is not None:
                local.append(replace(cost, name=f"block {index}"))
    return Profile(
        algorithm=subject.rule.alias,
        network=subject.network,
        batch_size=subject.batch_size,
        input_bytes=inputs.nbytes,
        target_bytes=targets.nbytes,
        local=tuple(local),
        backprop=tuple(backprop),
        device=hardware(device),
        source="measured here",
        precision=subject.precision,
    )


def _costs(
    subject: Subject, parts: _Parts, index: int, signal: Tensor, targets: Tensor, readings: int
) -> tuple[BlockCost, BlockCost | None, Tensor]:
    """What a block takes by back-propagation and by the rule, and its outputs.

    Args:
        subject: what is measured.
        parts: of the network.
        index: of the block.
        signal: (B, ..) inputs of the block.
        targets: (B,) classes.
        readings: of the clock.
    """
    block, *following = parts.blocks[index : index + 2]
    head = None if following else Head(parts.shapes[-1], subject.classes, bias=True)
    backward, outputs = _backprop_cost(subject, f"block {index}", block, head, signal, index > 0, readings)
    if parts.whole is None:
        return backward, None, outputs
    cost = _LearningCost.alone(subject, [block], parts.shapes[index], signal, targets, readings)
    if following:
        pair = [block, *following], parts.shapes[index], signal
        rest = following, parts.shapes[index + 1], outputs
        sizes = [_bytes(subject.learner(*these[:2]).parameters()) for these in (pair, rest)]
        if sizes[0] - sizes[1] != cost.parameter_bytes:
            both, after = (_LearningCost.alone(subject, *these, targets, readings) for these in (pair, rest))
            cost = both.beyond(after)
    reads_next = isinstance(parts.whole, LocalLearning) and parts.whole.ema
    local = BlockCost(
        name=backward.name,
        forward_seconds=backward.forward_seconds,
        gradient_seconds=max(0.0, cost.step_seconds - cost.update_seconds - backward.forward_seconds),
        update_seconds=cost.update_seconds,
        output_bytes=backward.output_bytes,
        parameter_bytes=cost.parameter_bytes,
        gradient_bytes=cost.gradient_bytes,
        optimizer_bytes=cost.optimizer_bytes,
        # closed forms have no graph, but need what goes in and comes out
        saved_bytes=max(cost.saved_bytes, signal.nbytes + outputs.nbytes),
        message_bytes=sum(_bytes(first_unit(next_one).parameters()) for next_one in following) if reads_next else 0,
    )
    return backward, local, outputs


class _Constants(TorchDispatchMode):
    """Initialises with constants: random numbers for a large network take longer than counting its bytes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return args[0].fill_(CONSTANT)
        return func(*args, **(kwargs or {}))


class _Structure(pickle.Pickler):
    """Pickles all that modules are made of but the numbers in their tensors."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return type(value).__name__, tuple(value.shape), str(value.dtype), value.requires_grad
        return None


def _structure(*made_of: object) -> object:
    """Equal for what is made alike, whatever numbers its tensors hold; what cannot be pickled is like nothing else."""
    written = io.BytesIO()
    try:
        _Structure(written).dump(made_of)
    except (pickle.PicklingError, AttributeError, TypeError):
        return object()
    return written.getvalue()


def _refuse_unknown_backprop(parameters: Mapping[str, Any]) -> None:
    others = sorted(set(parameters) - {"optimizer", "lr", "momentum", "weight_decay"})
    if others:
        raise UsageError(f"plans know plain back-propagation and its optimisers; leave out {', '.join(others)}")


def _refuse_unmeasurable(subject: Subject, learner: Learner) -> None:
    """Raise a `UsageError` for a learner whose blocks cannot be told apart by building them alone, or work at once."""
    if isinstance(learner, LOCAL):
        if len(learner.stages()) > 1:
            reason = f"this schedule trains {len(learner.stages())} stages one after another, not side by side"
        elif getattr(learner, "pixels", None) is not None:
            reason = "its blocks reconstruct the network's inputs, which they do not have when they are alone"
        elif subject.parameters.get("input_projection"):
            reason = "input_projection is a unit of its own before the first block"
        else:
            try:
                learner.local_units()
            except UsageError as error:  # one that `bpfree run --parallel layer` refuses, too
                reason = str(error)
            else:
                return
    elif isinstance(learner, Backprop):
        reason = "gradients go through the whole network; the baseline that plans know is bp"
    elif isinstance(learner, HasLocalUnits):
        reason = "its blocks send each other nothing while they learn, so that there is no pipeline to plan"
    else:
        reason = learner.undivided
    raise UsageError(f"{subject.rule.alias} has no block times to measure: {reason}; --times takes times of your own")


@dataclass(frozen=True)
class _LearningCost:
    """Of learners that are made of one or two blocks."""

    step_seconds: float
    update_seconds: float
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int

    @classmethod
    def alone(
        cls,
        subject: Subject,
        blocks: Sequence[nn.Module],
        input_shape: Shape,
        inputs: Tensor,
        targets: Tensor,
        readings: int,
    ) -> _LearningCost:
        """Of a learner that has only these blocks, which read (B, *input_shape) `inputs`."""
        learner = subject.learner(blocks, input_shape)

        def step() -> None:
            with step_precision(subject.precision, subject.device):
                learner.step((inputs, targets))

        def update() -> None:
            for optimizer in learner.optimizers():
                optimizer.step()

        with _saved_tensors(learner.parameters()) as saved:
            step()
        return cls(
            step_seconds=_seconds(step, subject.device, readings),
            update_seconds=_seconds(update, subject.device, readings) if readings else 0.0,
            parameter_bytes=_bytes(learner.parameters()),
            gradient_bytes=_bytes(p for p in learner.parameters() if p.grad is not None),
            optimizer_bytes=sum(map(_state_bytes, learner.optimizers())),
            saved_bytes=sum(saved.values()),
        )

    def beyond(self, other: _LearningCost) -> _LearningCost:
        """What this one has more than `other`; readings of the clock can make that negative, which nothing is."""
        return _LearningCost(**{name: max(0, value - getattr(other, name)) for name, value in vars(self).items()})


def _backprop_cost(
    subject: Subject,
    name: str,
    block: nn.Module,
    head: Head | None,
    inputs: Tensor,
    passes_on: bool,
    readings: int,
) -> tuple[BlockCost, Tensor]:
    """One block of back-propagation, the last one with its read-out, and its outputs.

    Args:
        subject: what is measured.
        name: of the block.
        block: the block.
        head: the read-out of the last block.
        inputs: (B, ..) of the block.
        passes_on: whether gradients go on to a block before it.
        readings: of the clock.
    """
    block, head = copy.deepcopy(block), copy.deepcopy(head)
    convert_conv2d_weight_memory_format(block, preferred_layout(block, subject.device))
    block.to(subject.device).train()
    if head is not None:
        head.to(subject.device)
    parameters = trained(block, head)
    options = {name: subject.parameters[name] for name in ("momentum", "weight_decay") if name in subject.parameters}
    kind = subject.parameters.get("optimizer", "adamw") if subject.rule.alias == BACKPROP else "adamw"
    optimizer = make_optimizer(parameters, kind, lr=1e-3, **(options if subject.rule.alias == BACKPROP else {}))
    signal = inputs.detach().requires_grad_(passes_on)
    wanted = [signal, *parameters] if passes_on else parameters

    def forward() -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), step_precision(subject.precision, subject.device):
            outputs = block(signal)
            return outputs, outputs if head is None else head(outputs)

    def both() -> list[Tensor]:
        _, last = forward()
        return list(torch.autograd.grad(last, wanted, torch.ones_like(last)))

    with _saved_tensors(parameters) as saved:
        outputs, _ = forward()
    set_gradients(parameters, both()[passes_on:])
    forward_seconds = _seconds(forward, subject.device, readings)
    both_seconds = _seconds(both, subject.device, readings)
    optimizer.step()
    cost = BlockCost(
        name=name,
        forward_seconds=forward_seconds,
        gradient_seconds=max(0.0, both_seconds - forward_seconds),
        update_seconds=_seconds(optimizer.step, subject.device, readings) if readings else 0.0,
        output_bytes=outputs.nbytes,
        parameter_bytes=_bytes([*block.parameters(), *(head.parameters() if head is not None else ())]),
        gradient_bytes=_bytes(parameters),
        optimizer_bytes=_state_bytes(optimizer),
        saved_bytes=sum(saved.values()),
    )
    return cost, outputs.detach()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _state_bytes(optimizer: Optimizer) -> int:
    return _bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


@contextmanager
def _saved_tensors(parameters: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Collects the bytes, by address, of what autograd saves in the meantime, but for the parameters themselves."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: dict[int, int] = {}
    alive = []  # an address is used again as soon as its tensor is freed

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor.detach()  # an output that its own node holds would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found
    alive.clear()


def _seconds(call: Callable[[], object], device: torch.device, readings: int) -> float:
    """Seconds of a call, undisturbed; without readings one second, for a caller who has other times to put there."""
    return least_seconds(call, device, readings, lasting=READING_SECONDS) if readings else 1.0


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON that `read_profile` reads.

    Raises:
        CheckpointError: it cannot be written.
    """
    RunFolder(path.parent).write_text(path.name, json.dumps(asdict(profile), indent=1) + "\n")


def read_profile(path: Path) -> Profile:
    """The profile in a JSON file: the fields of `Profile`, `local` and `backprop` being lists of those of `BlockCost`.

    A block may have `seconds` instead of the three times that it is made of, when nothing more is known.

    Raises:
        DataError: the file is missing, or does not hold a profile.
    """
    values = _read_json(path)
    try:
        blocks = {kind: tuple(map(_block, values.pop(kind, ()))) for kind in ("local", "backprop")}
        return Profile(**{**values, **blocks, "source": str(path)})
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not hold block times ({error})") from error


def _block(values: dict[str, Any]) -> BlockCost:
    seconds = values.pop("seconds", None)
    if seconds is None:
        return BlockCost(**values)
    return BlockCost(**values, forward_seconds=1.0, gradient_seconds=0.0).timed(seconds)


def read_measurements(path: Path) -> list[Measurement]:
    """The measured steps in a JSON file: an object, a list of them, or what benchmarks/scale.py writes.

    docs/planning.md names the fields.

    Raises:
        DataError: the file is missing, or does not hold measurements.
    """
    found = _read_json(path)
    if isinstance(found, dict) and isinstance(found.get("arms"), list):
        found = found["arms"]
    objects = found if isinstance(found, list) else [found]
    if not objects:
        raise DataError(f"{path} holds no measured step")
    try:
        return [_measurement(values) for values in objects]
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not hold a measured step ({error})") from error


def _measurement(values: Mapping[str, Any]) -> Measurement:
    """What else a record has (energy, hardware, ..) is not for a plan."""
    named = {"algorithm" if name == "algo" else name: value for name, value in values.items()}
    named["block_seconds"] = tuple(named.get("block_seconds") or ())
    known = {f.name for f in fields(Measurement)}
    return Measurement(**{name: value for name, value in named.items() if name in known})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from error
