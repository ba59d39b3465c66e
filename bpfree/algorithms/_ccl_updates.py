"""How a layer of counter-current learning moves: a gradient, shortened if it is too long, and one step of descent.

The gradient of a linear layer's weights is a sum over rows, dW = E^T X with E (n, d_out) and X (n, d_in). Where rows
are few (a feedback layer learns from one per class) and descent is plain, dW is never written out:

    |dW|^2 = sum((E E^T) * (X X^T))          W <- (1 - lr decay) W - lr E^T X
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

THIN: Final = 10
"""A gradient is left in factors if they have this many times fewer rows than its matrix has rows and columns: two
Gram matrices then cost less than to write it, read it for its length, scale it and read it again."""


class Update(ABC):
    """What one layer is about to do.

    Attributes:
        squared_length: squared 2-norm of the gradient of all of the layer's parameters, 0-d, once it is measured.
    """

    squared_length: Tensor | None = None

    def measure(self) -> Tensor:
        """Find out `squared_length`, if it is not known."""
        if self.squared_length is None:
            self.squared_length = self._measured()
        return self.squared_length

    @abstractmethod
    def _measured(self) -> Tensor: ...

    @abstractmethod
    def take(self, factor: Tensor | None) -> None:
        """Change the parameters, by 0-d `factor` times the gradient; None for all of it."""


class WrittenUpdate(Update):
    """A gradient in `.grad` of every parameter, whatever the optimiser.

    Args:
        parameters: of the layer.
        optimizer: of these parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
        self._gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._optimizer = optimizer

    def _measured(self) -> Tensor:
        lengths = [torch.linalg.vector_norm(gradient) for gradient in self._gradients]
        return lengths[0].square() if len(lengths) == 1 else torch.stack(lengths).square().sum()

    def take(self, factor: Tensor | None) -> None:
        if factor is not None:
            for gradient in self._gradients:
                gradient.mul_(factor)
        self._optimizer.step()


class ThinUpdate(Update):
    """Gradient descent by E^T X, which is not written out; `.grad` is left as it is.

    Args:
        linear: W and, if there is one, b.
        errors: E, (n, d_out).
        inputs: X, (n, d_in).
        optimizer: of plain descent; it holds the rate and the decay.
    """

    def __init__(self, linear: nn.Linear, errors: Tensor, inputs: Tensor, optimizer: Optimizer) -> None:
        self._linear, self._optimizer = linear, optimizer
        self._errors, self._inputs = errors.to(linear.weight.dtype), inputs.to(linear.weight.dtype)

    def _measured(self) -> Tensor:
        with torch.autocast(self._errors.device.type, enabled=False):
            grams = [(rows @ rows.T).flatten() for rows in (self._errors, self._inputs)]
        squared = torch.dot(*grams)
        return squared if self._linear.bias is None else squared + self._errors.sum(0).square().sum()

    def take(self, factor: Tensor | None) -> None:
        (group,) = self._optimizer.param_groups
        rate, decay = group["lr"], group["weight_decay"]
        step = self._errors * (rate if factor is None else factor * rate)
        if decay:
            for parameter in self._linear.parameters():
                parameter.mul_(1 - rate * decay)
        weight = self._linear.weight
        torch.addmm(weight, step.T, self._inputs, alpha=-1, out=weight)  # torch counts no operations of addmm_
        if self._linear.bias is not None:
            self._linear.bias.sub_(step.sum(0))


def is_thin(linear: nn.Linear, rows: int) -> bool:
    """Whether a gradient over so many rows is better left in factors."""
    return THIN * rows <= min(linear.weight.shape)


def clipping(groups: Iterable[Sequence[Update]], longest: float) -> Tensor:
    """What to multiply each group of updates with, so that its gradient as a whole is at most `longest` long.

    Returns:
        One factor of at most 1 per group, (groups,).
    """
    measured = [[update.measure() for update in group] for group in groups]
    squared = [parts[0] if len(parts) == 1 else torch.stack(parts).sum() for parts in measured]
    # rounding may leave less than nothing of a gradient whose rows cancel: that is short enough
    return torch.stack(squared).clamp(min=longest**2).rsqrt() * longest
