"""In which order graph layers learn: one after another to convergence, or all together in time steps.

Both are made of the same parts: blocks, a way of bringing labels in, an objective. See `forward_gnn` for the equations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._graph_labels import Labelling, Layout, edges_of, label_matrix
from bpfree.algorithms._graph_objectives import Objective
from bpfree.algorithms._optim import set_gradients, trained
from bpfree.algorithms.learner import Batch, Metrics, Stage, evaluation_mode
from bpfree.errors import UsageError
from bpfree.networks.gnn import GraphBlock, SeparableBlock
from bpfree.networks.graph import Graph

NORM_EPS: Final = 1e-8
CLIP_NORM: Final = 1.0  # top-to-loss only
INFERENCE_STEPS: Final = 10
SILENT_STEPS: Final = 2  # of these, not counted


@dataclass(frozen=True, eq=False)
class Parts:
    """What a schedule trains and with what.

    Attributes:
        blocks: graph blocks in forward order.
        labelling: how labels get into the graph.
        objective: what a layer's output is trained for.
        classes: number of classes C.
        features: F.
        links: whether pairs of nodes are asked about.
    """

    blocks: nn.ModuleList
    labelling: Labelling
    objective: Objective
    classes: int
    features: int
    links: bool

    def checked(self, graph: Graph) -> Graph:
        """The graph, if it fits.

        Raises:
            UsageError: another number of features, or a question about nodes where pairs are rated.
        """
        if graph.x.shape[1] != self.features:
            raise UsageError(f"node features have shape {tuple(graph.x.shape[1:])}, expected {(self.features,)}")
        if self.links and graph.nodes.ndim != 2:
            raise UsageError("this variant rates pairs of nodes, the graph asks about nodes; use a variant for nodes")
        return graph

    def learn(self, index: int, layout: Layout, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Set the gradients of one layer, by autograd inside it; return its loss and its output for all rows."""
        block = self.blocks[index]
        parameters = trained(block)
        with torch.enable_grad():
            output = block(layout.detach())
            value = loss(wanted_rows(output))
        if parameters:  # else the user has frozen them all
            set_gradients(parameters, torch.autograd.grad(value, parameters))
        return value.detach(), output.x.detach()


class Schedule(ABC):
    """One order of learning."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """What is trained in which order."""

    @abstractmethod
    def evidence(self, graph: Graph) -> list[Tensor]:
        """What each layer says about the nodes or pairs asked about, (M, C)."""


class LayerByLayer(Schedule):
    """One layer after another, each until it converges, on inputs that do not change meanwhile.

    Args:
        parts: see `Parts`.
        optimizers: one per layer.
    """

    def __init__(self, parts: Parts, optimizers: Sequence[Optimizer]) -> None:
        super().__init__(parts)
        self._optimizers = optimizers

    def stages(self) -> tuple[Stage, ...]:
        return tuple(
            Stage(
                name=f"layer {index}",
                modules=(block,),
                optimizers=(self._optimizers[index],),
                update=partial(self.update, index),
                scores=partial(self._scores, index),
                input_shape=(block.sums if isinstance(block, SeparableBlock) else block.in_features,),
                classes=self._parts.classes,
                prefix=partial(self._asking, index),
                training_prefix=partial(self._training, index),
            )
            for index, block in enumerate(graph_blocks(self._parts.blocks))
        )

    def evidence(self, graph: Graph) -> list[Tensor]:
        layout = self._parts.labelling.to_ask(self._parts.checked(graph))
        evidence = []
        for block in self._parts.blocks:
            layout = block(normalized(layout))
            evidence.append(self._parts.objective.evidence(wanted_rows(layout), layout))
        return evidence

    @torch.no_grad()
    def _training(self, index: int, graph: Graph) -> Layout:
        """What layer `index` learns from."""
        layout = self._parts.labelling.to_learn(self._parts.checked(graph))
        with evaluation_mode(self._parts.blocks):
            for block in self._parts.blocks[:index]:
                layout = block(normalized(layout))
                layout = layout.with_x(self._parts.labelling.carry(layout.x))
        return self._inputs(index, layout)

    @torch.no_grad()
    def _asking(self, index: int, graph: Graph) -> Layout:
        """What layer `index` is asked, with the evidence of the layers below."""
        layout = self._parts.labelling.to_ask(self._parts.checked(graph))
        with evaluation_mode(self._parts.blocks):
            for block in self._parts.blocks[:index]:
                layout = block(normalized(layout))
                evidence = self._parts.objective.evidence(wanted_rows(layout), layout)
                layout = replace(layout, evidence=evidence if layout.evidence is None else layout.evidence + evidence)
        return self._inputs(index, layout)

    def _inputs(self, index: int, layout: Layout) -> Layout:
        """A layer's constant inputs: where its convolution allows, the neighbourhood sums of the wanted rows alone."""
        layout, block = normalized(layout), list(graph_blocks(self._parts.blocks))[index]
        if not isinstance(block, SeparableBlock):
            block.prepare(edges_of(layout))
            return layout
        sums = block.aggregate(layout.x, edges_of(layout))
        return replace(layout, x=sums if layout.rows is None else sums[layout.rows], edges=None)

    def update(self, index: int, batch: Batch) -> Metrics:
        """One step of layer `index` from its inputs, kept sums or whole."""
        layout, targets = batch
        loss, _ = self._parts.learn(index, layout, lambda h: self._parts.objective.loss(h, layout, targets))
        self._optimizers[index].step()
        return {f"layer {index} loss": loss}

    def _scores(self, index: int, layout: Layout) -> Tensor:
        evidence = self._parts.objective.evidence(wanted_rows(self._parts.blocks[index](layout)), layout)
        return self._parts.objective.scores(evidence if layout.evidence is None else layout.evidence + evidence)


