"""Batch normalisation, what is added behind it and ReLU, in as few passes over channels-last maps as there can be, and
of vectors in one kernel each way.

Rows are all positions of all samples, columns are channels. Sums over rows are taken in parts by as many programs as
the shape alone says, and the parts are added up in one order: the same inputs have the same bits as outputs.

PyTorch's kernels for the three took two fifths of a step of ResNet-32 on an H200, that for statistics five times as
long as ours.
"""

# mypy: disable-error-code="misc,no-untyped-def,import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree.networks.kernels import shares

TILE: Final = 2048  # values that a program has at once
WIDEST: Final = 128  # channels of a tile
PARTS: Final = 1024  # programs that sum up
COLUMNS: Final = 16  # of vectors, that a program normalises
MOST_ROWS: Final = 8192  # of vectors, beyond which so few programs take longer than PyTorch's
ROWS: Final = 256  # of them at once
WARPS: Final = 8


@triton.jit
def _keep(mean, factor, running_mean, running_var, channel, known, centre, variance, rows, epsilon, momentum):
    """Write down a batch's statistics, and let the running ones follow; the result is 1 / standard deviation."""
    spread = 1 / tl.sqrt(variance + epsilon)
    tl.store(mean + channel, centre, mask=known)
    tl.store(factor + channel, spread, mask=known)
    old_mean, old_var = tl.load(running_mean + channel, mask=known), tl.load(running_var + channel, mask=known)
    unbiased = variance * (rows / (rows - 1))
    tl.store(running_mean + channel, (1 - momentum) * old_mean + momentum * centre, mask=known)
    tl.store(running_var + channel, (1 - momentum) * old_var + momentum * unbiased, mask=known)
    return spread


