"""Goodness of classes: groups of channels, or an auxiliary convolution, that compete for a sample.

Shapes: `B` batch, `K` classes, activities (B, channels, ..) of any number of positions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.networks.blocks import Shape
from bpfree.networks.kernels import triton_kernels

EPSILON: Final = 1e-5
KERNELS: Final = "bpfree.algorithms._ff_kernels"
PVN_THRESHOLD: Final = 2.0
CWG_SHARE: Final = 0.28  # of the cross-entropy


class ClassGoodness(nn.Module, ABC):
    """What a layer says of every class."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """(B, channels, ..) -> (B, K), in at least 32 bits."""


class PositionMean(torch.autograd.Function):
    """(B, channels, ..) -> (B, channels) means over positions, in at least 32 bits.

    The derivative is the same at every position. PyTorch's own would write it out, not as the maps lie in memory.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(wide) if hidden.ndim == 2 else hidden.flatten(2).mean(2, dtype=wide)

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor) -> Tensor:
        share = by_mean / math.prod(ctx.shape[2:])
        return share.to(ctx.dtype).reshape(*ctx.shape[:2], *(1 for _ in ctx.shape[2:])).expand(ctx.shape)


class GroupGoodness(ClassGoodness):
    """Mean activity ("mean"), or mean squared activity ("squares"), of the channels of each class, over all positions.

    Channels are cut into K consecutive groups, as even as can be: equal where K divides their number, as in the papers.

    Args:
        shape: of one sample.
        classes: K.
        squared: whether activities are squared.

    Raises:
        UsageError: fewer channels than classes.
    """

    def __init__(self, shape: Shape, classes: int, *, squared: bool) -> None:
        super().__init__()
        if shape[0] < classes:
            raise UsageError(
                f"a layer of {shape[0]} channels cannot be shared by {classes} classes; use a wider network, or "
                "goodness=auxiliary"
            )
        self.classes, self.squared = classes, squared

    def forward(self, hidden: Tensor) -> Tensor:
        if self.squared:
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).square()
        channels: Tensor = PositionMean.apply(hidden)
        if hidden.shape[1] % self.classes == 0:
            return channels.unflatten(1, (self.classes, -1)).mean(2)
        return torch.stack([group.mean(1) for group in groups(channels, self.classes)], 1)


class AuxiliaryGoodness(ClassGoodness):
    """Mean square, over all positions, of a 1x1 convolution (of vectors: a linear map) without bias to K channels.

    Args:
        shape: of one sample.
        classes: K.
    """

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        layer: nn.Module = nn.Conv2d(shape[0], classes, 1, bias=False)
        self.auxiliary = layer if len(shape) == 3 else nn.Linear(shape[0], classes, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        answers: Tensor = self.auxiliary(hidden)
        answers = answers.to(torch.promote_types(answers.dtype, torch.float32)).square()
        return answers.flatten(2).mean(2) if answers.ndim > 2 else answers


GoodnessFactory = Callable[[Shape, int], ClassGoodness]
"""From the shape of a layer's output, of one sample, and K to its goodness."""

GOODNESS: Final[dict[str, GoodnessFactory]] = {
    "mean": partial(GroupGoodness, squared=False),
    "squares": partial(GroupGoodness, squared=True),
    "auxiliary": AuxiliaryGoodness,
}


def groups(hidden: Tensor, classes: int) -> tuple[Tensor, ...]:
    """The channels of each class."""
    return hidden.tensor_split(classes, dim=1)


def standardize(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean 0 and variance 1 over these dimensions, as the values lie in memory: PyTorch's kernels for layers and groups
    would copy channels-last maps, and the next convolution would copy them back."""
    given, values = values.dtype, values.to(torch.promote_types(values.dtype, torch.float32))
    variance, mean = torch.var_mean(values, dim=dims, keepdim=True, correction=0)
    return ((values - mean) * (variance + EPSILON).rsqrt()).to(given)


def normalize_sample(values: Tensor) -> Tensor:
    """Each sample with mean 0 and variance 1 over all of its values."""
    return standardize(values, tuple(range(1, values.ndim)))


def _maps_by_position(hidden: Tensor) -> bool:
    """Whether these are channels-last maps on a CUDA device that want no derivative."""
    constant = not (torch.is_grad_enabled() and hidden.requires_grad)
    return constant and hidden.is_cuda and hidden.ndim == 4 and hidden.is_contiguous(memory_format=torch.channels_last)


def normalize_groups(hidden: Tensor, classes: int) -> Tensor:
    """Each class's channels with mean 0 and variance 1 over all of its values: nothing is left of mean goodness."""
    if hidden.shape[1] % classes == 0:
        kernels = triton_kernels(KERNELS) if _maps_by_position(hidden) and hidden.dtype.itemsize <= 4 else None
        if kernels is not None:
            normalized: Tensor = kernels.standardize_groups(hidden, classes, EPSILON)
            return normalized
        shared = hidden.unflatten(1, (classes, -1))
        return standardize(shared, tuple(range(2, shared.ndim))).flatten(1, 2)
    return torch.cat([normalize_sample(group) for group in groups(hidden, classes) if group.shape[1]], 1)


def normalize_channels(hidden: Tensor, classes: int) -> Tensor:
    """Mean 0 and variance 1 over the channels, at every position."""
    if _maps_by_position(hidden):
        with torch.autocast(hidden.device.type, enabled=False):  # it would copy them to 32 bits, and back for the next
            return F.layer_norm(hidden.permute(0, 2, 3, 1), hidden.shape[1:2], eps=EPSILON).permute(0, 3, 1, 2)
    return standardize(hidden, (1,))


def keep(hidden: Tensor, classes: int) -> Tensor:
    """As it is, where blocks end in a normalisation of their own."""
    return hidden


ClassNormalizer = Callable[[Tensor, int], Tensor]
"""From activities and K to what a layer passes on."""

NORMALIZERS: Final[dict[str, ClassNormalizer]] = {
    "groups": normalize_groups,
    "channels": normalize_channels,
    "none": keep,
}


def positive_versus_negative(goodness: Tensor, targets: Tensor) -> Tensor:
    """mean_B softplus(2 - g_y) + softplus(mean_{k != y} g_k - 2)."""
    own = goodness.gather(1, targets[:, None])[:, 0]
    others = (goodness.sum(1) - own) / (goodness.shape[1] - 1)
    return (F.softplus(PVN_THRESHOLD - own) + F.softplus(others - PVN_THRESHOLD)).mean()


def weighted_loss(goodness: Tensor, targets: Tensor) -> Tensor:
    """0.28 cross-entropy + 0.72 PvN."""
    entropy = F.cross_entropy(goodness, targets)
    return CWG_SHARE * entropy + (1 - CWG_SHARE) * positive_versus_negative(goodness, targets)


Competition = Callable[[Tensor, Tensor], Tensor]
"""The loss, from (B, K) goodness and (B,) targets to a 0-d tensor."""

LOSSES: Final[dict[str, Competition]] = {
    "cross-entropy": F.cross_entropy,  # goodness as logits
    "pvn": positive_versus_negative,
    "cwg": weighted_loss,
}
