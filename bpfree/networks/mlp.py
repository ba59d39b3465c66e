"""Multi-layer perceptrons: one block per hidden layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


def mlp(input_shape: tuple[int, ...], widths: Sequence[int], *, elu: bool = False) -> nn.Sequential:
    """Hidden layers `Linear -> ReLU`, one block each; the first block flattens its input.

    Weights are Kaiming-uniform with a = sqrt(5) (PyTorch's default for `Linear`), biases zero, as in the
    studies that bpfree compares with.

    Args:
        input_shape: shape of one input sample.
        widths: number of units per hidden layer.
        elu: `Linear -> ELU` without biases instead, as in counter-current learning (arXiv 2409.19841).
    """
    blocks = []
    fan_in = math.prod(input_shape)
    for index, width in enumerate(widths):
        linear = nn.Linear(fan_in, width, bias=not elu)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        flatten = [nn.Flatten()] if index == 0 else []
        blocks.append(nn.Sequential(*flatten, linear, nn.ELU() if elu else nn.ReLU()))
        fan_in = width
    return nn.Sequential(*blocks)