@triton.jit
def _sum_moments(
    x, sums, squares, rows, channels, share, parts, tall: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """Sums of x - x_0 and of its square, x_0 being the first row: no digits are lost where means are large."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    known = channel < channels
    origin = tl.load(x + channel, mask=known, other=0).to(tl.float32)[None, :]
    first = part.to(tl.int64) * share
    last = tl.minimum(first + share, rows)
    total = tl.zeros((tall, wide), tl.float32)
    total_square = tl.zeros((tall, wide), tl.float32)
    for start in range(first, last, tall):
        row = start + tl.arange(0, tall)
        inside = (row < last)[:, None] & known[None, :]
        value = tl.load(x + row[:, None] * channels + channel[None, :], mask=inside, other=0).to(tl.float32)
        value = tl.where(inside, value - origin, 0)
        total += value
        total_square += value * value
    tl.store(sums + channel * parts + part, tl.sum(total, 0), mask=known)
    tl.store(squares + channel * parts + part, tl.sum(total_square, 0), mask=known)


@triton.jit
def _statistics(
    x, sums, squares, mean, factor, running_mean, running_var, seen, rows, parts, epsilon, momentum, width: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0)
    part = tl.arange(0, width)
    shift = tl.sum(tl.load(sums + channel * parts + part, mask=part < parts, other=0)) / rows
    square = tl.sum(tl.load(squares + channel * parts + part, mask=part < parts, other=0)) / rows
    centre = tl.load(x + channel).to(tl.float32) + shift
    variance = square - shift * shift
    variance = tl.where(variance < 0, 0, variance)
    _keep(mean, factor, running_mean, running_var, channel, True, centre, variance, rows, epsilon, momentum)
    if seen is not None and channel == 0:
        tl.store(seen, tl.load(seen) + 1)


@triton.jit
def _normalize(
    x, shortcut, out, mean, factor, weight, bias, rows, channels,
    rectified: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    known = channel < channels
    inside = (row < rows)[:, None] & known[None, :]
    place = row[:, None] * channels + channel[None, :]
    scale = tl.load(factor + channel, mask=known, other=0) * tl.load(weight + channel, mask=known, other=0)
    centre = tl.load(mean + channel, mask=known, other=0)
    offset = tl.load(bias + channel, mask=known, other=0)
    value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    value = (value - centre[None, :]) * scale[None, :] + offset[None, :]
    if shortcut is not None:
        value += tl.load(shortcut + place, mask=inside, other=0).to(tl.float32)
    if rectified:
        value = tl.where(value <= 0, 0, value)
    tl.store(out + place, value, mask=inside)


@triton.jit
def _sum_gradients(
    by_out, x, out, passed, mean, factor, weight, bias, sums, products, rows, channels, share, parts,
    rectified: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Sums of what ReLU passes of the gradient, g, and of g (x - mean); g itself where there is a place for it."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    known = channel < channels
    centre = tl.load(mean + channel, mask=known, other=0)[None, :]
    scale = tl.load(factor + channel, mask=known, other=0) * tl.load(weight + channel, mask=known, other=0)
    offset = tl.load(bias + channel, mask=known, other=0)
    first = part.to(tl.int64) * share
    last = tl.minimum(first + share, rows)
    total = tl.zeros((tall, wide), tl.float32)
    total_product = tl.zeros((tall, wide), tl.float32)
    for start in range(first, last, tall):
        row = start + tl.arange(0, tall)
        inside = (row < last)[:, None] & known[None, :]
        place = row[:, None] * channels + channel[None, :]
        gradient = tl.load(by_out + place, mask=inside, other=0).to(tl.float32)
        distance = tl.load(x + place, mask=inside, other=0).to(tl.float32) - centre
        if passed is not None:
            gradient = tl.where(tl.load(out + place, mask=inside, other=0).to(tl.float32) <= 0, 0, gradient)
            tl.store(passed + place, gradient, mask=inside)
        elif rectified:
            gradient = tl.where(distance * scale[None, :] + offset[None, :] <= 0, 0, gradient)
        total += gradient
        total_product += gradient * distance
    tl.store(sums + channel * parts + part, tl.sum(total, 0), mask=known)
    tl.store(products + channel * parts + part, tl.sum(total_product, 0), mask=known)


@triton.jit
def _finish_gradients(sums, products, factor, by_weight, by_bias, parts, width: tl.constexpr):
    channel = tl.program_id(0)
    part = tl.arange(0, width)
    total = tl.sum(tl.load(sums + channel * parts + part, mask=part < parts, other=0))
    product = tl.sum(tl.load(products + channel * parts + part, mask=part < parts, other=0))
    tl.store(by_bias + channel, total)
    tl.store(by_weight + channel, product * tl.load(factor + channel))


@triton.jit
def _differentiate(
    gradients, x, by_x, mean, factor, weight, bias, by_weight, by_bias, rows, channels,
    rectified: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    known = channel < channels
    inside = (row < rows)[:, None] & known[None, :]
    place = row[:, None] * channels + channel[None, :]
    spread = tl.load(factor + channel, mask=known, other=0)
    scale = spread * tl.load(weight + channel, mask=known, other=0)
    centre = tl.load(mean + channel, mask=known, other=0)
    gradient = tl.load(gradients + place, mask=inside, other=0).to(tl.float32)
    distance = tl.load(x + place, mask=inside, other=0).to(tl.float32) - centre[None, :]
    if rectified:
        offset = tl.load(bias + channel, mask=known, other=0)
        gradient = tl.where(distance * scale[None, :] + offset[None, :] <= 0, 0, gradient)
    shared = tl.load(by_bias + channel, mask=known, other=0) / rows
    slope = tl.load(by_weight + channel, mask=known, other=0) * spread / rows
    gradient = scale[None, :] * (gradient - shared[None, :] - distance * slope[None, :])
    tl.store(by_x + place, gradient, mask=inside)


@triton.jit
def _normalize_vectors(
    x, out, mean, factor, weight, bias, running_mean, running_var, seen, rows, channels, epsilon, momentum,
    rectified: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * wide + tl.arange(0, wide)
    known = channel < channels
    total = tl.zeros((tall, wide), tl.float32)
    for start in range(0, rows, tall):
        row = start + tl.arange(0, tall)
        inside = (row < rows)[:, None] & known[None, :]
        total += tl.load(x + row[:, None] * channels + channel[None, :], mask=inside, other=0).to(tl.float32)
    centre = tl.sum(total, 0) / rows
    squares = tl.zeros((tall, wide), tl.float32)
    for start in range(0, rows, tall):
        row = start + tl.arange(0, tall)
        inside = (row < rows)[:, None] & known[None, :]
        value = tl.load(x + row[:, None] * channels + channel[None, :], mask=inside, other=0).to(tl.float32)
        value = tl.where(inside, value - centre[None, :], 0)
        squares += value * value
    variance = tl.sum(squares, 0) / rows
    spread = _keep(mean, factor, running_mean, running_var, channel, known, centre, variance, rows, epsilon, momentum)
    if seen is not None and tl.program_id(0) == 0:
        tl.store(seen, tl.load(seen) + 1)
    scale = spread * tl.load(weight + channel, mask=known, other=0)
    offset = tl.load(bias + channel, mask=known, other=0)
    for start in range(0, rows, tall):
        row = start + tl.arange(0, tall)
        inside = (row < rows)[:, None] & known[None, :]
        place = row[:, None] * channels + channel[None, :]
        value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        value = (value - centre[None, :]) * scale[None, :] + offset[None, :]
        if rectified:
            value = tl.where(value <= 0, 0, value)
        tl.store(out + place, value, mask=inside)


@triton.jit
def _differentiate_vectors(
    by_out, x, by_x, mean, factor, weight, bias, by_weight, by_bias, rows, channels,
    rectified: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * wide + tl.arange(0, wide)
    known = channel < channels
    centre = tl.load(mean + channel, mask=known, other=0)[None, :]
    spread = tl.load(factor + channel, mask=known, other=0)
    scale = spread * tl.load(weight + channel, mask=known, other=0)
    offset = tl.load(bias + channel, mask=known, other=0)[None, :]
    total = tl.zeros((tall, wide), tl.float32)
    total_product = tl.zeros((tall, wide), tl.float32)
    for start in range(0, rows, tall):
        row = start + tl.arange(0, tall)
        inside = (row < rows)[:, None] & known[None, :]
        place = row[:, None] * channels + channel[None, :]
        gradient = tl.load(by_out + place, mask=inside, other=0).to(tl.float32)
        distance = tl.load(x + place, mask=inside, other=0).to(tl.float32) - centre
        if rectified:
            gradient = tl.where(distance * scale[None, :] + offset <= 0, 0, gradient)
        total += gradient
        total_product += gradient * distance
    shared, product = tl.sum(total, 0), tl.sum(total_product, 0) * spread
    tl.store(by_bias + channel, shared, mask=known)
    tl.store(by_weight + channel, product, mask=known)
    slope = product * spread / rows
    for start in range(0, rows, tall):
        row = start + tl.arange(0, tall)
        inside = (row < rows)[:, None] & known[None, :]
        place = row[:, None] * channels + channel[None, :]
        gradient = tl.load(by_out + place, mask=inside, other=0).to(tl.float32)
        distance = tl.load(x + place, mask=inside, other=0).to(tl.float32) - centre
        if rectified:
            gradient = tl.where(distance * scale[None, :] + offset <= 0, 0, gradient)
        gradient = scale[None, :] * (gradient - shared[None, :] / rows - distance * slope[None, :])
        tl.store(by_x + place, gradient, mask=inside)


def _tiles(maps: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Rows, channels, how many tiles lie beside each other, and the measures of one."""
    channels = maps.shape[1]
    wide = min(triton.next_power_of_2(channels), WIDEST)
    return maps.numel() // channels, channels, triton.cdiv(channels, wide), {"tall": TILE // wide, "wide": wide}


def normalized(
    x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    seen: Tensor | None, epsilon: float, momentum: float, rectified: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normalise a batch of maps, and keep its statistics in mind.

    Args:
        x: (B, channels, height, width), channels-last without holes, of float32 or less; more than one row.
        shortcut: of the same shape and layout, added before ReLU.
        weight: (channels,) float32, as are the bias and the running statistics, which are updated.
        bias: added after scaling.
        running_mean: updated.
        running_var: updated.
        seen: number of batches so far, which is counted up, or None.
        epsilon: added to variances.
        momentum: share of this batch in the running statistics.
        rectified: end with ReLU.

    Returns:
        Maps of x's precision; mean and 1 / standard deviation, (channels,) each.
    """
    rows, channels, beside, tile = _tiles(x)
    share, parts = shares(rows, tile["tall"], max(1, PARTS // beside))
    width = triton.next_power_of_2(parts)
    sums, squares = torch.empty(2, channels, parts, device=x.device)
    mean, factor = torch.empty(2, channels, device=x.device)
    out = torch.empty_like(x)
    with torch.cuda.device(x.device):
        _sum_moments[(parts, beside)](x, sums, squares, rows, channels, share, parts, **tile)
        _statistics[(channels,)](
            x, sums, squares, mean, factor, running_mean, running_var, seen, rows, parts, epsilon, momentum, width=width
        )
        _normalize[(triton.cdiv(rows, tile["tall"]), beside)](
            x, shortcut, out, mean, factor, weight, bias, rows, channels, rectified=rectified, **tile
        )
    return out, mean, factor


def gradients(
    by_out: Tensor, x: Tensor, out: Tensor | None, mean: Tensor, factor: Tensor, weight: Tensor, bias: Tensor,
    rectified: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Derivatives of `normalized`.

    Args:
        by_out: derivative by its output, laid out as that is.
        x: what was normalised.
        out: the output if a shortcut was added before ReLU, None otherwise: it says where ReLU was open, which x alone
            says without a shortcut.
        mean: of `normalized`.
        factor: of `normalized`.
        weight: as then.
        bias: as then.
        rectified: as then.

    Returns:
        Derivatives by x, by the shortcut (None if `out` is), by weight and by bias.
    """
    rows, channels, beside, tile = _tiles(x)
    share, parts = shares(rows, tile["tall"], max(1, PARTS // beside))
    width = triton.next_power_of_2(parts)
    sums, products = torch.empty(2, channels, parts, device=x.device)
    by_weight, by_bias = torch.empty(2, channels, device=x.device)
    passed = None if out is None else torch.empty_like(by_out)
    by_x = torch.empty_like(x)
    with torch.cuda.device(x.device):
        _sum_gradients[(parts, beside)](
            by_out, x, out, passed, mean, factor, weight, bias, sums, products, rows, channels, share, parts,
            rectified=rectified, **tile,
        )  # fmt: skip
        _finish_gradients[(channels,)](sums, products, factor, by_weight, by_bias, parts, width=width)
        _differentiate[(triton.cdiv(rows, tile["tall"]), beside)](
            by_out if passed is None else passed, x, by_x, mean, factor, weight, bias, by_weight, by_bias, rows,
            channels, rectified=rectified and passed is None, **tile,
        )  # fmt: skip
    return by_x, passed, by_weight, by_bias


def _columns(vectors: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Programs, and the measures of what one has at once."""
    rows, channels = vectors.shape
    tall = min(ROWS, triton.next_power_of_2(rows))
    return (triton.cdiv(channels, COLUMNS),), {"tall": tall, "wide": COLUMNS, "num_warps": WARPS}


def normalized_vectors(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, seen: Tensor | None,
    epsilon: float, momentum: float, rectified: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`normalized` of (B, channels) vectors without holes, 2 <= B <= `MOST_ROWS`, and without a shortcut."""
    rows, channels = x.shape
    out, (mean, factor) = torch.empty_like(x), torch.empty(2, channels, device=x.device)
    grid, tile = _columns(x)
    with torch.cuda.device(x.device):
        _normalize_vectors[grid](
            x, out, mean, factor, weight, bias, running_mean, running_var, seen, rows, channels, epsilon, momentum,
            rectified=rectified, **tile,
        )  # fmt: skip
    return out, mean, factor


def vector_gradients(
    by_out: Tensor, x: Tensor, mean: Tensor, factor: Tensor, weight: Tensor, bias: Tensor, rectified: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of `normalized_vectors` by x, by weight and by bias; see `gradients`."""
    rows, channels = x.shape
    by_x, (by_weight, by_bias) = torch.empty_like(x), torch.empty(2, channels, device=x.device)
    grid, tile = _columns(x)
    with torch.cuda.device(x.device):
        _differentiate_vectors[grid](
            by_out, x, by_x, mean, factor, weight, bias, by_weight, by_bias, rows, channels, rectified=rectified,
            **tile,
        )  # fmt: skip
    return by_x, by_weight, by_bias
