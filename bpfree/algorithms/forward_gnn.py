"""ForwardGNN: graph networks whose layers learn forward, for node classification and link prediction.

Paper: Park, Wang, Simoulin, Yang, Yang, Rossi, Trivedi, Ahmed, "Forward Learning of Graph Neural Networks", ICLR 2024,
arXiv 2403.11004. A layer is H_l = relu(conv_l(N(H_{l-1}), edges)), N(h) = h / (||h||_2 + 1e-8) per row; its input is a
constant to it, so a gradient never travels further than one convolution.

    variant    section  labels enter as            loss of a layer                          trained
    sf         3.2      virtual nodes              CE(S_l, y), S_l = H_T H_V^T / tau        layer after layer
    sf-t2i     3.3      virtual nodes, from above  the same, input [N(s_{l-1}) | N(s_{l+1})]  all, in time steps
    sf-t2l     3.3      virtual nodes              the same, on mean(h_l, s_{l+1}, .., s_L)   all, in time steps
    ff-la      3.1      columns appended to X      softplus(theta - q+) + softplus(q- - theta)  layer after layer
    ff-vn      3.1      virtual nodes in C views   the same                                 layer after layer
    link-ce    3.4      not at all                 BCE(z_u . z_v)                           layer after layer
    link-ff    3.4      not at all                 the goodness loss on z_u * z_v           layer after layer
    link-t2i   3.4      not at all                 BCE(z_u . z_v), input as sf-t2i          all, in time steps

    q = sum_d h_d^2.  Evidence of a layer: softmax_k(S_l), or mean_d h_d^2 - theta per candidate class; it adds up over
    layers. Of the variants in time steps, T2I takes 10 more steps after a bottom-up pass and adds up steps 2..9.

Shapes: X (n, F), H_l (n + C, d), H_T (T, d) rows of training nodes, H_V (C, d) rows of virtual nodes, S_l (T, C).

Deviations from the paper: validation labels stay hidden at test, where the authors' code appends them for ff-la and
ff-vn; a run that reveals them must say so (`TrainingConfig.reveal_validation`). The bottom-up pass of sf-t2l normalises
like training does; `bottom_up="raw"` leaves it out. Scores of link-ff come from its goodness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._graph_labels import AppendedLabels, Labelling, Unlabelled, VirtualNodes, VirtualViews
from bpfree.algorithms._graph_objectives import Goodness, InnerProducts, Objective, PairGoodness, Prototypes
from bpfree.algorithms._graph_schedules import InTime, LayerByLayer, Parts, Schedule, States, graph_blocks
from bpfree.algorithms._optim import OptimizerFactory, make_optimizer
from bpfree.algorithms.learner import Batch, Channel, Learner, Metrics, Paper, Stage, Support, Trial, accuracy
from bpfree.errors import UsageError, unknown_name
from bpfree.metrics import roc_auc
from bpfree.networks.blocks import Shape
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.graph import Graph

LOSSES: Final = ("ff", "symba")
BOTTOM_UP: Final = ("normalized", "raw")

STATES_FROM_ABOVE: Final = Channel("states from above", "outputs of later layers, part of a layer's input or loss")
STATES_OF_BEFORE: Final = Channel(
    "states from above", "outputs of later layers in the step before, in a layer's loss", 1
)
CHANNELS: Final[dict[str, tuple[Channel, ...]]] = {
    "greedy": (),
    "top-to-input": (STATES_FROM_ABOVE,),
    "top-to-loss": (STATES_OF_BEFORE,),
}


@dataclass(frozen=True)
class Variant:
    """The parts that a variant is made of, and the options that it has."""

    schedule: Literal["greedy", "top-to-input", "top-to-loss"]
    labelling: Callable[[ForwardGNN], Labelling]
    objective: Callable[[ForwardGNN], Objective]
    options: frozenset[str]


def _prototypes(learner: ForwardGNN) -> Objective:
    return Prototypes(learner.classes, learner.tau)


def _goodness(learner: ForwardGNN) -> Objective:
    return Goodness(learner.classes, learner.theta, learner.loss == "symba")


def _pair_goodness(learner: ForwardGNN) -> Objective:
    return PairGoodness(learner.theta)


def _virtual(kind: type[VirtualNodes], learner: ForwardGNN) -> Labelling:
    return kind(learner.classes, learner.input_shape[0], both=learner.bidirectional)


_NODES, _VIEWS = partial(_virtual, VirtualNodes), partial(_virtual, VirtualViews)
_SF, _FF = frozenset({"tau", "bidirectional"}), frozenset({"theta", "loss"})
VARIANTS: Final = {
    "sf": Variant("greedy", _NODES, _prototypes, _SF),
    "sf-t2i": Variant("top-to-input", _NODES, _prototypes, _SF),
    "sf-t2l": Variant("top-to-loss", _NODES, _prototypes, _SF | {"bottom_up"}),
    "ff-la": Variant("greedy", lambda learner: AppendedLabels(learner.classes), _goodness, _FF),
    "ff-vn": Variant("greedy", _VIEWS, _goodness, _FF | {"bidirectional"}),
    "link-ce": Variant("greedy", lambda learner: Unlabelled(), lambda learner: InnerProducts(), frozenset()),
    "link-ff": Variant("greedy", lambda learner: Unlabelled(), _pair_goodness, frozenset({"theta"})),
    "link-t2i": Variant("top-to-input", lambda learner: Unlabelled(), lambda learner: InnerProducts(), frozenset()),
}


class ForwardGNN(Learner):
    """ForwardGNN over GCN, GraphSAGE or GAT blocks.

    Args:
        network: graph blocks in forward order (`networks.gnn`). Variants whose layers take labels or states from above
            as inputs put larger, newly initialised blocks in their place.
        classes: number of classes C; 2 for links.
        variant: "sf", "sf-t2i", "sf-t2l", "ff-la", "ff-vn"; for pairs of nodes "link-ce", "link-ff", "link-t2i".
        lr: learning rate.
        optimizer: "adam", "adamw", "sgd", or a function from parameters to an optimiser.
        weight_decay: decay of all weights.
        tau: temperature of the prototypes (sf variants).
        theta: threshold of the goodness (ff variants).
        loss: "ff" or "symba" (ff-la, ff-vn).
        bidirectional: whether nodes hear their virtual node too (variants with virtual nodes).
        bottom_up: "normalized", or "raw": features and states as they are (sf-t2l).
        input_shape: `(F,)`.

    Raises:
        UsageError: a network or value that does not fit, or an option that the variant does not have.

    Example:
        >>> from bpfree.networks import Graph, gnn
        >>> ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        >>> train, labels = torch.tensor([0, 1]), torch.tensor([0, 1])
        >>> graph = Graph.of(torch.eye(4), ring, nodes=train, known=train, labels=labels)
        >>> learner = ForwardGNN(gnn("gcn", (4,), (8,)), classes=2)
        >>> sorted(learner.step((graph, labels)))
        ['layer 0 loss']
        >>> learner.scores(graph.asking(torch.tensor([2, 3]))).shape
        torch.Size([2, 2])
    """

    paper = Paper(
        title="Forward Learning of Graph Neural Networks",
        authors="Park, Wang, Simoulin, Yang, Yang, Rossi, Trivedi, Ahmed",
        year=2024,
        arxiv="2403.11004",
        follows="sections 3.1 to 3.4: FF-LA, FF-VN, SF, SF-Top-To-Input, SF-Top-To-Loss, link prediction",
    )
    locality = "layer"
    undivided = "its layers read the whole graph, one after another or with signals from above"

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        variant: str = "sf",
        lr: float = 1e-3,
        optimizer: str | OptimizerFactory = "adam",
        weight_decay: float = 5e-4,
        tau: float = 1.0,
        theta: float = 2.0,
        loss: str = "ff",
        bidirectional: bool = True,
        bottom_up: str = "normalized",
        input_shape: Shape | None = None,
    ) -> None:
        super().__init__(network, classes, input_shape)
        support = self.supports(self.network)
        if not support.ok:
            raise UsageError(support.reason)
        for kind, value, known in (
            ("variant", variant, VARIANTS),
            ("loss", loss, LOSSES),
            ("bottom-up pass", bottom_up, BOTTOM_UP),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        if not tau > 0:
            raise UsageError(f"tau must be positive, got {tau}")
        if variant.startswith("link") and classes != 2:
            raise UsageError(
                f"variant {variant} tells edges from other pairs of nodes, 2 classes, and here are {classes}; ask for "
                "links by split=edges, or use a variant for nodes such as sf"
            )
        self.tau, self.theta, self.loss = tau, theta, loss
        self.bidirectional, self.bottom_up = bidirectional, bottom_up
        parts = VARIANTS[variant]
        given = {
            "tau": tau != 1.0,
            "theta": theta != 2.0,
            "loss": loss != "ff",
            "bidirectional": not bidirectional,
            "bottom_up": bottom_up != "normalized",
        }
        for name in given:
            if given[name] and name not in parts.options:
                raise UsageError(f"the variant {variant} has no {name}")
        self.name = variant
        self._labelling, self._objective = parts.labelling(self), parts.objective(self)
        self.channels = CHANNELS[parts.schedule]
        self._fit_blocks(parts.schedule)
        greedy = parts.schedule == "greedy"
        groups = [block.parameters() for block in self.network] if greedy else [self.parameters()]
        optimizers = [make_optimizer(group, optimizer, lr=lr, weight_decay=weight_decay) for group in groups]
        self._states = States(0 if greedy else len(self.network))
        self._schedule = self._order(parts.schedule, optimizers)

    def _order(self, schedule: str, optimizers: list[Optimizer]) -> Schedule:
        parts = Parts(
            self.network,
            self._labelling,
            self._objective,
            self.classes,
            self.input_shape[0],
            self.name.startswith("link"),
        )
        if schedule == "greedy":
            return LayerByLayer(parts, optimizers)
        to_input, raw = schedule == "top-to-input", self.bottom_up == "raw"
        return InTime(parts, optimizers[0], self._states, to_input=to_input, raw=raw)

    def _fit_blocks(self, schedule: str) -> None:
        """Blocks for inputs with appended labels or states from above, where the variant has them."""
        layers = list(graph_blocks(self.network))
        widths = [layer.width for layer in layers]
        extra = [self._labelling.columns, *[0] * (len(layers) - 1)]
        if schedule == "top-to-input":
            extra = [*widths[1:], 0 if self.name.startswith("link") else self.classes]
        for index, (layer, more) in enumerate(zip(layers, extra, strict=True)):
            if more:
                if not all(parameter.requires_grad for parameter in layer.parameters()):
                    raise UsageError(
                        f"{self.name} gives block {index} more inputs and so new weights, which cannot stay frozen; "
                        "unfreeze it, or use variant=sf"
                    )
                self.network[index] = layer.like(layer.in_features + more, layer.width, layer.activation)

    @torch.no_grad()
    def forward(self, inputs: Graph) -> Tensor:
        """A graph that asks about M nodes or pairs -> (M, C) class scores: what its layers say, added up."""
        return self._objective.scores(torch.stack(self._schedule.evidence(inputs)).sum(0))

    def stages(self) -> tuple[Stage, ...]:
        """One stage per layer, or one for all layers of the variants in time steps."""
        return self._schedule.stages()

    @property
    def variant(self) -> str:
        """The variant, and what differs from its usual form."""
        words = [self.name, *([self.loss] if self.loss != "ff" else [])]
        words += ["one direction"] if not self.bidirectional else []
        words += ["raw bottom-up"] if self.bottom_up == "raw" else []
        return ", ".join(words)

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Accuracy (of pairs ROC-AUC) when only the first layers speak: of greedy variants, that of a shallower run."""
        graph, targets = batch
        summed = torch.stack(self._schedule.evidence(graph)).cumsum(0)
        report = {}
        for depth, evidence in enumerate(summed, 1):
            scores = self._objective.scores(evidence)
            if graph.nodes.ndim == 1:
                report[f"depth {depth} accuracy"] = accuracy(scores, targets)
            else:
                report[f"depth {depth} ROC-AUC"] = roc_auc(scores[:, 1] - scores[:, 0], targets)
        return report

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Graph blocks only."""
        if all(isinstance(block, GraphBlock) for block in network):
            return Support(True)
        return Support(False, "it needs graph convolutions as blocks, such as gcn:2x128, sage:2x128 or gat:2x128")

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """The temperature of variants that have one."""
        variant = VARIANTS.get(fixed.get("variant", "sf"))  # the learner says if there is none of that name
        if variant is None or "tau" not in variant.options:
            return {}
        return {"tau": trial.suggest_float("tau", 0.1, 10.0, log=True)}
