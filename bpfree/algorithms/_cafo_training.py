"""How CaFo's blocks and predictors are trained, each as a stage: see `cafo` for the equations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._cafo_predictors import GradientLoss, Predictor, Predictors
from bpfree.algorithms._cafo_ridge import RidgeStatistics
from bpfree.algorithms._cross_entropy import encode_targets
from bpfree.algorithms._lanes import Lanes
from bpfree.algorithms._optim import set_gradients
from bpfree.algorithms.direct_feedback import draw_feedback, set_feedback_gradients
from bpfree.algorithms.learner import Batch, Metrics, Stage, check_inputs
from bpfree.algorithms.local_units import LocalUnit, LocalUnits, Signal
from bpfree.errors import UsageError
from bpfree.networks.blocks import Shape
from bpfree.networks.graph import Graph
from bpfree.networks.heads import Head

RIDGES: Final = tuple(10 ** (exponent / 2) for exponent in range(-8, 2))
"""Ridges to choose from, 1e-4 to 10^0.5, in units of the mean variance of the features."""


class Alignment(nn.Module):
    """Training of the blocks by direct feedback alignment: the read-out u, the feedback B_j, their optimiser.

    Args:
        blocks: f_1..f_L.
        shapes: of one sample of each h_j.
        classes: number of classes C.
        make: from parameters to an optimiser.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        shapes: Sequence[Shape],
        classes: int,
        make: Callable[[Iterable[nn.Parameter]], Optimizer],
    ) -> None:
        super().__init__()
        self.readout = Head(shapes[-1], classes, bias=True)
        for index, shape in enumerate(shapes[:-1]):
            self.register_buffer(f"feedback_{index}", draw_feedback(classes, shape))
        self._blocks = (blocks,)  # in a tuple, because they are registered by the learner
        self._optimizer = make([*blocks.parameters(), *self.readout.parameters()])

    def stage(self, input_shape: Shape) -> Stage:
        """All blocks learn from the same error."""
        return Stage(
            name="blocks",
            modules=(*self._blocks, self.readout),
            optimizers=(self._optimizer,),
            update=self._update,
            scores=self._scores,
            input_shape=input_shape,
            classes=self.readout.weight.shape[0],
        )

    def _scores(self, inputs: Any) -> Tensor:
        """u, (B, C)."""
        signal = inputs
        for block in self._blocks[0]:
            signal = block(signal)
        return self.readout(signal)

    def _update(self, batch: Batch) -> Metrics:
        blocks = list(self._blocks[0])
        feedback = [getattr(self, f"feedback_{index}") for index in range(len(blocks) - 1)]
        loss = set_feedback_gradients(blocks, self.readout, [*feedback, None], batch)
        self._optimizer.step()
        return {"read-out loss": loss}


Outputs = Callable[[Any], list[Any]]
"""From network inputs to the outputs of a group's blocks."""
Answer = Callable[[Tensor], Tensor]
"""From the scores of some predictors (l, B, C) to one answer (B, C)."""


class Group(nn.Module, ABC):
    """Predictors that are trained together.

    Args:
        members: numbers of their blocks, from 0.
        predictors: the predictors.
    """

    def __init__(self, members: range, predictors: Predictors) -> None:
        super().__init__()
        self.members, self.predictors = members, predictors

    @property
    def name(self) -> str:
        """As shown in progress and records."""
        if len(self.members) == 1:
            return f"predictor {self.members[0]}"
        return f"predictors {self.members[0]} to {self.members[-1]}"

    @abstractmethod
    def stage(self, outputs: Outputs, answer: Answer, input_shape: Shape) -> Stage:
        """How the predictors are trained.

        Args:
            outputs: from network inputs to the outputs of the group's blocks.
            answer: makes one answer of the predictors' scores.
            input_shape: shape of one network input.
        """

    def scores(self, outputs: Sequence[Any]) -> Tensor:
        """Outputs of the group's blocks -> (l, B, C) scores."""
        dtype = next(self.predictors.parameters()).dtype
        scores: Tensor = self.predictors([sample_rows(output).to(dtype) for output in outputs])
        return scores


