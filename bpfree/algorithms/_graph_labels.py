"""How labels get into a graph: as virtual nodes, as appended columns, or not at all.

Each way lays a graph out twice: `to_learn`, where layers learn from the known labels, and `to_ask`, where the nodes
asked about have none. Only `Graph.known` and `Graph.labels` are ever read, so that labels of other nodes
cannot leak. Several views of a graph (a positive and its negatives, one per candidate class) lie side by side as one
graph without edges between them.

Shapes: `n` nodes, `F` features, `C` classes, `T` known nodes, `M` nodes asked about, `K` views.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.networks.graph import Edges, Graph

SEED_MASK = 2**62 - 1


@dataclass(frozen=True, eq=False)
class Layout(Graph):
    """A graph as a layer meets it.

    Attributes:
        rows: which rows of the layer's output the objective needs, in its order; None for all.
        evidence: (M, C) what the layers before this one say about the nodes asked about, or None.
        top: (n, C) what the last layer is fed from above, or None.
    """

    rows: Tensor | None = None
    evidence: Tensor | None = None
    top: Tensor | None = None

    @classmethod
    def over(cls, graph: Graph, x: Tensor, edges: Edges, rows: Tensor | None) -> Layout:
        """A layout that asks what `graph` asks."""
        return cls(x, edges, graph.nodes, graph.known, graph.labels, rows)


class Labelling(nn.Module, ABC):
    """One way of bringing labels into a graph."""

    columns = 0  # how many features are appended

    @abstractmethod
    def to_learn(self, graph: Graph) -> Layout:
        """The layout that layers learn from."""

    @abstractmethod
    def to_ask(self, graph: Graph) -> Layout:
        """The layout that answers what `graph` asks."""

    def carry(self, x: Tensor) -> Tensor:
        """What the next layer learns from, given this layer's output for the training layout."""
        return x


class Unlabelled(Labelling):
    """No labels: for pairs of nodes, whose targets are edges."""

    def to_learn(self, graph: Graph) -> Layout:
        return Layout.over(graph, graph.x, edges_of(graph), None)

    to_ask = to_learn


