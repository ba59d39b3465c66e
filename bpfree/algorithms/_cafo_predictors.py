"""Linear predictors side by side, the losses they learn from, and how their answers become one.

Shapes: `L` predictors, `B` batch, `C` classes, `D_j` features of predictor j.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._cafo_ridge import exact_products
from bpfree.algorithms._cross_entropy import softmax_cross_entropy

AGGREGATES: Final = ("sum_prob", "sum_logit", "mean", "last")
ALIGNED: Final = 4
"""Rows of so many float32, 16 bytes, are loaded whole by tensor cores; of ten columns they are loaded one by one."""
COLUMNS: Final = 16
"""Features of a predictor begin at a multiple of so many columns, so that products read them the same, and compute the
same bits, whichever features are packed beside them."""
PROBABILITY_FLOOR: Final = 1e-6
"""Least probability whose logarithm is a score: sparsemax gives exact zeros."""


class Predictor(nn.Module):
    """A linear map from D features to class scores.

    Args:
        width: number of features D.
        classes: number of classes C.
        bias: whether there is a bias.
        exact: compute scores in float32, whatever a run allows: weights in closed form may be large and of opposite
            sign, which does not forgive rounded products.
    """

    def __init__(self, width: int, classes: int, *, bias: bool, exact: bool) -> None:
        super().__init__()
        self.exact = exact
        self.weight = nn.Parameter(torch.zeros(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes)) if bias else None

    @property
    def _filling(self) -> int:
        """Columns of zeros beside those of the classes, in products on a GPU."""
        return -len(self.weight) % ALIGNED if self.weight.is_cuda else 0

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) features -> (B, C) scores."""
        products = exact_products() if self.exact else nullcontext()
        with torch.autocast(features.device.type, enabled=False), products:
            return self.scores(features)

    def scores(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        scores = F.linear(features, F.pad(self.weight, (0, 0, 0, self._filling)))[:, : len(self.weight)]
        return scores if self.bias is None else scores + self.bias

    def gradients(self, features: Tensor, errors: Tensor) -> list[Tensor]:
        """Gradients of weight and bias from (B, D) features and (B, C) errors of the scores."""
        weight = (F.pad(errors, (0, self._filling)).T @ features)[: len(self.weight)]
        return [weight] if self.bias is None else [weight, errors.sum(0)]


class Predictors(nn.Module):
    """L predictors, which share nothing: what one computes does not depend on which others are there.

    Args:
        widths: number of features of each predictor.
        classes: number of classes C.
        bias: whether predictors have a bias.
        exact: see `Predictor`.
    """

    def __init__(self, widths: Sequence[int], classes: int, *, bias: bool, exact: bool) -> None:
        super().__init__()
        self.widths, self.classes = tuple(widths), classes
        self.each = nn.ModuleList(Predictor(width, classes, bias=bias, exact=exact) for width in widths)

    def packed_width(self, members: range) -> int:
        """Columns of the packed features of some of the predictors."""
        return sum(self.widths[number] + -self.widths[number] % COLUMNS for number in members)

    def pack(self, features: Sequence[Tensor]) -> Tensor:
        """(n, D_j) features of some predictors -> (n, packed width), each beginning at a multiple of `COLUMNS`."""
        return torch.cat([F.pad(part, (0, -part.shape[1] % COLUMNS)) for part in features], 1)

    def unpack(self, packed: Tensor, members: range) -> list[Tensor]:
        """What `pack` has made of these predictors' features -> (B, D_j) each, in the precision of the weights.

        Without a copy where that is theirs already.
        """
        parts = packed.split([self.packed_width(range(number, number + 1)) for number in members], 1)
        dtype = next(self.parameters()).dtype
        return [part[:, : self.widths[number]].to(dtype) for number, part in zip(members, parts, strict=True)]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, D_j) features of all predictors -> (L, B, C) scores."""
        return torch.stack([predictor(part) for predictor, part in zip(self.each, features, strict=True)])


class Loss:
    """What a predictor learns from, and what its scores mean."""

    def probabilities(self, scores: Tensor) -> Tensor:
        """(..., C) scores -> class probabilities: the softmax, but of sparsemax predictors."""
        return scores.softmax(-1)


class SquaredError(Loss):
    """Squared error against one-hot targets, which has a closed form."""


class GradientLoss(Loss, ABC):
    """A loss that predictors descend."""

    @abstractmethod
    def losses_and_errors(self, scores: Tensor, target_errors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of each predictor, and its gradient by the scores.

        Args:
            scores: (L, B, C).
            target_errors: (B, C), -onehot(y) / B.

        Returns:
            (L,) losses and (L, B, C) errors (p - onehot(y)) / B.
        """


class CrossEntropy(GradientLoss):
    """Cross-entropy of the softmax."""

    def losses_and_errors(self, scores: Tensor, target_errors: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_cross_entropy(scores, target_errors)


class SparsemaxLoss(GradientLoss):
    """-z_y + 1/2 sum_{j in S} (z_j^2 - tau^2) + 1/2, with the support S and threshold tau of the sparsemax."""

    def probabilities(self, scores: Tensor) -> Tensor:
        return sparsemax(scores)[0]

    def losses_and_errors(self, scores: Tensor, target_errors: Tensor) -> tuple[Tensor, Tensor]:
        probabilities, threshold = sparsemax(scores)
        # z^2 - tau^2 = (z - tau) (z + tau), and the first factor is the probability, zero outside of the support
        support = (probabilities * (scores + threshold)).sum(-1)
        losses = (scores * target_errors).sum((1, 2)) + (support.mean(1) + 1) / 2
        return losses, torch.add(target_errors, probabilities, alpha=1 / scores.shape[1])


def sparsemax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean projection of (..., C) scores on the probability simplex, and its threshold tau, (..., 1).

    Martins and Astudillo, arXiv 1602.02068, algorithm 1.
    """
    descending = scores.sort(-1, descending=True).values
    sums = descending.cumsum(-1)
    ranks = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    support = (1 + ranks * descending > sums).sum(-1, keepdim=True).clamp(min=1)  # the first k; none if a score is nan
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0), threshold


LOSSES: Final[dict[str, type[Loss]]] = {"mse": SquaredError, "ce": CrossEntropy, "sl": SparsemaxLoss}


def aggregate_scores(scores: Tensor, how: str, loss: Loss) -> Tensor:
    """One answer of L predictors.

    Args:
        scores: (L, B, C).
        how: "sum_prob" adds class probabilities, "sum_logit" adds scores, "mean" averages them (the same class, on
            the scale of one predictor), "last" takes the last predictor.
        loss: says what scores mean.

    Returns:
        (B, C); for "sum_prob" the logarithm of the mean probability, so that these are log-probabilities too.
    """
    if how == "last":
        return scores[-1]
    if how == "sum_logit":
        return scores.sum(0)
    if how == "mean":
        return scores.mean(0)
    return loss.probabilities(scores).mean(0).clamp(min=PROBABILITY_FLOOR).log()
