"""3 x 3 convolutions of few channels: outputs, and derivatives by input and by weight.

The library's kernels for them have tiles of more channels, most of which are empty at 16: they took two thirds of the
time of all convolutions in a step of ResNet-32 on an H200, and those for images a quarter of that of all kernels in one
of NoProp-DT. Here a tile has the channels that there are. A pixel and its neighbours to the left and to the right lie
beside each other in channels-last maps, so one load brings three of nine taps. Sizes of tiles are the fastest on an
H200 with 1024 images of CIFAR-10's size in the network's stage.

Sums of the weight's derivative are taken in parts whose number the shape alone says: the same inputs have the same bits
as outputs.
"""

# mypy: disable-error-code="misc,no-untyped-def,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree.networks.kernels import shares

SIDE: Final = 3
PIXELS: Final = 128  # that a program has at once
SUMMED: Final = 64  # the same of programs that sum up, of other than 16 channels
LEAST: Final = 16  # of a matrix product's inner dimension
PARTS: Final = 264  # programs that sum up
WARPS: Final = 4
STAGES: Final = 2  # of loads ahead of sums


@triton.jit
def _neighbours(
    x, pixel, known, by_sample, by_channel, by_line, by_column, down: tl.constexpr, height: tl.constexpr,
    width: tl.constexpr, pad: tl.constexpr, inner: tl.constexpr, span: tl.constexpr, dense: tl.constexpr,
):  # fmt: skip
    """What one line of taps sees of the input, for some pixels of the output: channels of three pixels; 0 beyond it."""
    place = tl.arange(0, span)
    if dense:  # pixels of the output are those of the input, and lie beside each other
        left, line = pixel % width - 1, (pixel // width) % height + (down - 1)
        source = (pixel + (down - 1) * width - 1)[:, None] * inner + place[None, :]
    else:
        across: tl.constexpr = width + 2 * pad - 2
        lines: tl.constexpr = height + 2 * pad - 2
        left, line = pixel % across - pad, (pixel // across) % lines + (down - pad)
        source = ((pixel // (across * lines)) * by_sample + line * by_line + left * by_column)[:, None]
        source += ((place // inner) * by_column + (place % inner) * by_channel)[None, :]
    beside = left[:, None] + (place // inner)[None, :]
    inside = (known & (line >= 0) & (line < height))[:, None] & (beside >= 0) & (beside < width)
    inside = inside & (place < 3 * inner)[None, :]
    return tl.load(x + source, mask=inside, other=0)


@triton.jit
def _convolve(
    x, weight, out, pixels, by_sample, by_channel, by_line, by_column, to_inner, to_outer, to_line, to_column,
    height: tl.constexpr, width: tl.constexpr, pad: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr,
    turned: tl.constexpr, dense: tl.constexpr, tall: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * tall + tl.arange(0, tall)
    known = pixel < pixels
    place, channel = tl.arange(0, span), tl.arange(0, outer)
    tap = place // inner
    source = weight + (place % inner)[:, None] * to_inner + channel[None, :] * to_outer
    source += (2 - tap if turned else tap)[:, None] * to_column
    total = tl.zeros((tall, outer), tl.float32)
    for line in tl.static_range(3):
        values = _neighbours(
            x, pixel, known, by_sample, by_channel, by_line, by_column, line, height, width, pad, inner, span, dense
        )
        taps = tl.load(source + (2 - line if turned else line) * to_line, mask=(place < 3 * inner)[:, None], other=0)
        total = tl.dot(values, taps, total)
    tl.store(out + pixel[:, None] * outer + channel[None, :], total, mask=known[:, None])


@triton.jit
def _sum_products(
    x, by_out, sums, pixels, share, by_sample, by_channel, by_line, by_column,
    height: tl.constexpr, width: tl.constexpr, pad: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr,
    dense: tl.constexpr, tall: tl.constexpr, span: tl.constexpr,
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
        above = _neighbours(
            x, pixel, known, by_sample, by_channel, by_line, by_column, 0, height, width, pad, inner, span, dense
        )
        top = tl.dot(gradient, above, top)
        level = _neighbours(
            x, pixel, known, by_sample, by_channel, by_line, by_column, 1, height, width, pad, inner, span, dense
        )
        middle = tl.dot(gradient, level, middle)
        below = _neighbours(
            x, pixel, known, by_sample, by_channel, by_line, by_column, 2, height, width, pad, inner, span, dense
        )
        bottom = tl.dot(gradient, below, bottom)
    target = sums + part * 3 * outer * span + channel[:, None] * span + place[None, :]
    tl.store(target, top)
    tl.store(target + outer * span, middle)
    tl.store(target + 2 * outer * span, bottom)


def _measures(x: Tensor, padding: int) -> dict[str, Any]:
    """Sizes and strides that say where what a tap sees lies in the input."""
    _, inner, height, width = x.shape
    by_sample, by_channel, by_line, by_column = x.stride()
    return {
        "by_sample": by_sample, "by_channel": by_channel, "by_line": by_line, "by_column": by_column,
        "height": height, "width": width, "pad": padding, "inner": inner,
        "dense": padding == 1 and x.is_contiguous(memory_format=torch.channels_last),
        "span": max(LEAST, triton.next_power_of_2(SIDE * inner)),
    }  # fmt: skip


def convolved(x: Tensor, weight: Tensor, turned: bool, padding: int) -> Tensor:
    """The convolution of stride 1.

    Args:
        x: (B, inner, height, width) of any layout, less than 2^31 values, as has the result.
        weight: (outer, inner, 3, 3) of x's precision, best channels-last; the result's channels are a power of two, 16
            or more.
        turned: for the derivative by the input where that is padded: `x` is that by the output, of `outer` channels,
            channels-last without holes, and the result has `inner`.
        padding: lines and columns of zeros around x, 0 or 1.

    Returns:
        Channels-last maps. Products of float32 are those of TF32.
    """
    measures = _measures(x, padding)
    outer = weight.shape[1 if turned else 0]
    to_outer, to_inner, to_line, to_column = weight.stride()
    if turned:
        to_outer, to_inner = to_inner, to_outer
    shape = len(x), outer, *(side + 2 * padding - SIDE + 1 for side in x.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixels = out.numel() // outer
    with torch.cuda.device(x.device):
        _convolve[(triton.cdiv(pixels, PIXELS),)](
            x, weight, out, pixels, to_inner=to_inner, to_outer=to_outer, to_line=to_line, to_column=to_column,
            outer=outer, turned=turned, tall=PIXELS, num_warps=WARPS, **measures,
        )  # fmt: skip
    return out


def by_weight(x: Tensor, by_out: Tensor, padding: int) -> Tensor:
    """The derivative by the weight: (outer, inner, 3, 3) of float32, channels-last.

    Args:
        x: as in `convolved`.
        by_out: derivative by the output, laid out as that is.
        padding: as then.
    """
    measures = _measures(x, padding)
    inner, span = measures["inner"], measures["span"]
    outer, pixels = by_out.shape[1], by_out.numel() // by_out.shape[1]
    tall = PIXELS if inner == 16 else SUMMED
    share, parts = shares(pixels, tall, PARTS)
    sums = torch.empty(parts, SIDE, outer, span, device=x.device)
    with torch.cuda.device(x.device):
        _sum_products[(parts,)](
            x, by_out, sums, pixels, share, outer=outer, tall=tall, num_warps=WARPS, num_stages=STAGES, **measures
        )
    taps = sums.sum(0)[..., : SIDE * inner].view(SIDE, outer, SIDE, inner)
    return taps.permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)
