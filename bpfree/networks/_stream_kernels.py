"""The hashes of `streams` in one CUDA kernel; written in PyTorch they are two dozen, each too small for a GPU."""

# mypy: disable-error-code="misc,no-untyped-def,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK: Final = 1024


@triton.jit
def _mixed(x, first: tl.constexpr, second: tl.constexpr):
    # int64 shifts repeat the sign, so the bits that a logical shift would clear are masked
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * first
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * second
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _fill(
    out, keys, count, width, total, step: tl.constexpr, golden: tl.constexpr, first: tl.constexpr,
    second: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < total
    key = tl.load(keys + place // width, mask=inside, other=0) + tl.load(count) * step
    hashes = _mixed(_mixed(key, first, second) + (place % width + 1) * golden, first, second)
    tl.store(out + place, hashes, mask=inside)


def hashes(keys: Tensor, count: Tensor, width: int, constants: dict[str, Any]) -> Tensor:
    """See `streams.hashes`: (...) keys on a CUDA device -> (..., width)."""
    out = torch.empty(*keys.shape, width, dtype=torch.int64, device=keys.device)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    with torch.cuda.device(keys.device):
        _fill[grid](out, keys.contiguous(), count, width, out.numel(), block=BLOCK, **constants)
    return out
