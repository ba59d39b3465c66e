"""What follows a convolution (bias, ReLU, max-pooling, dropout) in one pass over channels-last maps, and one back.

A cell is what one pooled value sees: two by two positions, or one without pooling. Of each pooled value one byte is
kept: 0 where nothing passes, otherwise 1 + the number of the position in its cell that was largest. Sums of the
bias's derivative are taken in parts whose number the shape alone says: the same inputs have the same bits as outputs.

PyTorch takes four or five kernels each way, one of which, the bias's sum, was 16 % of the kernels' time in a step of
NoProp-DT.
"""

# mypy: disable-error-code="misc,no-untyped-def,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree.networks._stream_kernels import hashed
from bpfree.networks.kernels import shares

TILE: Final = 1024  # cells' values that a program has at once
WIDEST: Final = 128  # channels of a tile
PARTS: Final = 512  # programs that sum up


@triton.jit
def _rectify(
    x, bias, out, code, key, count, rows, channels, height, width, pooled_height, pooled_width, threshold, scale,
    side: tl.constexpr, golden: tl.constexpr, first: tl.constexpr, second: tl.constexpr, lanes: tl.constexpr,
    tall: tl.constexpr, words: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * tall + tl.arange(0, tall))[:, None, None]
    word = (tl.program_id(1) * words + tl.arange(0, words))[None, :, None]
    lane = tl.arange(0, lanes)[None, None, :]
    channel = word * lanes + lane
    inside = (row < rows) & (channel < channels)
    line, column = row // pooled_width, row % pooled_width
    sample, line = line // pooled_height, line % pooled_height
    offset = 0.0
    if bias is not None:
        offset = tl.load(bias + channel, mask=channel < channels, other=0)
    largest = tl.zeros((tall, words, lanes), tl.float32)
    chosen = tl.zeros((tall, words, lanes), tl.int32)
    for position in tl.static_range(side * side):
        source = (sample * height + line * side + position // side) * width + column * side + position % side
        value = tl.load(x + source * channels + channel, mask=inside, other=0).to(tl.float32) + offset
        # NaN goes on, as in PyTorch; otherwise the first of the largest is chosen
        larger = (value > largest) | (value != value)
        largest = tl.where(larger, value, largest)
        chosen = tl.where(larger, position + 1, chosen)
    if count is not None:
        place = (row * (channels // lanes) + word).to(tl.int64)
        hashes = hashed(tl.load(key), tl.load(count), place, golden, first, second)
        kept = (((hashes >> (lane * 16)) & 0xFFFF) ^ 0x8000) >= threshold
        largest = tl.where(kept, largest * scale, 0)
        chosen = tl.where(kept, chosen, 0)
    place = row * channels + channel
    tl.store(out + place, largest, mask=inside)
    tl.store(code + place, chosen.to(tl.uint8), mask=inside)


@triton.jit
def _differentiate(
    by_out, code, by_x, sums, rows, channels, height, width, by_sample, by_channel, by_line, by_column, scale, share,
    parts, side: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    known = (channel < channels)[None, :]
    pooled_height, pooled_width = height // side, width // side
    high, broad = tl.cdiv(height, side), tl.cdiv(width, side)  # cells at the edge may have had no part in anything
    total = tl.zeros((tall, wide), tl.float32)
    first = part * share
    last = tl.minimum(first + share, rows)
    for start in range(first, last, tall):
        row = (start + tl.arange(0, tall))[:, None]
        line, column = row // broad, row % broad
        sample, line = line // high, line % high
        pooled = (row < last) & (line < pooled_height) & (column < pooled_width) & known
        source = by_out + sample.to(tl.int64) * by_sample + channel.to(tl.int64)[None, :] * by_channel
        source += line.to(tl.int64) * by_line + column.to(tl.int64) * by_column
        gradient = tl.load(source, mask=pooled, other=0).to(tl.float32)
        cell = (sample * pooled_height + line) * pooled_width + column
        chosen = tl.load(code + cell * channels + channel[None, :], mask=pooled, other=0)
        passed = tl.where(chosen != 0, gradient * scale, 0)
        total += passed
        for position in tl.static_range(side * side):
            at_line, at_column = line * side + position // side, column * side + position % side
            place = ((sample * height + at_line) * width + at_column) * channels + channel[None, :]
            inside = (row < last) & (at_line < height) & (at_column < width) & known
            tl.store(by_x + place, tl.where(chosen == position + 1, passed, 0), mask=inside)
    if sums is not None:
        tl.store(sums + channel * parts + part, tl.sum(total, 0), mask=channel < channels)


def rectified(
    x: Tensor, bias: Tensor | None, side: int, key: Tensor, count: Tensor | None, threshold: int, scale: float,
    lanes: int, constants: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dropout(max-pool(relu(x + bias))).

    Args:
        x: (B, channels, height, width), channels-last without holes, of float32 or less, 1 to 2^31 - 1 values;
            channels a multiple of `lanes`.
        bias: (channels,) float32, or None.
        side: of the square that is pooled, which is also the stride; 1 for none.
        key: of the dropout's stream.
        count: number of the draw; None for no dropout.
        threshold: see `_stream_kernels.dropped`, as for the rest; the mask is that of `dropped` on maps of this layout.
        scale: what kept values are multiplied by.
        lanes: numbers in a hash.
        constants: of the hash.

    Returns:
        (B, channels, height // side, width // side) maps, and of each value the byte that `gradients` wants.
    """
    batch, channels, height, width = x.shape
    shape = (batch, channels, height // side, width // side)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    code = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    words = max(1, min(triton.next_power_of_2(channels), WIDEST) // lanes)
    tall, rows = TILE // (words * lanes), out.numel() // channels
    with torch.cuda.device(x.device):
        _rectify[(triton.cdiv(rows, tall), triton.cdiv(channels, words * lanes))](
            x, bias, out, code, key, count, rows, channels, height, width, *shape[2:], threshold, scale, side=side,
            lanes=lanes, tall=tall, words=words, **constants,
        )  # fmt: skip
    return out, code


def gradients(
    by_out: Tensor, code: Tensor, shape: torch.Size, side: int, scale: float, biased: bool
) -> tuple[Tensor, Tensor | None]:
    """Derivatives of `rectified` by x, and by the bias if there is one.

    Args:
        by_out: derivative by its maps, of any strides.
        code: its bytes.
        shape: of x.
        side: as then.
        scale: as then; 1 without dropout.
        biased: whether there is a bias.
    """
    batch, channels, height, width = shape
    by_x = torch.empty(shape, dtype=by_out.dtype, device=code.device, memory_format=torch.channels_last)
    wide = min(triton.next_power_of_2(channels), WIDEST)
    tall, beside = TILE // wide, triton.cdiv(channels, wide)
    rows = batch * triton.cdiv(height, side) * triton.cdiv(width, side)
    share, parts = shares(rows, tall, max(1, PARTS // beside))
    sums = torch.empty(channels, parts, device=code.device) if biased else None
    with torch.cuda.device(code.device):
        _differentiate[(parts, beside)](
            by_out, code, by_x, sums, rows, channels, height, width, *by_out.stride(), scale, share, parts, side=side,
            tall=tall, wide=wide,
        )  # fmt: skip
    return by_x, None if sums is None else sums.sum(1)
