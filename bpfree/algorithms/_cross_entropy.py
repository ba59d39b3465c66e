"""Cross-entropy of the softmax in closed form: its value and its gradient by the scores, without autograd.

Shapes: `B` samples, `C` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode_targets(targets: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """-onehot(y) / B, (B, C): the part of the gradient that does not depend on scores, once for all that share y."""
    encoded = torch.zeros(len(targets), classes, dtype=dtype, device=targets.device)
    return encoded.scatter_(1, targets[:, None], -1 / len(targets))


def softmax_cross_entropy(scores: Tensor, target_errors: Tensor) -> tuple[Tensor, Tensor]:
    """mean_B -log softmax(z)_y, and its gradient (softmax(z) - onehot(y)) / B.

    Args:
        scores: z, (.., B, C): of one classifier, or of several on the same samples.
        target_errors: (B, C), see `encode_targets`.

    Returns:
        (..) losses, 0-d for one classifier, and (.., B, C) gradients.
    """
    log_probabilities = scores.log_softmax(-1)
    losses = (log_probabilities * target_errors).sum((-2, -1))
    return losses, torch.add(target_errors, log_probabilities.exp(), alpha=1 / scores.shape[-2])
