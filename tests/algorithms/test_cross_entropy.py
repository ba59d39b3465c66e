"""Cross-entropy in closed form against PyTorch's own and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bpfree.algorithms._cross_entropy import encode_targets, softmax_cross_entropy

F64 = torch.float64


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_value_and_gradient_are_those_of_autograd(lead: tuple[int, ...]) -> None:
    scores = (5 * torch.randn(*lead, 7, 4, dtype=F64)).requires_grad_()
    targets = torch.randint(4, (7,))
    losses, errors = softmax_cross_entropy(scores.detach(), encode_targets(targets, 4, F64))
    one_by_one = [F.cross_entropy(part, targets) for part in scores.reshape(-1, 7, 4)]
    (gradient,) = torch.autograd.grad(sum(one_by_one), scores)
    torch.testing.assert_close(losses.flatten(), torch.stack(one_by_one).detach())
    assert losses.shape == lead
    torch.testing.assert_close(errors, gradient)


def test_scores_that_leave_nothing_to_the_other_classes() -> None:
    """softmax(1000, 0, 0) = (1, 0, 0): the loss of another class is 1000, of this one 0, and nothing overflows."""
    scores = torch.tensor([[1000.0, 0.0, 0.0], [1000.0, 0.0, 0.0]])
    loss, errors = softmax_cross_entropy(scores, encode_targets(torch.tensor([0, 2]), 3, torch.float32))
    assert loss.item() == 500
    assert errors.tolist() == [[0, 0, 0], [0.5, 0, -0.5]]


def test_targets_are_encoded_once_for_all() -> None:
    assert encode_targets(torch.tensor([1, 0]), 3, F64).tolist() == [[0, -0.5, 0], [-0.5, 0, 0]]
