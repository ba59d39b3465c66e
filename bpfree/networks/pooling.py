"""Means of maps over windows that lie beside each other."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def grid_mean(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average maps to a grid of equal windows.

    On GPUs PyTorch's pooling of channels-last maps takes several times as long as its mean, backwards most of all, and
    adaptive pooling adds up derivatives in no fixed order. The derivative of PyTorch's mean is written twice, since it
    has no layout of its own: here once, as channels-last maps.

    Args:
        maps: (B, channels, height, width).
        grid: rows and columns, by which height and width can be divided.

    Returns:
        (B, channels, *grid).
    """
    return cast(Tensor, _GridMean.apply(maps, *grid))


class _GridMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, rows: int, columns: int) -> Tensor:
        ctx.size = maps.shape[2:]
        windows = maps.permute(0, 2, 3, 1).unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
        return windows.mean((2, 4)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_mean: Tensor) -> tuple[Tensor, None, None]:
        height, width = ctx.size
        batch, channels, rows, columns = by_mean.shape
        tall, wide = height // rows, width // columns
        shares = (by_mean / (tall * wide)).permute(0, 2, 3, 1).reshape(-1, channels)
        # a copy of few large values is several times as fast as one of many small ones
        packs = channels * shares.element_size() % torch.int64.itemsize == 0
        values = (shares.view(torch.int64) if packs else shares).view(batch, rows, 1, columns, 1, -1)
        spread = values.expand(-1, -1, tall, -1, wide, -1).reshape(batch, height, width, -1)
        return spread.view(shares.dtype).permute(0, 3, 1, 2), None, None
