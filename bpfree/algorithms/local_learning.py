"""Supervised local learning in blocks with auxiliary networks: greedy, DGL, PredSim, InfoPro, and MAN on any of them.

Papers: `_auxiliary_losses` names those of the hosts; MAN is Su, Cai, Zhu, He, Xu, Guan, Si, "Momentum Auxiliary Network
for Supervised Local Learning", ECCV 2024, arXiv 2407.05623. With blocks h_i = f_i(h_{i-1}), h_0 = x, i = 1..K:

    i < K    loss_i = host(y_i, x, y),  y_i = h_i, or under MAN  y_i = E_i(h_i) + T_i(h_i)
    i = K    loss_K = CE(W pool(h_K) + c, y)
    E_i <- m E_i + (1 - m) u_{i+1}         u_{i+1} the first unit of block i+1: the one channel that goes backwards

h_{i-1} is a constant to block i: a gradient stays inside a block and its auxiliary network. Inside a block ordinary
back-propagation runs. E_i has parameters, but no gradient of its own; T_i is its trainable twin, or a bias. Each
block's graph is freed before the next block begins, so that the peak of memory is that of one block, or, with `lanes`,
of as many as learn at once. All blocks share one optimiser step at the end. Prediction uses blocks and W alone.

Deviations from the papers: E_i and T_i start as copies of u_{i+1} (the paper's word; its code draws all three anew).
InfoPro's weights run linearly from the first auxiliary loss to the last (MAN's code ramps by stage, which makes weights
negative for few blocks). InfoPro reconstructs the image scaled by the smallest and largest value that the training set
has in each channel, which for 8-bit images is the image in [0, 1]. PredSim's classifier reads the mean over positions.
E_i normalises by the batch in training, as in the code; the statistics it keeps are those of its own forward passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from bpfree.algorithms._auxiliary_losses import (
    INFOPRO_CLASSIFY,
    INFOPRO_RECONSTRUCT,
    AuxiliaryLoss,
    Classification,
    HeadOptions,
    Host,
    Place,
    auxiliary_loss,
)
from bpfree.algorithms._lanes import Lanes, check_lanes
from bpfree.algorithms._momentum_auxiliary import Momentum, MomentumAuxiliary, check_parts
from bpfree.algorithms._optim import OptimizerFactory, make_optimizer, set_gradients, trained
from bpfree.algorithms.learner import (
    Batch,
    Channel,
    Learner,
    Metrics,
    Paper,
    Stage,
    Support,
    Trial,
    accuracy,
)
from bpfree.algorithms.local_units import LocalUnit, LocalUnits, Signal
from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape, as_blocks, block_output_shapes, sample_shape
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.heads import Head, check_pooled
from bpfree.networks.partition import first_unit, partition

UpdateTime = Literal["before", "after"]
UPDATE_TIMES: Final = ("before", "after")
MOMENTUM: Final = 0.995
MOMENTUM_COPY: Final = Channel(
    "momentum copy", "weights of the next block's first unit, into the copy that a block learns through", 1, 1
)

GREEDY: Final = Paper(
    title="Greedy Layerwise Learning Can Scale to ImageNet",
    authors="Belilovsky, Eickenberg, Oyallon",
    year=2019,
    arxiv="1812.11446",
    follows="auxiliary classifiers, all blocks learning at once",
)
DGL: Final = Paper(
    title="Decoupled Greedy Learning of CNNs",
    authors="Belilovsky, Eickenberg, Oyallon",
    year=2020,
    arxiv="1901.08164",
    follows="Algorithm 1 (synchronous), auxiliary network MLP-SR-aux",
)
PREDSIM: Final = Paper(
    title="Training Neural Networks with Local Error Signals",
    authors="Nokland, Eidnes",
    year=2019,
    arxiv="1901.06656",
    follows="the combined loss predsim, for the blocks of a residual network",
)
INFOPRO: Final = Paper(
    title="Revisiting Locally Supervised Learning: an Alternative to End-to-end Training",
    authors="Wang, Ni, Song, Yang, Huang",
    year=2021,
    arxiv="2101.10832",
    follows="the information propagation loss, its softmax and its contrastive version",
)


class LocalLearning(Learner):
    """Blocks that learn side by side, each from an auxiliary network of its own.

    Args:
        network: units in forward order.
        classes: number of classes C.
        k: K, how many blocks the units make, see `partition`; 0 has a block wherever the network is cut.
        ends: the units that end a block, from 0, such as "3,7,15", instead of `k`.
        stem: cut the stem of a residual network off as a block of its own.
        host: "greedy", "dgl", "predsim", "infopro" or "infopro-contrast", or a function from a `Place` and
            `HeadOptions` to an `AuxiliaryLoss`.
        head: the host's classifier: "NcMf", "shrink", "wide" or "bottleneck"; "" is the host's own.
        reconstruct_first, reconstruct_last: InfoPro's weight of the reconstruction in the first and the last auxiliary
            loss, linear in between; None is InfoPro's 5 and 0.2.
        classify_first, classify_last: the same for the classification; None is 0.05 and 0.5.
        ema: MAN's momentum copy E_i.
        bias: what is learnt beside it: "none", "light" (a value per channel) or "twin" (a unit T_i). "twin" without
            `ema` is the control that has no momentum: an auxiliary network deeper by one unit.
        momentum: m.
        ema_update: "before" the optimiser's step, so that E_i reads what block i+1 had while block i learnt (and that
            could be sent to it meanwhile), as in the code; or "after" it.
        scale: learn MAN++'s scale between E_i and T_i.
        start: E_i and T_i begin as a "copy" of the unit that they stand for, or "draw" weights of their own, as in the
            authors' code.
        head_pool: how feature maps reach the read-out: "gap" (None), "flatten" or "adaptive".
        lr: learning rate.
        optimizer: "sgd" (Nesterov momentum 0.9), or another of `make_optimizer`.
        weight_decay: decay of all weights that are trained.
        lanes: blocks that learn at the same time in a CUDA graph. Two took the memory of one and
            0.8 of its time with ResNet-32, three 0.1 more memory and 0.1 less time than two.
        input_shape: shape of one input sample; needed when the first layer is not a `Linear`.

    Raises:
        UsageError: a network or value that does not fit, or a value that the other choices leave without effect.

    Example:
        >>> blocks = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        >>> learner = LocalLearning(blocks, classes=3, ema=True, bias="twin", lr=0.1)
        >>> sorted(learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))))
        ['block 0 loss', 'block 1 loss']
    """

    paper = Paper(
        title="Momentum Auxiliary Network for Supervised Local Learning",
        authors="Su, Cai, Zhu, He, Xu, Guan, Si",
        year=2024,
        arxiv="2407.05623",
        follows="the momentum copy of the next block's first unit with a learnable bias, light or as a unit",
    )
    locality = "block"

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        k: int = 0,
        ends: str = "",
        stem: bool = False,
        host: str | Host = "dgl",
        head: str = "",
        reconstruct_first: float | None = None,
        reconstruct_last: float | None = None,
        classify_first: float | None = None,
        classify_last: float | None = None,
        ema: bool = False,
        bias: str = "none",
        momentum: float = MOMENTUM,
        ema_update: UpdateTime = "before",
        scale: bool = False,
        start: str = "copy",
        head_pool: str | None = None,
        lr: float = 0.1,
        optimizer: str | OptimizerFactory = "sgd",
        weight_decay: float = 0.0,
        lanes: int = 2,
        input_shape: Shape | None = None,
    ) -> None:
        check_lanes(lanes)
        super().__init__(_cut(network, k, ends, stem, input_shape), classes, input_shape)
        check_parts(ema=ema, bias=bias, scale=scale, start=start)
        if ema_update not in UPDATE_TIMES:
            raise unknown_name("ema_update", ema_update, UPDATE_TIMES)
        if not ema and (momentum != MOMENTUM or ema_update != "before"):
            raise UsageError("momentum and ema_update are of the momentum copy; they need ema=true")
        options = HeadOptions(
            head,
            weight_ramp("reconstruct", reconstruct_first, reconstruct_last, INFOPRO_RECONSTRUCT),
            weight_ramp("classify", classify_first, classify_last, INFOPRO_CLASSIFY),
        )
        self.host = host if isinstance(host, str) else getattr(host, "__name__", type(host).__name__)
        self.ema, self.bias, self.ema_update, self.scale, self.lanes = ema, bias, ema_update, scale, lanes
        self.channels = (MOMENTUM_COPY,) if ema else ()
        blocks = list(self.network)
        shapes = block_output_shapes(blocks, self.input_shape)
        make_loss = auxiliary_loss(host, options)
        self.auxiliaries, self.losses = nn.ModuleList(), nn.ModuleList()
        followed: list[tuple[MomentumAuxiliary, nn.Module]] = []
        for index, (shape, following) in enumerate(zip(shapes, blocks[1:], strict=False)):
            if ema or bias != "none":
                unit = first_unit(following)
                (shape,) = block_output_shapes([unit], shape)
                auxiliary = MomentumAuxiliary(unit, shape, ema=ema, bias=bias, scale=scale, start=start)
                self.auxiliaries.append(auxiliary)
                followed.append((auxiliary, unit))
            else:
                self.auxiliaries.append(nn.Identity())
            depth = index / max(1, len(blocks) - 2)
            self.losses.append(make_loss(Place(shape, classes, self.input_shape, depth)))
        self.readout = Head(shapes[-1], classes, pool="gap" if head_pool is None else head_pool, bias=True)
        check_pooled(head_pool, [self.readout])
        needs_images = any(loss.needs_images for loss in self.losses)
        self.pixels = PixelRange(self.input_shape) if needs_images else None
        parts = zip(
            blocks, [*self.auxiliaries, nn.Identity()], [*self.losses, Classification(self.readout)], strict=True
        )
        self._units = tuple(Unit.of(f"block {index}", *part) for index, part in enumerate(parts))
        self._momentum = Momentum(followed if ema else [], momentum)
        parameters = [parameter for unit in self._units for parameter in unit.parameters]
        self._optimizer = make_optimizer(parameters, optimizer, lr=lr, weight_decay=weight_decay)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Learn the range of the pixels, for losses that reconstruct images; others have nothing to look at.

        Without it images are taken to lie in [0, 1].

        Args:
            batches: the training set in batches as for `step`, on the learner's device.
        """
        if self.pixels is not None:
            self.pixels.observe(inputs for inputs, _ in batches)

    def local_units(self) -> LocalUnits:
        """The blocks, each with its auxiliary network and loss; the last one with the read-out.

        Raises:
            UsageError: the momentum copies move after the optimiser's step.
        """
        if self.ema and self.ema_update == "after":
            raise UsageError(
                "ema_update=after reads the next block behind its update, so that blocks would wait for each other; "
                "use ema_update=before"
            )
        return self._local_units()

    def _local_units(self) -> LocalUnits:
        units = []
        for index, unit in enumerate(self._units):
            following = first_unit(self._units[index + 1].block) if self.ema and index + 1 < len(self._units) else None
            units.append(
                LocalUnit(
                    unit.name,
                    (unit.block, unit.auxiliary, unit.loss),
                    partial(self._learn_unit, unit),
                    partial(self._pass_unit, unit),
                    borrows=() if following is None else tuple(following.parameters()),
                )
            )
        return LocalUnits(
            units=tuple(units),
            begin=self._begin,
            enter=lambda step: (step.inputs,),
            end=self._end,
            ask=lambda inputs: inputs,
            offer=lambda inputs: (inputs,),
            answer=lambda signal, inputs: self.readout(signal[0]),
            join=lambda step: step.lanes.join(),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, C) scores of the blocks and the read-out; auxiliary networks have no part in it."""
        return self._local_units().scores(inputs)

    def stages(self) -> tuple[Stage, ...]:
        """One stage: all blocks learn on every batch."""
        return (self.joint_stage("all blocks", (self._optimizer,), self._update),)

    def _update(self, batch: Batch) -> Metrics:
        return self._local_units().update(batch)

    def _begin(self, batch: Batch) -> Step:
        inputs, targets = batch
        images = None if self.pixels is None else self.pixels(inputs)
        return Step(inputs, targets, images, Lanes(targets.device, self.lanes))

    @staticmethod
    def _learn_unit(unit: Unit, signal: Signal, step: Step) -> tuple[Signal, Metrics]:
        outputs, loss = unit.learn(signal[0], step)
        return (outputs,), {f"{unit.name} loss": loss}

    @staticmethod
    def _pass_unit(unit: Unit, signal: Signal, inputs: Tensor) -> Signal:
        return (unit.block(signal[0]),)

    def _end(self, step: Step, members: range) -> Metrics:
        if self.ema_update == "before":
            self._momentum.update(members)
        self._optimizer.step()  # of the blocks that have gradients
        if self.ema_update == "after":
            self._momentum.update(members)
        return {}

    @property
    def variant(self) -> str:
        """Number of blocks, host, and MAN's parts."""
        parts = ["EMA"] * self.ema + [self.bias] * (self.bias != "none") + ["scale"] * self.scale
        return ", ".join([f"{len(self.network)} blocks", self.host, " + ".join(parts)]).removesuffix(", ")

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Accuracy of each block's own classifier, where it has one."""
        signal, targets = batch
        report = {}
        for unit in self._units:
            signal = unit.block(signal)
            scores = unit.loss.scores(unit.auxiliary(signal))
            if scores is not None:
                report[f"{unit.name} accuracy"] = accuracy(scores, targets)
        return report

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Networks for images and vectors."""
        if any(isinstance(block, GraphBlock) for block in network):
            return Support(False, "its auxiliary networks are for maps and vectors, not for graphs; see mf and fgnn")
        return Support(True)

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing of its own: cut, host and MAN's parts are what is compared."""
        return {}


