"""Residual networks, and how networks are cut into blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from bpfree.errors import UsageError
from bpfree.networks import build_network
from bpfree.networks.partition import (
    Units,
    balanced_ends,
    cheapest_ends,
    first_unit,
    partition,
    step_seconds,
    unit_operations,
)

IMAGE = (3, 32, 32)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def lengths(blocks: nn.Sequential) -> list[int]:
    return [len(block) if isinstance(block, Units) else 1 for block in blocks]


@pytest.mark.parametrize(
    ("name", "image", "read_out", "published"),
    [
        ("resnet32", IMAGE, 64 * 10 + 10, 466_906),  # specification, section 3
        ("resnet:50", (3, 224, 224), 2048 * 1000 + 1000, 25_557_032),  # torchvision's tables
        ("resnet:101", (3, 224, 224), 2048 * 1000 + 1000, 44_549_160),
        ("resnet:152", (3, 224, 224), 2048 * 1000 + 1000, 60_192_808),
    ],
)
def test_residual_networks_have_the_published_number_of_parameters(
    name: str, image: tuple[int, ...], read_out: int, published: int
) -> None:
    with torch.device("meta"):
        network = build_network(name, image)
    assert parameters(network) + read_out == published


def test_resnet_110_has_three_stages_of_eighteen_units() -> None:
    network = build_network("resnet:110", IMAGE)
    assert [unit.width for unit in network[1:]] == [16] * 18 + [32] * 18 + [64] * 18
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 110  # and the read-out


def test_large_residual_networks_shrink_images_by_32() -> None:
    network = build_network("resnet:50", (3, 64, 64)).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 2048, 2, 2)


# the stem counts as a unit: the numbers of the specification's table of (stage, unit), section 3
@pytest.mark.parametrize(
    ("name", "k", "expected"),
    [
        ("resnet:32", 2, [8, 8]),
        ("resnet:32", 4, [4, 4, 4, 4]),
        ("resnet:32", 8, [2] * 8),
        ("resnet:32", 16, [2] + [1] * 14),
        ("resnet:110", 8, [6, 7, 7, 7, 7, 7, 7, 7]),
        ("resnet:110", 16, [3] * 9 + [4] * 3 + [4] * 4),
        ("resnet:110", 55, [2] + [1] * 53),
    ],
)
def test_the_papers_cuts(name: str, k: int, expected: list[int]) -> None:
    blocks = partition(build_network(name, IMAGE), k)
    assert lengths(blocks) == expected


def test_the_papers_cut_of_resnet_110_into_32() -> None:
    blocks = partition(build_network("resnet:110", IMAGE), 32)
    ends = list(itertools.accumulate(lengths(blocks)))
    inside = [(end - 2) % 18 for end in ends]  # unit in its stage; the stem is the first of all
    assert inside == [1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17] * 2 + [1, 3, 4, 6, 7, 9, 11, 13, 15, 17]


@pytest.mark.parametrize(
    ("name", "k", "ends"),
    [
        ("resnet:101", 2, [3 + 1, 33]),
        ("resnet:101", 4, [3 + 3, 7 + 9, 7 + 17, 33]),
        ("resnet:152", 2, [3 + 6, 50]),
        ("resnet:152", 4, [3 + 7, 11 + 14, 11 + 26, 50]),
    ],
)
def test_the_papers_cuts_of_large_networks(name: str, k: int, ends: list[int]) -> None:
    with torch.device("meta"):
        blocks = partition(build_network(name, (3, 224, 224)), k)
    assert [end - 1 for end in itertools.accumulate(lengths(blocks))] == ends


def test_blocks_are_the_units_once_each_in_their_order() -> None:
    network = build_network("resnet:32", IMAGE).eval()
    for k in (1, 3, 8, 16):
        blocks = partition(network, k, input_shape=IMAGE).eval()
        units = [unit for block in blocks for unit in (block if isinstance(block, Units) else [block])]
        assert [id(unit) for unit in units] == [id(unit) for unit in network]
        x = torch.randn(2, *IMAGE)
        assert torch.equal(blocks(x), network(x))


def test_the_stem_can_be_a_block_of_its_own() -> None:
    network = build_network("resnet:32", IMAGE)
    assert lengths(partition(network, 16, stem=True)) == [1] * 16
    assert lengths(partition(network, 2, stem=True)) == [1, 7, 8]
    with pytest.raises(UsageError, match="no stem"):
        partition(build_network("mlp:3x8", IMAGE), 2, input_shape=IMAGE, stem=True)


@pytest.mark.parametrize("seed", range(8))
def test_balanced_cuts_equal_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 20, (9,), generator=generator).tolist()
    for k in range(1, 10):

        def dearest(ends: tuple[int, ...]) -> int:
            return max(sum(costs[a + 1 : b + 1]) for a, b in itertools.pairwise([-1, *ends]))

        every = [(*inner, 8) for inner in itertools.combinations(range(8), k - 1)]
        ends = balanced_ends(costs, k)
        assert ends in every
        assert dearest(ends) == min(map(dearest, every))


def test_ties_are_broken_evenly() -> None:
    assert balanced_ends([9, 1, 1, 1, 1], 3) == (0, 2, 4)


@pytest.mark.parametrize("seed", range(4))
def test_of_the_balanced_cuts_the_most_even_one_is_taken(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 9, (8,), generator=generator).tolist()
    for k in range(1, 9):

        def rated(ends: tuple[int, ...]) -> tuple[int, int]:
            runs = [sum(costs[a + 1 : b + 1]) for a, b in itertools.pairwise([-1, *ends])]
            return max(runs), sum(run * run for run in runs)

        every = [(*inner, 7) for inner in itertools.combinations(range(7), k - 1)]
        assert rated(balanced_ends(costs, k)) == min(map(rated, every))


def test_runs_may_cost_something_else_than_the_sum() -> None:
    # a toll on beginning at unit 2, which the sums alone would choose
    assert balanced_ends([1, 1, 1, 1], 2) == (1, 3)
    assert cheapest_ends(4, 2, lambda start, stop: stop - start + 5 * (start == 2)) in {(0, 3), (2, 3)}


def test_costs_count_and_measure() -> None:
    network = build_network("cnn:4x8x16", (3, 16, 16))
    before = [p.clone() for p in network.parameters()]
    # 2 * out * in * 9 products and sums per position: at 16x16, 8x8 and 4x4
    assert unit_operations(network, (3, 16, 16)) == [2 * 9 * 256 * 12, 2 * 9 * 64 * 32, 2 * 9 * 16 * 128]
    seconds = step_seconds(network, torch.randn(2, 3, 16, 16), repeats=1)
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert lengths(partition(network, 2, costs=[1.0, 1.0, 2.0])) == [2, 1]
    assert lengths(partition(network, 2, costs=[2.0, 1.0, 1.0])) == [1, 2]
    assert lengths(partition(network, 2, input_shape=(3, 16, 16))) == [1, 2]  # 55, 37 and 37 thousand operations


def test_frozen_units_are_timed_too() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    network[0].requires_grad_(False)
    assert len(step_seconds(network, torch.randn(2, 3), repeats=1)) == 2


def test_first_units() -> None:
    blocks = partition(build_network("resnet:32", IMAGE), (3, 4, 15))
    assert first_unit(blocks[0]) is blocks[0][0]
    assert first_unit(blocks[1]) is blocks[1]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (17, "17 blocks"),
        (0, "0 blocks"),
        ((3, 14), "the last is 15"),
        ((5, 3, 15), "rising"),
        ((-1, 15), "rising"),
        ((), "rising"),
    ],
)
def test_impossible_cuts(cut: int | tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        partition(build_network("resnet:32", IMAGE), cut, input_shape=IMAGE)


def test_balancing_by_operations_needs_a_shape() -> None:
    with pytest.raises(UsageError, match="input_shape"):
        partition(build_network("resnet:32", IMAGE), 3)
