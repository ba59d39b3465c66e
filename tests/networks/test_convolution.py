"""Convolutions with ReLU, pooling and dropout behind them: the parts by formula, the kernels against the parts.

Values are multiples of an eighth and kept ones are doubled, so that every sum is exact in every precision, and equal
values, which pooling has to choose between, are frequent.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from bpfree.networks.convolution import RectifiedConvolution

SHAPES = [(3, 8, 7, 9), (2, 100, 5, 5), (2, 4, 3, 2), (40, 64, 30, 31)]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
CASES = list(itertools.product((False, True), (0.0, 0.5), (False, True)))  # pooled, dropout, with a bias


def eighths(*shape: int) -> Tensor:
    return torch.randint(-24, 25, shape) / 8


def case(shape: tuple[int, ...], pooled: bool, dropout: float, biased: bool) -> tuple[RectifiedConvolution, Tensor]:
    """A layer whose convolution hands every value on, and inputs."""
    torch.manual_seed(sum(shape))
    convolution = nn.Conv2d(shape[1], shape[1], 1, groups=shape[1], bias=biased)
    nn.init.ones_(convolution.weight)
    if convolution.bias is not None:
        convolution.bias.data = eighths(shape[1])
    return RectifiedConvolution(convolution, dropout, pooled=pooled), eighths(*shape)


def ends(layer: RectifiedConvolution, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Outputs, and their derivatives by the inputs, the weights and, if there is one, the bias."""
    x.requires_grad_()
    outputs = layer(x)
    derivatives = torch.autograd.grad(outputs, [x, *layer.parameters()], gradient.to(outputs))
    return [outputs.detach(), *derivatives]


@pytest.mark.parametrize(("pooled", "dropout", "biased"), CASES)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_maps_are_rectified_pooled_and_dropped(
    shape: tuple[int, ...], pooled: bool, dropout: float, biased: bool
) -> None:
    layer, x = case(shape, pooled, dropout, biased)
    expected = x if layer.convolution.bias is None else x + layer.convolution.bias.detach()[:, None, None]
    expected = torch.where(expected > 0, expected, 0)
    if pooled:
        corners = [expected[:, :, down : shape[2] // 2 * 2 : 2, right : shape[3] // 2 * 2 : 2] for down, right in
                   itertools.product((0, 1), (0, 1))]  # fmt: skip
        expected = torch.stack(corners).amax(0)
    dropped = layer(x).detach()
    kept = dropped != 0
    assert torch.equal(dropped[kept], expected[kept] / (1 - dropout))
    share = kept.sum() / (expected != 0).sum()
    assert share == 1 if not dropout else 0 < share < 1
    assert torch.equal(layer.eval()(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("pooled", "dropout", "biased"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_the_same_bits(
    dtype: torch.dtype, shape: tuple[int, ...], pooled: bool, dropout: float, biased: bool
) -> None:
    here, x = case(shape, pooled, dropout, biased)
    there = copy.deepcopy(here).cuda()
    for layout in LAYOUTS:  # of the derivative; that of the maps is channels-last
        x = x.detach().contiguous(memory_format=torch.channels_last)
        gradient = eighths(*here(x).shape).contiguous(memory_format=layout)
        there.load_state_dict(here.state_dict())
        expected = ends(here, x, gradient)
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            found = ends(there, x.detach().cuda(), gradient.cuda())
        assert found[0].dtype == dtype
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            rounded = index == 2 and dtype is torch.bfloat16  # the weights' derivative is a sum in bfloat16
            tolerance = 2e-2 * theirs.abs().max().item() if rounded else 0
            torch.testing.assert_close(mine.cpu().float(), theirs, rtol=0, atol=tolerance)
        assert int(here.dropout.stream.count) == int(there.dropout.stream.count)


@pytest.mark.gpu
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("shape", "layout"), [((2, 6, 5, 5), LAYOUTS[0]), ((2, 8, 5, 5), LAYOUTS[1])])
def test_what_the_kernels_do_not_take_is_left_to_pytorch(
    shape: tuple[int, ...], layout: torch.memory_format, pooled: bool
) -> None:
    here, x = case(shape, pooled, 0.5, True)
    there = copy.deepcopy(here).cuda()
    x = x.contiguous(memory_format=layout)
    gradient = eighths(*copy.deepcopy(here)(x).shape)
    for mine, theirs in zip(ends(there, x.cuda(), gradient.cuda()), ends(here, x, gradient), strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.gpu
def test_nan_goes_on() -> None:
    layer, x = case(SHAPES[0], True, 0.0, True)
    x[0, 0, 1, 1] = torch.nan
    outputs = layer.cuda()(x.cuda().contiguous(memory_format=torch.channels_last))
    assert outputs.isnan().nonzero().tolist() == [[0, 0, 0, 0]]


@pytest.mark.gpu
def test_parts_with_hooks_are_called() -> None:
    layer, x = case(SHAPES[0], False, 0.5, True)
    seen: list[str] = []
    for name, part in layer.named_children():
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
    layer.cuda()(x.cuda().contiguous(memory_format=torch.channels_last))
    assert seen == ["convolution", "dropout"]