@dataclass(frozen=True, eq=False)
class Step:
    """What the blocks of a step share: x, (B,) targets, x scaled to [0, 1] if a loss reconstructs images, and lanes."""

    inputs: Tensor
    targets: Tensor
    images: Tensor | None
    lanes: Lanes


@dataclass(frozen=True, eq=False)
class Unit:
    """One block with all that its loss needs.

    Attributes:
        name: shown in metrics.
        block: f_i.
        auxiliary: from h_i to y_i.
        loss: the auxiliary loss, for the last block that of the read-out.
        parameters: of the three, those that are trained.
    """

    name: str
    block: nn.Module
    auxiliary: nn.Module
    loss: AuxiliaryLoss
    parameters: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, name: str, block: nn.Module, auxiliary: nn.Module, loss: AuxiliaryLoss) -> Unit:
        """A unit, with what follows from its parts."""
        return cls(name, block, auxiliary, loss, tuple(trained(block, auxiliary, loss)))

    def learn(self, inputs: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Set the gradients; return h_i and the loss. The graph begins, ends and is freed in here.

        The next block may begin with h_i, and so before this one has its gradients.
        """
        with step.lanes.turn(inputs):
            with torch.enable_grad():
                activations = self.block(inputs.detach())
                step.lanes.hand_on()
                loss = self.loss(self.auxiliary(activations), step.images, step.targets)
            set_gradients(self.parameters, torch.autograd.grad(loss, self.parameters))
            return activations.detach(), loss.detach()


class PixelRange(nn.Module):
    """Scales inputs back to [0, 1] by the smallest and largest value of each channel, or of all values of vectors.

    Args:
        input_shape: of one sample.
    """

    low: Tensor
    high: Tensor

    def __init__(self, input_shape: Shape) -> None:
        super().__init__()
        self.input_shape = input_shape
        shape = (input_shape[0], 1, 1) if len(input_shape) == 3 else ()
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.ones(shape))

    @torch.no_grad()
    def observe(self, batches: Iterable[Tensor]) -> None:
        """Take the range of all inputs, (B, *input_shape) each."""
        axes = (0, 2, 3) if self.low.ndim else tuple(range(1 + len(self.input_shape)))
        for index, inputs in enumerate(batches):
            inputs = inputs.reshape(len(inputs), *self.input_shape)
            low, high = inputs.amin(axes), inputs.amax(axes)
            low, high = low.view(self.low.shape), high.view(self.low.shape)
            self.low.copy_(torch.minimum(self.low, low) if index else low)
            self.high.copy_(torch.maximum(self.high, high) if index else high)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) -> the same, in [0, 1]."""
        width = (self.high - self.low).clamp(min=torch.finfo(self.low.dtype).eps)
        images = inputs.detach().reshape(len(inputs), *self.input_shape)
        return ((images - self.low) / width).clamp(0, 1)


def weight_ramp(
    name: str, first: float | None, last: float | None, default: tuple[float, float]
) -> tuple[float, float] | None:
    """A weight in the first and in the last auxiliary loss; None if the user leaves both to the host.

    Raises:
        UsageError: a weight below 0.
    """
    if first is None and last is None:
        return None
    ends = (default[0] if first is None else first, default[1] if last is None else last)
    if min(ends) < 0:
        raise UsageError(f"{name}_first and {name}_last must be numbers from 0 on, got {first} and {last}")
    return ends


def _cut(
    network: nn.Sequential | Iterable[nn.Module], k: int, ends: str, stem: bool, input_shape: Shape | None
) -> nn.Sequential | Iterable[nn.Module]:
    """The network in the blocks that the user asks for."""
    if ends:
        if k:
            raise UsageError("ends says where to cut, k into how many blocks; give one of them")
        if not re.fullmatch(r"\d+(,\d+)*", ends):
            raise UsageError(f"ends are numbers of units such as 3,7,15, got {ends!r}")
        return partition(network, tuple(map(int, ends.split(","))), stem=stem)
    if not k:
        if stem:
            raise UsageError("stem cuts the stem off the first of k blocks; give k or ends")
        return network
    units = list(as_blocks(network))
    return partition(units, k, input_shape=sample_shape(input_shape, units), stem=stem)