class InTime(Schedule):
    """All layers together over time steps, each hearing or mixing in the states of the layers above.

    Args:
        parts: see `Parts`.
        optimizer: of all layers.
        states: what the layers said in the last step.
        to_input: top-to-input, or else top-to-loss.
        raw: leave features and states of the bottom-up pass as they are (top-to-loss).
    """

    def __init__(self, parts: Parts, optimizer: Optimizer, states: States, *, to_input: bool, raw: bool) -> None:
        super().__init__(parts)
        self._optimizer, self._states, self._to_input, self._raw = optimizer, states, to_input, raw

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(
                name="all layers",
                modules=(self._parts.blocks, self._states),
                optimizers=(self._optimizer,),
                update=self._update,
                scores=self._scores,
                input_shape=(self._parts.features,),
                classes=self._parts.classes,
                prefix=self._asking,
                training_prefix=self._begin,
                whole_graph=True,
            ),
        )

    def evidence(self, graph: Graph) -> list[Tensor]:
        return self._settled(self._asking(graph))

    def _laid_out(self, layout: Layout, *, raw: bool) -> Layout:
        """A layout with its features normalised, unless `raw`, and the labels that the top layer is fed, if any."""
        for block in graph_blocks(self._parts.blocks):
            block.prepare(edges_of(layout))
        top = None
        if self._to_input and not self._parts.links:
            top = normalize(label_matrix(layout, self._parts.classes))
        return replace(layout if raw else normalized(layout), top=top)

    @torch.no_grad()
    def _asking(self, graph: Graph) -> Layout:
        return self._laid_out(self._parts.labelling.to_ask(self._parts.checked(graph)), raw=self._raw)

    @torch.no_grad()
    def _begin(self, graph: Graph) -> Layout:
        """The training layout; the first time, the states of all layers are set by a bottom-up pass."""
        layout = self._parts.labelling.to_learn(self._parts.checked(graph))
        if not self._states.fit(len(layout.x)):
            with evaluation_mode(self._parts.blocks):
                outputs = self._bottom_up(self._laid_out(layout, raw=self._raw))
            self._states.begin([self._state(output) for output in outputs])
        return self._laid_out(layout, raw=False)

    def _state(self, output: Tensor) -> Tensor:
        """What a bottom-up pass hands to other layers."""
        return output if self._raw else normalize(output)

    def _layer_at(self, index: int, layout: Layout, states: Sequence[Tensor]) -> Layout:
        """The input of a layer in time: the state below and, for top-to-input, the state above."""
        below = states[index - 1] if index else layout.x
        if not self._to_input:
            return layout.with_x(below)
        above = layout.top if index == len(self._parts.blocks) - 1 else states[index + 1]
        return layout.with_x(below if above is None else torch.cat([below, above], 1))

    def _bottom_up(self, layout: Layout) -> list[Tensor]:
        """Every layer's output (n, d) in one pass from below, with nothing from above."""
        outputs: list[Tensor] = []
        below = layout.x
        for block in graph_blocks(self._parts.blocks):
            missing = below.new_zeros(len(below), block.in_features - below.shape[1])
            outputs.append(block(layout.with_x(torch.cat([below, missing], 1))).x)
            below = self._state(outputs[-1])
        return outputs

    def _mixed(self, index: int, h: Tensor, layout: Layout, states: Sequence[Tensor]) -> Tensor:
        """What a layer's loss and evidence look at: h itself, or its mean with the states above (top-to-loss)."""
        if self._to_input:
            return h
        above = [wanted_rows(layout.with_x(state)) for state in states[index + 1 :]]
        return torch.stack([h, *above]).mean(0)

    def _order(self) -> list[int]:
        """Top-to-input: the layers 1, 3, 5, .., then 2, 4, .., each seeing what is new already."""
        layers = list(range(len(self._parts.blocks)))
        return layers[::2] + layers[1::2]

    def _settled(self, layout: Layout) -> list[Tensor]:
        outputs = self._bottom_up(layout)
        states = [self._state(output) for output in outputs]
        evidence = [layout.x.new_zeros(()) for _ in outputs]
        if not self._to_input:
            for index, output in enumerate(outputs):
                h = self._mixed(index, wanted_rows(layout.with_x(output)), layout, states)
                evidence[index] = self._parts.objective.evidence(h, layout)
            return evidence
        for step in range(INFERENCE_STEPS):
            for index in self._order():
                output = self._parts.blocks[index](self._layer_at(index, layout, states))
                states[index] = normalize(output.x)
                if step >= SILENT_STEPS:
                    evidence[index] = evidence[index] + self._parts.objective.evidence(wanted_rows(output), layout)
        return evidence

    def _scores(self, layout: Layout) -> Tensor:
        return self._parts.objective.scores(torch.stack(self._settled(layout)).sum(0))

    def _update(self, batch: Batch) -> Metrics:
        layout, targets = batch
        states, fresh, metrics = self._states.tensors(), {}, {}
        for index in self._order():

            def loss(h: Tensor, index: int = index) -> Tensor:
                return self._parts.objective.loss(self._mixed(index, h, layout, states), layout, targets)

            value, output = self._parts.learn(index, self._layer_at(index, layout, states), loss)
            metrics[f"layer {index} loss"] = value
            fresh[index] = normalize(output)
            if self._to_input:
                states[index].copy_(fresh[index])
            else:
                nn.utils.clip_grad_norm_(self._parts.blocks[index].parameters(), CLIP_NORM)
        if not self._to_input:  # every layer saw the states of the step before
            for index, state in fresh.items():
                states[index].copy_(state)
        self._optimizer.step()
        return {name: metrics[name] for name in sorted(metrics)}


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


def graph_blocks(blocks: Iterable[nn.Module]) -> Iterator[GraphBlock]:
    """The blocks, which are graph blocks."""
    for block in blocks:
        assert isinstance(block, GraphBlock)
        yield block


def normalize(x: Tensor) -> Tensor:
    """N(h) = h / (||h||_2 + 1e-8), per row."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + NORM_EPS)


def normalized(layout: Layout) -> Layout:
    """A layout with N of its features."""
    return layout.with_x(normalize(layout.x))


def wanted_rows(output: Layout) -> Tensor:
    """The rows that the objective wants, of a layer's output for all of them or for just these."""
    return output.x if output.edges is None or output.rows is None else output.x[output.rows]
