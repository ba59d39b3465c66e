"""A graph as a learner meets it, and the sparse products that graph convolutions are made of.

Shapes: `n` nodes, `F` features, `E` directed edges, `M` nodes or node pairs that are asked about, `T` nodes whose
labels are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bpfree.errors import UsageError

LONGEST_BAG: Final = 32
"""Entries that one GPU thread adds up; longer rows (virtual nodes, hubs) are added in parts, and then the parts."""


def _longest_bag(device: torch.device) -> int | None:
    """Where rows are cut; not on CPUs, which have few threads."""
    return None if device.type == "cpu" else LONGEST_BAG


class SparseMatrix:
    """A constant sparse matrix whose products with dense ones are deterministic, and its transpose for gradients.

    Products are `embedding_bag`s: on CPUs faster than CSR products, on GPUs free of atomic additions (which
    PyTorch Geometric's scatters and cuSPARSE have), and capturable in a CUDA graph. Entries that repeat add up.

    Args:
        rows: (E,) int64.
        columns: (E,) int64.
        values: (E,) floating point.
        shape: numbers of rows and columns.
    """

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._forward = _Bags(rows, columns, values, shape[0])
        self._backward = _Bags(columns, rows, values, shape[1])

    def __matmul__(self, dense: Tensor) -> Tensor:
        """(rows, columns) @ (columns, d) -> (rows, d), in the precision of the matrix."""
        product: Tensor = _Product.apply(dense.to(self._forward.values.dtype), self._forward, self._backward)
        return product


class _Bags:
    """Compressed rows, cut into bags of at most `_longest_bag` entries."""

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, count: int) -> None:
        order = torch.argsort(rows, stable=True)
        self.columns, self.values = columns[order], values[order]
        lengths = torch.bincount(rows, minlength=count)
        self.offsets = _offsets(lengths)
        self.parts: Tensor | None = None  # bags of bags, where a row has several
        longest = _longest_bag(rows.device)
        if longest is not None and int(lengths.max()) > longest:
            bags = (lengths + longest - 1).div(longest, rounding_mode="floor")
            self.parts = _offsets(bags)
            owner = torch.repeat_interleave(bags)
            self.part_index = torch.arange(len(owner), device=rows.device)
            within = self.part_index - self.parts[owner]
            self.offsets = torch.cat([self.offsets[owner] + longest * within, self.offsets[-1:]])

    def times(self, dense: Tensor) -> Tensor:
        product = F.embedding_bag(
            self.columns, dense, self.offsets, mode="sum", per_sample_weights=self.values, include_last_offset=True
        )
        if self.parts is None:
            return product
        return F.embedding_bag(self.part_index, product, self.parts, mode="sum", include_last_offset=True)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, dense: Tensor, forward: _Bags, backward: _Bags) -> Tensor:
        context.transposed = backward
        return forward.times(dense)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return context.transposed.times(gradient.contiguous()), None, None


class Edges:
    """The directed edges of a graph, with what convolutions need of them computed once.

    Args:
        index: (2, E) int64: sources, then destinations. A node hears the sources of its edges.
        nodes: number of nodes n.
        dtype: floating point type of the weights.
    """

    def __init__(self, index: Tensor, nodes: int, dtype: torch.dtype = torch.float32) -> None:
        if index.ndim != 2 or index.shape[0] != 2 or index.dtype != torch.int64:
            raise UsageError(f"edges must be (2, E) int64, got shape {tuple(index.shape)} of {index.dtype}")
        self.index, self.nodes, self.dtype = index, nodes, dtype

    @cached_property
    def looped(self) -> Tensor:
        """(2, E') edges with every node's self-loop exactly once."""
        loops = torch.arange(self.nodes, device=self.index.device)
        return torch.cat([self.index[:, self.index[0] != self.index[1]], torch.stack([loops, loops])], 1)

    @cached_property
    def normalized(self) -> SparseMatrix:
        """D^-1/2 (A + I) D^-1/2, where D counts the incoming edges and the self-loop (Kipf and Welling 2017)."""
        sources, targets = self.looped
        degree = torch.bincount(targets, minlength=self.nodes).to(self.dtype)
        scale = degree.rsqrt()  # never of 0: there is the self-loop
        return SparseMatrix(targets, sources, scale[sources] * scale[targets], (self.nodes, self.nodes))

    @cached_property
    def mean(self) -> SparseMatrix:
        """D^-1 A: the mean over a node's neighbours, zero without any (Hamilton et al. 2017)."""
        sources, targets = self.index
        degree = torch.bincount(targets, minlength=self.nodes).to(self.dtype)
        return SparseMatrix(targets, sources, degree.reciprocal()[targets], (self.nodes, self.nodes))

    def to(self, target: torch.device | torch.dtype | str) -> Edges:
        """The same edges on another device or with weights of another type."""
        if isinstance(target, torch.dtype):
            return self if target == self.dtype else Edges(self.index, self.nodes, target)
        return (
            self if self.index.device == torch.device(target) else Edges(self.index.to(target), self.nodes, self.dtype)
        )

    def extended(self, index: Tensor, nodes: int) -> Edges:
        """With more edges, in a graph that has `nodes` nodes."""
        return Edges(torch.cat([self.index, index], 1), nodes, self.dtype)

    @staticmethod
    def union(parts: Sequence[Edges]) -> Edges:
        """Graphs side by side, as one graph without edges between them."""
        offset, shifted = 0, []
        for part in parts:
            shifted.append(part.index + offset)
            offset += part.nodes
        return Edges(torch.cat(shifted, 1), offset, parts[0].dtype)


AnyGraph = TypeVar("AnyGraph", bound="Graph")


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph with a question: which class has each of `nodes` (or: is there an edge between each pair of them)?

    What a learner may know of labels is here too, so that scores are a function of the graph alone: in transductive
    learning the labels of the training nodes are part of the input, and no others are.

    Attributes:
        x: (n, F) floating point node features.
        edges: directed edges; None once a layer's neighbourhood sums are in `x`.
        nodes: (M,) int64 nodes, or (2, M) pairs of nodes, that are asked about.
        known: (T,) int64 nodes whose labels are known: training nodes. Rules that need no labels ignore them.
        labels: (T,) int64 classes of the `known` nodes.

    Raises:
        UsageError: shapes or types other than these.
    """

    x: Tensor
    edges: Edges | None
    nodes: Tensor
    known: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise UsageError(f"graph: {problem}")

    def _problem(self) -> str | None:
        if self.x.ndim != 2 or not self.x.is_floating_point():
            return f"features must be (n, F) floating point, got shape {tuple(self.x.shape)} of {self.x.dtype}"
        if self.nodes.ndim not in (1, 2) or (self.nodes.ndim == 2 and len(self.nodes) != 2):
            return f"nodes must be (M,) or (2, M), got {tuple(self.nodes.shape)}"
        if self.known.ndim != 1 or self.known.shape != self.labels.shape:
            return (
                f"known nodes and labels must be (T,) each, got {tuple(self.known.shape)}, {tuple(self.labels.shape)}"
            )
        if any(t.dtype != torch.int64 for t in (self.nodes, self.known, self.labels)):
            return "nodes, known and labels must be int64"
        return None

    @classmethod
    def of(
        cls,
        x: Tensor,
        edge_index: Tensor,
        nodes: Tensor,
        known: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Graph:
        """A graph from PyTorch Geometric's (2, E) edge index; see the class for the rest."""
        none = torch.empty(0, dtype=torch.int64, device=x.device)
        return cls(
            x,
            Edges(edge_index, len(x), x.dtype),
            nodes,
            none if known is None else known,
            none if labels is None else labels,
        )

    def __len__(self) -> int:
        return self.nodes.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.x.device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient would flow into the features."""
        return self.x.requires_grad

    @property
    def nbytes(self) -> int:
        """Bytes of the features and edges."""
        return self.x.nbytes + (0 if self.edges is None else self.edges.index.nbytes)

    @property
    def answers(self) -> Tensor:
        """(M, F): the features of the nodes that are asked about.

        Raises:
            UsageError: pairs of nodes are asked about.
        """
        if self.nodes.ndim != 1:
            raise UsageError(
                "the graph asks about pairs of nodes, and this read-out rates single ones; for links use "
                "back-propagation with readout=dot, or ForwardGNN with variant=link-ce, link-ff or link-t2i"
            )
        return self.x[self.nodes]

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """(M, F) twice: the features of both nodes of the pairs that are asked about.

        A node is in many pairs, whose gradients add up in a fixed order: by `index_select` on CPUs, where threads
        would hand those of `x[nodes]` in as they come, and by `x[nodes]` on GPUs, where it is the other way round.

        Raises:
            UsageError: single nodes are asked about.
        """
        if self.nodes.ndim != 2:
            raise UsageError("the graph asks about single nodes, and this read-out rates pairs of nodes")
        first, second = (self.x.index_select(0, n) if n.device.type == "cpu" else self.x[n] for n in self.nodes)
        return first, second

    def with_x(self: AnyGraph, x: Tensor) -> AnyGraph:
        """The same graph with other features."""
        return replace(self, x=x)

    def detach(self: AnyGraph) -> AnyGraph:
        """The same graph, its features cut off from any gradient."""
        return self.with_x(self.x.detach())

    def asking(self, nodes: Tensor) -> Graph:
        """The same graph with another question."""
        return replace(self, nodes=nodes)

    def to(self: AnyGraph, target: torch.device | torch.dtype | str) -> AnyGraph:
        """On another device, or with another floating point type."""
        edges = None if self.edges is None else self.edges.to(target)
        if isinstance(target, torch.dtype):
            return replace(self, x=self.x.to(target), edges=edges)
        moved = {name: getattr(self, name).to(target) for name in ("x", "nodes", "known", "labels")}
        return replace(self, edges=edges, **moved)
