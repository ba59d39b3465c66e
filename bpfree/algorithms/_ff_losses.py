"""Local losses on the goodness of positive and negative rows, with their derivatives, for all layers at once.

A loss takes (L, 2B) goodness, B positive columns and then the B negative ones of the same samples, and returns the
(L,) losses and dL_l/dg_l, (L, 2B). No layer's derivative has a term of another layer's loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._ff_goodness import Goodness
from bpfree.errors import UsageError, unknown_name

LOSSES: Final = ("original", "symba", "collaboration", "collaboration-preceding")
SYMBA_ALPHA: Final = 4.0


class ContrastiveLoss(nn.Module):
    """A loss of positive against negative rows; also what turns goodness into class scores."""

    @abstractmethod
    def forward(self, goodness: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """(L, 2B) goodness -> (L,) losses, (L, 2B) derivatives; those of consecutive layers, from layer `first` on."""


class ThresholdLoss(ContrastiveLoss):
    """mean over 2B rows of softplus(-s (g_l + gamma_l - theta_l) / T), s = 1 for positive rows and -1 for negative.

    gamma_l = 0 is Hinton's loss. In layer collaboration (Lorberbom et al., arXiv 2305.12393) it is the sum of the
    other layers' goodness on the same row, or of the preceding layers', and a constant to layer l.

    Args:
        thresholds: theta_l, one per layer.
        temperature: T.
        gamma: "none", "others" or "preceding".
    """

    theta: Tensor

    def __init__(self, thresholds: Sequence[float], temperature: float, gamma: str) -> None:
        super().__init__()
        if not temperature > 0:
            raise UsageError(f"temperature must be positive, got {temperature}")
        self.temperature, self.gamma = temperature, gamma
        self.register_buffer("theta", torch.tensor(thresholds)[:, None], persistent=False)

    def forward(self, goodness: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        total = goodness
        if self.gamma == "others":
            total = goodness.sum(0, keepdim=True).expand_as(goodness)
        elif self.gamma == "preceding":
            total = goodness.cumsum(0)
        margin = (total - self.theta[first : first + len(goodness)]) / self.temperature
        positive, negative = margin.chunk(2, 1)
        margin = torch.cat([positive, -negative], 1)
        rows = margin.shape[1]
        slope = torch.sigmoid(-margin) / (rows * self.temperature)
        positive, negative = slope.chunk(2, 1)
        return F.softplus(-margin).mean(1), torch.cat([-positive, negative], 1)


class SymbaLoss(ContrastiveLoss):
    """mean over B pairs of softplus(-alpha (g+ - g-)) (Lee and Song, arXiv 2303.08418): no threshold.

    Args:
        alpha: 4 in public re-implementations, for mean goodness.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        if not alpha > 0:
            raise UsageError(f"alpha must be positive, got {alpha}")
        self.alpha = alpha

    def forward(self, goodness: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        positive, negative = goodness.chunk(2, 1)
        margin = self.alpha * (positive - negative)
        slope = torch.sigmoid(-margin) * (self.alpha / margin.shape[1])
        return F.softplus(-margin).mean(1), torch.cat([-slope, slope], 1)


def contrastive_loss(
    name: str,
    goodness: Goodness,
    widths: Sequence[int],
    theta: float | None,
    temperature: float | None,
    alpha: float | None,
) -> ContrastiveLoss:
    """The loss called `name`.

    Args:
        name: "original", "symba", "collaboration" (gamma from all other layers) or "collaboration-preceding".
        goodness: what it is a loss of.
        widths: N_l of every layer.
        theta: threshold of every layer; None: the goodness of all layers that count, at a mean square activity of 1.
        temperature: T; None: 1.
        alpha: of SymBa; None: 4.

    Raises:
        UsageError: another name, a value that is not positive, or one that the loss does not have.
    """
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)
    unused = {"theta": theta, "temperature": temperature} if name == "symba" else {"alpha": alpha}
    for option, value in unused.items():
        if value is not None:
            raise UsageError(f"the loss {name} has no {option}")
    if name == "symba":
        return SymbaLoss(SYMBA_ALPHA if alpha is None else alpha)
    own = [goodness.scale(width) * width for width in widths]
    gamma = {"original": "none", "collaboration": "others"}.get(name, "preceding")
    usual = {
        "none": own,
        "others": [sum(own)] * len(own),
        "preceding": [sum(own[: index + 1]) for index in range(len(own))],
    }[gamma]
    thresholds = usual if theta is None else [theta] * len(own)
    return ThresholdLoss(thresholds, 1.0 if temperature is None else temperature, gamma)
