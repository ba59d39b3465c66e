"""3 x 3 convolutions of few channels, as in the first stages of networks for small images."""

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
NARROW: Final = (16, 32)  # channels, as many in as out
NARROWEST: Final = 16
IMAGE: Final = 4  # channels at most
POWERS: Final = (16, 32, 64, 128)
SIDE: Final = 3


class NarrowConvolution(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 without bias, padded with one line and column of zeros: see `convolution`.

    Args:
        fan_in: channels of the input.
        channels: of the output.
    """

    def __init__(self, fan_in: int, channels: int) -> None:
        super().__init__(fan_in, channels, SIDE, padding=SIDE // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, fan_in, height, width) -> (B, channels, height, width)."""
        return convolution(x, self) if self.training and x.is_cuda else super().forward(x)


def is_narrow(fan_in: int, channels: int) -> bool:
    """Whether there are kernels of our own for a 3 x 3 convolution: from images to 16, 32, 64 or 128 channels, from 16
    to 16, from 32 to 32."""
    from_images = fan_in <= IMAGE and channels in POWERS
    return from_images or fan_in == channels in NARROW


def convolution(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """`layer` without its bias, in training on a GPU.

    With few channels the library's kernels have tiles for many more. Of 3 x 3 convolutions of stride 1 these are
    kernels of our own: of images, in TF32 and 16 bits, the outputs and the derivative by the weight; of channels-last
    maps in 16 bits the latter of 32 channels, and all of 16.

    Args:
        x: (B, fan_in, height, width) on a GPU.
        layer: padded with zeros if at all.

    Returns:
        (B, channels, height', width').
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if _fuses(x, layer, dtype):
        convolved: Tensor = _Narrow.apply(x.to(dtype), layer.weight, int(layer.padding[0]))
        return convolved
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _fuses(x: Tensor, layer: nn.Conv2d, dtype: torch.dtype) -> bool:
    if not is_narrow(layer.in_channels, layer.out_channels) or layer.padding not in ((0, 0), (1, 1)) or x.ndim != 4:
        return False
    sides = [side + 2 * int(layer.padding[0]) - SIDE + 1 for side in x.shape[2:]]
    if layer.in_channels <= IMAGE:
        suits = dtype.itemsize == 2 or (dtype is torch.float32 and torch.backends.cudnn.allow_tf32)
    else:
        suits = dtype.itemsize == 2 and sides == [*x.shape[2:]] and x.is_contiguous(memory_format=torch.channels_last)
    return (
        suits
        and (layer.kernel_size, layer.stride, layer.dilation, layer.groups) == ((SIDE, SIDE), (1, 1), (1, 1), 1)
        and layer.weight.dtype in (dtype, torch.float32)
        and min(sides) > 0
        and 0 < len(x) * max(layer.in_channels * math.prod(x.shape[2:]), layer.out_channels * math.prod(sides)) < 2**31
        and triton_kernels(KERNELS) is not None
    )


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        rounded = weight.to(x.dtype, memory_format=torch.channels_last)
        ctx.save_for_backward(x, rounded)
        ctx.precision, ctx.padding = weight.dtype, padding
        convolved: Tensor = (
            _convolved(x, rounded, False, padding) if x.shape[1] <= NARROWEST else F.conv2d(x, rounded, padding=padding)
        )
        return convolved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        by_out = by_out.contiguous(memory_format=torch.channels_last)
        by_x = _derivative_by_input(by_out, x, weight, ctx.padding) if ctx.needs_input_grad[0] else None
        by_weight = _by_weight(x, by_out, ctx.padding).to(ctx.precision) if ctx.needs_input_grad[1] else None
        return by_x, by_weight, None


def _derivative_by_input(by_out: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    if x.shape[1] == NARROWEST:
        return cast(Tensor, _convolved(by_out, weight, True, padding))
    # as PyTorch's own backward does: conv2d_input of torch.nn.grad would hide the layout of x
    ones, pads = [1, 1], [padding, padding]
    by_x, _, _ = torch.ops.aten.convolution_backward(
        by_out, x, weight, None, ones, pads, ones, False, [0, 0], 1, [True, False, False]
    )
    return cast(Tensor, by_x)


# operators, so that PyTorch's counter of operations sees them


@custom_op(
    "bpfree::narrow_convolution",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, bool turned, int padding) -> Tensor",
)
def _convolved(x: Tensor, weight: Tensor, turned: bool, padding: int) -> Tensor:
    kernels = triton_kernels(KERNELS)
    assert kernels is not None
    convolved: Tensor = kernels.convolved(x, weight, turned, padding)
    return convolved


@custom_op(
    "bpfree::narrow_convolution_by_weight",
    mutates_args=(),
    schema="(Tensor x, Tensor by_out, int padding) -> Tensor",
)
def _by_weight(x: Tensor, by_out: Tensor, padding: int) -> Tensor:
    kernels = triton_kernels(KERNELS)
    assert kernels is not None
    by_weight: Tensor = kernels.by_weight(x, by_out, padding)
    return by_weight


@register_flop_formula(torch.ops.bpfree.narrow_convolution)
def _operations(x: torch.Size, weight: torch.Size, turned: bool, padding: int, **_: Any) -> int:
    """A product and a sum for each tap of each pixel of the output, and of x where the weight is turned."""
    sides = x[2:] if turned else (side + 2 * padding - SIDE + 1 for side in x[2:])
    return 2 * SIDE**2 * weight[0] * weight[1] * x[0] * math.prod(sides)


@register_flop_formula(torch.ops.bpfree.narrow_convolution_by_weight)
def _operations_by_weight(x: torch.Size, by_out: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * SIDE**2 * math.prod(by_out) * x[1]