class VirtualNodes(Labelling):
    """One more node per class, with fixed random features, tied to the nodes known to be of that class.

    A training node of class c gets the edges i -> n+c and n+c -> i ("both" directions) or only the first ("in").
    The rows are the nodes asked about, then the C virtual nodes.

    Args:
        classes: C.
        features: F.
        both: whether virtual nodes are also heard by the nodes tied to them.
    """

    features: Tensor
    seed: Tensor

    def __init__(self, classes: int, features: int, *, both: bool = True) -> None:
        super().__init__()
        self.classes, self.both = classes, both
        seed = torch.initial_seed() & SEED_MASK  # not the global generator: a deeper network would shift its numbers
        drawn = torch.randn(classes, features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("features", drawn)
        self.register_buffer("seed", torch.tensor(seed))

    def tie(self, graph: Graph, nodes: Tensor, labels: Tensor) -> Edges:
        """The graph's edges and those between `nodes` and the virtual nodes of `labels`."""
        ties = torch.stack([nodes, len(graph.x) + labels])
        both = torch.cat([ties, ties.flip(0)], 1) if self.both else ties
        return edges_of(graph).extended(both, len(graph.x) + self.classes)

    def extended(self, graph: Graph) -> Tensor:
        """(n + C, F) features of real and virtual nodes."""
        return torch.cat([graph.x, self.features.to(graph.x.dtype)])

    def virtual(self, graph: Graph) -> Tensor:
        """(C,) the rows of the virtual nodes."""
        return torch.arange(len(graph.x), len(graph.x) + self.classes, device=graph.device)

    def to_learn(self, graph: Graph) -> Layout:
        require_known(graph)
        edges = self.tie(graph, graph.known, graph.labels)
        return Layout.over(graph, self.extended(graph), edges, torch.cat([graph.nodes, self.virtual(graph)]))

    to_ask = to_learn


class VirtualViews(VirtualNodes):
    """Virtual nodes in K = C views. Training: one positive view, then C - 1 in which every known node is tied to one
    of its wrong classes; rows are the known nodes of each view. Asking: one view per class c, in which all nodes
    asked about are tied to c and the other known ones to their own; rows are the nodes asked about in each view.
    """

    def to_learn(self, graph: Graph) -> Layout:
        require_known(graph)
        labels = positive_and_negatives(graph.labels, self.classes, int(self.seed))
        views = [self.tie(graph, graph.known, row) for row in labels]
        x = self.extended(graph)
        return Layout.over(
            graph, x.repeat(len(views), 1), Edges.union(views), in_views(graph.known, len(x), len(views))
        )

    def to_ask(self, graph: Graph) -> Layout:
        require_known(graph)
        others = ~torch.isin(graph.known, graph.nodes)
        nodes = torch.cat([graph.known[others], graph.nodes])
        views = [
            self.tie(graph, nodes, torch.cat([graph.labels[others], torch.full_like(graph.nodes, candidate)]))
            for candidate in range(self.classes)
        ]
        x = self.extended(graph)
        return Layout.over(
            graph, x.repeat(len(views), 1), Edges.union(views), in_views(graph.nodes, len(x), len(views))
        )

    def carry(self, x: Tensor) -> Tensor:
        """The positive view's features, in every view: only the edges of negatives differ."""
        return x.unflatten(0, (self.classes, -1))[0].repeat(self.classes, 1)


class AppendedLabels(Labelling):
    """[X | e] in K = C views, with e the one-hot label, or 1 / C where there is none. Views and rows are those of
    `VirtualViews`; negatives go on through the layers separately.

    Args:
        classes: C.
    """

    seed: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = self.columns = classes
        self.register_buffer("seed", torch.tensor(torch.initial_seed() & SEED_MASK))

    def _views(self, graph: Graph, appended: Tensor, nodes: Tensor) -> Layout:
        """Views of the graph with (K, n, C) columns appended."""
        views = len(appended)
        x = torch.cat([graph.x.expand(views, -1, -1), appended], 2).flatten(0, 1)
        edges = Edges.union([edges_of(graph)] * views)
        return Layout.over(graph, x, edges, in_views(nodes, len(graph.x), views))

    def to_learn(self, graph: Graph) -> Layout:
        require_known(graph)
        labels = positive_and_negatives(graph.labels, self.classes, int(self.seed))
        appended = graph.x.new_full((self.classes, len(graph.x), self.classes), 1 / self.classes)
        appended[:, graph.known] = F.one_hot(labels, self.classes).to(graph.x.dtype)
        return self._views(graph, appended, graph.known)

    def to_ask(self, graph: Graph) -> Layout:
        require_known(graph)
        one_hot = torch.eye(self.classes, dtype=graph.x.dtype, device=graph.device)
        appended = graph.x.new_full((self.classes, len(graph.x), self.classes), 1 / self.classes)
        appended[:, graph.known] = one_hot[graph.labels]
        appended[:, graph.nodes] = one_hot[:, None]
        return self._views(graph, appended, graph.nodes)


def edges_of(graph: Graph) -> Edges:
    """The graph's edges, which network inputs always have."""
    if graph.edges is None:
        raise UsageError("this graph has no edges left: it holds a layer's inputs, not a network's")
    return graph.edges


def require_known(graph: Graph) -> None:
    """Refuse a graph without known labels, or a question about pairs."""
    if graph.nodes.ndim != 1:
        raise UsageError(
            "this variant classifies nodes, the graph asks about pairs; use a link variant such as link-ce"
        )
    if not len(graph.known):
        raise UsageError("no label is known in this graph; pass the training nodes as known and their labels")


def positive_and_negatives(labels: Tensor, classes: int, seed: int) -> Tensor:
    """(T,) labels -> (C, T): the labels, then each node's wrong classes in a random order of its own."""
    keys = torch.rand(len(labels), classes, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    keys.scatter_(1, labels[:, None], -1.0)  # the true class comes first
    return keys.argsort(1).T.contiguous()


def in_views(nodes: Tensor, size: int, views: int) -> Tensor:
    """(M,) nodes -> (K * M,) their rows in views of `size` nodes each, view after view."""
    return (nodes + size * torch.arange(views, device=nodes.device)[:, None]).flatten()


def label_matrix(layout: Layout, classes: int) -> Tensor:
    """(n, C) one-hot labels of the known nodes and of the C virtual nodes at the end, 1 / C elsewhere."""
    matrix = layout.x.new_full((len(layout.x), classes), 1 / classes)
    one_hot = torch.eye(classes, dtype=matrix.dtype, device=matrix.device)
    matrix[layout.known] = one_hot[layout.labels]
    matrix[-classes:] = one_hot
    return matrix