class Descent(Group):
    """Predictors that learn in steps, on outputs of the blocks that may be computed once.

    Each has its own arithmetic, so that it learns the same beside others and alone, and a lane of its own.

    Args:
        members: see `Group`.
        predictors: see `Group`.
        loss: what they learn from.
        optimizer: over all of them.
    """

    def __init__(self, members: range, predictors: Predictors, loss: GradientLoss, optimizer: Optimizer) -> None:
        super().__init__(members, predictors)
        self._loss, self._optimizer = loss, optimizer

    def stage(self, outputs: Outputs, answer: Answer, input_shape: Shape) -> Stage:
        every = range(len(self.members))
        units = self.units([()] * len(every), answer)

        def features(inputs: Any) -> Any:
            check_inputs(inputs, input_shape)
            found = outputs(inputs)
            if isinstance(inputs, Graph):  # of all nodes: which of them are asked about may change
                return inputs.with_x(self.predictors.pack([output.x for output in found]))
            return self.packed(found)

        return Stage(
            name=self.name,
            modules=(self.predictors,),
            optimizers=(self._optimizer,),
            update=units.update,
            scores=units.scores,
            input_shape=(self.predictors.packed_width(every),),
            classes=self.predictors.classes,
            prefix=features,
        )

    def packed(self, outputs: Sequence[Any]) -> Tensor:
        """Outputs of consecutive blocks -> (B, packed width) features."""
        return self.predictors.pack([output.flatten(1) for output in outputs])

    def units(
        self, blocks: Sequence[tuple[nn.Module, ...]], answer: Answer, members: range | None = None
    ) -> LocalUnits:
        """The predictors as a chain, which learns from packed features.

        Args:
            blocks: frozen modules that belong to each predictor.
            answer: makes one answer of the predictors' scores.
            members: which of the predictors the features are of; None for all.
        """
        number_of = range(len(self.members)) if members is None else members

        def each(inputs: Any) -> dict[int, Tensor]:
            return dict(zip(number_of, self.predictors.unpack(sample_rows(inputs), number_of), strict=True))

        def begin(batch: Batch) -> Step:
            inputs, targets = batch
            dtype = next(self.predictors.parameters()).dtype
            errors = encode_targets(targets, self.predictors.classes, dtype)
            return Step(each(inputs), errors, Lanes(targets.device, len(self.members)), [])

        return LocalUnits(
            units=tuple(
                LocalUnit(
                    f"block {number}",
                    (*frozen, self.predictors.each[index]),
                    partial(self._learn, index),
                    partial(self._pass, index),
                )
                for index, (number, frozen) in enumerate(zip(self.members, blocks, strict=True))
            ),
            begin=begin,
            enter=lambda step: (),
            end=self._end,
            join=lambda step: step.lanes.join(),
            ask=each,
            offer=lambda features: (),
            answer=lambda signal, features: answer(torch.stack(signal)),
            independent=True,
        )

    @torch.no_grad()
    def _learn(self, index: int, signal: Signal, step: Step) -> tuple[Signal, Metrics]:
        predictor, features = self.predictors.each[index], step.features[index]
        assert isinstance(predictor, Predictor)
        with (
            step.lanes.lane(index),
            torch.autocast(features.device.type, enabled=False),  # errors divided by B are too small for 16 bits
        ):
            losses, errors = self._loss.losses_and_errors(predictor.scores(features)[None], step.target_errors)
            gradients = predictor.gradients(features, errors[0])
            set_gradients(predictor.parameters(), gradients)
        step.kept.append((losses, errors, gradients))
        return (), {f"block {self.members[index]} loss": losses[0]}

    def _end(self, step: Step, members: range) -> Metrics:
        self._optimizer.step()  # of the predictors that have gradients
        return {}

    def _pass(self, index: int, signal: Signal, features: dict[int, Tensor]) -> Signal:
        return (*signal, self.predictors.each[index](features[index]))


@dataclass(frozen=True, eq=False)
class Step:
    """What the predictors of a step share.

    Attributes:
        features: (B, D_j) by the number of the predictor.
        target_errors: -onehot(y) / B, (B, C).
        lanes: side streams of the updates.
        kept: what the updates made, referenced until the lanes are joined.
    """

    features: dict[int, Tensor]
    target_errors: Tensor
    lanes: Lanes
    kept: list[Any]


