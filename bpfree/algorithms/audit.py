"""The isolation audit: on which later blocks does the update of a block depend? Found by trying, not by reading.

A learner takes some steps first, so that nothing is at its first values any more: a read-out that starts at zero says
the same of everything, and who listens to it would go unnoticed. From that state it takes the same steps, on the same
batches and with the same random numbers, once as it is and once for every block j with noise on all that the block
holds. Where the gradients, parameters or buffers of block i are then other bits, its update depends on block j. On
blocks before it (j < i) it may, since they make its inputs. On blocks behind it (j > i) the update of a local rule must
not depend, but by channels that the rule declares.

What keeps the audit honest: the steps are taken twice without noise, and must agree bit for bit; and noise on a block
must change that block's own gradient, since noise that nobody notices would prove nothing.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms.learner import Batch, Channel, Learner, Locality, check_learner
from bpfree.errors import TrainingError, UsageError
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.graph import Graph

Measured = Literal["nothing learns", "layer", "block", "network"]
"""How far the update of a block depends on what comes after: not beyond a layer, beyond the block, or further."""

STEPS: Final = 2
"""Steps that are watched: what arrives one step late shows in the second."""


class Dependence(NamedTuple):
    """The update of block `block` is another when the later block `on` is, from step `step` on, counted from 1."""

    block: int
    on: int
    step: int


@dataclass(frozen=True)
class Audit:
    """What a learner declares, and what was found.

    Attributes:
        locality: how far a gradient travels, as the rule declares it.
        channels: other ways to earlier blocks, as the rule declares them.
        steps: how many steps were watched.
        first_changes: [i][j] is the first step, from 1 on, in which noise on block j changed the update of block i
            (for i = j its gradient); None if none did.
        parts: the same for what else learns, by name: heads, read-out, feedback layers.
        trained: for each block whether it learns at all.
        layers_depend: whether inside a block the update of a layer depends on a later layer.
        entered: blocks from whose inputs autograd leads into another block.
    """

    locality: Locality
    channels: tuple[Channel, ...]
    steps: int
    first_changes: tuple[tuple[int | None, ...], ...]
    parts: Mapping[str, tuple[int | None, ...]]
    trained: tuple[bool, ...]
    layers_depend: bool
    entered: tuple[int, ...]

    @property
    def upward(self) -> tuple[Dependence, ...]:
        """Every dependence of a block's update on a later block."""
        return tuple(
            Dependence(block, on, step)
            for block, row in enumerate(self.first_changes)
            for on, step in enumerate(row)
            if on > block and step is not None
        )

    @property
    def reach(self) -> int:
        """How many blocks upwards the update of a block depends on within the step; 0 for a local rule."""
        return max((one.on - one.block for one in self.upward if one.step == 1), default=0)

    @property
    def late_reach(self) -> int:
        """How many blocks upwards an update depends on within all steps that were watched."""
        return max((one.on - one.block for one in self.upward), default=0)

    @property
    def measured(self) -> Measured:
        """The locality that was found within a step."""
        if not any(self.trained):
            return "nothing learns"
        if self.reach:
            return "network"
        return "block" if self.layers_depend else "layer"

    @property
    def unexplained(self) -> tuple[Dependence, ...]:
        """Dependences that neither the locality nor a channel accounts for."""
        if self.locality == "network":
            return ()
        return tuple(
            one
            for one in self.upward
            if not any(channel.explains(one.on - one.block, one.step) for channel in self.channels)
        )

    @property
    def unnoticed(self) -> tuple[int, ...]:
        """Blocks that learn, and on which noise did not change even their own gradient."""
        return tuple(
            index for index, trains in enumerate(self.trained) if trains and not self.first_changes[index][index]
        )

    @property
    def faults(self) -> tuple[str, ...]:
        """Where what was found is not what is declared, one line each."""
        found = []
        if self.unexplained:
            first, more = self.unexplained[0], len(self.unexplained) - 1
            found.append(
                f"the update of block {first.block} depends on block {first.on} in step {first.step}, which "
                f"locality {self.locality} and the declared channels do not allow"
                + (f" (and {more} more)" * bool(more))
            )
        if self.entered and self.locality != "network":
            found.append(f"autograd leads out of {_blocks(self.entered)} into another block")
        if self.layers_depend and self.locality == "layer":
            found.append("inside a block the update of a layer depends on a later layer")
        if self.locality == "network" and len(self.trained) > 1 and any(self.trained) and not self.reach:
            found.append("locality network is declared, and no update depends on a later block")
        if self.unnoticed:
            found.append(f"noise on {_blocks(self.unnoticed)} changed nothing, so that nothing can be said of it")
        return tuple(found)

    @property
    def agrees(self) -> bool:
        """Whether all that was found is declared."""
        return not self.faults


