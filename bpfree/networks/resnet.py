"""Residual networks of He, Zhang, Ren and Sun (2015, arXiv 1512.03385): a stem, then one block per residual unit.

For small images: ResNet-18 (3x3 stem without pooling, widths 64 to 512), and the networks of depth 6n + 2 that the
paper has for CIFAR (three stages of n units, widths 16, 32, 64). For large images: ResNet-50, 101 and 152 of
bottlenecks.
Where a unit changes shape its shortcut is a 1x1 convolution with batch normalisation. Read-outs are the learner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.networks.normalization import MapNorm
from bpfree.networks.residual import convolution, needs_images

Shape = tuple[int, ...]
SMALL_WIDTHS: Final = (16, 32, 64)
SMALL_UNITS: Final = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}  # depth -> n
RESNET18: Final = ((64, 2), (128, 2), (256, 2), (512, 2))  # width and units of each stage
BOTTLENECK_UNITS: Final = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BOTTLENECK_WIDTHS: Final = (64, 128, 256, 512)
EXPANSION: Final = 4
LARGE_STEM: Final = 64
DEPTHS: Final = tuple(sorted((18, *SMALL_UNITS, *BOTTLENECK_UNITS)))


class ResidualUnit(nn.Module):
    """Convolutions with batch normalisation, and a shortcut (1x1 where shapes differ).

    It is relu(norm(body(x)) + shortcut(x)).

    Args:
        body: the convolutions, from `fan_in` to `width` channels, and what is between them.
        fan_in: channels of the input.
        width: channels of the output.
        stride: of the body.
    """

    def __init__(self, body: nn.Sequential, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.width = width
        self.body = body
        self.norm = MapNorm(width)
        same = fan_in == width and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(convolution(fan_in, width, 1, stride), MapNorm(width, rectified=False))
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, fan_in, height, width) -> (B, width, height / stride, width / stride)."""
        outputs: Tensor = self.norm(self.body(inputs), self.shortcut(inputs))
        return outputs


def basic_unit(fan_in: int, width: int, stride: int) -> ResidualUnit:
    """Two 3x3 convolutions, the first with `stride`."""
    body = nn.Sequential(convolution(fan_in, width, 3, stride), MapNorm(width), convolution(width, width, 3))
    return ResidualUnit(body, fan_in, width, stride)


def bottleneck_unit(fan_in: int, narrow: int, stride: int) -> ResidualUnit:
    """A 1x1 convolution to `narrow` channels, a 3x3 one with `stride`, and a 1x1 one to four times as many."""
    width = EXPANSION * narrow
    body = nn.Sequential(
        *(convolution(fan_in, narrow, 1), MapNorm(narrow)),
        *(convolution(narrow, narrow, 3, stride), MapNorm(narrow)),
        convolution(narrow, width, 1),
    )
    return ResidualUnit(body, fan_in, width, stride)


def resnet(input_shape: Shape, depth: int) -> nn.Sequential:
    """The residual network of this depth.

    Args:
        input_shape: (channels, height, width); at least 8x8, for bottlenecks 32x32.
        depth: 18, 20, 32, 44, 56 or 110 for small images, 50, 101 or 152 for large ones.

    Raises:
        UsageError: unknown depth, or inputs that are not images or too small.
    """
    if depth not in DEPTHS:
        raise UsageError(f"there is no ResNet-{depth} here, only {', '.join(map(str, DEPTHS))}")
    if depth in BOTTLENECK_UNITS:
        needs_images(input_shape, f"resnet:{depth}", 32)
        stem = nn.Sequential(
            *(convolution(input_shape[0], LARGE_STEM, 7, 2), MapNorm(LARGE_STEM), nn.MaxPool2d(3, 2, 1)),
        )
        stages = tuple(zip(BOTTLENECK_WIDTHS, BOTTLENECK_UNITS[depth], strict=True))
        return nn.Sequential(stem, *_units(LARGE_STEM, stages, bottleneck=True))
    needs_images(input_shape, f"resnet:{depth}", 8)
    stages = RESNET18 if depth == 18 else tuple((width, SMALL_UNITS[depth]) for width in SMALL_WIDTHS)
    first = stages[0][0]
    stem = nn.Sequential(convolution(input_shape[0], first, 3), MapNorm(first))
    return nn.Sequential(stem, *_units(first, stages, bottleneck=False))


def _units(fan_in: int, stages: Sequence[tuple[int, int]], *, bottleneck: bool) -> list[nn.Module]:
    """The units of stages `(width, units)`; from the second stage on, the first unit halves the map."""
    units: list[nn.Module] = []
    for stage, (width, count) in enumerate(stages):
        for number in range(count):
            stride = 2 if stage and not number else 1
            unit = (bottleneck_unit if bottleneck else basic_unit)(fan_in, width, stride)
            units.append(unit)
            fan_in = unit.width
    return units
