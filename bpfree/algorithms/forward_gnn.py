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
like training does; the authors' code does not, which is `bottom_up="raw"`. Scores of link-ff come from its goodness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from bpfree.algorithms._graph_labels import (
    AppendedLabels,
    Labelling,
    Layout,
    Unlabelled,
    VirtualNodes,
    VirtualViews,
    edges_of,
    label_matrix,
)
from bpfree.algorithms._graph_objectives import Goodness, InnerProducts, Objective, PairGoodness, Prototypes
from bpfree.algorithms._optim import OptimizerFactory, make_optimizer, set_gradients
from bpfree.algorithms.learner import Batch, Learner, Metrics, Paper, Stage, Support, Trial, accuracy, evaluation_mode
from bpfree.errors import UsageError, unknown_name
from bpfree.metrics import roc_auc
from bpfree.networks.blocks import Shape
from bpfree.networks.gnn import GraphBlock, SeparableBlock
from bpfree.networks.graph import Graph

NORM_EPS: Final = 1e-8
CLIP_NORM: Final = 1.0  # sf-t2l only
INFERENCE_STEPS: Final = 10
SILENT_STEPS: Final = 2  # of these, not counted
LOSSES: Final = ("ff", "symba")
BOTTOM_UP: Final = ("normalized", "raw")
Schedule = Literal["greedy", "top-to-input", "top-to-loss"]