def _blocks(numbers: Sequence[int]) -> str:
    return f"block{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def audit(
    learner: Learner,
    batches: Iterable[Batch],
    *,
    steps: int = STEPS,
    validation: Iterable[Batch] = (),
    seed: int = 0,
) -> Audit:
    """Find out on which later blocks the update of each block depends.

    The learner is left as it was, gradients apart. On a CPU all of it is done by one thread: sums that several threads
    share may come out in other bits each time.

    Args:
        learner: what is audited; in every stage it takes all steps.
        batches: network inputs and targets as for `step`, one for each step; all of them are taken into memory.
        steps: how many are watched, the last ones; those before them, at least one, are the first steps.
        validation: batches for stages whose `finish` chooses something on validation data.
        seed: of the noise, and of PyTorch's generators before the steps.

    Returns:
        What was found.

    Raises:
        UsageError: no learner, no step to watch, no batch for a step before, or batches that do not fit.
        TrainingError: the same steps do not give the same bits, so that nothing can be told from bits.

    Example:
        >>> from bpfree.algorithms import MonoForward
        >>> blocks = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        >>> batches = [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])) for _ in range(12)]
        >>> found = audit(MonoForward(blocks, classes=3), batches)
        >>> found.reach, found.agrees
        (0, True)
    """
    check_learner(learner, "an audit")
    batches, validation = list(batches), list(validation)
    if not 0 < steps < len(batches):
        raise UsageError(
            f"an audit takes a batch for each of its steps and does not watch the first; got {len(batches)} batches "
            f"and {steps} steps to watch"
        )
    with torch.random.fork_rng(), _one_thread():
        before = copy.deepcopy(learner.state_dict())
        try:
            return _Trial(learner, batches[-steps:], validation, seed).audit(batches[:-steps])
        finally:
            learner.load_state_dict(before)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Bits(NamedTuple):
    """Digests of a parameter or buffer: of the gradients that optimisers got in a step, and of the values behind it."""

    gradients: bytes
    values: bytes


class _Moment(NamedTuple):
    """All parameters and buffers, by name, behind a step of a stage; `step` counts from 1."""

    step: int
    tensors: dict[str, _Bits]


Course = list[_Moment]
NOTHING: Final = b""


