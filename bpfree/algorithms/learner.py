"""The contract that every learning rule fulfils.

A `Learner` owns a network cut into blocks, whatever its rule adds to it, and its optimisers. Rules implement
the abstract methods once; nothing that is implemented here is overridden, and no learner inherits from
another. A plain loop is all it takes to train one:

    learner = bpfree.MonoForward(my_blocks, classes=10, lr=1e-3)
    for x, y in my_loader:
        learner.step((x, y))
    accuracy = (learner.scores(x_test).argmax(1) == y_test).float().mean()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._option_types import check_options
from bpfree.errors import UsageError
from bpfree.networks.blocks import Shape, as_blocks, sample_shape
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.graph import Graph

Made = TypeVar("Made", bound="Learner")
Batch = tuple[Any, Tensor]  # inputs, a tensor or a `Graph`, and targets
Metrics = dict[str, Tensor]
Locality = Literal["network", "block", "layer"]
Task = Literal["classify", "autoencode"]
TASKS: Final = ("classify", "autoencode")
KIND: Final = "kind"  # name of an optimiser's class, beside its state


@dataclass(frozen=True)
class Paper:
    """Where a rule comes from, and what of it the code follows."""

    title: str
    authors: str
    year: int
    arxiv: str | None
    follows: str


class Support(NamedTuple):
    """Whether a rule can train a network, and the reason if it cannot."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Channel:
    """A way, other than a gradient from block to block, in which later blocks have a say in what earlier ones learn.

    Attributes:
        name: in a few words.
        carries: what goes through it.
        delay: steps that it takes; 0 if it arrives within the step that it leaves in.
        reach: how many blocks up it goes each time; None for any number.
    """

    name: str
    carries: str
    delay: int = 0
    reach: int | None = None

    def explains(self, distance: int, step: int) -> bool:
        """Whether a change in one block can have reached the update of a block so far before it by this channel.

        Args:
            distance: how many blocks up.
            step: the step in whose update it shows, from 1 on; the change was made before step 1.
        """
        passages = (step - 1) // self.delay if self.delay else step
        return distance <= passages * self.reach if self.reach is not None else passages > 0


