"""What a layer's activity is worth, and what of it the next layer sees.

Shapes: `M` rows (samples, with or without a label written into them), `N` units of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError

EPSILON: Final = 1e-30  # keeps a silent layer's normalised activity at zero; a number in single precision too
PEER_DECAY: Final = 0.9
PEER_START: Final = 0.5


class Goodness(ABC):
    """g(h), with the derivative that a layer's update in closed form needs.

    Attributes:
        zero_at_silence: whether dg/dh_j is 0 wherever h_j is, so that ReLU's derivative needs no mask.
    """

    zero_at_silence: ClassVar[bool] = False

    @abstractmethod
    def value(self, hidden: Tensor) -> Tensor:
        """h, (M, N) -> g, (M,), in at least 32 bits."""

    @abstractmethod
    def errors(self, hidden: Tensor, slope: Tensor) -> Tensor:
        """dL/dh = dL/dg dg/dh, (M, N), from h and dL/dg, (M,).

        What it is for units that are silent, h = 0, does not count unless `zero_at_silence` promises zeros.
        """

    @abstractmethod
    def at_unit_activity(self, width: int) -> float:
        """g of a layer of `width` units whose activities have a mean square of 1: the usual threshold."""


@dataclass(frozen=True)
class SquaredGoodness(Goodness):
    """g = c sum_j h_j^2, with c = 1, or 1/N for the mean; times -1 if positive data are to be quiet.

    Attributes:
        average: take the mean over units.
        sign: 1 or -1.
    """

    zero_at_silence = True

    average: bool = False
    sign: float = 1.0

    def scale(self, width: int) -> float:
        """c of a layer of `width` units."""
        return self.sign / width if self.average else self.sign

    def value(self, hidden: Tensor) -> Tensor:
        return length_of(hidden).square() * self.scale(hidden.shape[1])

    def errors(self, hidden: Tensor, slope: Tensor) -> Tensor:
        return hidden * (2 * self.scale(hidden.shape[1]) * slope)[:, None].to(hidden.dtype)

    def at_unit_activity(self, width: int) -> float:
        return self.scale(width) * width


GOODNESS: Final[dict[str, Goodness]] = {
    "sum": SquaredGoodness(),
    "mean": SquaredGoodness(average=True),
    "minus_sum": SquaredGoodness(sign=-1.0),
    "minus_mean": SquaredGoodness(average=True, sign=-1.0),
}


class Normalizer(ABC):
    """What of a layer's activity the next one sees: nothing from which it could read off the goodness."""

    @abstractmethod
    def of(self, rows: Tensor) -> Tensor:
        """h, (M, N) -> z, (M, N)."""

    @abstractmethod
    def divisor(self, length: Tensor, width: int) -> Tensor | None:
        """(M,) lengths |h| > 0 -> (M, 1) with z = h / divisor; None if z is not h over a function of its length.

        With it the first layer's product with an image is computed once for all labels.
        """


class RootMeanSquare(Normalizer):
    """z = h / sqrt(mean_j h_j^2 + eps), so that |z|^2 = N. No mean is subtracted."""

    def of(self, rows: Tensor) -> Tensor:
        return F.rms_norm(rows, rows.shape[1:], eps=EPSILON)

    def divisor(self, length: Tensor, width: int) -> Tensor:
        return (length * width**-0.5)[:, None]


class UnitLength(Normalizer):
    """z = h / sqrt(sum_j h_j^2 + N eps), so that |z| = 1. No mean is subtracted."""

    def of(self, rows: Tensor) -> Tensor:
        return F.rms_norm(rows, rows.shape[1:], eps=EPSILON) * rows.shape[1] ** -0.5

    def divisor(self, length: Tensor, width: int) -> Tensor:
        return length[:, None]


NORMALIZERS: Final[dict[str, Normalizer]] = {"rms": RootMeanSquare(), "unit": UnitLength()}


@dataclass(frozen=True, eq=False)
class Activity:
    """One layer on a batch.

    Attributes:
        inputs: z_{l-1}, (M, N_{l-1}).
        hidden: h_l, (M, N_l).
    """

    inputs: Tensor
    hidden: Tensor


def length_of(rows: Tensor) -> Tensor:
    """(M, N) -> (M,) Euclidean lengths, in at least 32 bits."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))


class PeerNormalization(nn.Module):
    """Pulls each unit's mean activity m_j on positive data towards the layer's average, so that none dies or rules.

    m <- 0.9 m + 0.1 mean_B(h), from 0.5; every positive row's dL/da_j gets lambda (m_j - mean(m)) / B, whether or not
    the unit is silent on that row: this is what wakes silent units.

    Args:
        width: N.
        strength: lambda, 0.03 in Hinton's code.

    Raises:
        UsageError: a negative strength.
    """

    mean: Tensor

    def __init__(self, width: int, strength: float) -> None:
        super().__init__()
        if strength < 0:
            raise UsageError(f"peer_normalization must not be negative, got {strength}")
        self.strength = strength
        self.register_buffer("mean", torch.full((width,), PEER_START))

    @torch.no_grad()
    def forward(self, positive: Tensor) -> Tensor:
        """(B, N) activities on positive data -> (N,), what is added to every positive row of dL/da; moves m."""
        self.mean.lerp_(positive.mean(0).to(self.mean.dtype), 1 - PEER_DECAY)
        return (self.mean - self.mean.mean()) * (self.strength / len(positive))

    def fused_errors(self, kernels: ModuleType, hidden: Tensor, slope: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """The same with `_ff_kernels`, in what a layer of squared goodness learns by: moves m.

        Args:
            kernels: `_ff_kernels`.
            hidden: h of the B positive and the B negative rows, (2B, N).
            slope: dL/dg, (2B,).
            factor: h slope factor is dL/dh.

        Returns:
            dL/da, (2B, N), and its sums over rows, (N,).
        """
        mean, pull = None, 0.0
        if self.strength:
            positive, mean = hidden[: len(hidden) // 2], self.mean
            kernels.move_means(positive, mean, 1 - PEER_DECAY)
            pull = self.strength / len(positive)
        found: tuple[Tensor, Tensor] = kernels.squared_errors(hidden, slope.contiguous(), factor, mean, pull)
        return found
