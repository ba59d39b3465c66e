"""Local losses on the goodness of positive and negative rows, with their derivatives, for all layers at once.

A loss takes (L, 2B) goodness, B positive columns and then the B negative ones of the same samples, and returns the
(L,) losses and dL_l/dg_l, (L, 2B). No layer's derivative has a term of another layer's loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._ff_goodness import Goodness
from bpfree.algorithms._options import chosen, option_name
from bpfree.errors import UsageError

SYMBA_ALPHA: Final = 4.0


class ContrastiveLoss(nn.Module, ABC):
    """A loss of positive against negative rows.

    Attributes:
        hears: whose goodness is part of a layer's loss besides its own: "none", "preceding" layers', or all "others".
    """

    hears: str = "none"

    @abstractmethod
    def forward(self, goodness: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """(L, 2B) goodness -> (L,) losses, (L, 2B) derivatives; those of consecutive layers, from layer `first` on."""


@dataclass(frozen=True)
class Heard:
    """What gamma_l is made of.

    Attributes:
        total: (L, M) goodness -> (L, M) goodness with gamma.
        thresholds: thresholds of each layer's own goodness -> those of what `total` gives.
    """

    total: Callable[[Tensor], Tensor]
    thresholds: Callable[[list[float]], list[float]]


HEARD: Final[dict[str, Heard]] = {
    "none": Heard(lambda goodness: goodness, lambda own: own),
    "others": Heard(
        lambda goodness: goodness.sum(0, keepdim=True).expand_as(goodness), lambda own: [sum(own)] * len(own)
    ),
    "preceding": Heard(lambda goodness: goodness.cumsum(0), lambda own: list(accumulate(own))),
}


class ThresholdLoss(ContrastiveLoss):
    """mean over 2B rows of softplus(-s (g_l + gamma_l - theta_l) / T), s = 1 for positive rows and -1 for negative.

    gamma_l = 0 is Hinton's loss. In layer collaboration (Lorberbom et al., arXiv 2305.12393) it is the sum of the
    other layers' goodness on the same row, or of the preceding layers', and a constant to layer l.

    Args:
        thresholds: theta_l, one per layer.
        temperature: T.
        hears: what gamma is made of, "none", "others" or "preceding".
    """

    theta: Tensor

    def __init__(self, thresholds: Sequence[float], temperature: float, hears: str = "none") -> None:
        super().__init__()
        if not temperature > 0:
            raise UsageError(f"temperature must be positive, got {temperature}")
        self.temperature, self.hears = temperature, hears
        self.register_buffer("theta", torch.tensor(thresholds)[:, None], persistent=False)

    def forward(self, goodness: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        total = HEARD[self.hears].total(goodness)
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


@dataclass(frozen=True)
class LossOptions:
    """What a user may choose about a loss by its name; None is its default.

    Attributes:
        theta: threshold of every layer; None: the goodness of all layers that count, at a mean square activity of 1.
        temperature: T; None: 1.
        alpha: of SymBa; None: 4.
    """

    theta: float | None = None
    temperature: float | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class NamedLoss:
    """A loss that has a name.

    Attributes:
        build: from what it is a loss of, the widths of the layers, and the options.
        unused: options that it does not have.
    """

    build: Callable[[Goodness, Sequence[int], LossOptions], ContrastiveLoss]
    unused: tuple[str, ...]


def _threshold_loss(hears: str, goodness: Goodness, widths: Sequence[int], options: LossOptions) -> ContrastiveLoss:
    usual = HEARD[hears].thresholds([goodness.at_unit_activity(width) for width in widths])
    thresholds = usual if options.theta is None else [options.theta] * len(widths)
    return ThresholdLoss(thresholds, 1.0 if options.temperature is None else options.temperature, hears)


def _symba_loss(goodness: Goodness, widths: Sequence[int], options: LossOptions) -> ContrastiveLoss:
    return SymbaLoss(SYMBA_ALPHA if options.alpha is None else options.alpha)


LOSSES: Final[dict[str, NamedLoss | ContrastiveLoss]] = {
    "original": NamedLoss(partial(_threshold_loss, "none"), ("alpha",)),
    "symba": NamedLoss(_symba_loss, ("theta", "temperature")),
    "collaboration": NamedLoss(partial(_threshold_loss, "others"), ("alpha",)),
    "collaboration-preceding": NamedLoss(partial(_threshold_loss, "preceding"), ("alpha",)),
}


def contrastive_loss(
    given: str | ContrastiveLoss, goodness: Goodness, widths: Sequence[int], options: LossOptions
) -> ContrastiveLoss:
    """The loss of that name, or the caller's own.

    Args:
        given: "original", "symba", "collaboration" (gamma from all other layers), "collaboration-preceding", or an
            object.
        goodness: what it is a loss of.
        widths: N_l of every layer.
        options: of a loss with a name.

    Raises:
        UsageError: another name, a value that is not positive, or one that the loss does not have.
    """
    named = chosen("loss", given, LOSSES, ContrastiveLoss)
    unused = named.unused if isinstance(named, NamedLoss) else tuple(vars(options))
    for option in unused:
        if getattr(options, option) is not None:
            raise UsageError(f"the loss {option_name(given)} has no {option}")
    return named.build(goodness, widths, options) if isinstance(named, NamedLoss) else named