class Trial(Protocol):
    """What a search space needs of a tuner's trial (Optuna's `Trial` has it)."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Stage:
    """What is trained together until it converges: the whole network, or one block of a greedy schedule.

    Attributes:
        name: shown in progress and records.
        modules: what this stage trains; its best state is the state of these modules.
        optimizers: the optimisers that `step` drives.
        update: one update from one checked batch.
        scores: (B, ...) stage inputs -> (B, C) logits that rate the stage on validation data; reconstructions of the
            inputs in the task "autoencode".
        input_shape: shape of one stage input.
        classes: number of classes C; 0 in the task "autoencode".
        prefix: frozen map from network inputs to stage inputs, without gradient; None when they are the same.
            As long as nothing augments the inputs, its outputs may be computed once and kept.
        training_prefix: the same for the inputs of `update`, if training looks at them in another way than `scores`
            does (other rows of a graph, labels appended, negatives); None when there is no difference.
        finish: for a stage whose steps only collect what a closed form needs. It makes the weights of what they
            collected and forgets that; it chooses hyperparameters on the batches given, which are validation data as
            inputs of `scores` (there may be none). Such a stage sees every sample once and is not repeated until it
            converges. None for stages whose steps learn.
        select: for a stage whose answers depend on a choice that validation data make, such as which layers count. It
            chooses anew, each time before `scores` are rated, on the batches given, which are validation data as
            network inputs, and returns the buffer that holds the choice. None where there is nothing to choose.
        whole_graph: whether it keeps something for each node of a graph, so that every step must meet the same one.

    Where inputs are graphs, "B" is the number of nodes (or node pairs) that the graph asks about.
    """

    name: str
    modules: tuple[nn.Module, ...]
    optimizers: tuple[Optimizer, ...]
    update: Callable[[Batch], Metrics]
    scores: Callable[[Any], Tensor]
    input_shape: Shape
    classes: int
    prefix: Callable[[Any], Any] | None = None
    training_prefix: Callable[[Any], Any] | None = None
    whole_graph: bool = False
    finish: Callable[[Iterable[Batch]], Metrics] | None = None
    select: Callable[[Iterable[Batch]], Tensor] | None = None

    @property
    def step_prefix(self) -> Callable[[Any], Any] | None:
        """From network inputs to the inputs of `step`, or None when they are the same."""
        return self.training_prefix or self.prefix

    def prepared(self, inputs: Any) -> Any:
        """Network inputs as the inputs of `step`."""
        return inputs if self.step_prefix is None else self.step_prefix(inputs)

    def scores_of_inputs(self, inputs: Any) -> Tensor:
        """`scores` of network inputs."""
        return self.scores(inputs if self.prefix is None else self.prefix(inputs))

    def step(self, batch: Batch) -> Metrics:
        """One update from one batch of stage inputs.

        Args:
            batch: `(inputs, targets)`: (B, *input_shape) floating point or a `Graph` with (n, *input_shape) features,
                and (B,) int64; in the task "autoencode" the inputs again.

        Returns:
            0-d tensors on the batch's device (at least one; losses of a stage that learns by steps); reading them on
            the host is the caller's choice.

        Raises:
            UsageError: shapes or types do not fit the network, (on the CPU, where looking at values does not stall a
                device) a target is not a class, or PyTorch is in inference mode.
        """
        if torch.is_inference_mode_enabled():
            raise UsageError("a step learns, which torch.inference_mode() does not allow; leave it for the step")
        check_batch(batch, self.input_shape, self.classes)
        return self.update(batch)


def check_inputs(inputs: Any, input_shape: Shape) -> None:
    """Refuse inputs that do not fit a network.

    Args:
        inputs: (B, *input_shape) floating point, or a `Graph` with (n, *input_shape) features.
        input_shape: shape of one sample.

    Raises:
        UsageError: another shape or type.
    """
    values = inputs.x if isinstance(inputs, Graph) else inputs
    if not isinstance(values, Tensor):
        raise UsageError(f"inputs are a tensor or a Graph, got {type(values).__name__}")
    if values.layout is not torch.strided:
        raise UsageError(f"inputs must be dense, got a tensor of layout {values.layout}; call its to_dense()")
    # A first layer that flattens takes images too, so only the number of values per sample has to agree.
    if values.ndim < 2 or values.shape[1:].numel() != torch.Size(input_shape).numel():
        raise UsageError(
            f"inputs have shape {tuple(values.shape)}, expected (batch, {', '.join(map(str, input_shape))})"
        )
    if not values.is_floating_point():
        raise UsageError(f"inputs must be floating point, got {values.dtype}; scale images to [0, 1] first")


def check_kind(inputs: Any, *, graphs: bool) -> None:
    """Refuse a graph where a network takes tensors, and a tensor where it takes graphs.

    Args:
        inputs: anything; what is neither is for `check_inputs` to refuse.
        graphs: what the network takes.

    Raises:
        UsageError: it is the other.
    """
    if isinstance(inputs, Graph if not graphs else Tensor):
        raise UsageError(
            "the network is made of graph convolutions and takes a Graph, got a tensor; see Graph.of"
            if graphs
            else "the network takes tensors, got a Graph; build one of graph convolutions, such as gcn:2x128"
        )


def check_learner(learner: object, what: str) -> None:
    """Refuse what is no learner, such as the network itself.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(learner, Learner):
        raise UsageError(
            f"{what} takes a learner, such as bpfree.Backprop(network, classes=10), got {type(learner).__name__}"
        )


def check_classes(classes: int) -> None:
    """Refuse what is no number of classes.

    Raises:
        UsageError: not an integer from 0 on, or one class, which there is nothing to tell from.
    """
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
        raise UsageError(f"classes is how many there are, an int, got {classes!r}")
    if classes == 1:
        raise UsageError("a classifier needs at least 2 classes, got 1")


