"""Means over windows against PyTorch's pooling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bpfree.networks.pooling import grid_mean
from bpfree.networks.residual import ShortcutBlock


@pytest.mark.parametrize(("channels", "dtype"), [(5, torch.float64), (5, torch.float32), (6, torch.float32)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "grid"), [((8, 8), (2, 2)), ((8, 12), (4, 2)), ((6, 7), (1, 1)), ((4, 6), (4, 6))])
def test_maps_are_averaged_to_a_grid(
    size: tuple[int, int], grid: tuple[int, int], layout: torch.memory_format, channels: int, dtype: torch.dtype
) -> None:
    maps = torch.randn(3, channels, *size, dtype=dtype).to(memory_format=layout).requires_grad_()
    means, expected = grid_mean(maps, grid), F.adaptive_avg_pool2d(maps, grid)
    gradient = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(outputs, maps, gradient)[0] for outputs in (means, expected))
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    torch.testing.assert_close(means, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [(8, 6), (7, 6), (5, 5)])
def test_shortcuts_shrink_as_the_layers_do(size: tuple[int, int]) -> None:
    inputs = torch.randn(2, 4, *size)
    smaller = F.avg_pool2d(inputs, 2, ceil_mode=True)
    outputs = torch.randn_like(smaller)
    torch.testing.assert_close(ShortcutBlock([], stride=2).join(outputs, inputs), outputs + smaller)
