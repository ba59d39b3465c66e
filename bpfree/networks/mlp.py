"""Multi-layer perceptrons: one block per hidden layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from bpfree.networks.streams import StreamDropout

DROPOUT = 0.2
"""Of networks that have it, unless a training setting says otherwise."""


def mlp(
    input_shape: tuple[int, ...], widths: Sequence[int], *, elu: bool = False, dropout: float | None = None
) -> nn.Sequential:
    """Hidden layers `Linear -> ReLU`, one block each; the first block flattens its input.

    Weights are Kaiming-uniform with a = sqrt(5) (PyTorch's default for `Linear`), biases zero, as in the
    studies that bpfree compares with.

    Args:
        input_shape: shape of one input sample.
        widths: number of units per hidden layer.
        elu: `Linear -> ELU` without biases instead, as in counter-current learning (arXiv 2409.19841).
        dropout: probability of a dropout layer at the entry of every block but the first; None for no such layers.
    """
    blocks = []
    fan_in = math.prod(input_shape)
    for index, width in enumerate(widths):
        linear = nn.Linear(fan_in, width, bias=not elu)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        entry: list[nn.Module] = [nn.Flatten()] if index == 0 else []
        if index and dropout is not None:
            entry.append(StreamDropout(dropout))
        blocks.append(nn.Sequential(*entry, linear, nn.ELU() if elu else nn.ReLU()))
        fan_in = width
    return nn.Sequential(*blocks)
