"""A 3 x 3 convolution of few channels, as in the first stages of residual networks for small images."""

from __future__ import annotations

import math
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from bpfree.networks.kernels import triton_kernels

KERNELS: Final = "bpfree.networks._narrow_kernels"
NARROW: Final = (16, 32)
"""Channels for which kernels of our own are faster than the library's."""
NARROWEST: Final = 16
SIDE: Final = 3


class NarrowConvolution(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 without bias, padded with one line and column of zeros.

    In training on a GPU in 16 bits, with channels-last maps, the derivative by the weight is a kernel of our own; of 16
    channels the outputs and the derivative by the input are, too.

    Args:
        channels: of the input and of the output, 16 or 32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, SIDE, padding=SIDE // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, channels, height, width)."""
        if not self._fuses(x):
            return super().forward(x)
        convolved: Tensor = _Narrow.apply(x, self.weight)
        return convolved

    def _fuses(self, x: Tensor) -> bool:
        return (
            self.training
            and x.is_cuda
            and x.ndim == 4
            and x.dtype in (torch.bfloat16, torch.float16)
            and (self.weight.dtype == x.dtype or _casts_to(x.dtype))
            and 0 < x.numel() < 2**31
            and x.is_contiguous(memory_format=torch.channels_last)
            and triton_kernels(KERNELS) is not None
        )


def _casts_to(dtype: torch.dtype) -> bool:
    return torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == dtype


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rounded = weight.to(x.dtype, memory_format=torch.channels_last)
        ctx.save_for_backward(x, rounded)
        ctx.precision = weight.dtype
        convolved: Tensor = (
            _convolved(x, rounded, False) if x.shape[1] == NARROWEST else F.conv2d(x, rounded, padding=SIDE // 2)
        )
        return convolved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_out = by_out.contiguous(memory_format=torch.channels_last)
        by_x = _derivative_by_input(by_out, x, weight) if ctx.needs_input_grad[0] else None
        by_weight = _by_weight(x, by_out).to(ctx.precision) if ctx.needs_input_grad[1] else None
        return by_x, by_weight


def _derivative_by_input(by_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if x.shape[1] == NARROWEST:
        return cast(Tensor, _convolved(by_out, weight, True))
    # as PyTorch's own backward does: conv2d_input of torch.nn.grad would hide the layout of x
    ones, half = [1, 1], [SIDE // 2, SIDE // 2]
    by_x, _, _ = torch.ops.aten.convolution_backward(
        by_out, x, weight, None, ones, half, ones, False, [0, 0], 1, [True, False, False]
    )
    return cast(Tensor, by_x)


# operators, so that PyTorch's counter of operations sees them


@custom_op("bpfree::narrow_convolution", mutates_args=(), schema="(Tensor x, Tensor weight, bool turned) -> Tensor")
def _convolved(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    kernels = triton_kernels(KERNELS)
    assert kernels is not None
    convolved: Tensor = kernels.convolved(x, weight, turned)
    return convolved


@custom_op("bpfree::narrow_convolution_by_weight", mutates_args=(), schema="(Tensor x, Tensor by_out) -> Tensor")
def _by_weight(x: Tensor, by_out: Tensor) -> Tensor:
    kernels = triton_kernels(KERNELS)
    assert kernels is not None
    by_weight: Tensor = kernels.by_weight(x, by_out)
    return by_weight


@register_flop_formula(torch.ops.bpfree.narrow_convolution)
def _operations(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """A product and a sum for each tap of each pixel; x has the input's channels, or turned, the output's."""
    return 2 * SIDE**2 * math.prod(x) * (weight[0] * weight[1] // x[1])


@register_flop_formula(torch.ops.bpfree.narrow_convolution_by_weight)
def _operations_by_weight(x: torch.Size, by_out: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * SIDE**2 * math.prod(x) * by_out[1]
