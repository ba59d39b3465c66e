"""Mono-Forward: every block learns from a private linear classifier on its own output.

Paper: Gong, Li, Abdulla, "Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training
Harnessing Local Errors", 2025, arXiv 2501.09238 (equations as restated by Spyra, arXiv 2509.19063, 2.7-2.11).

For block i = 1..L with input a_{i-1} (a constant; a_0 = x), projection matrix M_i (C, d_i) without bias:

    z_i = a_{i-1} W_i^T + b_i,  a_i = relu(z_i)        forward (convolution blocks: a_i = f_i(a_{i-1}))
    G_i = a_i M_i^T                                    goodness, (B, C)
    loss_i = CE(G_i, y), mean over the batch           the only thing that W_i, b_i and M_i learn from

and in closed form for linear blocks, with every gradient taken before any of them is applied:

    D_i = (softmax(G_i) - onehot(y)) / B               (B, C)
    dM_i = D_i^T a_i                                   (C, d_i)
    dz_i = D_i M_i * 1[z_i > 0]                        (B, d_i)
    dW_i = dz_i^T a_{i-1},  db_i = sum_B dz_i          no product with W_i: nothing goes to block i-1

There is no output layer: the read-out is M_L ("last"), or the sum over blocks of the goodness ("sum").

Deviations from the paper: the paper's text on feature maps could not be verified, so how they reach M_i is an
option (`head_pool`, default flatten). "sum" is offered over scores and over probabilities for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._cross_entropy import encode_targets, softmax_cross_entropy
from bpfree.algorithms._lanes import Lanes
from bpfree.algorithms._optim import OptimizerFactory, make_optimizer, set_gradients, trained
from bpfree.algorithms.learner import (
    Batch,
    Learner,
    Metrics,
    Paper,
    Stage,
    Support,
    Trial,
    accuracy,
    evaluation_mode,
    refuse_idle,
)
from bpfree.algorithms.local_units import LocalUnit, LocalUnits, Signal
from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape, block_output_shapes, dropout_linear_relu
from bpfree.networks.graph import Graph
from bpfree.networks.heads import Head, check_pooled
from bpfree.networks.streams import StreamDropout

Schedule = Literal["simultaneous", "sequential"]
PassOn = Literal["pre", "post"]
Inference = Literal["last", "sum_logits", "sum_probs"]
SCHEDULES: Final = ("simultaneous", "sequential")
PASS_ON: Final = ("pre", "post")
INFERENCES: Final = ("last", "sum_logits", "sum_probs")


class MonoForward(Learner):
    """Mono-Forward over any sequence of blocks.

    Args:
        network: hidden blocks in forward order. Linear blocks (`Linear`, `ReLU`, after an optional `Flatten`)
            learn in closed form, all others by autograd inside the block.
        classes: number of classes C.
        lr: learning rate.
        optimizer: "adam", "adamw", "sgd", or a function from parameters to an optimiser.
        weight_decay: decay of all weights, projections included.
        schedule: "simultaneous" trains every block on every batch; "sequential" trains block after block, each
            until it converges, with the blocks before it frozen.
        pass_on: what a block hands to the next one in the simultaneous schedule: its activations from before
            its update ("pre", or None) or computed again after it ("post").
        inference: "last" reads the last block; "sum_logits" adds the goodness of all blocks, "sum_probs" their
            softmax probabilities (so that no block dominates by its scale).
        head_pool: how feature maps reach M_i: "flatten", "gap" or "adaptive".
        input_projection: also train M_0, a classifier on the raw input; it only matters for the sums.
        input_shape: shape of one input sample; needed when the first layer is not a `Linear`.

    Raises:
        UsageError: a network or value that does not fit, or a value that the other choices leave without effect.

    Example:
        >>> blocks = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        >>> learner = MonoForward(blocks, classes=3, lr=1e-2)
        >>> sorted(learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))))
        ['block 0 loss', 'block 1 loss']
    """

    paper = Paper(
        title="Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training Harnessing "
        "Local Errors",
        authors="Gong, Li, Abdulla",
        year=2025,
        arxiv="2501.09238",
        follows="equations 2.7-2.11 as restated in arXiv 2509.19063; Algorithm 1 (simultaneous), greedy (sequential)",
    )
    locality = "block"

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        lr: float = 1e-3,
        optimizer: str | OptimizerFactory = "adam",
        weight_decay: float = 0.0,
        schedule: Schedule = "simultaneous",
        pass_on: PassOn | None = None,
        inference: Inference = "last",
        head_pool: str = "flatten",
        input_projection: bool = False,
        input_shape: Shape | None = None,
    ) -> None:
        super().__init__(network, classes, input_shape)
        for kind, value, known in (
            ("schedule", schedule, SCHEDULES),
            ("pass_on", "pre" if pass_on is None else pass_on, PASS_ON),
            ("inference", inference, INFERENCES),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        if schedule == "sequential":
            refuse_idle({"pass_on": pass_on}, ("pass_on",), "schedule=sequential")
        self.schedule, self.pass_on, self.inference = schedule, pass_on or "pre", inference
        blocks: list[nn.Module] = list(self.network)
        shapes = block_output_shapes(blocks, self.input_shape)
        names = [f"block {index}" for index in range(len(blocks))]
        if input_projection:  # M_0 is the head of a block that passes its input through
            blocks, shapes, names = [nn.Identity(), *blocks], [self.input_shape, *shapes], ["input", *names]
        heads = [Head(shape, classes, pool=head_pool) for shape in shapes]
        check_pooled(head_pool, heads)
        self.heads = nn.ModuleList(heads)
        self._units = tuple(
            Unit.of(name, block, head, input_shape)
            for name, block, head, input_shape in zip(
                names, blocks, heads, [self.input_shape, *shapes[:-1]], strict=True
            )
        )
        together = schedule == "simultaneous" and self.pass_on == "pre"
        groups = [self.parameters()] if together else [unit.parameters for unit in self._units]
        self._optimizers = tuple(make_optimizer(group, optimizer, lr=lr, weight_decay=weight_decay) for group in groups)

    def local_units(self) -> LocalUnits:
        """The blocks, each with its projection.

        Raises:
            UsageError: the schedule is sequential.
        """
        if self.schedule == "sequential":
            raise UsageError(
                "schedule=sequential trains one block at a time, so that other ranks would wait; "
                "use schedule=simultaneous"
            )
        return self._local_units()

    def _local_units(self) -> LocalUnits:
        return LocalUnits(
            units=tuple(
                LocalUnit(
                    unit.name, (unit.block, unit.head), partial(self._learn_unit, index), partial(self._pass_unit, unit)
                )
                for index, unit in enumerate(self._units)
            ),
            begin=self._begin,
            enter=lambda step: (step.inputs,),
            end=self._end,
            join=lambda step: step.lanes.join(),
            ask=lambda inputs: inputs,
            offer=lambda inputs: (inputs,),
            answer=self._answer,
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, C) goodness of the last block, or the sum over blocks."""
        return self._local_units().scores(inputs)

    def _pass_unit(self, unit: Unit, signal: Signal, inputs: Any) -> Signal:
        """a_{i-1} -> a_i; behind it, for the sums, the goodness of all blocks so far."""
        activations = unit.block(signal[0])
        if self.inference == "last":
            return (activations,)
        return (activations, *signal[1:], unit.head(activations))

    def _answer(self, signal: Signal, inputs: Any) -> Tensor:
        if self.inference == "last":
            scores: Tensor = self._units[-1].head(signal[0])
            return scores
        goodness = torch.stack(signal[1:])
        if self.inference == "sum_logits":
            return goodness.sum(0)
        return goodness.softmax(2).mean(0).log()  # logarithm, so that these are log-probabilities too

    @torch.no_grad()
    def _prefix(self, count: int, inputs: Tensor) -> Tensor:
        """What the first `count` units make of the inputs."""
        signal = inputs
        for unit in self._units[:count]:
            signal = unit.block(signal)
        return signal

    def _frozen_prefix(self, count: int, inputs: Tensor) -> Tensor:
        with evaluation_mode(*(unit.block for unit in self._units[:count])):
            return self._prefix(count, inputs)

    def stages(self) -> tuple[Stage, ...]:
        """One stage in the simultaneous schedule, one per block in the sequential one."""
        if self.schedule == "simultaneous":
            return (self.joint_stage("all blocks", self._optimizers, self._update_all),)
        return tuple(
            Stage(
                name=unit.name,
                modules=(unit.block, unit.head),
                optimizers=(self._optimizers[index],),
                update=partial(self._update_one, index),
                scores=unit.scores,
                input_shape=unit.input_shape,
                classes=self.classes,
                prefix=partial(self._frozen_prefix, index) if index else None,
            )
            for index, unit in enumerate(self._units)
        )

    @property
    def variant(self) -> str:
        """Schedule and inference, the two choices that tables tell apart."""
        return f"{self.schedule}, {self.inference}"

    def _update_all(self, batch: Batch) -> Metrics:
        return self._local_units().update(batch)

    def _begin(self, batch: Batch) -> Step:
        inputs, targets = batch
        lanes = Lanes(targets.device, len(self._units) if self.pass_on == "pre" else 0)
        dtype = self._units[0].head.weight.dtype
        return Step(inputs, targets, encode_targets(targets, self.classes, dtype), lanes, [])

    @torch.no_grad()
    def _learn_unit(self, index: int, signal: Signal, step: Step) -> tuple[Signal, Metrics]:
        unit, (inputs,) = self._units[index], signal
        if unit.linear is None:
            activations, loss = unit.learn_by_autograd(inputs, step.targets)
        else:
            entered = unit.enter(inputs)
            activations = unit.activate(entered)
            step.kept.append((entered, activations))
            with step.lanes.lane(index):  # nothing below this block waits for its update
                loss = unit.learn_in_closed_form(entered, activations, step.target_errors)
        if self.pass_on == "post":
            self._optimizers[index].step()
            activations = unit.block(inputs)
        return (activations,), {f"{unit.name} loss": loss}

    def _end(self, step: Step, members: range) -> Metrics:
        if self.pass_on == "pre":
            self._optimizers[0].step()  # of the units that have gradients
        return {}

    @torch.no_grad()
    def _update_one(self, index: int, batch: Batch) -> Metrics:
        inputs, targets = batch
        unit = self._units[index]
        if unit.linear is None:
            _, loss = unit.learn_by_autograd(inputs, targets)
        else:
            target_errors = encode_targets(targets, self.classes, unit.head.weight.dtype)
            entered = unit.enter(inputs)
            loss = unit.learn_in_closed_form(entered, unit.activate(entered), target_errors)
        self._optimizers[index].step()
        return {f"{unit.name} loss": loss}

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Per block: accuracy of its goodness, and the fraction of its units silent on the whole batch."""
        signal, targets = batch
        report = {}
        for unit in self._units:
            signal = unit.block(signal)
            report[f"{unit.name} accuracy"] = accuracy(unit.head(signal), targets)
            activations = signal.answers if isinstance(signal, Graph) else signal
            report[f"{unit.name} silent"] = (activations.flatten(1) <= 0).all(0).float().mean()
        return report

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Any sequence of blocks: each must only map a batch to a batch."""
        return Support(True)

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """The schedule is the only choice of its own that changes training."""
        schedules = SCHEDULES if fixed.get("pass_on") is None else ("simultaneous",)
        return {"schedule": trial.suggest_categorical("schedule", schedules)}


