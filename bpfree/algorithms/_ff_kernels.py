"""CUDA kernels of Forward-Forward: normalisation of groups of channels, as channels-last maps lie in memory, and what
the closed form of a layer of squared goodness wants before its matrix product.

Sums are taken in one order: the same inputs have the same bits as outputs.
"""

# mypy: disable-error-code="misc,no-untyped-def,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE: Final = 2048
REGISTERS: Final = 16384  # values of a group that a program keeps between its passes
VALUES: Final = 1024  # of them that a warp keeps
UNITS: Final = 16  # columns of a program in the closed form: enough programs for a GPU from 2000 units on
ROWS: Final = 64  # of activities that it has at once
CHUNK: Final = 1024  # of units' means that it adds up at once


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


@triton.jit
def _standardize_at_once(
    x, out, positions, epsilon, channels: tl.constexpr, members: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * positions * channels + tl.program_id(1) * members
    place, member = tl.arange(0, tall)[:, None], tl.arange(0, wide)[None, :]
    inside = (place < positions) & (member < members)
    at = first + place * channels + member
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    difference = tl.where(inside, value - tl.sum(value) / (positions * members), 0)
    factor = 1 / tl.sqrt(tl.sum(difference * difference) / (positions * members) + epsilon)
    tl.store(out + at, difference * factor, mask=inside)


def standardize_groups(hidden: Tensor, count: int, epsilon: float) -> Tensor:
    """See `_ff_classes.normalize_groups`: (B, channels, height, width), channels-last and without holes, of `count`
    groups of as many channels."""
    batch, channels, height, width = hidden.shape
    out, members, positions = torch.empty_like(hidden), channels // count, height * width
    wide, tall = triton.next_power_of_2(members), triton.next_power_of_2(positions)
    with torch.cuda.device(hidden.device):
        if tall * wide <= REGISTERS:
            _standardize_at_once[(batch, count)](
                hidden, out, positions, epsilon, channels=channels, members=members, tall=tall, wide=wide,
                num_warps=max(1, tall * wide // VALUES),
            )  # fmt: skip
        else:
            _standardize[(batch, count)](
                hidden, out, positions, channels, members, epsilon, tall=max(1, TILE // wide), wide=wide
            )
    return out


@triton.jit
def _move_means(hidden, mean, rows, units, weight, tall: tl.constexpr, wide: tl.constexpr):
    unit = tl.program_id(0) * wide + tl.arange(0, wide)
    known = unit < units
    total = tl.zeros((tall, wide), tl.float32)
    for start in range(0, rows, tall):
        row = start + tl.arange(0, tall)
        inside = (row < rows)[:, None] & known[None, :]
        place = row.to(tl.int64)[:, None] * units + unit[None, :]
        total += tl.load(hidden + place, mask=inside, other=0).to(tl.float32)
    old = tl.load(mean + unit, mask=known, other=0)
    tl.store(mean + unit, old + weight * (tl.sum(total, 0) / rows - old), mask=known)


@triton.jit
def _errors(
    hidden, slope, mean, errors, sums, rows, units, factor, pull, tall: tl.constexpr, wide: tl.constexpr,
    chunk: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * wide + tl.arange(0, wide)
    known = unit < units
    pulled = tl.zeros((wide,), tl.float32)
    if mean is not None:
        whole = tl.zeros((chunk,), tl.float32)
        for start in range(0, units, chunk):
            some = start + tl.arange(0, chunk)
            whole += tl.load(mean + some, mask=some < units, other=0)
        pulled = (tl.load(mean + unit, mask=known, other=0) - tl.sum(whole) / units) * pull
    total = tl.zeros((tall, wide), tl.float32)
    for start in range(0, rows, tall):
        row = start + tl.arange(0, tall)
        inside = (row < rows)[:, None] & known[None, :]
        place = row.to(tl.int64)[:, None] * units + unit[None, :]
        steep = tl.load(slope + row, mask=row < rows, other=0) * factor
        error = tl.load(hidden + place, mask=inside, other=0).to(tl.float32) * steep[:, None]
        error += tl.where((row < rows // 2)[:, None], pulled[None, :], 0)
        tl.store(errors + place, error, mask=inside)
        total += tl.where(inside, error, 0)
    tl.store(sums + unit, tl.sum(total, 0), mask=known)


def move_means(hidden: Tensor, mean: Tensor, weight: float) -> None:
    """Move (N,) float32 means by `weight` towards those of the columns of (M, N) activities without holes."""
    rows, units = hidden.shape
    with torch.cuda.device(hidden.device):
        _move_means[(triton.cdiv(units, UNITS),)](hidden, mean, rows, units, weight, tall=ROWS, wide=UNITS)


def squared_errors(
    hidden: Tensor, slope: Tensor, factor: float, mean: Tensor | None, pull: float
) -> tuple[Tensor, Tensor]:
    """h_ij slope_i factor, for rows of the first half + pull (m_j - mean(m)), and the sums of its columns.

    Args:
        hidden: h, (2B, N) without holes, of float32 or less.
        slope: (2B,) float32.
        factor: what all rows have in common.
        mean: m, (N,) float32, or None.
        pull: what the distance of m from its mean is multiplied by.

    Returns:
        (2B, N) of h's precision, (N,) in float32.
    """
    rows, units = hidden.shape
    errors, sums = torch.empty_like(hidden), torch.empty(units, device=hidden.device)
    with torch.cuda.device(hidden.device):
        _errors[(triton.cdiv(units, UNITS),)](
            hidden, slope, mean, errors, sums, rows, units, factor, pull, tall=ROWS, wide=UNITS, chunk=CHUNK
        )
    return errors, sums
