"""Forward-Forward: each layer learns to be lively on positive data and quiet on negative data.

Paper: Hinton, "The Forward-Forward Algorithm: Some Preliminary Investigations", 2022, arXiv 2212.13345, sections 2 to
4, and the author's MATLAB code for what the text leaves open. With B samples, M = 2B rows of positive and negative data
together, s = 1 for positive rows and -1 for negative ones, layers l = 1..L of N_l units:

    z_0 = norm(x with its label)             the label as C of the input's values; norm(v) = v / rms(v)
    h_l = relu(z_{l-1} W_l^T + b_l)          z_{l-1} is a constant to layer l
    g_l = sum_j h_lj^2                       goodness
    z_l = norm(h_l)                          all that the next layer sees
    loss_l = mean over M rows of softplus(-s (g_l - theta_l) / T),  theta_l = N_l, T = 1

and in closed form, all layers at once, without autograd:

    dL/dg = -(s / (M T)) sigma(-s (g - theta) / T)
    dL/da = dL/dg 2 h  (+ lambda (m_j - mean(m)) / B in positive rows, peer normalisation)
    dW = (dL/da)^T z_{l-1},  db = sum_M dL/da

Negative data: a wrong label, drawn from what a softmax read-out takes for likely ("hard") or uniformly ("random"); or
hybrids of two images and no labels at all ("hybrid"). The read-out sees z_l, l >= 2, of the input with the neutral
label 1/C (of the plain image, without labels), learns by cross-entropy, and sends nothing to the layers.
Inference: "goodness" adds up g_l, l >= 2, for each label in turn; "softmax" asks the read-out.

Losses besides the original: SymBa (Lee and Song, arXiv 2303.08418) and layer collaboration (Lorberbom et al., arXiv
2305.12393), see `_ff_losses.py`. Label-free descendants for convolutions are in `competitive_forward.py`.

Deviations from the paper: Hinton's code smooths gradients (0.9) and steps by 0.01, which is SGD with momentum 0.9 and a
rate of 0.001, exactly; it adds weight decay behind the smoothing, PyTorch before it. Weights start as the network has
them, or with variance 1 / fan-in as in the paper (`init`). Without labels, the linear read-out learns beside the layers
and not after them. How often the hybrids' masks are blurred is not given (here ten times). In SymBa alpha applies to
goodness as configured. Layer collaboration's theta is not given: here it is the goodness of all layers that count, at a
mean square activity of 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._ff_chain import Chain
from bpfree.algorithms._ff_goodness import (
    GOODNESS,
    NORMALIZERS,
    Activity,
    Goodness,
    Normalizer,
    PeerNormalization,
    SquaredGoodness,
)
from bpfree.algorithms._ff_inference import INFERENCES, Inference, LabelGoodness, SoftmaxReadout, answer
from bpfree.algorithms._ff_layers import Layer, Parts, labelled_activity, learn_readout, read
from bpfree.algorithms._ff_losses import HEARD, ContrastiveLoss, LossOptions, contrastive_loss
from bpfree.algorithms._ff_negatives import NEGATIVES, LabelledViews, Views, WrongLabels, check_views
from bpfree.algorithms._lanes import Lanes
from bpfree.algorithms._optim import OptimizerFactory, make_optimizer
from bpfree.algorithms._options import chosen, option_name
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
    refuse_idle,
)
from bpfree.algorithms.local_units import LocalUnits
from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape, as_blocks, linear_relu
from bpfree.networks.streams import Stream

__all__ = [
    "ContrastiveLoss",
    "ForwardForward",
    "Goodness",
    "Inference",
    "LabelGoodness",
    "LabelledViews",
    "Normalizer",
    "SoftmaxReadout",
    "SquaredGoodness",
    "Views",
    "WrongLabels",
]

SCHEDULES: Final = ("joint", "greedy")
INITS: Final = ("network", "normal")
DEEP: Final = 3  # layers from which on the first one is left out of inference

HARD_NEGATIVES: Final = Channel("hard negatives", "wrong labels, drawn from what the read-out says of all layers")
COLLABORATION: Final = Channel("collaboration", "goodness of all other layers, which is part of a layer's loss")


class ForwardForward(Learner):
    """Forward-Forward over layers `Linear -> ReLU`.

    Args:
        network: hidden layers in forward order.
        classes: number of classes C.
        lr: learning rate of the layers.
        optimizer: "momentum", "sgd" (with Nesterov's), "adam", "adamw", or a function from parameters to an optimiser.
        weight_decay: decay of the layers' weights; biases do not decay.
        head_lr: learning rate of the softmax read-out.
        head_weight_decay: decay of the softmax read-out.
        loss: "original", "symba", "collaboration", "collaboration-preceding", or a `ContrastiveLoss`.
        goodness: "sum" or "mean" of squares, "minus_sum" or "minus_mean" of them, or a `Goodness`.
        theta: threshold of every layer; None: the goodness of units whose mean square activity is 1.
        temperature: T; None: 1. Mean goodness is N times softer than the sum at the same T.
        alpha: of SymBa; None: 4.
        normalizer: "rms" (|z|^2 = N), "unit" (|z| = 1), or a `Normalizer`.
        negatives: "hard", "random", or a choice of `WrongLabels`; "hybrid" or `Views`, which learn without labels.
        label: "overlay" writes the label over the input's first C values, "concat" puts it before them.
        label_strength: value of the label's column.
        peer_normalization: lambda; 0 leaves it out.
        schedule: "joint" trains all layers on every batch, "greedy" layer after layer, each until it converges.
        inference: "goodness" of each label in turn, the "softmax" read-out, or an `Inference`.
        skip_first: leave the first layer out of both; None: with three layers or more, unless a greedy schedule has
            only the read-out to rate it by, or layers collaborate: what these learn is a sum over all of them.
        init: "network" leaves the weights as they are, "normal" draws them with variance 1 / fan-in, as in the paper.
        noise_seed: fixes the draw of negatives; None takes it from PyTorch's global generator.
        input_shape: shape of one input sample; needed when it is not a vector.

    Raises:
        UsageError: a network or value that does not fit, or an option that another one leaves without a meaning.

    Example:
        >>> layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        >>> learner = ForwardForward(layers, classes=3)
        >>> metrics = learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))
        >>> [name for name in sorted(metrics) if name.endswith("loss")]
        ['layer 0 loss', 'layer 1 loss', 'read-out loss']
    """

    paper = Paper(
        title="The Forward-Forward Algorithm: Some Preliminary Investigations",
        authors="Hinton",
        year=2022,
        arxiv="2212.13345",
        follows="sections 2 to 4; losses of arXiv 2303.08418 (SymBa) and 2305.12393 (layer collaboration)",
    )
    locality = "layer"

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        lr: float = 1e-3,
        optimizer: str | OptimizerFactory = "momentum",
        weight_decay: float = 1e-3,
        head_lr: float = 1e-2,
        head_weight_decay: float = 3e-3,
        loss: str | ContrastiveLoss = "original",
        goodness: str | Goodness = "sum",
        theta: float | None = None,
        temperature: float | None = None,
        alpha: float | None = None,
        normalizer: str | Normalizer = "rms",
        negatives: str | WrongLabels | Views = "hard",
        label: str = "overlay",
        label_strength: float = 1.0,
        peer_normalization: float = 0.03,
        schedule: str = "joint",
        inference: str | Inference = "goodness",
        skip_first: bool | None = None,
        init: str = "network",
        noise_seed: int | None = None,
        input_shape: Shape | None = None,
    ) -> None:
        super().__init__(network, classes, input_shape)
        support = self.supports(self.network)
        if not support.ok:
            raise UsageError(support.reason)
        for kind, value, known in (
            ("schedule", schedule, SCHEDULES),
            ("init", init, INITS),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        self.inference = chosen("inference", inference, INFERENCES, Inference)
        self.schedule = schedule
        self.views = self._make_views(negatives, label, label_strength, noise_seed)
        linears = self._linears(init)
        widths = [linear.out_features for linear in linears]
        by_readout = schedule == "greedy" and self.inference.of_readout  # has to say something of layer 0
        self.goodness = chosen("goodness", goodness, GOODNESS, Goodness)
        self.normalizer = chosen("normalizer", normalizer, NORMALIZERS, Normalizer)
        self.contrast = contrastive_loss(loss, self.goodness, widths, LossOptions(theta, temperature, alpha))
        if self.contrast.hears not in HEARD:
            raise unknown_name("value of hears", self.contrast.hears, HEARD)
        usual = len(linears) >= DEEP and not by_readout and self.contrast.hears == "none"
        skip = usual if skip_first is None else skip_first
        if skip and len(linears) == 1:
            raise UsageError("skip_first needs a second layer: there is nothing left to read")
        if skip and by_readout:
            raise UsageError("a greedy schedule with inference=softmax rates its first layer: leave out skip_first")
        self.first = int(skip)
        if self.contrast.hears == "others" and schedule == "greedy":
            raise UsageError("layers cannot hear later ones in the greedy schedule; use loss=collaboration-preceding")
        # layers that learn one after another hear of those before them only
        self.channels = (
            *([HARD_NEGATIVES] if self.views.asks_readout and schedule == "joint" else []),
            *([COLLABORATION] if self.contrast.hears == "others" else []),
        )
        greedy = ["greedy"] if schedule == "greedy" else []
        self._words = [*map(option_name, (loss, negatives, inference)), *greedy]
        self.peers = nn.ModuleList(PeerNormalization(width, peer_normalization) for width in widths)
        self.heads = nn.ModuleList(nn.Linear(width, classes, bias=False) for width in widths[self.first :])
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)
        heads: list[nn.Module | None] = [None] * self.first + list(self.heads)
        self._layers = tuple(
            Layer(f"layer {index}", linear, self.goodness, peer, head)  # type: ignore[arg-type]
            for index, (linear, peer, head) in enumerate(zip(linears, self.peers, heads, strict=True))
        )
        joint = schedule == "joint"
        self._stage_layers = [range(len(linears))] if joint else [range(i, i + 1) for i in range(len(linears))]
        self._optimizers = [
            self._optimizers_of(
                [self._layers[index] for index in indices], optimizer, (lr, weight_decay), (head_lr, head_weight_decay)
            )
            for indices in self._stage_layers
        ]

    def _make_views(self, negatives: str | WrongLabels | Views, label: str, strength: float, seed: int | None) -> Views:
        """How a batch becomes rows, with the label's options where rows carry one."""
        source = chosen("negatives", negatives, NEGATIVES, WrongLabels, Views)
        features = torch.Size(self.input_shape).numel()
        if isinstance(source, WrongLabels):
            return LabelledViews(features, self.classes, label, strength, source, Stream(seed))
        name = option_name(negatives)
        if self.inference.of_labels and not isinstance(source, LabelledViews):
            raise UsageError(f"{name} negatives carry no label: they need inference=softmax and no label options")
        if isinstance(source, LabelledViews) and source.classes != self.classes:
            raise UsageError(f"{name} negatives carry one of {source.classes} labels, and there are {self.classes}")
        if (label, strength) != ("overlay", 1.0):
            raise UsageError(f"label options have no effect with {name} negatives; leave out label and label_strength")
        if isinstance(source, Views):
            refuse_idle({"noise_seed": seed}, ("noise_seed",), "negatives that draw for themselves")
            check_views(source, self.input_shape, self.classes, name)
            return source
        return source(self.input_shape, Stream(seed))

    def _linears(self, init: str) -> list[nn.Linear]:
        """The layers, the first one with the label's columns in front."""
        linears = []
        for index, block in enumerate(self.network):
            linear = linear_relu(block)
            assert linear is not None
            if index == 0 and self.views.appended:
                assert isinstance(block, nn.Sequential)
                linear = block[-2] = self._widened(linear, self.views.appended)
            if init == "normal":
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            linears.append(linear)
        return linears

    @staticmethod
    def _widened(linear: nn.Linear, columns: int) -> nn.Linear:
        wide = nn.Linear(linear.in_features + columns, linear.out_features, bias=linear.bias is not None)
        with torch.no_grad():
            wide.weight[:, columns:] = linear.weight
            if linear.bias is not None:
                wide.bias.copy_(linear.bias)
                wide.bias.requires_grad_(linear.bias.requires_grad)
        wide.weight.requires_grad_(linear.weight.requires_grad)  # what the user has frozen stays frozen
        return wide.to(linear.weight)

    @staticmethod
    def _optimizers_of(
        layers: list[Layer],
        optimizer: str | OptimizerFactory,
        body: tuple[float, float],
        head: tuple[float, float],
    ) -> tuple[Optimizer, ...]:
        """One for the weights, one for the biases, which do not decay, and one for the read-out."""
        body_parameters = [parameter for layer in layers for parameter in layer.linear.parameters()]
        weights = [parameter for parameter in body_parameters if parameter.ndim == 2 and parameter.requires_grad]
        biases = [parameter for parameter in body_parameters if parameter.ndim == 1 and parameter.requires_grad]
        heads = [parameter for layer in layers if layer.head is not None for parameter in layer.head.parameters()]
        groups = ((weights, body), (biases, (body[0], 0.0)), (heads, head))
        return tuple(
            make_optimizer(parameters, optimizer, lr=rate, weight_decay=decay)
            for parameters, (rate, decay) in groups
            if parameters
        )

    # -- forward ----------------------------------------------------------------------------------------------

    @property
    def _parts(self) -> Parts:
        return Parts(self._layers, self.views, self.goodness, self.normalizer, self.first, self.classes)

    def _logits(self, activities: list[Activity]) -> tuple[Tensor, list[Tensor]]:
        """(B, C) logits of the read-out over the layers that were run, and the z_l that each of its parts saw."""
        passed = [activity.inputs for activity in activities[1:]]
        passed.append(self.normalizer.of(activities[-1].hidden))
        pairs = [(layer.head, z) for layer, z in zip(self._layers, passed, strict=False) if layer.head is not None]
        seen = [signal.to(head.weight.dtype) for head, signal in pairs]
        if seen:
            return read([head for head, _ in pairs], seen), seen
        # only the first layer is there, and it is not read
        return self._layers[0].linear.weight.new_zeros(len(activities[0].hidden), self.classes), seen

    @torch.no_grad()
    def label_goodness(self, inputs: Tensor, depth: int | None = None) -> Tensor:
        """Goodness of every layer for every label.

        All labels are one batch. The first layer's product with the image is computed once: a label only adds its
        column, since |z_0| is the same for all of them.

        Args:
            inputs: (B, *input_shape).
            depth: how many layers; None: all.

        Returns:
            (depth, B, C).

        Raises:
            UsageError: the learner was trained without labels.
        """
        if not isinstance(self.views, LabelledViews):
            raise UsageError("these negatives carry no label, so there is no goodness of a label")
        first = labelled_activity(self._layers[0], self.views, self.normalizer, inputs)
        activities = self._parts.run_from(first, len(self._layers) if depth is None else depth)
        said = torch.stack([self.goodness.value(activity.hidden) for activity in activities])
        return said.unflatten(1, (-1, self.classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, C): summed goodness of each label, or the softmax read-out's logits."""
        return self._scores(len(self._layers), inputs)

    def _scores(self, depth: int, inputs: Tensor) -> Tensor:
        """Scores by the first `depth` layers."""
        return answer(self.inference, self._parts, inputs, depth)

    def readout(self, inputs: Tensor, depth: int | None = None) -> Tensor:
        """(B, *input_shape) -> (B, C) logits of the softmax read-out over the first `depth` layers (None: all)."""
        return answer(SoftmaxReadout(), self._parts, inputs, len(self._layers) if depth is None else depth)

    # -- training ---------------------------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        """One stage in the joint schedule, one per layer in the greedy one."""
        joint = self.schedule == "joint"
        return tuple(
            Stage(
                name="all layers" if joint else self._layers[indices.start].name,
                modules=(self,) if joint else self._layers[indices.start].modules,
                optimizers=optimizers,
                update=partial(self._update, indices, optimizers),
                scores=partial(self._scores, indices.stop),
                input_shape=self.input_shape,
                classes=self.classes,
            )
            for indices, optimizers in zip(self._stage_layers, self._optimizers, strict=True)
        )

    def local_units(self) -> LocalUnits:
        """The layers, and the read-out behind them, which is sent what it sees of each.

        Raises:
            UsageError: a layer cannot learn without hearing from later ones.
        """
        if self.schedule == "greedy":
            raise UsageError("schedule=greedy trains one layer at a time, so that other ranks would wait")
        if self.views.asks_readout:
            raise UsageError(
                "hard negatives are drawn from what the read-out says of all layers before any of them learns; "
                "use negatives=random"
            )
        if self.contrast.hears != "none":
            raise UsageError("its loss adds up the goodness of several layers; use loss=original or loss=symba")
        return self._chain.units()

    @property
    def _separate(self) -> bool:
        """Whether layers learn from what comes before them alone."""
        return self.schedule == "joint" and not self.views.asks_readout and self.contrast.hears == "none"

    @property
    def _chain(self) -> Chain:
        """The layers as units, if they are separate."""
        return Chain(self._parts, self.contrast, self._optimizers[0], self.inference)

    @torch.no_grad()
    def _update(self, indices: range, optimizers: tuple[Optimizer, ...], batch: Batch) -> Metrics:
        """Train the layers of these indices; those before them only run."""
        if self._separate:
            return self._chain.units().update(batch)
        inputs, targets = batch[0].flatten(1), batch[1]
        size, depth = len(inputs), indices.stop
        counts = (2, depth, max(1 + len(indices), len(optimizers)))
        early, middle, late = (Lanes(inputs.device, count) for count in counts)
        with early.lane(1):  # random numbers wait for nothing
            noise = self.views.draw(size)
        plain = list(self._parts.run(self.views.plain(inputs), depth)) if self.views.labelled else None
        logits, seen = self._logits(plain) if plain else (None, [])
        early.join()
        activities, measured = [], []
        for index, activity in enumerate(self._parts.run(self.views.contrast(inputs, targets, logits, noise), depth)):
            activities.append(activity)
            with middle.lane(index):  # the next layer does not wait for this one's goodness
                measured.append(self.goodness.value(activity.hidden))
        if logits is None:  # the read-out sees the positive rows
            logits, seen = self._logits([Activity(a.inputs[:size], a.hidden[:size]) for a in activities])
        middle.join()
        goodness = torch.stack(measured)
        losses, slopes = self.contrast(goodness)
        metrics: Metrics = {}
        with late.lane(0):
            if seen:
                parts = [(head, seen[index - self.first]) for index in indices if (head := self._layers[index].head)]
                metrics["read-out loss"] = learn_readout(logits, parts, targets)
        for index in indices:
            with late.lane(1 + index - indices.start):
                self._layers[index].learn(activities[index], slopes[index])
        late.join()
        for index, optimizer in enumerate(optimizers):
            with late.lane(index):
                optimizer.step()
        late.join()
        liveliness = goodness.unflatten(1, (2, size)).mean(2)
        for index in indices:
            name = self._layers[index].name
            metrics[f"{name} loss"] = losses[index]
            metrics[f"{name} positive goodness"], metrics[f"{name} negative goodness"] = liveliness[index]
        return metrics

    # -- what it says of itself -------------------------------------------------------------------------------

    @property
    def variant(self) -> str:
        """Loss, negatives and inference, and the schedule if it is greedy."""
        return ", ".join(self._words)

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Accuracy of both ways of inference and of each layer alone, and mean goodness of right and wrong labels."""
        inputs, targets = batch
        report = {"softmax inference accuracy": accuracy(self.readout(inputs), targets)}
        if isinstance(self.views, LabelledViews):
            goodness = self.label_goodness(inputs)
            report["goodness inference accuracy"] = accuracy(goodness[self.first :].sum(0), targets)
            right = goodness.gather(2, targets[None, :, None].expand(len(goodness), -1, 1)).squeeze(2)
            wrong = (goodness.sum(2) - right) / (self.classes - 1)
            for layer, labels, own, others in zip(self._layers, goodness, right, wrong, strict=True):
                report[f"{layer.name} accuracy"] = accuracy(labels, targets)
                report[f"{layer.name} goodness of the class"] = own.mean()
                report[f"{layer.name} goodness of other classes"] = others.mean()
        return report

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Fully connected ReLU layers: a label in a few values of the input is lost in convolutions."""
        if all(linear_relu(block) is not None for block in as_blocks(network)):
            return Support(True)
        return Support(False, "its layers are Linear-ReLU, such as mlp:4x2000; for convolutions see cwc, dff and sff")

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """The temperature of losses that have one, and the strength of peer normalisation."""
        space: dict[str, Any] = {
            "peer_normalization": trial.suggest_categorical("peer_normalization", (0.0, 0.03)),
        }
        if isinstance(loss := fixed.get("loss", "original"), str) and loss != "symba":
            space["temperature"] = trial.suggest_float("temperature", 0.3, 100.0, log=True)
        return space
