"""Learning-rate schedules and the stopping rule: the same choice for every arm of a comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from bpfree.errors import unknown_name

SCHEDULES: Final = ("constant", "cosine", "cosine-epochs", "step", "cooldown")
STEP_MILESTONES: Final = (0.5, 0.75)  # fractions of the epochs at which "step" divides the rate
STEP_FACTOR: Final = 0.1
WARMUP_START: Final = 0.01 / 0.8  # where the warm-up of "cosine-epochs" begins: the rate 0.01 of a base rate of 0.8


def learning_rate_factor(schedule: str, epoch: float, epochs: int, warmup_epochs: float = 0.0) -> float:
    """What the base learning rate is multiplied with at a moment of training.

    A linear warm-up comes first, if any; then "constant" stays at 1, "cosine" falls from 1 to 0 at the end
    of `epochs`, "step" is divided by 10 after 1/2 and after 3/4 of `epochs`, and "cooldown" falls linearly from 1 at
    1/2 of `epochs` to 0 at their end.

    "cosine-epochs" is the schedule of InfoPro and MAN, constant within an epoch e = 1, .., E and with a warm-up of its
    own: c(e) = (1 + cos(pi e / E)) / 2, but c(e) (e - 1) / W + s (W + 1 - e) / W in the first W epochs, s = 1/80. In
    the last epoch it is 0.

    Args:
        schedule: "constant", "cosine", "cosine-epochs", "step" or "cooldown".
        epoch: epochs done so far, with the fraction of the current one.
        epochs: the cap on epochs.
        warmup_epochs: length of the warm-up.

    Raises:
        UsageError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise unknown_name("learning-rate schedule", schedule, SCHEDULES)
    if schedule == "cosine-epochs":
        number = math.floor(epoch) + 1
        cosine = 0.5 * (1 + math.cos(math.pi * min(number / epochs, 1.0)))
        if number > warmup_epochs:
            return cosine
        return (cosine * (number - 1) + WARMUP_START * (warmup_epochs + 1 - number)) / warmup_epochs
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    if schedule == "cosine":
        done = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if schedule == "step":
        return STEP_FACTOR ** sum(epoch >= milestone * epochs for milestone in STEP_MILESTONES)
    if schedule == "cooldown":
        return min(1.0, max(0.0, 2 * (1 - epoch / epochs)))
    return 1.0


@dataclass
class EarlyStopping:
    """Stop when the validation loss has not improved for `patience` epochs in a row; remember the best epoch.

    Attributes:
        patience: epochs without improvement that end training; None never stops.
        min_delta: how much lower than the best a loss must be to count as better.
        best_loss: lowest validation loss so far.
        best_epoch: when it was seen (counted from 0); -1 before the first.
        waited: epochs since then.
    """

    patience: int | None
    min_delta: float = 0.0
    best_loss: float = math.inf
    best_epoch: int = -1
    waited: int = 0

    def update(self, epoch: int, loss: float) -> bool:
        """Take note of an epoch's validation loss; True if it is the best so far."""
        if loss < self.best_loss - self.min_delta:
            self.best_loss, self.best_epoch, self.waited = loss, epoch, 0
            return True
        self.waited += 1
        return False

    @property
    def stop(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience
