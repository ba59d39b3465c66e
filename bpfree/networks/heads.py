"""Linear classifiers on a block's output: local heads and read-outs."""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError, unknown_name

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

    def features(self, activations: Tensor) -> Tensor:
        """(B, *shape) activations -> (B, features), what the linear map sees."""
        if self.pool_size is not None:
            activations = F.adaptive_avg_pool2d(activations, self.pool_size)
        return activations.flatten(1)

    def forward(self, activations: Tensor) -> Tensor:
        """(B, *shape) activations -> (B, C) class scores."""
        features = self.features(activations)
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(features.to(self.linear.weight.dtype))
