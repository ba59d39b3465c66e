"""Normalisation of groups of channels in one CUDA kernel, as channels-last maps lie in memory."""

# mypy: disable-error-code="misc,no-untyped-def,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE: Final = 2048


@triton.jit
def _standardize(
    x, out, positions, channels, members, epsilon, tall: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * positions * channels + tl.program_id(1) * members
    place = tl.arange(0, tall)[:, None]
    member = tl.arange(0, wide)[None, :]
    total = tl.zeros((tall, wide), tl.float32)
    for start in range(0, positions, tall):
        inside = (start + place < positions) & (member < members)
        total += tl.load(x + first + (start + place) * channels + member, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(total) / (positions * members)
    squares = tl.zeros((tall, wide), tl.float32)
    for start in range(0, positions, tall):
        inside = (start + place < positions) & (member < members)
        value = tl.load(x + first + (start + place) * channels + member, mask=inside, other=0).to(tl.float32)
        squares += tl.where(inside, (value - mean) * (value - mean), 0)
    factor = 1 / tl.sqrt(tl.sum(squares) / (positions * members) + epsilon)
    for start in range(0, positions, tall):
        inside = (start + place < positions) & (member < members)
        at = first + (start + place) * channels + member
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + at, (value - mean) * factor, mask=inside)


def standardize_groups(hidden: Tensor, count: int, epsilon: float) -> Tensor:
    """See `_ff_classes.normalize_groups`: (B, channels, height, width), channels-last and without holes, of `count`
    groups of as many channels."""
    batch, channels, height, width = hidden.shape
    out, members = torch.empty_like(hidden), channels // count
    wide = triton.next_power_of_2(members)
    with torch.cuda.device(hidden.device):
        _standardize[(batch, count)](
            hidden, out, height * width, channels, members, epsilon, tall=max(1, TILE // wide), wide=wide
        )
    return out
