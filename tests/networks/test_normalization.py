"""Batch normalisation of maps and vectors with what follows it, against the formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn

from bpfree.algorithms._recompute import recomputed
from bpfree.networks.normalization import MOMENTUM, MapNorm, VectorNorm

F64 = torch.float64
SHAPES = [(4, 16, 5, 7), (3, 24, 8, 8), (2, 200, 3, 3), (2, 1, 4, 4), (300, 8, 1, 1), (9, 64, 70, 33)]
CASES = [(True, False), (True, True), (False, False), (False, True)]  # rectified, with a shortcut


def by_formula(norm: MapNorm | VectorNorm, x: Tensor, shortcut: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ioffe and Szegedy (2015), algorithm 1: outputs, and the running statistics after this batch."""
    count = x.numel() // x.shape[1]
    mean = x.sum((0, 2, 3)) / count
    squares = (x - mean[:, None, None]).square().sum((0, 2, 3))
    out = (x - mean[:, None, None]) / (squares / count + norm.eps).sqrt()[:, None, None]
    out = out * norm.weight[:, None, None] + norm.bias[:, None, None]
    if shortcut is not None:
        out = out + shortcut
    assert norm.running_mean is not None
    assert norm.running_var is not None
    running_mean = (1 - MOMENTUM) * norm.running_mean + MOMENTUM * mean
    running_var = (1 - MOMENTUM) * norm.running_var + MOMENTUM * squares / (count - 1)
    return out.clamp(min=0) if norm.rectified else out, running_mean.detach(), running_var.detach()


def case(shape: tuple[int, ...], rectified: bool, joined: bool) -> tuple[MapNorm, Tensor, Tensor | None, Tensor]:
    """A normalisation with weights of its own, an input far from 0, a shortcut and a gradient."""
    torch.manual_seed(sum(shape))
    norm = MapNorm(shape[1], rectified=rectified).double()
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean):
            assert values is not None
            values.normal_()
    x, shortcut, gradient = torch.randn(3, *shape, dtype=F64)
    return norm, 2 * x + 5, shortcut if joined else None, gradient


