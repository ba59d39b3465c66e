"""Counter-current learning: a second network runs from the labels to the input, and the two agree level by level.

Paper: Kao, Hariharan, "Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning",
NeurIPS 2024, arXiv 2409.19841. With forward layers U_l (d_l, d_{l-1}) and feedback layers V_l (d_{l-1}, d_l), which
share nothing, and SG for "a constant from here on":

    a_l = f(U_l SG(a_{l-1})),  a_0 = x,  o = a_L = U_L SG(a_{L-1})          forward, (B, d_l)
    b_{l-1} = f(V_l SG(b_l)),  b_L = one row per class,  b_0 = V_1 SG(b_1)  feedback, (C, d_l): once per step
    loss_l = how far the similarities of a_l's rows and b_l's rows are from 1 (own class) and 0, l < L (equation 2)
    loss_L = CE(o, y)

loss_l changes U_l and V_{l+1}, both at once and neither taken for a constant; loss_0 changes V_1 alone and loss_L U_L
alone. For linear layers everything is in closed form (dA, dB of `_ccl_objectives`, M (B, C) the indicator of classes):

    dot          dA = k (A B^T - M) B,  dB = k (A B^T - M)^T A,  k = 2 * 256 s / (d_l B C)
    dU_l = (dA * f'(z_l))^T a_{l-1},  dV_{l+1} = (dB * f'(q_l))^T b_{l+1}

Convolutional layers take dA and dB through an autograd graph of that one layer. At inference there is only the forward
network.

In the autoencoder task the feedback network runs from the images, which are the targets, to the images, one row per
sample, and a_l is to equal b_l and to have the form of its maps.

Channels that are not local, all off by default: the norm of a whole network's gradient (`clip_scope="network"`), and
which samples the output is sure of (`flood`). The feedback activations are the rule's own channel.

Deviations from the paper: the similarity target of equation 2 is I, which holds when every class occurs once; here M,
as in the authors' code. A row of zeros has no direction under "cosine" and gives no gradient (their code divides by
1e-8). Scale and shift of batch normalisation stay as they are, as in the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._ccl_layers import DenseTrace, Layer, Trace, core, feedback_modules, freeze_norms, weighted
from bpfree.algorithms._ccl_objectives import (
    ClassObjective,
    CosineObjective,
    DotObjective,
    Objective,
    ReconstructionObjective,
)
from bpfree.algorithms._ccl_updates import ThinUpdate, Update, WrittenUpdate, clipping, is_thin
from bpfree.algorithms._lanes import Lanes
from bpfree.algorithms._optim import OptimizerFactory, centralize_gradients, is_heard, make_optimizer, set_gradients
from bpfree.algorithms._whole_batch import WholeBatch
from bpfree.algorithms.learner import Batch, Channel, Learner, Metrics, Paper, Stage, Support, Trial, evaluation_mode
from bpfree.errors import UsageError, unknown_name
from bpfree.metrics import linear_cka
from bpfree.networks.autoencoder import check_reconstructs, start_autoencoder
from bpfree.networks.blocks import Shape, as_blocks, block_output_shapes

Similarity = Literal["cosine", "dot"]
ClipScope = Literal["layer", "network"]
SIMILARITIES: Final = ("cosine", "dot")
CLIP_SCOPES: Final = ("layer", "network")
DECORRELATION: Final = 0.5
FEEDBACK: Final = 0  # the lane of the feedback network

FEEDBACK_STREAM: Final = Channel(
    "feedback stream", "activations of the feedback network, whose layers have learnt from those of later blocks", 1
)
CLIPPING: Final = Channel("clipping", "the length of the whole network's gradient (clip_scope=network)")
FLOOD: Final = Channel("flood", "the output's probabilities, which say what samples hidden levels leave out")


class CounterCurrent(Learner):
    """Counter-current learning over a sequence of blocks of one layer each.

    Args:
        network: hidden blocks in forward order, each one `Linear` or `Conv2d`, after `Flatten` or `Upsample`, before
            batch normalisation, an activation and pooling. The feedback network is derived from them. Scale and shift
            of batch normalisation do not learn.
        classes: number of classes C; 0 for the task "autoencode", in which the network returns what has the shape of
            its inputs, the feedback network starts as `start_autoencoder` says, and `similarity`, `scale`,
            `decorrelation` and `flood` have no meaning.
        similarity: "cosine" compares directions, "dot" takes plain products (see `_ccl_objectives`).
        scale: s, the weight of similarity against the output's cross-entropy.
        decorrelation: r, how much "cosine" pushes samples (and templates) of one level apart; 0.5 if left out.
        lr: learning rate.
        feedback_lr: of the feedback network, `lr` if left out; 0 leaves that as it was drawn.
        optimizer: "gd", "sgd", "momentum", "adam", "adamw", or a function from parameters to an optimiser.
        momentum: of optimizer=sgd and momentum, 0.9 if left out.
        weight_decay: decay of all weights.
        clip: longest gradient allowed, 2-norm; 0 for any.
        clip_scope: what is clipped as one: each "layer", or as in the paper all of the forward "network" and all of
            the feedback network.
        centralize: take the mean over inputs off each unit's gradient.
        flood: hidden levels leave out samples whose class has a probability above 1 - flood already; 0 none.
        warmup_steps: steps over which the losses grow linearly to their full weight.
        input_shape: shape of one input sample; needed when the first layer is not a `Linear`.

    Raises:
        UsageError: a network or value that does not fit.

    Example:
        >>> blocks = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 8), nn.ELU())
        >>> learner = CounterCurrent(blocks, classes=3)
        >>> sorted(learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))))
        ['level 0 loss', 'level 1 loss', 'level 2 loss', 'level 3 loss']
    """

    paper = Paper(
        title="Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning",
        authors="Kao, Hariharan",
        year=2024,
        arxiv="2409.19841",
        follows="equations 1 and 2 and the anti-collapse loss of appendix 6.1; details from the authors' code",
    )
    locality = "layer"
    undivided = "its feedback stream runs from the last block to the first in every step"
    tasks = ("classify", "autoencode")
    steps_taken: Tensor

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        similarity: Similarity = "cosine",
        scale: float = 1.0,
        decorrelation: float | None = None,
        lr: float = 1.0,
        feedback_lr: float | None = None,
        optimizer: str | OptimizerFactory = "gd",
        momentum: float | None = None,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        clip_scope: ClipScope = "layer",
        centralize: bool = False,
        flood: float = 0.0,
        warmup_steps: int = 0,
        input_shape: Shape | None = None,
    ) -> None:
        super().__init__(network, classes, input_shape)
        if similarity not in SIMILARITIES:
            raise unknown_name("similarity", similarity, SIMILARITIES)
        if clip_scope not in CLIP_SCOPES:
            raise unknown_name("clip_scope", clip_scope, CLIP_SCOPES)
        if clip_scope == "network" and not clip:
            raise UsageError("clip=0 clips nothing, so that clip_scope=network has no effect; use clip_scope=layer")
        if similarity == "dot" and decorrelation is not None:
            raise UsageError("decorrelation belongs to similarity=cosine")
        if not (0 <= flood < 1 and clip >= 0 and warmup_steps >= 0 and scale > 0 and (decorrelation or 0) >= 0):
            raise UsageError(
                "flood must lie in [0, 1), clip, warmup_steps and decorrelation must not be negative, scale positive; "
                f"got {flood}, {clip}, {warmup_steps}, {decorrelation}, {scale}"
            )
        self.similarity, self.clip, self.clip_scope, self.centralize = similarity, clip, clip_scope, centralize
        self.channels = (
            *([FEEDBACK_STREAM] if feedback_lr != 0 else []),
            *([CLIPPING] if clip and clip_scope == "network" else []),
            *([FLOOD] if flood else []),
        )
        freeze_norms(self.network)
        shapes = [self.input_shape, *block_output_shapes(self.network, self.input_shape)]
        forward = list(self.network)
        self.batch = WholeBatch()
        self.objective: Objective
        if self.task == "autoencode":
            if (similarity, scale, decorrelation, flood) != ("cosine", 1.0, None, 0.0):
                raise UsageError("similarity, scale, decorrelation and flood are for classes, not for task=autoencode")
            check_reconstructs(shapes[-1], self.input_shape)
            self.objective = ReconstructionObjective()
        else:
            self.readout = _readout(shapes[-1], classes)
            forward.append(self.readout)
            shapes.append((classes,))
            self.objective = _class_objective(similarity, classes, flood, scale, decorrelation)
        self.feedback = feedback_modules(forward, shapes)
        if self.task == "autoencode":
            start_autoencoder([weighted(layer) for layer in reversed(self.feedback)])
        self._forward = tuple(Layer.of(module) for module in forward)
        if feedback_lr == 0:
            self.feedback.requires_grad_(False)
        self._feedback = tuple(Layer.of(module) for module in self.feedback)
        optimize = partial(make_optimizer, optimizer=optimizer, weight_decay=weight_decay, momentum=momentum)
        rates = ((self._forward, lr), (self._feedback, lr if feedback_lr is None else feedback_lr))
        # one of each layer, so that they step side by side; a frozen network has none
        self._optimizers = {
            layer: optimize(layer.parameters, lr=rate)
            for network, rate in rates
            for layer in network
            if layer.parameters
        }
        self._plain_descent = optimizer == "gd"
        self._in_closed_form = all(layer.dense is not None for layer in (*self._forward, *self._feedback))
        self.warmup_steps = warmup_steps
        if warmup_steps:
            self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, C) scores, or reconstructions; the feedback network has no part in them."""
        return _outputs(self._forward, inputs)[-1]

    def stages(self) -> tuple[Stage, ...]:
        """One stage: both networks learn together."""
        return (self.joint_stage("both networks", self._optimizers.values(), self._update),)

    @property
    def variant(self) -> str:
        """How activations are compared, and what is clipped as one."""
        compared = self.similarity if self.task == "classify" else "reconstruction"
        return ", ".join([compared, *([f"clipped by {self.clip_scope}"] if self.clip else [])])

    @torch.no_grad()
    def _update(self, batch: Batch) -> Metrics:
        inputs, targets = batch
        inputs = inputs.reshape(len(inputs), *self.input_shape)
        lanes = Lanes(inputs.device, len(self._forward) + 2)
        with lanes.lane(FEEDBACK):
            feedback = list(_traces(reversed(self._feedback), self.objective.feedback_input(targets)))[::-1]
            asked = self.objective.asked(targets)
        share = self._warmed_up()
        # A level waits for its two activations and for nothing else, unless it hears what the output is sure of. An
        # autograd graph goes backwards on the stream of its forward pass: then only the two networks go side by side.
        forward: Iterable[Trace] = _traces(self._forward, inputs)
        if self.objective.flood or not self._in_closed_form:
            forward = list(forward)
            lanes.join()
            asked = self.objective.flooded(asked, forward[-1].output)
        metrics: Metrics = {}
        updates: dict[Layer, Update] = {}
        used: list[object] = []  # by lanes, until they are joined
        rising = iter(forward)
        for level, (layer, mirrored) in enumerate(self._levels()):
            below = next(rising) if layer else None
            activation = inputs if below is None else below.output
            with lanes.lane(level + 1, after=FEEDBACK) if self._in_closed_form else nullcontext():
                if mirrored is None:
                    rating = self.objective.rate_output(activation, asked)
                else:
                    rating = self.objective.rate(activation, feedback[level].output, asked, at_input=layer is None)
                metrics[f"level {level} loss"] = rating.loss
                used += [below, rating]
                if layer is not None and below is not None and rating.by_forward is not None:
                    updates |= self._taught(layer, below, rating.by_forward, share)
                if mirrored is not None and rating.by_feedback is not None:
                    with nullcontext() if self._in_closed_form else lanes.lane(FEEDBACK):
                        updates |= self._taught(mirrored, feedback[level], rating.by_feedback, share)
        lanes.join()
        self._move(updates, lanes)
        return metrics

    def _levels(self) -> Iterable[tuple[Layer | None, Layer | None]]:
        """Of levels 0..L, the forward layer and the feedback layer that learn there."""
        return zip((None, *self._forward), (*self._feedback, None), strict=True)

    def _warmed_up(self) -> Tensor | None:
        """The share of the full loss that this step counts with, 0-d; None for all of it."""
        if not self.warmup_steps:
            return None
        self.steps_taken += 1
        return (self.steps_taken / self.warmup_steps).clamp(max=1)

    def _taught(self, layer: Layer, trace: Trace, towards: Tensor, share: Tensor | None) -> dict[Layer, Update]:
        """What a layer is about to do, given the derivative of its level's loss; nothing if all of it is frozen."""
        if not layer.parameters:
            return {}
        update = self._gradient(layer, trace, towards if share is None else towards * share)
        if self.clip and self.batch.alone:
            update.measure()  # now, beside other levels
        return {layer: update}

    def _gradient(self, layer: Layer, trace: Trace, towards: Tensor) -> Update:
        optimizer = self._optimizers[layer]
        plain = self._plain_descent and not is_heard(optimizer)
        if plain and isinstance(trace, DenseTrace) and is_thin(trace.dense.linear, rows=len(towards)):
            errors, inputs = trace.factors(towards)
            if self.centralize:
                inputs = inputs - inputs.mean(1, keepdim=True)
            return ThinUpdate(trace.dense.linear, errors, inputs, optimizer)
        set_gradients(layer.parameters, trace.gradients(towards))
        if self.centralize:
            centralize_gradients(layer.parameters)
        return WrittenUpdate(layer.parameters, optimizer)

    def _move(self, updates: Mapping[Layer, Update], lanes: Lanes) -> None:
        """Clip, and step."""
        factors: dict[Layer, Tensor] = {}
        if self.clip and updates:
            # the length is that of the whole batch's gradient
            self.batch.settle(parameter for layer in updates for parameter in layer.parameters)
            together = (self._forward, self._feedback) if self.clip_scope == "network" else ((one,) for one in updates)
            groups = [found for layers in together if (found := [layer for layer in layers if layer in updates])]
            shares = clipping([[updates[layer] for layer in group] for group in groups], self.clip)
            for group, factor in zip(groups, shares.unbind(), strict=True):
                factors |= dict.fromkeys(group, factor)
        for index, (layer, update) in enumerate(updates.items()):
            with lanes.lane(index % lanes.count):
                update.take(factors.get(layer))
        lanes.join()

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Per layer, the cosine between U_l and the transpose of V_l; per hidden level, the linear CKA between the
        forward activations of samples and the feedback activations of their class."""
        inputs, targets = batch
        report = {
            f"layer {index + 1} alignment": alignment(forward.module, feedback.module)
            for index, (forward, feedback) in enumerate(zip(self._forward, self._feedback, strict=True))
        }
        for level, (a, b) in enumerate(self.paired_activations(inputs, targets)):
            report[f"level {level} CKA"] = linear_cka(a, b)
        return report

    @torch.no_grad()
    def paired_activations(self, inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Forward activations of samples beside the feedback activations of their classes, in evaluation mode.

        Args:
            inputs: (B, *input_shape).
            targets: (B,) classes, or to be reconstructed (B, *input_shape).

        Returns:
            (a_l, b_l) for l = 0..L-1, each (B, d_l).
        """
        with evaluation_mode(self):
            below = _outputs(self._forward, inputs)[:-1]
            above = _outputs(reversed(self._feedback), self.objective.feedback_input(targets))[::-1]
        return [
            (a.flatten(1), self.objective.paired(b, targets).flatten(1))
            for a, b in zip([inputs, *below], above, strict=True)
        ]

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Networks whose every block is one linear or convolutional layer, so that it has a counterpart."""
        try:
            for block in as_blocks(network):
                core(block)
        except UsageError as error:
            return Support(False, str(error))
        return Support(True)

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """How activations are compared, and the length at which gradients are clipped."""
        cosine_only = fixed.get("decorrelation") is not None or fixed.get("classes") == 0  # templates are of classes
        comparable = ("cosine",) if cosine_only else SIMILARITIES
        return {
            "similarity": trial.suggest_categorical("similarity", comparable),
            "clip": trial.suggest_float("clip", 0.1, 1.0, log=True),
        }


def _readout(shape: Shape, classes: int) -> nn.Sequential:
    """U_L: (B, *shape) -> (B, C), without bias or activation."""
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), classes, bias=False))


def _class_objective(
    similarity: str, classes: int, flood: float, scale: float, decorrelation: float | None
) -> ClassObjective:
    if similarity == "dot":
        return DotObjective(classes, flood, scale)
    return CosineObjective(classes, flood, scale, DECORRELATION if decorrelation is None else decorrelation)


def _outputs(layers: Iterable[Layer], signal: Tensor) -> list[Tensor]:
    """What layers make of a signal, one after another."""
    outputs: list[Tensor] = []
    for layer in layers:
        signal = layer.module(signal)
        outputs.append(signal)
    return outputs


def _traces(layers: Iterable[Layer], signal: Tensor) -> Iterator[Trace]:
    """The same, one after another as they are asked for, by layers that are about to learn from it."""
    for layer in layers:
        trace = layer.trace(signal)
        signal = trace.output
        yield trace


def alignment(forward: nn.Module, feedback: nn.Module) -> Tensor:
    """Cosine between a forward layer's weights and the transpose of its feedback layer's, 0-d in [-1, 1]."""
    U, V = weighted(forward).weight, weighted(feedback).weight.transpose(0, 1)
    if V.ndim == 4:  # the transpose of a convolution has its kernel turned
        V = V.flip(2, 3)
    return F.cosine_similarity(U.flatten(), V.flatten(), dim=0)