def refuse_idle(given: Mapping[str, Any], idle: Container[str], reason: str) -> None:
    """Refuse parameters that would be ignored.

    Args:
        given: by name; None is not given.
        idle: names of those that have no effect.
        reason: what leaves them without.

    Raises:
        UsageError: one of them is given.
    """
    names = [name for name, value in given.items() if value is not None and name in idle]
    if names:
        raise UsageError(f"{' and '.join(names)} would have no effect with {reason}; leave out {' and '.join(names)}")


def _pair(batch: Batch) -> Batch:
    # a tensor of two rows would unpack as well
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UsageError(f"a batch is a pair (inputs, targets), got {type(batch).__name__}")
    return batch[0], batch[1]


def check_batch(batch: Batch, input_shape: Shape, classes: int) -> None:
    """Refuse a batch that does not fit a network, as `Stage.step` does.

    Args:
        batch: see `Stage.step`.
        input_shape: shape of one input sample.
        classes: C; 0 for the task "autoencode".

    Raises:
        UsageError: see `Stage.step`.
    """
    inputs, targets = _pair(batch)
    check_inputs(inputs, input_shape)
    if not isinstance(targets, Tensor):
        raise UsageError(f"targets are a tensor, got {type(targets).__name__}")
    if len(inputs) == 0:
        raise UsageError("the batch is empty")
    if not classes:
        if targets.shape != inputs.shape or not targets.is_floating_point():
            raise UsageError(
                f"the task autoencode wants targets like its inputs, {tuple(inputs.shape)} floating point, "
                f"got {tuple(targets.shape)} of {targets.dtype}"
            )
        return
    if targets.ndim != 1 or len(targets) != len(inputs) or targets.dtype != torch.int64:
        raise UsageError(
            f"targets must be {len(inputs)} int64 class indices, got shape {tuple(targets.shape)} of {targets.dtype}"
        )
    if targets.device.type == "cpu" and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise UsageError(f"targets must lie in [0, {classes}), got {int(targets.min())} to {int(targets.max())}")