def ends(norm: MapNorm | VectorNorm, outputs: Tensor, gradient: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """Outputs, and their derivatives by everything."""
    leaves = [leaf for leaf in (norm.weight, norm.bias, *inputs) if leaf is not None]
    return [outputs.detach(), *torch.autograd.grad(outputs, leaves, gradient.to(outputs))]


def agree(found: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    """Within a share of the largest value."""
    for mine, theirs in zip(found, exact, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine.double().cpu(), theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("rectified", "joined"), CASES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_maps_are_normalised_added_up_and_rectified(shape: tuple[int, ...], rectified: bool, joined: bool) -> None:
    norm, x, shortcut, gradient = case(shape, rectified, joined)
    inputs = [None if values is None else values.requires_grad_() for values in (x, shortcut)]
    expected, running_mean, running_var = by_formula(norm, x, shortcut)
    for mine, theirs in zip(
        ends(norm, norm(x, shortcut), gradient, *inputs), ends(norm, expected, gradient, *inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.running_mean, running_mean)
    torch.testing.assert_close(norm.running_var, running_var)
    norm.eval()
    still = norm(x, shortcut)
    assert torch.equal(still[:1], norm(x[:1], None if shortcut is None else shortcut[:1]))


@pytest.mark.gpu
@pytest.mark.parametrize(("rectified", "joined"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_kernels_agree_with_the_formulas(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], rectified: bool, joined: bool
) -> None:
    norm, x, shortcut, gradient = case(shape, rectified, joined)
    there = copy.deepcopy(norm).float().cuda()
    given = [
        None if values is None else values.to("cuda", dtype, memory_format=torch.channels_last).requires_grad_()
        for values in (x, shortcut)
    ]
    exact = [None if values is None else values.detach().double().cpu().requires_grad_() for values in given]
    assert exact[0] is not None
    expected, running_mean, running_var = by_formula(norm, exact[0], exact[1])
    outputs = there(*given)
    # what is kept of a value within the tolerance of 0 is a matter of rounding: no gradient comes to it
    gradient = torch.where(expected.detach().abs() < 1e-2, 0, gradient).to(dtype)
    found = ends(there, outputs, gradient, *given)
    assert found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    agree(found, ends(norm, expected, gradient, *exact), tolerance)
    assert there.running_mean is not None
    assert there.running_var is not None
    agree([there.running_mean, there.running_var], [running_mean, running_var], 1e-5)
    assert int(there.num_batches_tracked or 0) == 1
    again = copy.deepcopy(there)
    for mine, theirs in zip(found, ends(again, again(*given), gradient, *given), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_computing_again_does_not_count_a_batch_twice() -> None:
    norm, x, _, gradient = case(SHAPES[0], True, False)
    plain = norm.float().cuda()
    checkpointed = copy.deepcopy(plain)
    there = x.to("cuda", torch.float32, memory_format=torch.channels_last).requires_grad_()
    pairs = zip(
        ends(plain, plain(there), gradient, there),
        ends(checkpointed, recomputed(checkpointed, there), gradient, there),
        strict=True,
    )
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(plain.state_dict().values(), checkpointed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def vectors(size: int, width: int, rectified: bool) -> tuple[VectorNorm, Tensor, Tensor]:
    """A normalisation with weights of its own, an input far from 0 and a gradient."""
    maps, x, _, gradient = case((size, width, 1, 1), rectified, False)
    norm = VectorNorm(width, rectified=rectified).double()
    norm.load_state_dict(maps.state_dict())
    return norm, x.flatten(1), gradient.flatten(1)


def vectors_by_formula(norm: VectorNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outputs, running_mean, running_var = by_formula(norm, x[:, :, None, None], None)
    return outputs.flatten(1), running_mean, running_var


@pytest.mark.parametrize("rectified", [False, True])
def test_vectors_are_normalised_and_rectified(rectified: bool) -> None:
    norm, x, gradient = vectors(9, 5, rectified)
    expected, running_mean, running_var = vectors_by_formula(norm, x.requires_grad_())
    for mine, theirs in zip(ends(norm, norm(x), gradient, x), ends(norm, expected, gradient, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.running_mean, running_mean)
    torch.testing.assert_close(norm.running_var, running_var)
    alone = norm(x[:1])  # has no variance, and does not move the running statistics
    torch.testing.assert_close(norm.running_mean, running_mean)
    assert torch.equal(alone, norm.eval()(x[:1]))


@pytest.mark.gpu
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize(("size", "width"), [(5, 7), (128, 256), (300, 40), (9000, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_kernels_of_vectors_agree_with_the_formulas(
    dtype: torch.dtype, tolerance: float, size: int, width: int, rectified: bool
) -> None:
    norm, x, gradient = vectors(size, width, rectified)
    there = copy.deepcopy(norm).float().cuda()
    given = x.to("cuda", dtype).requires_grad_()
    exact = given.detach().double().cpu().requires_grad_()
    expected, running_mean, running_var = vectors_by_formula(norm, exact)
    outputs = there(given)
    gradient = torch.where(expected.detach().abs() < 1e-2, 0, gradient).to(dtype)  # as of maps
    found = ends(there, outputs, gradient, given)
    assert found[0].dtype == dtype
    agree(found, ends(norm, expected, gradient, exact), tolerance)
    assert there.running_mean is not None
    assert there.running_var is not None
    agree([there.running_mean, there.running_var], [running_mean, running_var], 1e-5)
    assert int(there.num_batches_tracked or 0) == 1
    again = copy.deepcopy(there)
    for mine, theirs in zip(found, ends(again, again(given), gradient, given), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3, 3)])
def test_others_may_measure_the_running_statistics(shape: tuple[int, ...]) -> None:
    norm = (VectorNorm(8) if len(shape) == 2 else MapNorm(8)).cuda()
    x = torch.randn(2, *shape, device="cuda")
    if len(shape) == 4:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 6))
    update_bn(x, norm)  # plain averages over batches: there is no momentum
    dims = [0, *range(2, len(shape))]
    means = torch.stack([batch.mean(dims) for batch in x])
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None  # batch statistics everywhere
    expected = F.batch_norm(x[0], None, None, training=True)
    torch.testing.assert_close(norm(x[0]), expected.relu() if norm.rectified else expected)
