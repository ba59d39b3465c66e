"""What a layer's activity is worth, and what of it the next layer sees.

Shapes: `M` rows (samples, with or without a label written into them), `N` units of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError, unknown_name

GOODNESS: Final = ("sum", "mean", "minus_sum", "minus_mean")
NORMALIZERS: Final = ("rms", "unit")
EPSILON: Final = 1e-30  # keeps a silent layer's normalised activity at zero; a number in single precision too
PEER_DECAY: Final = 0.9
PEER_START: Final = 0.5


@dataclass(frozen=True)
class Goodness:
    """g = c sum_j h_j^2, with c = 1 ("sum"), 1/N ("mean"), or minus that ("minus_sum", "minus_mean").

    Raises:
        UsageError: another name.
    """

    name: str = "sum"

    def __post_init__(self) -> None:
        if self.name not in GOODNESS:
            raise unknown_name("goodness", self.name, GOODNESS)

    def scale(self, width: int) -> float:
        """c of a layer of `width` units: also its goodness when the mean square of its activities is 1, over N."""
        size = 1 / width if self.name.endswith("mean") else 1.0
        return -size if self.name.startswith("minus") else size

    def of(self, activity: Activity) -> Tensor:
        """(M,) goodness, in at least 32 bits."""
        return length_of(activity.hidden).square() * self.scale(activity.hidden.shape[1])


@dataclass(frozen=True)
class Normalizer:
    """z = h / sqrt(mean_j h_j^2 + eps), so that |z|^2 = N ("rms"), or that over sqrt(N), so that |z| = 1 ("unit").

    No mean is subtracted. All that passes is the direction of h, not its length, from which the next layer could read
    off the goodness.

    Raises:
        UsageError: another name.
    """

    name: str = "rms"

    def __post_init__(self) -> None:
        if self.name not in NORMALIZERS:
            raise unknown_name("normalizer", self.name, NORMALIZERS)

    def of(self, rows: Tensor) -> Tensor:
        """h, (M, N) -> z, (M, N)."""
        normalized = F.rms_norm(rows, rows.shape[1:], eps=EPSILON)
        return normalized if self.name == "rms" else normalized * rows.shape[1] ** -0.5

    def divisor(self, length: Tensor, width: int) -> Tensor:
        """(M,) lengths |h| > 0 -> (M, 1), z = h / divisor."""
        return (length * (width**-0.5 if self.name == "rms" else 1.0))[:, None]


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
