"""Cutting a network of many units into K blocks, the units of locality.

Cuts are written as the units that end a block: of eight units, (2, 7) makes the blocks 0..2 and 3..7. The papers' own
cuts of residual networks come first where there is one, because results depend on them: those of MAN (Su et al., ECCV
2024, arXiv 2407.05623), InfoPro (Wang et al., ICLR 2021, arXiv 2101.10832) and MAN++ (arXiv 2507.16279) agree. Other
networks are cut where the most expensive block is cheapest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.networks.blocks import Shape, as_blocks, block_output_shapes
from bpfree.networks.flops import FlopCounter
from bpfree.networks.resnet import ResidualUnit
from bpfree.networks.timing import least_seconds

# Units in each stage -> K -> the unit that ends each block, as (stage from 1, unit from 0); () ends one at every unit.
PAPER_CUTS: Final[dict[tuple[int, ...], dict[int, tuple[tuple[int, int], ...]]]] = {
    (5, 5, 5): {  # ResNet-32
        2: ((2, 1), (3, 4)),
        4: ((1, 2), (2, 1), (3, 0), (3, 4)),
        8: ((1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2), (3, 4)),
        16: (),
    },
    (18, 18, 18): {  # ResNet-110
        8: ((1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10), (3, 17)),
        16: (
            *((1, unit) for unit in (1, 4, 7, 10, 13, 16)),
            *((2, unit) for unit in (1, 4, 7, 11, 15)),
            *((3, unit) for unit in (1, 5, 9, 13, 17)),
        ),
        32: (
            *((stage, unit) for stage in (1, 2) for unit in (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)),
            *((3, unit) for unit in (1, 3, 4, 6, 7, 9, 11, 13, 15, 17)),
        ),
        55: (),
    },
    (3, 4, 23, 3): {  # ResNet-101
        2: ((2, 0), (4, 2)),
        4: ((2, 2), (3, 8), (3, 16), (4, 2)),
    },
    (3, 8, 36, 3): {  # ResNet-152
        2: ((2, 5), (4, 2)),
        4: ((2, 6), (3, 13), (3, 25), (4, 2)),
    },
}


class Units(nn.Sequential):
    """Consecutive units that learn as one block."""


def first_unit(block: nn.Module) -> nn.Module:
    """The unit with which a block begins: the block itself if it is one unit."""
    return block[0] if isinstance(block, Units) else block


def partition(
    network: nn.Sequential | Iterable[nn.Module],
    k: int | Sequence[int],
    *,
    input_shape: Shape | None = None,
    costs: Sequence[float] | None = None,
    stem: bool = False,
) -> nn.Sequential:
    """`network` cut into blocks, which share its modules.

    Args:
        network: units in forward order (see `as_blocks` for what is one).
        k: K, the number of blocks, or the units that end one, from 0. Where the papers name a cut by the number that it
            has with the stem as a block of its own (16 of ResNet-32, 55 of ResNet-110: every unit), the stem belongs to
            the first block as in MAN, and there is one block less, unless `stem` cuts it off.
        input_shape: shape of one sample, for counting operations; needed if neither the papers nor `costs` say where
            to cut.
        costs: what each unit costs, such as its `step_seconds`: blocks are balanced by these, whatever the papers do.
        stem: cut what comes before the first residual unit off as a block of its own, besides the K others.

    Raises:
        UsageError: a number of blocks that the network has no units for, or a cut that does not exist.
    """
    units = as_blocks(network)
    last = len(units) - 1
    if not isinstance(k, int):
        ends: Sequence[int] = k
    elif costs is not None:
        ends = balanced_ends(costs, k)
    else:
        ends = _paper_ends(units, k) or balanced_ends(unit_operations(units, input_shape), k)
    if list(ends) != sorted(set(ends)) or not ends or ends[0] < 0 or ends[-1] != last:
        raise UsageError(f"blocks must end at rising units of which the last is {last}, got {tuple(ends)}")
    if stem:
        count = _stem_units(units)
        if not count:
            raise UsageError("this network has no stem before its first residual unit")
        ends = sorted({count - 1, *ends})
    groups = [units[after + 1 : end + 1] for after, end in pairwise([-1, *ends])]
    return nn.Sequential(*(group[0] if len(group) == 1 else Units(*group) for group in groups))


def balanced_ends(costs: Sequence[float], k: int) -> tuple[int, ...]:
    """The cut into K runs whose dearest run is cheapest, and among those the one with the least sum of squares.

    Args:
        costs: of each unit, not negative.
        k: K.

    Raises:
        UsageError: more runs than units, or none.
    """
    total = [0.0, *accumulate(costs)]
    return cheapest_ends(len(costs), k, lambda start, stop: total[stop] - total[start])


def cheapest_ends(count: int, k: int, cost: Callable[[int, int], float]) -> tuple[int, ...]:
    """The same as `balanced_ends` where a run costs something else than the sum of its units.

    Two passes, each of them exact: the least possible cost of the dearest run, then the least sum of squares among
    the cuts that reach it. One pass over both would not be: the most even cut of the first units need not be the
    beginning of the most even cut of all, as soon as a later run is dearer.

    Args:
        count: number of units.
        k: K.
        cost: of the run of the units `start` to `stop - 1`, not negative, infinite for runs that must not be.

    Raises:
        UsageError: more runs than units, or none.
    """
    if not 1 <= k <= count:
        raise UsageError(f"a network of {count} units cannot be cut into {k} blocks")
    runs = [[cost(start, stop) if start < stop else math.inf for stop in range(count + 1)] for start in range(count)]
    dearest = [0.0, *([math.inf] * count)]  # of the first j units in as many runs as there were rounds
    for _ in range(k):
        dearest = [
            min((max(dearest[start], runs[start][stop]) for start in range(stop)), default=math.inf)
            for stop in range(count + 1)
        ]
    bound = dearest[count]
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *([None] * count)]
    for _ in range(k):
        after: list[tuple[float, tuple[int, ...]] | None] = [None] * (count + 1)
        for stop in range(1, count + 1):
            for start in range(stop):
                so_far, run = best[start], runs[start][stop]
                if so_far is None or run > bound:
                    continue
                squares, known = so_far[0] + run * run, after[stop]
                if known is None or (squares, so_far[1]) < (known[0], known[1][:-1]):
                    after[stop] = (squares, (*so_far[1], stop - 1))
        best = after
    found = best[count]
    assert found is not None
    return found[1]


def unit_operations(units: Iterable[nn.Module], input_shape: Shape | None) -> list[float]:
    """Floating-point operations of each unit's forward pass on one sample, counted without doing them.

    Raises:
        UsageError: the shape of an input is not given, or does not fit.
    """
    if input_shape is None:
        raise UsageError("no paper says how to cut this network into as many blocks; pass input_shape to balance them")
    copies = [copy.deepcopy(unit).to("meta").eval() for unit in units]
    block_output_shapes(copies, input_shape)  # refuses, in words, what does not fit
    signal = torch.empty(1, *input_shape, dtype=next(copies[0].parameters()).dtype, device="meta")
    operations = []
    with torch.no_grad():
        for unit in copies:
            with FlopCounter() as counter:
                signal = unit(signal)
            operations.append(float(counter.get_total_flops()))
    return operations


def step_seconds(units: Iterable[nn.Module], batch: Tensor, repeats: int = 10) -> list[float]:
    """Seconds of a forward and backward pass through each unit alone, undisturbed, on the device of `batch`.

    Args:
        units: in forward order; they are copied, so that neither weights nor statistics change.
        batch: (B, *input_shape).
        repeats: how many passes are timed, of which the shortest counts.
    """
    seconds = []
    signal = batch.detach()
    for original in units:
        unit = copy.deepcopy(original).to(batch.device).train()
        parameters = [parameter for parameter in unit.parameters() if parameter.requires_grad]

        def step(unit: nn.Module = unit, signal: Tensor = signal, parameters: list[nn.Parameter] = parameters) -> None:
            outputs = unit(signal)
            if parameters:  # a frozen unit only runs forwards
                torch.autograd.grad(outputs.sum(), parameters)

        seconds.append(least_seconds(step, batch.device, repeats))
        with torch.no_grad():
            signal = unit(signal)
    return seconds


def _stem_units(units: Sequence[nn.Module] | nn.ModuleList) -> int:
    """How many units come before the first residual one; 0 if there is none."""
    return next((index for index, unit in enumerate(units) if isinstance(unit, ResidualUnit)), 0)


def _paper_ends(units: nn.ModuleList, k: int) -> tuple[int, ...] | None:
    """The papers' cut of a residual network, if they have one."""
    stem = _stem_units(units)
    widths = [unit.width for unit in units[stem:] if isinstance(unit, ResidualUnit)]
    if not widths or len(widths) != len(units) - stem:
        return None
    stages = tuple(widths.count(width) for width in dict.fromkeys(widths))
    ends = PAPER_CUTS.get(stages, {}).get(k)
    if ends == ():
        return tuple(range(stem, len(units)))
    return None if ends is None else tuple(stem + sum(stages[: stage - 1]) + unit for stage, unit in ends)
