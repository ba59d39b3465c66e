"""A convolution with what follows it in networks without normalisation."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bpfree.networks.kernels import triton_kernels
from bpfree.networks.narrow import NarrowConvolution, convolution
from bpfree.networks.streams import CONSTANTS, LANES, Mask, StreamDropout

KERNELS: Final = "bpfree.networks._rectified_kernels"
POOL: Final = 2


class RectifiedConvolution(nn.Module):
    """A convolution, ReLU, max-pooling by 2 if wanted, and dropout: dropout(pool(relu(conv(x)))).

    In training on a GPU all that follows the convolution is one kernel of our own for channels-last maps, and one for
    the derivative, instead of one for each operation.

    Args:
        convolution: with or without a bias; padded with zeros if at all.
        dropout: probability with which a value becomes zero.
        pooled: take the largest of two by two positions.

    Raises:
        UsageError: `dropout` is not in [0, 1).
    """

    def __init__(self, convolution: nn.Conv2d, dropout: float, *, pooled: bool = False) -> None:
        super().__init__()
        self.convolution = convolution
        self.pooled = pooled
        self.dropout = StreamDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, fan_in, height, width) -> (B, channels, height', width')."""
        if not self._may_fuse(x):
            return self._finished(self.convolution(x))
        layer, side = self.convolution, POOL if self.pooled else 1
        bare = convolution(x, layer)
        if not (
            bare.is_contiguous(memory_format=torch.channels_last)
            and 0 < bare.numel() < 2**31
            and min(bare.shape[2:]) >= side
        ):
            return self._finished(bare if layer.bias is None else bare + layer.bias.to(bare.dtype)[:, None, None])
        mask = self.dropout.draw() if self.dropout.p else None
        fused: Tensor = _Fused.apply(bare, layer.bias, side, self.dropout.stream.key, mask)
        return fused

    def _finished(self, maps: Tensor) -> Tensor:
        rectified = F.relu(maps)
        finished: Tensor = self.dropout(F.max_pool2d(rectified, POOL) if self.pooled else rectified)
        return finished

    def _may_fuse(self, x: Tensor) -> bool:
        layer, dropout = self.convolution, self.dropout
        # parts that somebody has replaced or hooked are called as they are
        plain = (
            type(layer) in (nn.Conv2d, NarrowConvolution)
            and layer.padding_mode == "zeros"
            and type(dropout) is StreamDropout
        )
        return (
            self.training
            and x.is_cuda
            and x.dtype.itemsize <= 4
            and layer.out_channels % LANES == 0
            and (layer.bias is None or layer.bias.dtype == torch.float32)
            and plain
            and not any(part._forward_hooks or part._forward_pre_hooks for part in (layer, dropout))
            and triton_kernels(KERNELS) is not None
        )

    def extra_repr(self) -> str:
        return f"pooled={self.pooled}"


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, side: int, key: Tensor, mask: Mask | None) -> Tensor:
        kernels = triton_kernels(KERNELS)
        assert kernels is not None
        number, threshold, scale = (None, 0, 1.0) if mask is None else mask
        out, code = kernels.rectified(x, bias, side, key, number, threshold, scale, LANES, CONSTANTS)
        ctx.save_for_backward(code)
        ctx.made_from = x.shape, side, scale, bias is not None
        rectified: Tensor = out
        return rectified

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        kernels = triton_kernels(KERNELS)
        assert kernels is not None
        (code,) = ctx.saved_tensors
        return *kernels.gradients(by_out, code, *ctx.made_from), None, None, None
