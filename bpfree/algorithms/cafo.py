"""CaFo, the cascaded forward algorithm: blocks that no predictor trains, and a linear predictor on each of them.

Paper: Zhao, Wang, Li, Jin, Lang, Ling, "The Cascaded Forward Algorithm for Neural Network Training", 2023, arXiv
2303.09728. With blocks h_j = f_j(h_{j-1}), h_0 = x, for j = 1..L, features x_j = flatten(h_j) (B, D_j) and predictors
z_j = x_j W_j^T + b_j, W_j (C, D_j):

    blocks        stay as they were drawn ("random"), or first learn by direct feedback alignment ("dfa") from
                  e = (softmax(u) - onehot(y)) / B, u a linear read-out of h_L that is not used afterwards:
                  block j < L descends its vector-Jacobian product with e B_j, B_j (C, D_j) fixed and random; block L
                  and the read-out descend their own gradient
    "mse"         min (1/N) ||X_j W^T + b - Y||^2 + ridge ||W||^2 over the training set, in closed form (`_cafo_ridge`)
    "ce", "sl"    dW_j = ((p - Y) / B)^T X_j with p = softmax(z_j) or sparsemax(z_j), in steps (`_cafo_predictors`)
    prediction    argmax of sum_j p_j, where p_j is the softmax, after "sl" the sparsemax, of z_j

No gradient of a predictor enters a block, and predictors know nothing of each other: they train side by side.

Deviations from the paper and its code: batch normalisation uses statistics of the training set, gathered in one pass
before the blocks are frozen, where the code uses those of whichever images are served together ("batch" does that,
over batches in place of whole sets). Features and targets of the closed form are centred and the ridge is chosen on
validation data; the code has neither ridge nor bias (`ridge=0`, `bias=False`). Gradients are products of two matrices,
without the code's (B, D, C) tensor. The feedback's scale is that of `direct_feedback`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim.swa_utils import update_bn

from bpfree.algorithms._cafo_predictors import AGGREGATES, LOSSES, GradientLoss, Predictors, aggregate_scores
from bpfree.algorithms._cafo_ridge import GRAM_PRECISIONS
from bpfree.algorithms._cafo_training import Alignment, ClosedForm, Descent, Group
from bpfree.algorithms._optim import OptimizerFactory, make_optimizer
from bpfree.algorithms.direct_feedback import OUTPUT_ERROR
from bpfree.algorithms.learner import (
    Batch,
    Learner,
    Locality,
    Metrics,
    Paper,
    Stage,
    Support,
    Trial,
    accuracy,
    evaluation_mode,
    refuse_idle,
)
from bpfree.algorithms.local_units import FrozenParts, LocalUnits, Signal
from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape, block_output_shapes

LossName = Literal["mse", "ce", "sl"]
BlockTraining = Literal["random", "dfa"]
Aggregate = Literal["sum_prob", "sum_logit", "mean", "last"]
Schedule = Literal["concurrent", "sequential"]
Normalization = Literal["train_stats", "batch"]
BLOCK_TRAININGS: Final = ("random", "dfa")
SCHEDULES: Final = ("concurrent", "sequential")
NORMALIZATIONS: Final = ("train_stats", "batch")
LR: Final = 1e-3


class CaFo(Learner):
    """CaFo over any sequence of blocks.

    Args:
        network: blocks in forward order; "random" freezes their parameters.
        classes: number of classes C.
        loss: what predictors learn from: "mse" in closed form, "ce" (cross-entropy) or "sl" (sparsemax) in steps.
        block_training: "random" leaves blocks as they are, "dfa" trains them first.
        aggregate: "sum_prob" adds the predictors' class probabilities, "sum_logit" adds their scores, "mean" averages
            them, "last" reads the last predictor alone.
        schedule: "concurrent" trains all predictors together, "sequential" one after another, each stopping by itself,
            with the memory of one.
        bn_mode: what batch normalisation uses: "train_stats", or "batch", the statistics of the images that are served
            together, as in the paper's code; the network's layers then lose their own.
        ridge: penalty of the closed form; None chooses each predictor's among `RIDGES` by squared error on validation
            data; 0 gives the solution of minimum norm.
        gram: precision of the closed form's products: "float64" (None), or "float32" where float64 is slow.
        bias: whether predictors have one.
        lr: learning rate of predictors that learn in steps; None: 0.001.
        optimizer: of predictors that learn in steps and of blocks: "adam" (None), "adamw", "sgd", "gd", or a function
            from parameters to one.
        weight_decay: decay of the weights of predictors that learn in steps; None: 0.
        block_lr: learning rate of blocks trained by "dfa"; None takes `lr`.
        block_weight_decay: decay of their weights; None: 0.
        input_shape: shape of one input sample; needed when the first layer is not a `Linear`.

    Raises:
        UsageError: a network or value that does not fit, or a value that the other choices leave without effect.

    Example:
        >>> learner = CaFo(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), classes=3, ridge=0.01)
        >>> for _ in range(3):
        ...     _ = learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))
        >>> _ = learner.finish()
        >>> learner.scores(torch.randn(2, 4)).shape
        torch.Size([2, 3])
    """

    paper = Paper(
        title="The Cascaded Forward Algorithm for Neural Network Training",
        authors="Zhao, Wang, Li, Jin, Lang, Ling",
        year=2023,
        arxiv="2303.09728",
        follows="random or feedback-aligned blocks; MSE in closed form, cross-entropy and sparsemax by descent",
    )
    locality: Locality = "block"

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        loss: LossName = "mse",
        block_training: BlockTraining = "random",
        aggregate: Aggregate = "sum_prob",
        schedule: Schedule = "concurrent",
        bn_mode: Normalization = "train_stats",
        ridge: float | None = None,
        gram: str | None = None,
        bias: bool = True,
        lr: float | None = None,
        optimizer: str | OptimizerFactory | None = None,
        weight_decay: float | None = None,
        block_lr: float | None = None,
        block_weight_decay: float | None = None,
        input_shape: Shape | None = None,
    ) -> None:
        super().__init__(network, classes, input_shape)
        precision = "float64" if gram is None else gram
        for kind, value, known in (
            ("loss", loss, LOSSES),
            ("block_training", block_training, BLOCK_TRAININGS),
            ("aggregate", aggregate, AGGREGATES),
            ("schedule", schedule, SCHEDULES),
            ("bn_mode", bn_mode, NORMALIZATIONS),
            ("gram", precision, GRAM_PRECISIONS),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        given = {
            "ridge": ridge,
            "gram": gram,
            "lr": lr,
            "optimizer": optimizer,
            "weight_decay": weight_decay,
            "block_lr": block_lr,
            "block_weight_decay": block_weight_decay,
        }
        chosen = {"loss": loss, "block_training": block_training, "block_lr": block_lr}
        idle = self.idle(chosen)
        reasons = (f"{k}={v}" for k, v in chosen.items() if v is not None and k not in idle)
        refuse_idle(given, idle, " and ".join(reasons))
        lr, optimizer = LR if lr is None else lr, "adam" if optimizer is None else optimizer
        for name, number in (("ridge", ridge), ("block_lr", block_lr)):
            if number is not None and (type(number) not in (float, int) or not 0 <= number < math.inf):
                raise UsageError(f"{name} must be a number from 0 on, got {number!r}")
        self.block_training, self.aggregate, self.schedule, self.bn_mode = block_training, aggregate, schedule, bn_mode
        self.loss_name, self._loss = loss, LOSSES[loss]()
        if bn_mode == "batch":
            for norm in self.network.modules():
                if not isinstance(norm, BatchNorm):
                    continue
                # without statistics of its own a layer uses the batch's, in evaluation too
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None

        shapes = block_output_shapes(self.network, self.input_shape)
        self.alignment: Alignment | None = None
        if block_training == "dfa":
            self.locality, self.channels = "network", (OUTPUT_ERROR,)
            block_lr = lr if block_lr is None else block_lr
            block_optimizer = partial(
                make_optimizer, optimizer=optimizer, lr=block_lr, weight_decay=block_weight_decay or 0.0
            )
            self.alignment = Alignment(self.network, shapes, classes, block_optimizer)
        else:
            self.network.requires_grad_(False)
        widths = [torch.Size(shape).numel() for shape in shapes]

        def group(members: range) -> Group:
            own = [widths[number] for number in members]
            if not isinstance(self._loss, GradientLoss):
                return ClosedForm(members, Predictors(own, classes, bias=bias, exact=True), ridge, precision)
            predictors = Predictors(own, classes, bias=bias, exact=False)
            make = make_optimizer(predictors.parameters(), optimizer, lr=lr, weight_decay=weight_decay or 0.0)
            return Descent(members, predictors, self._loss, make)

        together = [range(len(widths))] if schedule == "concurrent" else [range(n, n + 1) for n in range(len(widths))]
        self._groups = tuple(group(members) for members in together)
        self.predictors = nn.ModuleList(self._groups)

    def local_units(self) -> LocalUnits:
        """The predictors, each with its frozen block.

        Raises:
            UsageError: blocks learn too, predictors are solved for, or they learn one after another.
        """
        if self.alignment is not None:
            raise UsageError("block_training=dfa takes an error from the last block to all; use block_training=random")
        group = self._groups[0]
        if not isinstance(group, Descent):
            raise UsageError("the closed form is solved in one place; use loss=ce or loss=sl, or --parallel data")
        if self.schedule == "sequential":
            raise UsageError(
                "schedule=sequential trains one predictor at a time, so that other ranks would wait; "
                "use schedule=concurrent"
            )
        blocks = tuple(self.network)

        def outputs(inputs: Any, members: range, signal: Signal | None) -> tuple[Tensor, Signal]:
            start, entering = (0, inputs) if signal is None else (members.start, signal[0])
            found = self._outputs(entering, range(start, members.stop))
            return group.packed(found[members.start - start :]), (found[-1],)

        def units(members: range | None = None) -> LocalUnits:
            return group.units([(block,) for block in blocks], self._answer, members)

        frozen = FrozenParts(blocks, outputs, lambda members: (group.predictors.packed_width(members),), units)
        return replace(units(), frozen=frozen)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Settle the statistics of batch normalisation in random blocks, by one forward pass.

        Blocks that "dfa" trains gather theirs while they learn.

        Args:
            batches: the training set in batches as for `step`, on the learner's device.
        """
        if self.alignment is not None or self.bn_mode == "batch":
            return
        blocks = nn.Sequential(*self.network)
        blocks.training = self.network.training  # the mode that `update_bn` goes back to
        update_bn(batches, blocks)

    @torch.no_grad()
    def _outputs(self, signal: Any, members: range) -> list[Any]:
        """What some consecutive frozen blocks make of what enters the first of them."""
        outputs = []
        with evaluation_mode(self.network):
            for number in members:
                signal = self.network[number](signal)
                outputs.append(signal)
        return outputs

    def _member_outputs(self, members: range, inputs: Any) -> list[Any]:
        return self._outputs(inputs, range(members.stop))[members.start :]

    def _all_scores(self, inputs: Any) -> Tensor:
        """z_1..z_L, (L, B, C)."""
        outputs = self._outputs(inputs, range(len(self.network)))
        return torch.cat([group.scores([outputs[number] for number in group.members]) for group in self._groups])

    def _answer(self, scores: Tensor) -> Tensor:
        return aggregate_scores(scores, self.aggregate, self._loss)

    def forward(self, inputs: Any) -> Tensor:
        """(B, *input_shape) or a graph -> (B, C) scores, as `aggregate` says."""
        return self._answer(self._all_scores(inputs))

    def stages(self) -> tuple[Stage, ...]:
        """Blocks first, if they learn; then all predictors at once, or one after another."""
        stages = [] if self.alignment is None else [self.alignment.stage(self.input_shape)]
        for group in self._groups:
            outputs = partial(self._member_outputs, group.members)
            stages.append(group.stage(outputs, self._answer, self.input_shape))
        return tuple(stages)

    @property
    def variant(self) -> str:
        """How blocks and predictors are trained, and what is not the default."""
        other = [self.aggregate] * (self.aggregate != "sum_prob") + ["batch statistics"] * (self.bn_mode == "batch")
        return ", ".join([self.block_training, self.loss_name, *other])

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Accuracy of each predictor."""
        inputs, targets = batch
        return {
            f"block {number} accuracy": accuracy(scores, targets)
            for number, scores in enumerate(self._all_scores(inputs))
        }

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Any sequence of blocks: each must only map a batch to a batch (for "dfa", PyTorch must differentiate it)."""
        return Support(True)

    @classmethod
    def idle(cls, parameters: Mapping[str, Any]) -> frozenset[str]:
        """Rates of what does not learn in steps, and the closed form's options without one."""
        names: set[str] = set()
        learning = parameters.get("block_training") == "dfa"
        if not learning:
            names |= {"block_lr", "block_weight_decay"}
        if parameters.get("loss", "mse") != "mse":
            return frozenset(names | {"ridge", "gram"})
        names.add("weight_decay")
        if not learning:
            names.add("optimizer")
        if not learning or parameters.get("block_lr") is not None:
            names.add("lr")
        return frozenset(names)

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """What predictors learn from, and how they are read."""
        losses = tuple(loss for loss in LOSSES if not CaFo.idle({**fixed, "loss": loss}) & set(fixed))
        return {
            # parameters of which no loss takes all are refused with whichever it is
            "loss": trial.suggest_categorical("loss", losses or tuple(LOSSES)),
            "aggregate": trial.suggest_categorical("aggregate", AGGREGATES),
        }