class _Trial:
    """A learner that takes the same steps from the same state, again and again.

    Rows of an audit are what it tells apart: each block, the layers of blocks that have several, and the other parts.
    """

    def __init__(self, learner: Learner, batches: Sequence[Batch], validation: Sequence[Batch], seed: int) -> None:
        self._learner, self._batches, self._validation, self._seed = learner, batches, validation, seed
        self._stages = learner.stages()
        self._blocks = [f"network.{index}" for index in range(len(learner.blocks()))]
        self._layers = {name: _layers(name, learner.get_submodule(name)) for name in self._blocks}

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name; what two blocks share has a name in each."""
        learner = self._learner
        return {
            **dict(learner.named_parameters(remove_duplicate=False)),
            **dict(learner.named_buffers(remove_duplicate=False)),
        }

    def audit(self, first: Sequence[Batch]) -> Audit:
        """The audit, from the state behind the first steps."""
        torch.manual_seed(self._seed)
        self._take(first)
        self._state = copy.deepcopy(self._learner.state_dict())
        plain, again = self._course(), self._course()
        for name in plain[0].tensors:
            if _first_change(plain, again, name) is not None:
                raise TrainingError(
                    f"the same steps from the same state gave other bits in {name}: the rule draws random numbers that "
                    "no seed reaches, keeps what its state_dict does not hold, or computes in no fixed order"
                )
        changed = [self._course(name) for name in self._blocks]
        first_changes = []
        for index, name in enumerate(self._blocks):
            changes = [_first_change(plain, course, name) for course in changed]
            # the values of a block are other ones already by the noise on it
            changes[index] = _first_change(plain, changed[index], name, of=("gradients",))
            first_changes.append(tuple(changes))
        learning = self._learning(plain)
        parts = dict.fromkeys(map(_part, learning))
        return Audit(
            locality=self._learner.locality,
            channels=self._learner.channels,
            steps=len(self._batches),
            first_changes=tuple(first_changes),
            parts={
                part.replace(".", " "): tuple(_first_change(plain, course, part) for course in changed)
                for part in parts
                if part not in self._blocks
            },
            trained=tuple(block in parts for block in self._blocks),
            layers_depend=self._layers_depend(plain),
            entered=self._entered(),
        )

    def _take(self, batches: Sequence[Batch], watch: Callable[[int], None] = lambda step: None) -> None:
        """Steps on these batches in every stage; `watch` hears the number of each."""
        for stage in self._stages:
            for step, (inputs, targets) in enumerate(batches, 1):
                stage.step((stage.prepared(inputs), targets))
                watch(step)
            if stage.finish is not None:
                stage.finish(self._validation)
                watch(len(batches))

    def _start(self) -> None:
        self._learner.load_state_dict(copy.deepcopy(self._state))  # optimisers would write into what they are given
        self._learner.zero_grad(set_to_none=True)
        torch.manual_seed(self._seed)

    def _course(self, disturbed: str = "") -> Course:
        """What the steps do to everything, with noise on this block or layer if one is named."""
        self._start()
        if disturbed:
            _disturb(self._learner.get_submodule(disturbed), self._seed)
        course: Course = []
        gradients: dict[int, Any] = {}

        def hear(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        gradients.setdefault(id(parameter), hashlib.sha256()).update(_bytes(parameter.grad))

        def watch(step: int) -> None:
            given = {parameter: heard.digest() for parameter, heard in gradients.items()}
            tensors = {
                name: _Bits(given.get(id(tensor), NOTHING), hashlib.sha256(_bytes(tensor)).digest())
                for name, tensor in self._tensors().items()
            }
            course.append(_Moment(step, tensors))
            gradients.clear()

        with ExitStack() as hooks:
            for optimizer in {id(one): one for stage in self._stages for one in stage.optimizers}.values():
                hooks.callback(optimizer.register_step_pre_hook(hear).remove)
            self._take(self._batches, watch)
        return course

    def _learning(self, course: Course) -> list[str]:
        """Names of what has a gradient or other values after some of the steps; counters do not learn."""
        first = course[0].tensors
        numbers = [name for name, tensor in self._tensors().items() if tensor.is_floating_point()]
        return [
            name
            for name in numbers
            if any(
                moment.tensors[name].gradients != NOTHING or moment.tensors[name].values != first[name].values
                for moment in course
            )
        ]

    def _layers_depend(self, plain: Course) -> bool:
        """Whether in some block a layer's update depends on a later layer; found as it is for blocks."""
        for layers in self._layers.values():
            for place in range(len(layers) - 1, 0, -1):
                noisy = self._course(layers[place])
                if any(_first_change(plain, noisy, earlier) is not None for earlier in layers[:place]):
                    return True
        return False

    def _entered(self) -> tuple[int, ...]:
        """Blocks whose inputs carry a graph that leads into another block, in one step."""
        self._start()
        owner = {id(p): index for index, block in enumerate(self._learner.blocks()) for p in block.parameters()}
        found: set[int] = set()

        def look(index: int, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = [one.x if isinstance(one, Graph) else one for one in (*arguments, *named.values())]
            if any(isinstance(one, Tensor) and _leads_away(one, index, owner) for one in inputs):
                found.add(index)

        with ExitStack() as hooks:
            for index, block in enumerate(self._learner.blocks()):
                hooks.callback(block.register_forward_pre_hook(partial(look, index), with_kwargs=True).remove)
            self._take(self._batches[:1])
        return tuple(sorted(found))


def _part(tensor: str) -> str:
    """The part of a learner that a parameter or buffer belongs to: a block, a head, the read-out, .."""
    first, *rest = tensor.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdecimal() else first


def _first_change(one: Course, other: Course, part: str, of: Sequence[str] = _Bits._fields) -> int | None:
    """The first step in which two courses differ in a tensor, or in those of a part."""
    for a, b in zip(one, other, strict=True):
        for name, bits in a.tensors.items():
            inside = name == part or name.startswith(f"{part}.")
            if inside and any(getattr(bits, what) != getattr(b.tensors[name], what) for what in of):
                return a.step
    return None


def _layers(name: str, block: nn.Module) -> tuple[str, ...]:
    """Names of the layers that a block is made of, in order: what has a matrix of weights. A graph block is one."""
    if isinstance(block, GraphBlock):
        return (name,)
    found = tuple(
        f"{name}.{inner}".rstrip(".")
        for inner, module in block.named_modules()
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    )
    return found if len(found) > 1 else (name,)


@torch.no_grad()
def _disturb(module: nn.Module, seed: int) -> None:
    """Add noise as large as they are to parameters, and to buffers that are no counters."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if not isinstance(tensor, nn.Parameter):
            noise = noise.abs()  # variances stay positive
        size = tensor.double().square().mean().sqrt().item() or 1.0
        tensor.add_((size * noise).to(tensor))


def _bytes(tensor: Tensor) -> Any:
    """The bits of a tensor's values, so that NaN is NaN and 0 is not -0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()


def _leads_away(tensor: Tensor, block: int, owner: Mapping[int, int]) -> bool:
    """Whether the graph behind a tensor leads to a parameter of another block, or ends in a cut made only to go on."""
    if not tensor.requires_grad:
        return False
    if tensor.grad_fn is None:  # whoever made this leaf wants a gradient to hand on
        return not isinstance(tensor, nn.Parameter)
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        parameter = getattr(node, "variable", None)
        if parameter is not None and owner.get(id(parameter), block) != block:
            return True
        waiting.extend(following for following, _ in node.next_functions if following is not None)
    return False