@dataclass(frozen=True, eq=False)
class Step:
    """What the units of a step share.

    Attributes:
        inputs: x.
        targets: (B,) int64.
        target_errors: -onehot(y) / B, (B, C).
        lanes: side streams of the updates.
        kept: what the updates read, referenced until the lanes are joined.
    """

    inputs: Any
    targets: Tensor
    target_errors: Tensor
    lanes: Lanes
    kept: list[Any]


@dataclass(frozen=True, eq=False)
class Unit:
    """One block with its projection M_i: everything that a local loss touches.

    Attributes:
        name: shown in metrics.
        block: f_i.
        head: M_i.
        input_shape: shape of one sample of a_{i-1}.
        dropout: of a_{i-1}, if a block that learns in closed form begins with it.
        linear: W_i and b_i if the block learns in closed form, otherwise None.
        parameters: of the block, then of the head, without those that the user has frozen.
    """

    name: str
    block: nn.Module
    head: Head
    input_shape: Shape
    dropout: StreamDropout | None
    linear: nn.Linear | None
    parameters: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, name: str, block: nn.Module, head: Head, input_shape: Shape) -> Unit:
        """A unit, with what follows from its block."""
        parameters = trained(block, head)
        whole = len(parameters) == len([*block.parameters(), *head.parameters()])
        dropout, linear = dropout_linear_relu(block) if whole else (None, None)
        return cls(name, block, head, input_shape, dropout, linear, tuple(parameters))

    def scores(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) block inputs -> (B, C) goodness."""
        goodness: Tensor = self.head(self.block(inputs))
        return goodness

    def enter(self, inputs: Tensor) -> Tensor:
        """a_{i-1} as a linear block sees it."""
        return inputs if self.dropout is None else self.dropout(inputs)

    def activate(self, inputs: Tensor) -> Tensor:
        """a_i of a linear block, (B, d_i), from what has entered."""
        assert self.linear is not None
        return F.relu(F.linear(inputs.flatten(1), self.linear.weight, self.linear.bias))

    def learn_in_closed_form(self, inputs: Tensor, activations: Tensor, target_errors: Tensor) -> Tensor:
        """Set the gradients of W_i, b_i and M_i from `inputs` that entered and `activations` a_i; return the loss."""
        loss, errors = classifier_errors(self.head.weight, activations, target_errors)
        gradients = linear_relu_gradients(self.head.weight, inputs.flatten(1), activations, errors)
        if self.linear is not None and self.linear.bias is None:
            del gradients[1]
        set_gradients(self.parameters, gradients)
        return loss

    def learn_by_autograd(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Set the gradients of any block with a graph that begins and ends inside it; return a_i and the loss."""
        with torch.enable_grad():
            activations = self.block(inputs.detach())
            loss = F.cross_entropy(self.head(activations), targets)
        set_gradients(self.parameters, torch.autograd.grad(loss, self.parameters))
        return activations.detach(), loss.detach()


