"""The hashes of `streams`, and dropout with them, in one CUDA kernel each.

Written in PyTorch, hashes are two dozen kernels, each too small for a GPU, and dropout four more with a mask in memory.
"""

# mypy: disable-error-code="misc,no-untyped-def,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK: Final = 1024


@triton.jit
def mixed(x, first: tl.constexpr, second: tl.constexpr):
    # int64 shifts repeat the sign, so the bits that a logical shift would clear are masked
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * first
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * second
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _drop(
    x, out, keys, count, total, threshold, scale, golden: tl.constexpr, first: tl.constexpr,
    second: tl.constexpr, block: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    key = mixed(tl.load(keys) + tl.load(count) * first, first, second)
    hashes = mixed(key + (word + 1) * golden, first, second)
    lane = tl.arange(0, lanes)
    # flipping its top bit orders a lane's 16 bits as if they were signed
    bits = ((hashes[:, None] >> (lane * 16)[None, :]) & 0xFFFF) ^ 0x8000
    place = word[:, None] * lanes + lane[None, :]
    inside = place < total
    values = tl.load(x + place, mask=inside, other=0).to(tl.float32) * scale
    tl.store(out + place, tl.where(bits >= threshold, values, 0), mask=inside)


@triton.jit
def _fill(
    out, keys, count, width, total, golden: tl.constexpr, first: tl.constexpr, second: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < total
    key = tl.load(keys + place // width, mask=inside, other=0) + tl.load(count) * first
    hashes = mixed(mixed(key, first, second) + (place % width + 1) * golden, first, second)
    tl.store(out + place, hashes, mask=inside)


def hashes(keys: Tensor, count: Tensor, width: int, constants: dict[str, Any]) -> Tensor:
    """See `streams.hashes`: (...) keys on a CUDA device -> (..., width)."""
    out = torch.empty(*keys.shape, width, dtype=torch.int64, device=keys.device)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    with torch.cuda.device(keys.device):
        _fill[grid](out, keys.contiguous(), count, width, out.numel(), block=BLOCK, **constants)
    return out


def dropped(
    x: Tensor, key: Tensor, count: Tensor, threshold: int, scale: float, lanes: int, constants: dict[str, Any]
) -> Tensor:
    """`x`, dense in memory, times `scale` where 16 bits of a hash, shifted to [0, 2^16), reach `threshold`, else 0."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), BLOCK * lanes),)
    with torch.cuda.device(x.device):
        _drop[grid](x, out, key, count, x.numel(), threshold, scale, block=BLOCK, lanes=lanes, **constants)
    return out
