"""Plain convolutional networks: one block per convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from torch import nn

from bpfree.errors import UsageError

MF_CHANNELS: Final = (64, 128, 256, 512)  # Gong et al., arXiv 2501.09238
CAFO_CHANNELS: Final = (32, 128, 512)  # Zhao et al., arXiv 2303.09728
CAFO_BATCH_NORM_EPS: Final = 1e-4
ELU_CHANNELS: Final = (128, 128, 256, 256, 512)  # Kao and Hariharan, arXiv 2409.19841


def _needs_images(input_shape: tuple[int, ...]) -> None:
    if len(input_shape) != 3:
        raise UsageError(f"a CNN needs images (channels, height, width), the data have shape {input_shape}; use an mlp")


def _needs_room_to_pool(input_shape: tuple[int, ...], blocks: int) -> None:
    smallest = 2**blocks
    if min(input_shape[1:]) < smallest:
        raise UsageError(
            f"images of {input_shape[1]}x{input_shape[2]} are too small for {blocks} pooled blocks; "
            f"they must be at least {smallest}x{smallest} (or use an mlp)"
        )


def cnn(
    input_shape: tuple[int, ...],
    channels: Sequence[int] = MF_CHANNELS,
    *,
    pool: Literal["avg", "max"] = "avg",
    batch_norm: bool = False,
) -> nn.Sequential:
    """Blocks `Conv 3x3 (padding 1) -> ReLU -> Pool 2x2 [-> BatchNorm]`.

    `channels=MF_CHANNELS, pool="avg"` is the network of the Mono-Forward paper; `channels=CAFO_CHANNELS,
    pool="max", batch_norm=True` that of the CaFo paper (which normalises after pooling).

    Args:
        input_shape: `(channels, height, width)` of one image.
        channels: feature maps per block.
        pool: average or maximum pooling.
        batch_norm: end each block with batch normalisation.

    Raises:
        UsageError: the input is not an image, or too small to be halved once per block.
    """
    _needs_images(input_shape)
    _needs_room_to_pool(input_shape, len(channels))
    blocks = []
    fan_in = input_shape[0]
    for width in channels:
        pooling: nn.Module = nn.AvgPool2d(2) if pool == "avg" else nn.MaxPool2d(2)
        norm = [nn.BatchNorm2d(width, eps=CAFO_BATCH_NORM_EPS)] if batch_norm else []
        blocks.append(nn.Sequential(nn.Conv2d(fan_in, width, 3, padding=1), nn.ReLU(), pooling, *norm))
        fan_in = width
    return nn.Sequential(*blocks)


def elu_cnn(
    input_shape: tuple[int, ...], channels: Sequence[int] = ELU_CHANNELS, *, strided: bool = False
) -> nn.Sequential:
    """The networks of counter-current learning: `Conv 3x3 -> ELU -> MaxPool 2x2` without biases, or strided.

    Strided blocks are `Conv 3x3 (stride 2) -> ELU` with biases and take images of any size.

    Args:
        input_shape: `(channels, height, width)` of one image.
        channels: feature maps per block.
        strided: halve the maps by the convolutions' stride instead of pooling.

    Raises:
        UsageError: the input is not an image, or too small to be pooled once per block.
    """
    _needs_images(input_shape)
    if not strided:
        _needs_room_to_pool(input_shape, len(channels))
    blocks = []
    fan_in = input_shape[0]
    for width in channels:
        convolution = nn.Conv2d(fan_in, width, 3, stride=2 if strided else 1, padding=1, bias=strided)
        pool = [] if strided else [nn.MaxPool2d(2)]
        blocks.append(nn.Sequential(convolution, nn.ELU(), *pool))
        fan_in = width
    return nn.Sequential(*blocks)
