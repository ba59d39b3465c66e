"""Figures of merit that never read from the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def roc_auc(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve: how often a positive outscores a negative, ties counting half.

    By ranks (Mann and Whitney 1947): with R the sum of the positives' ranks, P positives and Q negatives,
    (R - P (P + 1) / 2) / (P Q). Tied scores share the mean of their ranks. Never reads from the device.

    Args:
        scores: (M,) floating point, higher for likelier positives.
        targets: (M,) 1 for positives, 0 for negatives; both must occur.

    Returns:
        0-d float64, NaN without positives or without negatives.
    """
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, scores, right=False)
    up_to = torch.searchsorted(ordered, scores, right=True)
    ranks = (below + 1 + up_to).double() / 2
    positive = targets.double()
    positives = positive.sum()
    negatives = len(targets) - positives
    return ((ranks * positive).sum() - positives * (positives + 1) / 2) / (positives * negatives)


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of two representations of the same samples.

    Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019,
    arXiv 1905.00414, equation 4 with linear kernels: tr(K H L H) over the product of |H K H| and |H L H|.

    Args:
        a: (n, d) floating point.
        b: (n, e) floating point.

    Returns:
        0-d in [0, 1], 1 for representations that differ by a rotation and a factor; NaN if one is constant.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    return F.cosine_similarity((a @ a.T).flatten(), (b @ b.T).flatten(), dim=0)
