"""Graph networks: one block per convolution of PyTorch Geometric, which owns the parameters and their initialisation.

GCN (Kipf and Welling 2017), GraphSAGE with mean aggregation (Hamilton et al. 2017) and GAT (Velickovic et al. 2018),
each followed by ReLU. The first two are linear maps of neighbourhood sums that have no parameters: `aggregate`, then
`transform`. When a layer's input does not change, the sums can be kept and only the rows that a loss needs transformed.

Shapes: `n` nodes, `F` features, `d` width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError, unknown_name
from bpfree.networks.graph import Edges, Graph

GAT_HEADS: Final = 4


def _convolutions() -> Any:
    """PyTorch Geometric's convolutions.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from torch_geometric import nn as convolutions
    except ImportError as error:
        raise UsageError(f"graph networks need PyTorch Geometric ({error}): pip install 'bpfree[graph]'") from None
    return convolutions


class GraphBlock(nn.Module, ABC):
    """One graph convolution and its activation, from `Graph` to `Graph`.

    Args:
        in_features: F.
        width: d.
        activation: "relu", or "none" for a read-out.
    """

    conv: Any  # PyTorch Geometric's modules are untyped here

    def __init__(self, in_features: int, width: int, activation: str = "relu") -> None:
        super().__init__()
        self.in_features, self.width, self.activation = in_features, width, activation
        self.conv = self._build(in_features, width)

    @abstractmethod
    def _build(self, in_features: int, width: int) -> nn.Module:
        """PyTorch Geometric's convolution."""

    @abstractmethod
    def convolve(self, x: Tensor, edges: Edges | None) -> Tensor:
        """(n, F) -> (n, d), before the activation."""

    @abstractmethod
    def prepare(self, edges: Edges) -> None:
        """Compute what the convolution needs of the edges, which reads from the device, before a step does."""

    def forward(self, graph: Graph) -> Graph:
        """The convolution of `graph` (or of the neighbourhood sums in it, see `SeparableBlock`) and its activation."""
        out = self.convolve(graph.x, graph.edges)
        return graph.with_x(F.relu(out) if self.activation == "relu" else out)

    @final
    def like(self, in_features: int, width: int, activation: str = "relu") -> GraphBlock:
        """A freshly initialised block of the same kind, on the same device and of the same type."""
        return type(self)(in_features, width, activation).to(next(self.parameters()))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class SeparableBlock(GraphBlock):
    """A convolution that is a linear `transform` of neighbourhood sums without parameters, `aggregate`.

    A graph whose edges are None holds such sums, for all nodes or for some of them.
    """

    @property
    @abstractmethod
    def sums(self) -> int:
        """F', the width of `aggregate`."""

    @abstractmethod
    def aggregate(self, x: Tensor, edges: Edges) -> Tensor:
        """(n, F) -> (n, F'): the neighbourhood sums."""

    @abstractmethod
    def transform(self, aggregated: Tensor) -> Tensor:
        """(rows, F') -> (rows, d)."""


class GCN(SeparableBlock):
    """H = relu(A_hat X W + b), A_hat = D^-1/2 (A + I) D^-1/2."""

    def _build(self, in_features: int, width: int) -> nn.Module:
        conv: nn.Module = _convolutions().GCNConv(in_features, width)
        return conv

    @property
    def sums(self) -> int:
        return self.in_features

    def convolve(self, x: Tensor, edges: Edges | None) -> Tensor:
        return self.transform(x) if edges is None else edges.normalized @ self.conv.lin(x) + self.conv.bias

    def prepare(self, edges: Edges) -> None:
        _ = edges.normalized

    def aggregate(self, x: Tensor, edges: Edges) -> Tensor:
        return edges.normalized @ x

    def transform(self, aggregated: Tensor) -> Tensor:
        return F.linear(aggregated, self.conv.lin.weight, self.conv.bias)


class SAGE(SeparableBlock):
    """H = relu(mean_neighbours(X) W_l + b + X W_r)."""

    def _build(self, in_features: int, width: int) -> nn.Module:
        conv: nn.Module = _convolutions().SAGEConv(in_features, width)
        return conv

    @property
    def sums(self) -> int:
        return 2 * self.in_features

    def convolve(self, x: Tensor, edges: Edges | None) -> Tensor:
        if edges is None:
            return self.transform(x)
        neighbours = edges.mean @ F.linear(x, self.conv.lin_l.weight)
        return neighbours + F.linear(x, self.conv.lin_r.weight, self.conv.lin_l.bias)

    def prepare(self, edges: Edges) -> None:
        _ = edges.mean

    def aggregate(self, x: Tensor, edges: Edges) -> Tensor:
        return torch.cat([edges.mean @ x, x], 1)

    def transform(self, aggregated: Tensor) -> Tensor:
        neighbours, own = aggregated.tensor_split(2, 1)
        out: Tensor = self.conv.lin_l(neighbours) + self.conv.lin_r(own)
        return out


class GAT(GraphBlock):
    """H = relu(attention(X) + b), 4 heads of d / 4, concatenated."""

    def _build(self, in_features: int, width: int) -> nn.Module:
        heads = GAT_HEADS if width % GAT_HEADS == 0 else 1  # a read-out may have any number of classes
        # Edges.looped has every self-loop once; PyTorch Geometric would look for them in every step
        conv: nn.Module = _convolutions().GATConv(in_features, width // heads, heads=heads, add_self_loops=False)
        return conv

    def convolve(self, x: Tensor, edges: Edges | None) -> Tensor:
        assert edges is not None, "attention depends on the weights and cannot be kept"
        out: Tensor = self.conv(x, edges.looped)
        return out

    def prepare(self, edges: Edges) -> None:
        _ = edges.looped


KINDS: Final[dict[str, Callable[..., GraphBlock]]] = {"gcn": GCN, "sage": SAGE, "gat": GAT}


def gnn(kind: str, input_shape: tuple[int, ...], widths: Sequence[int]) -> nn.Sequential:
    """Blocks `convolution -> ReLU`, one per width.

    Args:
        kind: "gcn", "sage" or "gat".
        input_shape: `(F,)`.
        widths: units per layer; a multiple of 4 for "gat".

    Raises:
        UsageError: unknown kind, inputs that are not feature vectors, a width that heads cannot share, or PyTorch
            Geometric is missing.
    """
    if kind not in KINDS:
        raise unknown_name("graph convolution", kind, KINDS)
    if len(input_shape) != 1:
        raise UsageError(f"a graph network needs feature vectors on nodes, the data have shape {input_shape}")
    if kind == "gat" and any(width % GAT_HEADS for width in widths):
        raise UsageError(f"a gat layer has {GAT_HEADS} heads, so its width must be a multiple of {GAT_HEADS}")
    sizes = [input_shape[0], *widths]
    return nn.Sequential(*(KINDS[kind](fan_in, width) for fan_in, width in pairwise(sizes)))
