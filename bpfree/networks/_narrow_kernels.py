"""3 x 3 convolutions of few channels: outputs, and derivatives by input and by weight.

The library's kernels for them have tiles of more channels, most of which are empty at 16: they took two thirds of the
time of all convolutions in a step of ResNet-32 on an H200. Here a tile has the channels that there are. A pixel and its
neighbours to the left and to the right lie beside each other in channels-last maps, so one load brings three of nine
taps. Sizes of tiles are the fastest on an H200 with 1024 images of CIFAR-10's size in the network's stage.

Sums of the weight's derivative are taken in parts whose number the shape alone says: the same inputs have the same bits
as outputs.
"""

# mypy: disable-error-code="misc,no-untyped-def,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree.networks.kernels import shares

SIDE: Final = 3
PIXELS: Final = 128  # that a program has at once
SUMMED: Final = 64  # the same of programs that sum up, where channels are more than 16
PARTS: Final = 264  # programs that sum up
WARPS: Final = 4
STAGES: Final = 2  # of loads ahead of sums


@triton.jit
def _neighbours(
    x, pixel, known, above: tl.constexpr, height: tl.constexpr, width: tl.constexpr, inner: tl.constexpr,
    span: tl.constexpr,
):  # fmt: skip
    """Channels of the pixels to the left, at, and to the right of some, `above` lines up; 0 beyond the map."""
    column, line = pixel % width, (pixel // width) % height - above
    place = tl.arange(0, span)
    beside = column[:, None] + (place // inner)[None, :] - 1
    inside = (known & (line >= 0) & (line < height))[:, None] & (beside >= 0) & (beside < width)
    inside = inside & (place < 3 * inner)[None, :]
    source = (pixel - above * width - 1)[:, None] * inner + place[None, :]
    return tl.load(x + source, mask=inside, other=0)


@triton.jit
def _convolve(
    x, weight, out, pixels, by_inner, by_outer, by_line, by_column,
    height: tl.constexpr, width: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr, turned: tl.constexpr,
    tall: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * tall + tl.arange(0, tall)
    known = pixel < pixels
    place, channel = tl.arange(0, span), tl.arange(0, outer)
    tap = place // inner
    source = weight + (place % inner)[:, None] * by_inner + channel[None, :] * by_outer
    source += (2 - tap if turned else tap)[:, None] * by_column
    total = tl.zeros((tall, outer), tl.float32)
    for line in tl.static_range(3):
        values = _neighbours(x, pixel, known, 1 - line, height, width, inner, span)
        taps = tl.load(source + (2 - line if turned else line) * by_line, mask=(place < 3 * inner)[:, None], other=0)
        total = tl.dot(values, taps, total)
    tl.store(out + pixel[:, None] * outer + channel[None, :], total, mask=known[:, None])


@triton.jit
def _sum_products(
    x, by_out, sums, pixels, share,
    height: tl.constexpr, width: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr, tall: tl.constexpr,
    span: tl.constexpr,
):  # fmt: skip
    """Over a share of the pixels: (3, outer, span) sums of a derivative by an output times what its taps saw."""
    part = tl.program_id(0)
    first = part * share
    last = tl.minimum(first + share, pixels)
    channel, place = tl.arange(0, outer), tl.arange(0, span)
    top = tl.zeros((outer, span), tl.float32)
    middle = tl.zeros((outer, span), tl.float32)
    bottom = tl.zeros((outer, span), tl.float32)
    for start in range(first, last, tall):
        pixel = start + tl.arange(0, tall)
        known = pixel < last
        gradient = tl.load(by_out + pixel[:, None] * outer + channel[None, :], mask=known[:, None], other=0)
        gradient = tl.trans(gradient)
        top = tl.dot(gradient, _neighbours(x, pixel, known, 1, height, width, inner, span), top)
        middle = tl.dot(gradient, _neighbours(x, pixel, known, 0, height, width, inner, span), middle)
        bottom = tl.dot(gradient, _neighbours(x, pixel, known, -1, height, width, inner, span), bottom)
    target = sums + part * 3 * outer * span + channel[:, None] * span + place[None, :]
    tl.store(target, top)
    tl.store(target + outer * span, middle)
    tl.store(target + 2 * outer * span, bottom)


def convolved(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    """The convolution of stride 1, padded with one line and column of zeros.

    Args:
        x: (B, inner, height, width), channels-last without holes, of 16 bits, less than 2^31 values; channels 16 or
            32.
        weight: (outer, inner, 3, 3) of x's precision, best channels-last.
        turned: for the derivative by the input: `x` is that by the output, of `outer` channels, and the result has
            `inner`.
    """
    batch, inner, height, width = x.shape
    outer = weight.shape[1 if turned else 0]
    by_outer, by_inner, by_line, by_column = weight.stride()
    if turned:
        by_outer, by_inner = by_inner, by_outer
    out = torch.empty(batch, outer, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixels = batch * height * width
    with torch.cuda.device(x.device):
        _convolve[(triton.cdiv(pixels, PIXELS),)](
            x, weight, out, pixels, by_inner, by_outer, by_line, by_column, height=height, width=width, inner=inner,
            outer=outer, turned=turned, tall=PIXELS, span=triton.next_power_of_2(SIDE * inner), num_warps=WARPS,
        )  # fmt: skip
    return out


def by_weight(x: Tensor, by_out: Tensor) -> Tensor:
    """The derivative by the weight: (outer, inner, 3, 3) of float32, channels-last.

    Args:
        x: as in `convolved`.
        by_out: derivative by the output, laid out as that is.
    """
    batch, inner, height, width = x.shape
    outer, pixels, span = by_out.shape[1], batch * height * width, triton.next_power_of_2(SIDE * inner)
    tall = PIXELS if inner <= 16 else SUMMED
    share, parts = shares(pixels, tall, PARTS)
    sums = torch.empty(parts, SIDE, outer, span, device=x.device)
    with torch.cuda.device(x.device):
        _sum_products[(parts,)](
            x, by_out, sums, pixels, share, height=height, width=width, inner=inner, outer=outer, tall=tall,
            span=span, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    taps = sums.sum(0)[..., : SIDE * inner].view(SIDE, outer, SIDE, inner)
    return taps.permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)
