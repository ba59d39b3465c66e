"""A graph served whole, or in random parts where it does not fit: the counterpart of `Batches` for graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import ClassVar, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.data.batches import Batches, Draw, Whole
from bpfree.errors import DataError, UsageError
from bpfree.metrics import roc_auc
from bpfree.networks.graph import Graph

VALIDATE_EVERY: Final = 2


class GraphBatches:
    """One part of a graph's nodes, or of its node pairs, asked about in the whole graph at every step.

    An epoch is a fixed number of steps on all of them, so that validation, patience and the cap on epochs mean
    the same as for samples in batches.

    Args:
        graph: the graph, on the device, asking about M nodes or pairs.
        targets: (M,) int64 classes; for pairs 1 where there is an edge and 0 elsewhere.
        steps: full-batch steps per epoch.

    Raises:
        DataError: targets that do not belong to the question.
    """

    augmentation: ClassVar[str] = "none"
    fixed_shapes: ClassVar[bool] = True

    def __init__(self, graph: Graph, targets: Tensor, *, steps: int = VALIDATE_EVERY) -> None:
        if targets.dtype != torch.int64 or targets.shape != (len(graph),):
            raise DataError(
                f"the graph asks about {len(graph)} nodes or pairs, targets are {tuple(targets.shape)} {targets.dtype}"
            )
        self.graph, self.targets, self.steps = graph, targets.to(graph.device), steps

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def device(self) -> torch.device:
        """Where the graph lives."""
        return self.graph.device

    @property
    def nbytes(self) -> int:
        """Bytes that the graph and targets take on the device."""
        return self.graph.nbytes + self.targets.nbytes

    @property
    def metric(self) -> str:
        """What `hits` counts: accuracy of nodes, or the area under the ROC curve of pairs."""
        return "accuracy" if self.graph.nodes.ndim == 1 else "ROC-AUC"

    @property
    def criterion(self) -> str:
        """What `losses` adds up."""
        return "cross-entropy"

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(M, C) scores -> the sum of the cross-entropies."""
        return F.cross_entropy(scores, targets, reduction="sum")

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps of one epoch; the batch size does not matter."""
        return self.steps if len(self) else 0

    def step_size(self, batch_size: int) -> int:
        """How many nodes or pairs one step learns from: all."""
        return len(self)

    def stage(self, count: int, batch_size: int) -> Whole:
        """The batches of up to `count` consecutive steps."""
        return Whole(self.graph, self.targets)

    def bytes_per_step(self, batch_size: int) -> int:
        """What staging one more step takes: nothing, since every step meets the same tensors."""
        return 0

    def draw(self, *seed: int) -> Draw:
        """An epoch's order: there is none to choose."""
        return Draw(torch.empty(0, dtype=torch.int64))

    def epoch(self, draw: Draw, batch_size: int, first_batch: int = 0) -> Iterator[tuple[Graph, Tensor]]:
        """Everything once, unless it has been seen already."""
        if not first_batch:
            yield self.graph, self.targets

    def in_order(self, batch_size: int) -> Iterator[tuple[Graph, Tensor]]:
        """Everything once."""
        yield self.graph, self.targets

    @torch.no_grad()
    def map(self, function: Callable[[Graph], Graph], batch_size: int) -> GraphBatches:
        """The same question put to what `function` makes of the graph, computed once."""
        return GraphBatches(function(self.graph), self.targets, steps=self.steps)

    def hits(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(M, C) scores -> `metric` times M, so that it adds up as the number of right answers does."""
        if self.metric == "accuracy":
            return (scores.argmax(1) == targets).sum()
        return roc_auc(scores[:, 1] - scores[:, 0], targets) * len(targets)


class GraphParts(GraphBatches):
    """A graph that stays where it is and comes to the device in random parts of its nodes, with the edges inside them.

    Every pass goes over all nodes once, in new parts; each part has its share of the nodes asked about and of those
    known. Edges between parts are not seen (random partition, the baseline of Chiang et al. 2019, arXiv 1905.07953).
    Nothing is kept between steps, hence inputs of frozen layers are computed anew.

    Args:
        graph: the graph, on the host, asking about M nodes.
        targets: (M,) int64 classes.
        parts: number of parts.
        device: where a part goes.
        steps: passes over all parts per epoch.

    Raises:
        DataError: targets that do not belong to the question.
        UsageError: a question about pairs, or fewer nodes asked about or known than parts.
    """

    augmentation: ClassVar[str] = "parts"
    fixed_shapes: ClassVar[bool] = False

    def __init__(
        self, graph: Graph, targets: Tensor, *, parts: int, device: torch.device, steps: int = VALIDATE_EVERY
    ) -> None:
        super().__init__(graph, targets, steps=steps)
        if graph.nodes.ndim != 1:
            raise UsageError("pairs of nodes fall into different parts of a graph; leave out graph_parts")
        if min(len(graph), len(graph.known)) < parts:
            raise UsageError(
                f"{parts} parts of a graph that asks about {len(graph)} nodes and knows {len(graph.known)}: "
                f"set graph_parts to at most {min(len(graph), len(graph.known))}"
            )
        self._parts, self._device = parts, device
        self._prefix: Callable[[Graph], Graph] = lambda part: part
        asked, known = (torch.zeros(len(graph.x), dtype=torch.bool) for _ in range(2))
        asked[graph.nodes.cpu()], known[graph.known.cpu()] = True, True
        self._groups = (asked, known & ~asked, ~asked & ~known)

    @property
    def device(self) -> torch.device:
        """Where parts go."""
        return self._device

    @property
    def nbytes(self) -> int:
        """Bytes that stay on the device: none."""
        return 0

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps of one epoch: a part each."""
        return self._parts * self.steps

    def step_size(self, batch_size: int) -> int:
        """How many nodes one step learns from, about."""
        return len(self) // self._parts

    def stage(self, count: int, batch_size: int) -> StagedParts:  # type: ignore[override]
        """The batches of up to `count` consecutive steps, cut when they are asked for."""
        return StagedParts(self)

    def draw(self, *seed: int) -> Draw:
        """An epoch's orders of nodes, one for each of its passes."""
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        return Draw(torch.stack([torch.randperm(len(self.graph.x), generator=generator) for _ in range(self.steps)]))

    def part(self, draw: Draw, step: int) -> tuple[Graph, Tensor]:
        """Step `step` of an epoch: a part of the graph on the device, and the targets it asks for."""
        from torch_geometric.utils import subgraph

        order, index = draw.order[step // self._parts], step % self._parts
        chosen = [order[group[order]].tensor_split(self._parts)[index] for group in self._groups]
        nodes = torch.cat(chosen).sort().values.to(self.graph.device)
        place = torch.full((len(self.graph.x),), -1, device=self.graph.device)
        place[nodes] = torch.arange(len(nodes), device=self.graph.device)
        assert self.graph.edges is not None
        edges, _ = subgraph(nodes, self.graph.edges.index, relabel_nodes=True, num_nodes=len(self.graph.x))
        asked, known = (place[among] >= 0 for among in (self.graph.nodes, self.graph.known))
        part = Graph.of(
            self.graph.x[nodes], edges, place[self.graph.nodes[asked]], place[self.graph.known[known]],
            self.graph.labels[known],
        )  # fmt: skip
        return self._prefix(part.to(self._device)), self.targets[asked].to(self._device)

    def epoch(self, draw: Draw, batch_size: int, first_batch: int = 0) -> Iterator[tuple[Graph, Tensor]]:
        """The parts of an epoch's first pass, from part `first_batch` on."""
        for step in range(first_batch, self._parts):
            yield self.part(draw, step)

    def in_order(self, batch_size: int) -> Iterator[tuple[Graph, Tensor]]:
        """Every node asked about once, in parts that are always the same."""
        return self.epoch(self.draw(0), batch_size)

    def map(self, function: Callable[[Graph], Graph], batch_size: int) -> GraphParts:
        """The same question put to what `function` makes of each part, whenever a part is asked for."""
        mapped, before = copy.copy(self), self._prefix
        mapped._prefix = torch.no_grad()(lambda part: function(before(part)))
        return mapped


class StagedParts:
    """The parts of consecutive steps, each cut when it is asked for: the device holds one at a time."""

    def __init__(self, parts: GraphParts) -> None:
        self._parts = parts

    def fill(self, draw: Draw, first_step: int, count: int) -> None:
        """Note which steps of which epoch are next."""
        self._draw, self._first = draw, first_step

    def __getitem__(self, position: int) -> tuple[Graph, Tensor]:
        return self._parts.part(self._draw, self._first + position)


AnyBatches = Batches | GraphBatches