def classifier_errors(projection: Tensor, activations: Tensor, target_errors: Tensor) -> tuple[Tensor, Tensor]:
    """loss_i and D_i of a linear classifier.

    Args:
        projection: M_i, (C, d_i).
        activations: a_i, (B, d_i).
        target_errors: -onehot(y) / B, (B, C).
    """
    with torch.autocast(activations.device.type, enabled=False):
        return softmax_cross_entropy(activations.to(projection.dtype) @ projection.T, target_errors)


def linear_relu_gradients(projection: Tensor, inputs: Tensor, activations: Tensor, errors: Tensor) -> list[Tensor]:
    """dW_i, db_i and dM_i of one `Linear -> ReLU` block.

    Args:
        projection: M_i, (C, d_i).
        inputs: a_{i-1}, (B, d_{i-1}).
        activations: a_i, (B, d_i).
        errors: D_i, (B, C).
    """
    with torch.autocast(activations.device.type, enabled=False):  # D_i is divided by B: too small for 16 bits
        projection_gradient = errors.T @ activations.to(errors.dtype)
        backward = (errors @ projection).to(activations.dtype)
    backward = torch.ops.aten.threshold_backward(backward, activations, 0)  # * 1[a_i > 0], which is 1[z_i > 0]
    return [backward.T @ inputs, backward.sum(0), projection_gradient]
