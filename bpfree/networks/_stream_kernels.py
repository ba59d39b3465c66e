"""The hashes of `streams`, numbers and dropout made of them, and the step of a counter, in one CUDA kernel each.

Written in PyTorch, hashes are two dozen kernels, each too small for a GPU, normal numbers nine more, and dropout four
with a mask in memory.
"""

# mypy: disable-error-code="misc,no-untyped-def,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

import math
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

BLOCK: Final = 1024
NUMBERS: Final = 256  # that a program draws: few, since an inverse error function keeps a thread long
STEP: Final = tl.constexpr(2.0**-52)
ROOT: Final = tl.constexpr(math.sqrt(2))


@triton.jit
def mixed(x, first: tl.constexpr, second: tl.constexpr):
    # int64 shifts repeat the sign, so the bits that a logical shift would clear are masked
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * first
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * second
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def hashed(key, count, place, golden: tl.constexpr, first: tl.constexpr, second: tl.constexpr):
    return mixed(mixed(key + count * first, first, second) + (place + 1) * golden, first, second)


@triton.jit
def _drop(
    x, out, keys, count, total, threshold, scale, golden: tl.constexpr, first: tl.constexpr,
    second: tl.constexpr, block: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    hashes = hashed(tl.load(keys), tl.load(count), word, golden, first, second)
    lane = tl.arange(0, lanes)
    # flipping its top bit orders a lane's 16 bits as if they were signed
    bits = ((hashes[:, None] >> (lane * 16)[None, :]) & 0xFFFF) ^ 0x8000
    place = word[:, None] * lanes + lane[None, :]
    inside = place < total
    values = tl.load(x + place, mask=inside, other=0).to(tl.float32) * scale
    tl.store(out + place, tl.where(bits >= threshold, values, 0), mask=inside)


@triton.jit
def _fill(
    out, keys, count, width, total, distribution: tl.constexpr, golden: tl.constexpr, first: tl.constexpr,
    second: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < total
    key = tl.load(keys + place // width, mask=inside, other=0)
    numbers = hashed(key, tl.load(count), place % width, golden, first, second)
    if distribution is not None:
        numbers = (((numbers >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) + 0.5) * STEP
        if distribution == "normal":
            numbers = libdevice.erfinv(numbers * 2 - 1) * ROOT
        if out.dtype.element_ty != tl.float64:  # PyTorch, too, rounds to 16 bits by way of float32
            numbers = numbers.to(tl.float32)
    tl.store(out + place, numbers, mask=inside)


@triton.jit
def _advance(count, number, rank, ranks):
    old = tl.load(count)
    tl.store(number, old * ranks + rank)
    tl.store(count, old + 1)


def numbers(
    keys: Tensor, count: Tensor, width: int, distribution: str | None, dtype: torch.dtype, constants: dict[str, Any]
) -> Tensor:
    """See `streams`: (...) keys on a CUDA device -> (..., width) of `dtype`, without a `distribution` hashes."""
    out = torch.empty(*keys.shape, width, dtype=dtype, device=keys.device)
    grid = (triton.cdiv(out.numel(), NUMBERS),)
    with torch.cuda.device(keys.device):
        _fill[grid](out, keys.contiguous(), count, width, out.numel(), distribution, block=NUMBERS, **constants)
    return out


def advanced(count: Tensor, rank: int, ranks: int) -> Tensor:
    """See `streams.Stream.draw`: `count` grows by one, and the result is made of what it was."""
    number = torch.empty_like(count)
    with torch.cuda.device(count.device):
        _advance[(1,)](count, number, rank, ranks, num_warps=1)
    return number


def dropped(
    x: Tensor, key: Tensor, count: Tensor, threshold: int, scale: float, lanes: int, constants: dict[str, Any]
) -> Tensor:
    """`x`, dense in memory, times `scale` where 16 bits of a hash, shifted to [0, 2^16), reach `threshold`, else 0."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), BLOCK * lanes),)
    with torch.cuda.device(x.device):
        _drop[grid](x, out, key, count, x.numel(), threshold, scale, block=BLOCK, lanes=lanes, **constants)
    return out