class Learner(nn.Module, ABC):
    """A network together with the rule that trains it.

    Args:
        network: the blocks in forward order, without a read-out (see `as_blocks` for how a network is cut).
        classes: number of classes C; 0 for the task "autoencode", in which targets are the inputs.
        input_shape: shape of one input sample; may be left out when the first layer is a `Linear`.

    Attributes:
        paper: where the rule comes from.
        locality: how far a gradient, or an error in its place, travels: through the "network", a "block" or a "layer";
            of a class with its defaults, of a learner with the options that it was made with.
        capture_safe: whether `step` can be captured in a CUDA graph.
        channels: ways besides gradients in which later blocks have a say in what earlier ones learn, with the options
            that this learner was made with; the audit shows that there are no others.
        takes_graphs: whether inputs are `Graph`s, and not tensors.
        tasks: what the rule can learn.
        undivided: why its blocks cannot be spread over processes, for rules whose blocks cannot (others are
            `HasLocalUnits`).

    Raises:
        UsageError: a task that the rule cannot learn, a network that does not fit, an option of another type, or a
            number that is not finite.
    """

    paper: ClassVar[Paper]
    locality: Locality
    capture_safe: ClassVar[bool] = True
    tasks: ClassVar[tuple[Task, ...]] = ("classify",)
    undivided: ClassVar[str] = ""
    channels: tuple[Channel, ...] = ()

    def __new__(cls: type[Made], *args: Any, **options: Any) -> Made:
        """Refuse options of another type before any rule makes something of them, for every rule alike."""
        check_options(cls, options)
        return super().__new__(cls)

    def __init__(
        self, network: nn.Sequential | Iterable[nn.Module], classes: int, input_shape: Shape | None = None
    ) -> None:
        super().__init__()
        check_classes(classes)
        self.network = as_blocks(network)
        self.takes_graphs = any(isinstance(module, GraphBlock) for module in self.network.modules())
        self.classes = classes
        if self.task not in self.tasks:
            raise UsageError(f"classes must be at least 2, got {classes}")
        self.input_shape = sample_shape(input_shape, self.blocks())

    @abstractmethod
    def forward(self, inputs: Any) -> Tensor:
        """(B, *input_shape) inputs or a `Graph` -> (B, C) class scores, higher is likelier; no labels in reach.

        In the task "autoencode" (B, *input_shape) reconstructions.
        """

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """What is trained in which order: one stage for simultaneous rules, one per block for greedy ones."""

    @abstractmethod
    def diagnostics(self, batch: Batch) -> Metrics:
        """What the rule knows about itself on a batch (accuracy of each local head, ...), as 0-d tensors."""

    @property
    @abstractmethod
    def variant(self) -> str:
        """The choices that make this rule differ from its default, in a word or two for a table's row."""

    @classmethod
    @abstractmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Whether the rule can train `network`, with a reason if not."""

    @staticmethod
    @abstractmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """The rule's own hyperparameters for a tuner, as keyword arguments of the learner.

        Those that every rule has (learning rate, weight decay, batch size, ...) are the tuner's.

        Args:
            trial: asked for values.
            fixed: keyword arguments that go with them, of a preset or the user, and `classes=0` in the task
                "autoencode"; nothing is suggested that the learner refuses beside them.
        """

    @classmethod
    def idle(cls, parameters: Mapping[str, Any]) -> frozenset[str]:
        """Names of keyword arguments that these, with the defaults of all others, leave without effect.

        A tuner asks, for a learner refuses them. Only rules that have no use for a learning rate or for weight decay,
        which are searched for every rule, have to answer.
        """
        return frozenset()

    @property
    @final
    def task(self) -> Task:
        """What is learned: classes, or to reconstruct the inputs."""
        return "classify" if self.classes else "autoencode"

    @final
    def blocks(self) -> tuple[nn.Module, ...]:
        """The ordered units of locality: also the units of audit, timing and placement on devices."""
        return tuple(self.network)

    @final
    def joint_stage(
        self,
        name: str,
        optimizers: Iterable[Optimizer],
        update: Callable[[Batch], Metrics],
        scores: Callable[[Any], Tensor] | None = None,
        select: Callable[[Iterable[Batch]], Tensor] | None = None,
    ) -> Stage:
        """The only stage of a rule that trains everything at once; see `Stage`. Rated by `forward` unless told."""
        return Stage(
            name=name,
            modules=(self,),
            optimizers=tuple(optimizers),
            update=update,
            scores=self if scores is None else scores,
            input_shape=self.input_shape,
            classes=self.classes,
            select=select,
        )

    @final
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Every optimiser of every stage."""
        return tuple(optimizer for stage in self.stages() for optimizer in stage.optimizers)

    @final
    def step(self, batch: Batch) -> Metrics:
        """One update of everything from one batch; never waits for the device.

        Args:
            batch: `(inputs, targets)`, (B, *input_shape) floating point and (B,) int64, on the learner's device.

        Returns:
            0-d tensors on the batch's device, such as each block's loss.

        Raises:
            UsageError: the batch does not fit, or the schedule trains one stage after another, in which case
                the loop is `for stage in learner.stages(): for x, y in loader: stage.step((stage.prepared(x), y))`.
        """
        stage = self._only_stage()
        inputs, targets = _pair(batch)
        check_kind(inputs, graphs=self.takes_graphs)
        with self._disagreements_explained(inputs):
            return stage.step((stage.prepared(inputs), targets))

    @final
    def finish(self, validation: Iterable[Batch] = ()) -> Metrics:
        """Make the weights of a rule in closed form, behind the last `step`; other rules have nothing left to do.

        Args:
            validation: batches as for `step` on which hyperparameters are chosen, where the rule has such.

        Returns:
            What was chosen, as 0-d tensors; this waits for the device.

        Raises:
            UsageError: nothing was collected, there is something to choose and no validation data, or see `step`.
        """
        stage = self._only_stage()
        return {} if stage.finish is None else stage.finish(validation)

    def _only_stage(self) -> Stage:
        stages = self.stages()
        if len(stages) > 1:
            raise UsageError(
                f"this schedule trains {len(stages)} stages one after another; loop over learner.stages() instead"
            )
        return stages[0]

    @final
    @torch.no_grad()
    def scores(self, inputs: Any) -> Tensor:
        """What `forward` makes of inputs or a `Graph`, in evaluation mode and without gradient.

        Raises:
            UsageError: inputs of a shape or type that does not fit the network.
        """
        check_kind(inputs, graphs=self.takes_graphs)
        check_inputs(inputs, self.input_shape)
        with evaluation_mode(self), self._disagreements_explained(inputs):
            scores: Tensor = self(inputs)
        return scores

    @contextmanager
    def _disagreements_explained(self, inputs: Any) -> Iterator[None]:
        """Say in words where precision or device differ, if PyTorch refuses to compute for that.

        Looked at only then: rules keep some parts in float32 on purpose, and autocast makes other pairs fit.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            have = {_kind(parameter) for parameter in self.parameters()}
            given = _kind(inputs.x if isinstance(inputs, Graph) else inputs)
            if len(have) > 1:
                raise UsageError(
                    f"parts of this {type(self).__name__} are {' and others '.join(sorted(have))}; build it from a "
                    "float32 network on the CPU and convert it as a whole, learner.double() or learner.cuda()"
                ) from error
            if given not in have:
                raise UsageError(
                    f"inputs are {given}, this {type(self).__name__} is {' '.join(have)}; convert one of them"
                ) from error
            raise

    @final
    def get_extra_state(self) -> list[dict[str, Any]]:
        """Optimiser states, so that `state_dict` holds all that is needed to go on bit for bit."""
        return [{**optimizer.state_dict(), KIND: type(optimizer).__name__} for optimizer in self.optimizers()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Optimiser states follow the parameters to another precision or device; counts of steps stay as they are."""
        moved = super()._apply(fn, recurse)
        for optimizer in self.optimizers():
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        state[name] = fn(value).to(value.dtype) if name == "step" else fn(value)
        return moved

    @final
    def set_extra_state(self, state: list[dict[str, Any]]) -> None:
        optimizers = self.optimizers()
        if len(state) != len(optimizers):
            raise UsageError(f"the state has {len(state)} optimisers, this learner {len(optimizers)}")
        for optimizer, saved in zip(optimizers, state, strict=True):  # all of them, before any is loaded
            mine = type(optimizer).__name__
            if saved.get(KIND, mine) != mine:
                raise UsageError(
                    f"the state is of {saved[KIND]} and this learner learns by {mine}; build it with the same optimizer"
                )
        try:
            for optimizer, saved in zip(optimizers, state, strict=True):
                optimizer.load_state_dict({name: value for name, value in saved.items() if name != KIND})
        except ValueError as error:  # heard before PyTorch's list of the weights that do not fit
            raise UsageError(f"the state is that of another network ({error})") from error


