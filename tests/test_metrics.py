"""ROC-AUC against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bpfree.metrics import roc_auc


def by_definition(scores: np.ndarray, targets: np.ndarray) -> float:
    """How often a positive outscores a negative, over all pairs; ties count half."""
    positive, negative = scores[targets == 1][:, None], scores[targets == 0][None, :]
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


@pytest.mark.parametrize("values", [2, 5, 1000])
def test_roc_auc_is_its_definition(values: int) -> None:
    draw = np.random.default_rng(values)
    scores, targets = draw.integers(values, size=300) / values, draw.integers(2, size=300)
    ours = roc_auc(torch.as_tensor(scores), torch.as_tensor(targets)).item()
    assert ours == pytest.approx(by_definition(scores, targets), rel=1e-12)


def test_extremes() -> None:
    scores, targets = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([0, 0, 1, 1])
    assert roc_auc(scores, targets).item() == 1
    assert roc_auc(-scores, targets).item() == 0
    assert roc_auc(torch.ones(4), targets).item() == 0.5
    assert roc_auc(scores, torch.ones(4, dtype=torch.int64)).isnan()
