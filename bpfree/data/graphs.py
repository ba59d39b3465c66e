"""Graphs for node classification and link prediction, and the splits that the papers use.

cora = load_graph("cora")
split = cora.node_split(0)

Shapes: `n` nodes, `F` features, `E` directed edges (every edge of the graph is two of them), `M` node pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bpfree.data.graph_readers import graph_extra
from bpfree.data.registry import load_raw_graph
from bpfree.errors import DataError, UsageError

FOLDS = 5
"""How many splits `node_split` and `edge_split` have."""

_FEWEST_EDGES = 7  # with fewer, 16 % of them are none


@dataclass(frozen=True, eq=False)
class NodeSplit:
    """Node indices of one split, each part ascending; no node is in two parts.

    Attributes:
        train: (n_train,) int64.
        validation: (n_validation,) int64.
        test: (n_test,) int64.
    """

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True, eq=False)
class EdgePart:
    """Labelled node pairs of one part of an edge split: edges first, then as many pairs that are no edges.

    Attributes:
        pairs: (2, M) int64; every edge once.
        labels: (M,) float32, 1 for an edge and 0 otherwise.
    """

    pairs: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class EdgeSplit:
    """A split of a graph's edges for link prediction.

    Attributes:
        message_edges: (2, E_train) int64, the training edges in both directions: what a network may pass messages
            along in training and validation.
        test_message_edges: (2, E_train + E_validation) int64: the same for testing, when the validation edges are
            known too, as in ForwardGNN.
        train: the training edges and fixed pairs that are no edges.
        validation: as `train`.
        test: as `train`.
    """

    message_edges: Tensor
    test_message_edges: Tensor
    train: EdgePart
    validation: EdgePart
    test: EdgePart


@dataclass(frozen=True, eq=False)
class GraphDataset:
    """An undirected graph with features and labels on its nodes.

    Attributes:
        name: as users call it.
        features: (n, F) floating point, all finite; float32 and row-normalised from `load_graph`.
        edge_index: (2, E) int64, every edge in both directions, without self-loops and duplicates. Nodes that are
            in no edge are nodes all the same.
        labels: (n,) int64 in [0, classes).
        classes: number of classes.
        public: the published split, if there is one.

    Raises:
        DataError: shapes, types or values other than these.
    """

    name: str
    features: Tensor
    edge_index: Tensor
    labels: Tensor
    classes: int
    public: NodeSplit | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise DataError(f"graph {self.name!r}: {problem}")

    def _problem(self) -> str | None:
        features, edges, labels = self.features, self.edge_index, self.labels
        if not features.is_floating_point() or features.ndim != 2:
            return f"features must be floating point of shape (n, F), not {features.dtype} of {tuple(features.shape)}"
        if not torch.isfinite(features).all():
            return "features hold NaN or infinite values"
        nodes = len(features)
        if labels.dtype != torch.int64 or labels.shape != (nodes,):
            return f"labels must be int64 of shape ({nodes},), not {labels.dtype} of {tuple(labels.shape)}"
        if nodes == 0:
            return "it has no nodes"
        if labels.min() < 0 or labels.max() >= self.classes:
            return f"labels span {int(labels.min())}..{int(labels.max())}, outside 0..{self.classes - 1}"
        if edges.dtype != torch.int64 or edges.ndim != 2 or len(edges) != 2:
            return f"edge_index must be int64 of shape (2, E), not {edges.dtype} of {tuple(edges.shape)}"
        if edges.numel() == 0:
            return None
        if edges.min() < 0 or edges.max() >= nodes:
            return f"edges span nodes {int(edges.min())}..{int(edges.max())}, outside 0..{nodes - 1}"
        if (edges[0] == edges[1]).any():
            return "there are self-loops"
        forwards, backwards = (edges[0] * nodes + edges[1]).sort().values, (edges[1] * nodes + edges[0]).sort().values
        if (forwards[1:] == forwards[:-1]).any():
            return "an edge occurs twice"
        if not torch.equal(forwards, backwards):
            return "an edge occurs in one direction only"
        return None

    @property
    def nodes(self) -> int:
        """Number of nodes, n."""
        return len(self.features)

    def node_split(self, split: int) -> NodeSplit:
        """Fold `split` of the five that ForwardGNN uses: 64 % training, 16 % validation, 20 % test nodes.

        The test parts are the folds of scikit-learn's `KFold(5, shuffle=True, random_state=101)`; 20 % of the other
        nodes, by `train_test_split(test_size=0.2, random_state=127 * split)`, are for validation. This gives, index
        for index, the splits that the authors publish (NamyongPark/forwardgnn-datasplits) for CitationFull's
        CiteSeer, Cora-ML and PubMed, Amazon Photo and GitHub, so they are computed and not read. A split is a
        function of `split` and the number of nodes only.

        Args:
            split: 0..4.

        Raises:
            UsageError: no such fold.
            DataError: fewer nodes than folds.
        """
        _check_fold(split)
        if self.nodes < FOLDS:
            raise DataError(f"graph {self.name!r}: cannot make {FOLDS} folds of {self.nodes} nodes")
        # The steps of scikit-learn, on the generator that it uses, whose streams NumPy has frozen.
        order = np.arange(self.nodes)
        np.random.RandomState(101).shuffle(order)
        test = np.array_split(order, FOLDS)[split]
        rest = np.setdiff1d(order, test)
        shuffled = rest[np.random.RandomState(127 * split).permutation(len(rest))]
        held_out = math.ceil(0.2 * len(rest))
        return _node_split(shuffled[held_out:], shuffled[:held_out], test)

    def random_split(self, seed: int, train: float = 0.6, validation: float = 0.2) -> NodeSplit:
        """A random split by fractions of the nodes, rounded; the rest is the test part. DFA-GNN uses 60/20/20.

        A function of the arguments and the number of nodes: not of the machine, nor of a version of NumPy or PyTorch.

        Args:
            seed: 0 or more.
            train: fraction of the nodes.
            validation: fraction of the nodes.

        Raises:
            UsageError: fractions that are not positive or leave nothing to test on, or a negative seed.
        """
        if not (train > 0 and validation > 0 and train + validation < 1):
            raise UsageError(f"fractions must be positive and below 1 together, not {train:g} and {validation:g}")
        if seed < 0:
            raise UsageError(f"the seed of a split must be 0 or more, not {seed}")
        # Sorting the generator's raw bits: NumPy freezes those, but not `Generator.permutation`.
        order = np.argsort(np.random.Philox(key=seed).random_raw(self.nodes), kind="stable")
        first = round(train * self.nodes)
        second = first + round(validation * self.nodes)
        return _node_split(order[:first], order[first:second], order[second:])

    def public_split(self) -> NodeSplit:
        """Planetoid's split: 20 training nodes a class, 500 for validation, 1,000 for testing, the rest unused.

        Raises:
            UsageError: the graph has no published split.
        """
        if self.public is None:
            raise UsageError(f"graph {self.name!r} has no public split: use node_split or random_split")
        return self.public

    def edge_split(self, split: int) -> EdgeSplit:
        """Fold `split` of the five that ForwardGNN uses for link prediction: 64 % / 16 % / 20 % of the edges.

        By `torch_geometric.transforms.RandomLinkSplit` after seeding Python's and PyTorch's generators with
        101 * split, as the authors do; both are left as they were. The same on any machine with the same versions
        of torch_geometric, PyTorch and Python. Pairs that are no edges are directed and drawn without replacement, so a
        pair may be in one part and its mirror image in another: this, too, is what the authors have.

        Args:
            split: 0..4.

        Raises:
            UsageError: no such fold, or torch_geometric is not installed.
            DataError: too few edges, or too few pairs that are no edges.
        """
        _check_fold(split)
        if self.edge_index.shape[1] < 2 * _FEWEST_EDGES:
            raise DataError(f"graph {self.name!r}: an edge split needs at least {_FEWEST_EDGES} edges")
        with graph_extra():
            from torch_geometric.data import Data
            from torch_geometric.transforms import RandomLinkSplit

            transform = RandomLinkSplit(num_val=0.16, num_test=0.2, is_undirected=True, neg_sampling_ratio=1.0)
            with _seeded(101 * split):
                parts = transform(Data(edge_index=self.edge_index.cpu(), num_nodes=self.nodes))
        train, validation, test = (EdgePart(part.edge_label_index, part.edge_label) for part in parts)
        if any(2 * int(part.labels.sum()) != len(part.labels) for part in (train, validation, test)):
            raise DataError(f"graph {self.name!r}: it has fewer pairs that are no edges than edges")
        return EdgeSplit(parts[0].edge_index, parts[2].edge_index, train, validation, test)


def load_graph(
    name: str, root: str | Path | None = None, *, download: bool = True, normalise: bool = True
) -> GraphDataset:
    """The graph `name`, in memory. Cora is packaged; all others but GitHub need torch_geometric to be read.

    Args:
        name: one of `bpfree.data.names()` that is a graph, or an alias.
        root: data root; see `bpfree.data.data_root`.
        download: first fetch the graph if it is not there.
        normalise: shift the features so that their minimum is 0 and divide every row by its sum, or by 1 if that is
            less (torch_geometric's `NormalizeFeatures`, which ForwardGNN uses on every graph): rows then sum to 1,
            those without features to 0. False gives the features as published.

    Raises:
        UsageError: no data set of that name, no graph, or torch_geometric is needed and not installed.
        DataError: it is not there, or a file is corrupt; says which file and what to do.
    """
    entry, graph = load_raw_graph(name, root, download=download)
    features = graph.features
    if normalise:
        features = features - features.min()
        features = features / features.sum(dim=1, keepdim=True).clamp(min=1)
    public = None if graph.public is None else NodeSplit(*graph.public)
    return GraphDataset(entry.name, features, graph.edge_index, graph.labels, entry.classes, public)


def _check_fold(split: int) -> None:
    if split not in range(FOLDS):
        raise UsageError(f"there are the splits 0..{FOLDS - 1}, not {split}")


def _node_split(*parts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> NodeSplit:
    train, validation, test = (torch.from_numpy(np.sort(part)) for part in parts)
    return NodeSplit(train, validation, test)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the two generators that `RandomLinkSplit` draws from on the CPU, and puts them back.

    `torch.manual_seed` would also reseed those of every GPU.
    """
    python, pytorch = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(pytorch)