@dataclass(frozen=True)
class Variant:
    """The parts that a variant is made of, and the options that it has."""

    schedule: Schedule
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
        bottom_up: "normalized", or "raw" as in the authors' code (sf-t2l).
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
        if not tau > 0 or classes < 2 or (variant.startswith("link") and classes != 2):
            raise UsageError(f"tau must be positive, and links have 2 classes; got tau {tau} and {classes} classes")
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
        self.name, self.schedule = variant, parts.schedule
        self._labelling = parts.labelling(self)
        self._objective = parts.objective(self)
        self._fit_blocks()
        greedy = self.schedule == "greedy"
        groups = [block.parameters() for block in self.network] if greedy else [self.parameters()]
        self._optimizers = tuple(make_optimizer(group, optimizer, lr=lr, weight_decay=weight_decay) for group in groups)
        self._states = States(0 if greedy else len(self.network))

    def _fit_blocks(self) -> None:
        """Blocks for inputs with appended labels or states from above, where the variant has them."""
        layers = list(self._graph_blocks())
        widths = [layer.width for layer in layers]
        extra = [self._labelling.columns, *[0] * (len(layers) - 1)]
        if self.schedule == "top-to-input":
            extra = [*widths[1:], 0 if self.name.startswith("link") else self.classes]
        for index, (layer, more) in enumerate(zip(layers, extra, strict=True)):
            if more:
                self.network[index] = layer.like(layer.in_features + more, layer.width, layer.activation)

    def _graph_blocks(self) -> Iterator[GraphBlock]:
        for block in self.network:
            assert isinstance(block, GraphBlock)
            yield block

    # -- what all variants share ------------------------------------------------------------------------------

    def _checked(self, graph: Graph) -> Graph:
        if graph.x.shape[1:] != self.input_shape:
            raise UsageError(f"node features have shape {tuple(graph.x.shape[1:])}, expected {self.input_shape}")
        if self.name.startswith("link") and graph.nodes.ndim != 2:
            raise UsageError(f"{self.name} rates pairs of nodes, the graph asks about nodes; use a variant for nodes")
        return graph

    @torch.no_grad()
    def forward(self, inputs: Graph) -> Tensor:
        """A graph that asks about M nodes or pairs -> (M, C) class scores: what its layers say, added up."""
        return self._objective.scores(torch.stack(self._evidence(inputs)).sum(0))

    def _evidence(self, graph: Graph) -> list[Tensor]:
        """What each layer says about the nodes asked about, (M, C)."""
        if self.schedule != "greedy":
            return self._evidence_in_time(self._asking(graph))
        layout = self._labelling.to_ask(self._checked(graph))
        evidence = []
        for block in self.network:
            layout = block(normalized(layout))
            evidence.append(self._objective.evidence(wanted_rows(layout), layout))
        return evidence

    def _learn(self, index: int, layout: Layout, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Set the gradients of one layer, by autograd inside it; return its loss and its output for all rows."""
        block = self.network[index]
        parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            output = block(layout.detach())
            value = loss(wanted_rows(output))
        set_gradients(parameters, torch.autograd.grad(value, parameters))
        return value.detach(), output.x.detach()

    # -- layer after layer ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _training_layer(self, index: int, graph: Graph) -> Layout:
        """What layer `index` learns from."""
        layout = self._labelling.to_learn(self._checked(graph))
        with evaluation_mode(self):
            for block in self.network[:index]:
                layout = block(normalized(layout))
                layout = layout.with_x(self._labelling.carry(layout.x))
        return self._layer_inputs(index, layout)

    @torch.no_grad()
    def _asking_layer(self, index: int, graph: Graph) -> Layout:
        """What layer `index` is asked, with the evidence of the layers below."""
        layout = self._labelling.to_ask(self._checked(graph))
        with evaluation_mode(self):
            for block in self.network[:index]:
                layout = block(normalized(layout))
                evidence = self._objective.evidence(wanted_rows(layout), layout)
                layout = replace(layout, evidence=evidence if layout.evidence is None else layout.evidence + evidence)
        return self._layer_inputs(index, layout)

    def _layer_inputs(self, index: int, layout: Layout) -> Layout:
        """A layer's constant inputs: where its convolution allows, the neighbourhood sums of the wanted rows alone."""
        layout, block = normalized(layout), list(self._graph_blocks())[index]
        if not isinstance(block, SeparableBlock):
            block.prepare(edges_of(layout))
            return layout
        sums = block.aggregate(layout.x, edges_of(layout))
        return replace(layout, x=sums if layout.rows is None else sums[layout.rows], edges=None)

    def _update_layer(self, index: int, batch: Batch) -> Metrics:
        layout, targets = batch
        loss, _ = self._learn(index, layout, lambda h: self._objective.loss(h, layout, targets))
        self._optimizers[index].step()
        return {f"layer {index} loss": loss}

    def _layer_scores(self, index: int, layout: Layout) -> Tensor:
        evidence = self._objective.evidence(wanted_rows(self.network[index](layout)), layout)
        return self._objective.scores(evidence if layout.evidence is None else layout.evidence + evidence)

    # -- all layers, in time steps ----------------------------------------------------------------------------

    def _laid_out(self, layout: Layout, *, raw: bool) -> Layout:
        """A layout with its features normalised, unless `raw`, and the labels that the top layer is fed, if any."""
        next(self._graph_blocks()).prepare(edges_of(layout))
        top = None
        if self.schedule == "top-to-input" and not self.name.startswith("link"):
            top = normalize(label_matrix(layout, self.classes))
        return replace(layout if raw else normalized(layout), top=top)

    @torch.no_grad()
    def _asking(self, graph: Graph) -> Layout:
        return self._laid_out(self._labelling.to_ask(self._checked(graph)), raw=self.bottom_up == "raw")

    @torch.no_grad()
    def _begin(self, graph: Graph) -> Layout:
        """The training layout; the first time, the states of all layers are set by a bottom-up pass."""
        layout = self._labelling.to_learn(self._checked(graph))
        if not self._states.fit(len(layout.x)):
            with evaluation_mode(self):
                outputs = self._bottom_up(self._laid_out(layout, raw=self.bottom_up == "raw"))
            self._states.begin([self._state(output) for output in outputs])
        return self._laid_out(layout, raw=False)

    def _state(self, output: Tensor) -> Tensor:
        """What a bottom-up pass hands to other layers."""
        return output if self.bottom_up == "raw" else normalize(output)

    def _layer_at(self, index: int, layout: Layout, states: Sequence[Tensor]) -> Layout:
        """The input of a layer in time: the state below and, for top-to-input, the state above."""
        below = states[index - 1] if index else layout.x
        if self.schedule == "top-to-loss":
            return layout.with_x(below)
        above = layout.top if index == len(self.network) - 1 else states[index + 1]
        return layout.with_x(below if above is None else torch.cat([below, above], 1))

    def _bottom_up(self, layout: Layout) -> list[Tensor]:
        """Every layer's output (n, d) in one pass from below, with nothing from above."""
        outputs: list[Tensor] = []
        below = layout.x
        for block in self._graph_blocks():
            missing = below.new_zeros(len(below), block.in_features - below.shape[1])
            outputs.append(block(layout.with_x(torch.cat([below, missing], 1))).x)
            below = self._state(outputs[-1])
        return outputs

    def _mixed(self, index: int, h: Tensor, layout: Layout, states: Sequence[Tensor]) -> Tensor:
        """What a layer's loss and evidence look at: h itself, or its mean with the states above (top-to-loss)."""
        if self.schedule == "top-to-input":
            return h
        above = [wanted_rows(layout.with_x(state)) for state in states[index + 1 :]]
        return torch.stack([h, *above]).mean(0)

    def _order(self) -> list[int]:
        """Top-to-input: the layers 1, 3, 5, .., then 2, 4, .., each seeing what is new already."""
        layers = list(range(len(self.network)))
        return layers[::2] + layers[1::2]

    def _evidence_in_time(self, layout: Layout) -> list[Tensor]:
        outputs = self._bottom_up(layout)
        states = [self._state(output) for output in outputs]
        evidence = [layout.x.new_zeros(()) for _ in outputs]
        if self.schedule == "top-to-loss":
            for index, output in enumerate(outputs):
                h = self._mixed(index, wanted_rows(layout.with_x(output)), layout, states)
                evidence[index] = self._objective.evidence(h, layout)
            return evidence
        for step in range(INFERENCE_STEPS):
            for index in self._order():
                output = self.network[index](self._layer_at(index, layout, states))
                states[index] = normalize(output.x)
                if step >= SILENT_STEPS:
                    evidence[index] = evidence[index] + self._objective.evidence(wanted_rows(output), layout)
        return evidence

    def _scores_in_time(self, layout: Layout) -> Tensor:
        return self._objective.scores(torch.stack(self._evidence_in_time(layout)).sum(0))

    def _update_in_time(self, batch: Batch) -> Metrics:
        layout, targets = batch
        states, fresh, metrics = self._states.tensors(), {}, {}
        for index in self._order():

            def loss(h: Tensor, index: int = index) -> Tensor:
                return self._objective.loss(self._mixed(index, h, layout, states), layout, targets)

            value, output = self._learn(index, self._layer_at(index, layout, states), loss)
            metrics[f"layer {index} loss"] = value
            fresh[index] = normalize(output)
            if self.schedule == "top-to-input":
                states[index].copy_(fresh[index])
            else:
                nn.utils.clip_grad_norm_(self.network[index].parameters(), CLIP_NORM)
        if self.schedule == "top-to-loss":  # every layer saw the states of the step before
            for index, state in fresh.items():
                states[index].copy_(state)
        self._optimizers[0].step()
        return {name: metrics[name] for name in sorted(metrics)}

    # -- the rest of the contract -----------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        """One stage per layer, or one for all layers of the variants in time steps."""
        if self.schedule != "greedy":
            return (
                Stage(
                    name="all layers",
                    modules=(self,),
                    optimizers=self._optimizers,
                    update=self._update_in_time,
                    scores=self._scores_in_time,
                    input_shape=self.input_shape,
                    classes=self.classes,
                    prefix=self._asking,
                    training_prefix=self._begin,
                ),
            )
        return tuple(
            Stage(
                name=f"layer {index}",
                modules=(block,),
                optimizers=(self._optimizers[index],),
                update=partial(self._update_layer, index),
                scores=partial(self._layer_scores, index),
                input_shape=(block.sums if isinstance(block, SeparableBlock) else block.in_features,),
                classes=self.classes,
                prefix=partial(self._asking_layer, index),
                training_prefix=partial(self._training_layer, index),
            )
            for index, block in enumerate(self._graph_blocks())
        )

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
        summed = torch.stack(self._evidence(graph)).cumsum(0)
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
    def search_space(trial: Trial) -> dict[str, Any]:
        """The temperature of the default variant."""
        return {"tau": trial.suggest_float("tau", 0.1, 10.0, log=True)}


class States(nn.Module):
    """The layers' outputs of the last time step, normalised: part of what a checkpoint holds.

    They take the size of the graph when training begins, or that of a checkpoint that is loaded.

    Args:
        layers: number of layers.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        for index in range(layers):
            self.register_buffer(str(index), torch.empty(0, 0))

    def tensors(self) -> list[Tensor]:
        """One (n, d) tensor per layer, to be changed in place."""
        return list(self.buffers())

    def fit(self, nodes: int) -> bool:
        """Whether there are states of this many nodes."""
        return all(len(state) == nodes for state in self.buffers())

    def begin(self, states: Iterable[Tensor]) -> None:
        """Take up first states."""
        for index, state in enumerate(states):
            self.register_buffer(str(index), state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name, state in self.named_buffers():
            saved = state_dict.get(prefix + name, state)
            self.register_buffer(name, state.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def normalize(x: Tensor) -> Tensor:
    """N(h) = h / (||h||_2 + 1e-8), per row."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + NORM_EPS)


def normalized(layout: Layout) -> Layout:
    """A layout with N of its features."""
    return layout.with_x(normalize(layout.x))


def wanted_rows(output: Layout) -> Tensor:
    """The rows that the objective wants, of a layer's output for all of them or for just these."""
    return output.x if output.edges is None or output.rows is None else output.x[output.rows]