class ClosedForm(Group):
    """Predictors that are solved for, from statistics gathered in one pass.

    Args:
        members: see `Group`.
        predictors: see `Group`.
        ridge: the penalty, or None for each predictor's best of `RIDGES` on validation data.
        gram: precision of the products.
    """

    def __init__(self, members: range, predictors: Predictors, ridge: float | None, gram: str) -> None:
        super().__init__(members, predictors.requires_grad_(False))
        self._ridge = ridge
        self._statistics = tuple(RidgeStatistics(width, predictors.classes, gram) for width in predictors.widths)
        self.statistics = nn.ModuleList(self._statistics)

    def stage(self, outputs: Outputs, answer: Answer, input_shape: Shape) -> Stage:
        return Stage(
            name=self.name,
            modules=(self.predictors,),
            optimizers=(),
            update=partial(self._gather, outputs),
            scores=lambda inputs: answer(self.scores(outputs(inputs))),
            input_shape=input_shape,
            classes=self.predictors.classes,
            finish=partial(self._solve, outputs),
        )

    def scores(self, outputs: Sequence[Any]) -> Tensor:
        """See `Group`.

        Raises:
            UsageError: samples have been collected, and not solved for.
        """
        if any(statistics.count for statistics in self._statistics):
            raise UsageError("what the steps collected is not in the weights yet; call finish() after the pass")
        return super().scores(outputs)

    @torch.no_grad()
    def _gather(self, outputs: Outputs, batch: Batch) -> Metrics:
        inputs, targets = batch
        y = self._one_hot(targets)
        for output, statistics in zip(outputs(inputs), self._statistics, strict=True):
            statistics.add(sample_rows(output), y)
        return {"samples": y.new_full((), len(targets))}

    def _one_hot(self, targets: Tensor) -> Tensor:
        dtype = next(self.predictors.parameters()).dtype
        return (targets[:, None] == torch.arange(self.predictors.classes, device=targets.device)).to(dtype)

    @torch.no_grad()
    def _solve(self, outputs: Outputs, validation: Iterable[Batch]) -> Metrics:
        """Fill in the weights; forget the statistics."""
        solved = []
        for statistics, predictor in zip(self._statistics, self.predictors.each, strict=True):
            assert isinstance(predictor, Predictor)
            problem = statistics.problem(predictor.weight.device, centred=predictor.bias is not None)
            ridges = [ridge * problem.scale for ridge in RIDGES] if self._ridge is None else [self._ridge]
            solved.append((ridges, *problem.solve(ridges)))
            del problem  # a Gram matrix takes as much as everything else
        chosen, errors = [0] * len(solved), None
        if self._ridge is None:
            errors = self._validation_errors(outputs, solved, validation)
            chosen = errors.argmin(1).tolist()
        report = {}
        for index, (number, best, (ridges, weights, biases)) in enumerate(
            zip(self.members, chosen, solved, strict=True)
        ):
            predictor = self.predictors.each[index]
            assert isinstance(predictor, Predictor)
            predictor.weight.copy_(weights[best])
            if predictor.bias is not None:
                predictor.bias.copy_(biases[best])
            report[f"block {number} ridge"] = torch.tensor(ridges[best])
            if errors is not None:
                report[f"block {number} validation squared error"] = errors[index, best]
        for statistics in self._statistics:
            statistics.clear()
        return report

    def _validation_errors(
        self, outputs: Outputs, solved: Sequence[tuple[list[float], Tensor, Tensor]], validation: Iterable[Batch]
    ) -> Tensor:
        """Mean squared error of every predictor with every ridge, (l, R) float64, in one pass for all of them."""
        first, count = next(self.predictors.parameters()), 0
        total = first.new_zeros(len(solved), len(RIDGES), dtype=torch.float64)
        for inputs, targets in validation:
            y = self._one_hot(targets).double()
            for errors, output, (_, weights, biases) in zip(total, outputs(inputs), solved, strict=True):
                scores = F.linear(sample_rows(output).double(), weights.flatten(0, 1), biases.flatten())
                errors += (scores.unflatten(1, biases.shape) - y[:, None]).square().sum((0, 2))
            count += len(targets)
        if not count:
            raise UsageError("the ridge is chosen on validation data: pass some to finish, or set ridge")
        return total / count


def sample_rows(output: Any) -> Tensor:
    """A block's output as (B, D) features, of a graph those of the nodes asked about."""
    return (output.answers if isinstance(output, Graph) else output).flatten(1)
