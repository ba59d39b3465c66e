"""Linear classifiers on a block's output: local heads and read-outs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError, unknown_name
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.graph import Graph

HeadPool = Literal["flatten", "gap", "adaptive"]
HEAD_POOLS: Final = ("flatten", "gap", "adaptive")
ADAPTIVE_SIZE: Final = 2


class Head(nn.Module):
    """Pool a block's output, flatten it, map it linearly to class scores.

    The map is computed in float32 whatever the precision of the block, because a loss gradient divided by
    a large batch underflows in 16 bits.

    Args:
        shape: shape of one sample of the block's output: `(d,)` or `(channels, height, width)`.
        classes: number of classes C.
        pool: what happens to feature maps before the linear map: "flatten" keeps every position, "gap"
            averages over positions, "adaptive" averages to a 2 x 2 grid. Vectors are never pooled.
        bias: whether the linear map has a bias.

    Raises:
        UsageError: unknown `pool`, or fewer than two classes.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, *, pool: str = "flatten", bias: bool = False) -> None:
        super().__init__()
        if pool not in HEAD_POOLS:
            raise unknown_name("head pool", pool, HEAD_POOLS)
        if classes < 2:
            raise UsageError(f"a classifier needs at least 2 classes, got {classes}")
        self.pool_size = None if pool == "flatten" or len(shape) != 3 else 1 if pool == "gap" else ADAPTIVE_SIZE
        features = math.prod(shape) if self.pool_size is None else shape[0] * self.pool_size**2
        self.linear = nn.Linear(features, classes, bias=bias)

    @property
    def weight(self) -> Tensor:
        """(C, features) matrix of the linear map."""
        return self.linear.weight

    def features(self, activations: Tensor | Graph) -> Tensor:
        """(B, *shape) activations -> (B, features), what the linear map sees; of a graph, the B nodes asked about."""
        if isinstance(activations, Graph):
            activations = activations.answers
        if self.pool_size is not None:
            activations = F.adaptive_avg_pool2d(activations, self.pool_size)
        return activations.flatten(1)

    def forward(self, activations: Tensor | Graph) -> Tensor:
        """(B, *shape) activations, or a graph -> (B, C) class scores."""
        features = self.features(activations)
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(features.to(self.linear.weight.dtype))


def check_pooled(pool: str | None, heads: Iterable[Head]) -> None:
    """Refuse a pool that no head has a use for.

    Args:
        pool: what was asked for; None if nothing was.
        heads: those that were made with it.

    Raises:
        UsageError: "gap" or "adaptive", and all heads read vectors.
    """
    if pool not in (None, "flatten") and all(head.pool_size is None for head in heads):
        raise UsageError("head_pool would have no effect where there are no feature maps to pool; leave out head_pool")


class ConvolutionHead(nn.Module):
    """A graph convolution without activation as read-out, as graph networks usually end.

    Args:
        block: a block of the network, for the kind of convolution.
        width: units of the last hidden block.
        classes: number of classes C.
        pairs: rate pairs of nodes by z_u . z_v, z being as wide as the last hidden block, instead of nodes.
    """

    def __init__(self, block: GraphBlock, width: int, classes: int, *, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs
        self.block = block.like(width, width if pairs else classes, "none")

    def forward(self, graph: Graph) -> Tensor:
        """A graph -> (M, C) scores of the nodes, or (M, 2) of the pairs, that it asks about."""
        output: Graph = self.block(graph)
        return pair_scores(output) if self.pairs else output.answers


def pair_scores(graph: Graph) -> Tensor:
    """(M, 2) logits of "no edge" and "edge" between each pair: 0 and z_u . z_v."""
    first, second = graph.ends
    strength = (first * second).sum(1)
    return torch.stack([torch.zeros_like(strength), strength], 1)