def _kind(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} on {values.device}"


@runtime_checkable
class LooksAtData(Protocol):
    """A learner that wants to see the training set before its first step; `Trainer` shows it."""

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Look at every training sample once, not augmented."""


class Processes(Protocol):
    """Those that share a training (`bpfree.parallel.Ranks`)."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Put the sum over all processes in place of a tensor, and return it."""


@runtime_checkable
class Collects(Protocol):
    """A module of a learner that notes samples for a closed form, in any cut into batches (`Stage.finish`)."""

    def merge(self, processes: Processes, device: torch.device) -> None:
        """Note here what all processes have noted, each of other samples; all of them call this."""

    def clear(self) -> None:
        """Forget everything."""


@runtime_checkable
class DrawsNoise(Protocol):
    """A learner whose answer depends on a draw of noise, and which can be asked for more than one answer."""

    def sample(self, inputs: Any, *, draw: int) -> Tensor:
        """(B, *input_shape) inputs -> (B, C) class scores from the draw of this number, in evaluation mode."""


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules in evaluation mode and each submodule back where it was on leaving."""
    switched = [part for module in modules for part in module.modules() if part.training]
    for part in switched:
        part.training = False
    try:
        yield
    finally:
        for part in switched:
            part.training = True


def accuracy(scores: Tensor, targets: Tensor) -> Tensor:
    """Fraction of samples whose highest score is their class: (B, C) and (B,) -> 0-d float32."""
    return (scores.argmax(1) == targets).float().mean()
