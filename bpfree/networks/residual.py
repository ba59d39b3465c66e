"""Networks with shortcuts: of layers that can learn one by one (DeeperForward), and MobileNet; `resnet.py` has ResNet.

A `ShortcutBlock` is a block whose layers a rule may also train apart; its shortcut has no parameters. In MobileNet (and
ResNet) a block is what one shortcut spans, with batch normalisation, to be trained as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.networks.convolution import RectifiedConvolution
from bpfree.networks.narrow import NarrowConvolution, is_narrow
from bpfree.networks.normalization import MapNorm
from bpfree.networks.pooling import grid_mean

Shape = tuple[int, ...]
DEEPER_WIDTHS: Final = (100, 200, 400, 800)  # Sun et al., ICLR 2025: 17 layers
DEEPER_DROPOUT: Final = 0.2
TINY: Final = ((100, 5, True), (200, 5, True), (400, 3, False), (400, 3, False))  # channels, kernel, pooled
CWCOMP_CHANNELS: Final = (20, 80, 240, 480)  # Papachristodoulou et al., arXiv 2312.12668
CWCOMP_GROUPS: Final = 10  # classes of the data sets that it is made for
CWCOMP_EPS: Final = 1e-4
# MobileNetV3-Small (Howard et al., arXiv 1905.02244, table 2), for small images: the first two strides are 1.
# kernel, expanded channels, output channels, squeeze-and-excitation, hard-swish, stride
MOBILENET: Final = (
    (3, 16, 16, True, False, 1),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
MOBILENET_STEM: Final = 16
SQUEEZE: Final = 4


class ShortcutBlock(nn.Module):
    """Layers in a row, and a shortcut around them that is added or concatenated.

    Args:
        layers: in forward order; rules that learn layer by layer train each of them alone.
        stride: by how much the layers shrink a map; the shortcut is averaged to fit.
        concatenate: put the shortcut's channels behind the output's, instead of adding them.
    """

    def __init__(self, layers: Iterable[nn.Module], *, stride: int = 1, concatenate: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.stride, self.concatenate = stride, concatenate

    def join(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """(B, channels, height, width) of the last layer, and the block's inputs -> what the block passes on."""
        if self.stride > 1:
            height, width = inputs.shape[2:]
            if height % self.stride == width % self.stride == 0:
                inputs = grid_mean(inputs, (height // self.stride, width // self.stride))
            else:
                inputs = F.avg_pool2d(inputs, self.stride, ceil_mode=True)
        return torch.cat([outputs, inputs], 1) if self.concatenate else outputs + inputs

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, channels', height', width')."""
        signal = inputs
        for layer in self.layers:
            signal = layer(signal)
        return self.join(signal, inputs)


def needs_images(input_shape: Shape, what: str, least: int) -> None:
    """Refuse inputs that are not images, or smaller than `least` x `least`, for the network called `what`."""
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise UsageError(
            f"{what} needs images (channels, height, width) of at least {least}x{least}, the data have shape "
            f"{input_shape}; use an mlp"
        )


def convolution(fan_in: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias, weights drawn from N(0, 2 / (kernel^2 width))."""
    if is_narrow(fan_in, width) and (kernel, stride) == (3, 1):
        layer: nn.Conv2d = NarrowConvolution(fan_in, width)
    else:
        layer = nn.Conv2d(fan_in, width, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def deeper(input_shape: Shape, widths: Sequence[int] = DEEPER_WIDTHS) -> nn.Sequential:
    """DeeperForward's residual network: a stem and four layers `conv 3x3, ReLU, dropout` per width, in pairs.

    The first pair of each width has an added shortcut, the second a concatenated one, which doubles the channels; from
    the second width on, the first layer halves the map. Widths therefore double: the default has 17 layers.

    Args:
        input_shape: (channels, height, width).
        widths: channels, each twice the one before.

    Raises:
        UsageError: inputs that are not images, or widths that do not double.
    """
    needs_images(input_shape, "deeper", 2 ** (len(widths) - 1))
    if any(after != 2 * before for before, after in pairwise(widths)):
        raise UsageError(f"each width must be twice the one before, because shortcuts are concatenated; got {widths}")

    def layer(fan_in: int, width: int, stride: int = 1) -> RectifiedConvolution:
        return RectifiedConvolution(convolution(fan_in, width, 3, stride), DEEPER_DROPOUT)

    blocks: list[nn.Module] = [layer(input_shape[0], widths[0])]
    for index, width in enumerate(widths):
        stride = 2 if index else 1
        last = index == len(widths) - 1  # nothing follows that wants twice the channels
        blocks.append(ShortcutBlock([layer(width, width, stride), layer(width, width)], stride=stride))
        blocks.append(ShortcutBlock([layer(width, width), layer(width, width)], concatenate=not last))
    return nn.Sequential(*blocks)


def deeper_tiny(input_shape: Shape) -> nn.Sequential:
    """DeeperForward's TinyCNN: 5x5 convolutions to 100 and 200 maps, each averaged 2x2, then 3x3 to 400 and 400."""
    needs_images(input_shape, "deeper:tiny", 4)
    blocks, fan_in = [], input_shape[0]
    for width, kernel, pooled in TINY:
        pool = [nn.AvgPool2d(2)] if pooled else []
        blocks.append(nn.Sequential(RectifiedConvolution(convolution(fan_in, width, kernel), DEEPER_DROPOUT), *pool))
        fan_in = width
    return nn.Sequential(*blocks)


def cwcomp(input_shape: Shape, channels: Sequence[int] = CWCOMP_CHANNELS) -> nn.Sequential:
    """CwComp's pairs of an ordinary and a grouped convolution: `conv 3x3, ReLU[, max-pool 2x2], batch normalisation`.

    Every second layer has ten groups, one per class of MNIST or CIFAR-10, and is pooled.

    Args:
        input_shape: (channels, height, width).
        channels: maps per layer, multiples of ten.

    Raises:
        UsageError: inputs that are not images, or channels that ten groups cannot share.
    """
    needs_images(input_shape, "cwcomp", 2 ** (len(channels) // 2))
    if any(width % CWCOMP_GROUPS for width in channels):
        raise UsageError(f"channels of cwcomp must be multiples of {CWCOMP_GROUPS}, got {tuple(channels)}")
    blocks, fan_in = [], input_shape[0]
    for index, width in enumerate(channels):
        second = index % 2 == 1
        convolution = nn.Conv2d(fan_in, width, 3, padding=1, groups=CWCOMP_GROUPS if second else 1)
        pool = [nn.MaxPool2d(2)] if second else []
        blocks.append(nn.Sequential(convolution, nn.ReLU(), *pool, nn.BatchNorm2d(width, eps=CWCOMP_EPS)))
        fan_in = width
    return nn.Sequential(*blocks)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a function of all channels' means.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, max(8, width // SQUEEZE), 1), nn.ReLU()),
            *(nn.Conv2d(max(8, width // SQUEEZE), width, 1), nn.Hardsigmoid()),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, width, height, width) of the same shape."""
        scaled: Tensor = inputs * self.gate(inputs)
        return scaled


class InvertedResidual(nn.Module):
    """MobileNetV3's block: expand 1x1, depthwise, squeeze-and-excitation, project 1x1; a shortcut where shapes agree.

    Args:
        fan_in: channels of the input.
        kernel: of the depthwise convolution.
        expanded: channels inside.
        width: channels of the output.
        squeeze: whether there is squeeze-and-excitation.
        swish: hard-swish instead of ReLU.
        stride: of the depthwise convolution.
    """

    def __init__(
        self, fan_in: int, kernel: int, expanded: int, width: int, squeeze: bool, swish: bool, stride: int
    ) -> None:
        super().__init__()
        depthwise = nn.Conv2d(expanded, expanded, kernel, stride, kernel // 2, groups=expanded, bias=False)
        self.body = nn.Sequential(
            *(convolution(fan_in, expanded, 1), *_norm(expanded, swish)),
            *(depthwise, *_norm(expanded, swish)),
            *([SqueezeExcitation(expanded)] if squeeze else []),
            *(convolution(expanded, width, 1), MapNorm(width, rectified=False)),
        )
        self.joined = fan_in == width and stride == 1

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, fan_in, height, width) -> (B, width, height / stride, width / stride)."""
        outputs: Tensor = self.body(inputs)
        return inputs + outputs if self.joined else outputs


def _norm(width: int, swish: bool) -> tuple[nn.Module, ...]:
    """Batch normalisation and hard-swish, or ReLU."""
    return (MapNorm(width, rectified=False), nn.Hardswish()) if swish else (MapNorm(width),)


def mobilenet(input_shape: Shape) -> nn.Sequential:
    """MobileNetV3-Small for small images: a stem and eleven inverted residuals; the widening last layer is left out."""
    needs_images(input_shape, "mobilenet", 8)
    stem = nn.Sequential(convolution(input_shape[0], MOBILENET_STEM, 3), *_norm(MOBILENET_STEM, swish=True))
    blocks: list[nn.Module] = [stem]
    fan_in = MOBILENET_STEM
    for kernel, expanded, width, squeeze, swish, stride in MOBILENET:
        blocks.append(InvertedResidual(fan_in, kernel, expanded, width, squeeze, swish, stride))
        fan_in = width
    return nn.Sequential(*blocks)
