"""Convolutional autoencoders: one block per convolution, the maps halved and doubled again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import nn

from bpfree.errors import UsageError
from bpfree.networks.blocks import Shape

AUTOENCODER_CHANNELS: Final = (128, 256, 1024, 2048)  # Kao and Hariharan, arXiv 2409.19841
SMALL: Final = 1e-3  # factor of the weights on the way to the image


def autoencoder(input_shape: Shape, channels: Sequence[int] = AUTOENCODER_CHANNELS) -> nn.Sequential:
    """Encoder `Conv 3x3 (stride 2) -> BatchNorm -> ReLU`, decoder `Upsample -> Conv 3x3 -> BatchNorm -> ReLU`.

    The decoder goes back through the encoder's shapes; its last block is a convolution to the image alone.

    Args:
        input_shape: (channels, height, width).
        channels: feature maps of the encoder's blocks.

    Raises:
        UsageError: inputs that are not images.
    """
    if len(input_shape) != 3:
        raise UsageError(f"a convolutional autoencoder needs images, the data have shape {input_shape}")
    shapes = [input_shape]
    for width in channels:
        shapes.append((width, -(-shapes[-1][1] // 2), -(-shapes[-1][2] // 2)))
    blocks = [
        nn.Sequential(nn.Conv2d(given[0], made[0], 3, stride=2, padding=1), nn.BatchNorm2d(made[0]), nn.ReLU())
        for given, made in pairwise(shapes)
    ]
    shapes.reverse()
    for given, made in pairwise(shapes):
        convolution = nn.Conv2d(given[0], made[0], 3, padding=1)
        behind = [] if made is shapes[-1] else [nn.BatchNorm2d(made[0]), nn.ReLU()]
        blocks.append(nn.Sequential(nn.Upsample(size=made[1:]), convolution, *behind))
    start_autoencoder([block[0] if isinstance(block[0], nn.Conv2d) else block[1] for block in blocks])
    return nn.Sequential(*blocks)


@torch.no_grad()
def start_autoencoder(layers: Sequence[nn.Module]) -> None:
    """Initial weights as in the code of arXiv 2409.19841: orthogonal, in the second half small, in the last layer zero.

    Args:
        layers: convolutions or linear layers of an autoencoder, in the order in which data flow.
    """
    for index, layer in enumerate(layers):
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        nn.init.orthogonal_(weight)
        if index >= len(layers) / 2:
            weight.mul_(SMALL)
        if index == len(layers) - 1:
            nn.init.zeros_(weight)


def check_reconstructs(made: Shape, input_shape: Shape) -> None:
    """Refuse a network that does not return what has the shape of its input.

    Raises:
        UsageError: another shape.
    """
    if made != input_shape:
        raise UsageError(
            f"an autoencoder returns what it is given, {input_shape}, but this network makes {made}; "
            "use --network autoencoder"
        )
