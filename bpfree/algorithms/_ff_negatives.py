"""Positive and negative data: what the rows look like that a layer is to tell apart.

Labels are C columns in front of an input's D' other values, either over its first C values ("overlay", as Hinton's) or
before all of them ("concat"). Without labels, negatives are hybrids of two images.

Shapes: `B` batch, `C` classes, `D` values of an input, `W` = D columns of a row, or D + C with "concat".
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape
from bpfree.networks.streams import Stream

LABELS: Final = ("overlay", "concat")
BLURS: Final = 10  # "repeatedly" in the paper
THRESHOLD: Final = 0.5


class Views(nn.Module, ABC):
    """How a batch becomes rows.

    Attributes:
        appended: columns that a row has besides an input's values.
        labelled: whether rows carry a label, so that goodness can rate classes.
        asks_readout: whether negative rows depend on what the softmax read-out says.
    """

    appended: int = 0
    labelled: bool = False
    asks_readout: bool = False

    @abstractmethod
    def plain(self, inputs: Tensor) -> Tensor:
        """(B, D) -> (B, W) rows that say nothing of a class: what the softmax read-out sees."""

    @abstractmethod
    def draw(self, size: int) -> Tensor:
        """All that is random in the negative rows of a batch of `size`; the next call draws anew."""

    @abstractmethod
    def contrast(self, inputs: Tensor, targets: Tensor, logits: Tensor | None, noise: Tensor) -> Tensor:
        """B positive rows and then the B negative ones of the same samples, (2B, W).

        Args:
            inputs: (B, D).
            targets: (B,), the classes.
            logits: (B, C), what the softmax read-out makes of `plain(inputs)`; None where rows carry no label.
            noise: what `draw` has drawn.
        """


class WrongLabels(ABC):
    """Which wrong class a negative row shows.

    Attributes:
        asks_readout: whether it depends on what the softmax read-out says.
    """

    asks_readout: ClassVar[bool] = False

    @abstractmethod
    def draw(self, size: int, classes: int, stream: Stream) -> Tensor:
        """All that is random in the choice for a batch of `size`; the next call draws anew."""

    @abstractmethod
    def choose(self, targets: Tensor, labels: Tensor, logits: Tensor | None, noise: Tensor) -> Tensor:
        """(B,) classes, each other than its target.

        Args:
            targets: (B,), the classes.
            labels: (C,), 0 to C - 1.
            logits: (B, C), what the softmax read-out makes of the input with the neutral label; None unless it is asked
                or known anyway.
            noise: what `draw` has drawn.
        """


class LikelyLabels(WrongLabels):
    """ "hard": as softmax(logits) without the target, the largest of logits plus Gumbel noise."""

    asks_readout = True

    def draw(self, size: int, classes: int, stream: Stream) -> Tensor:
        """(B, C) float64 of Gumbel's distribution."""
        return -(-stream.uniform((size, classes), torch.float64).log()).log()

    def choose(self, targets: Tensor, labels: Tensor, logits: Tensor | None, noise: Tensor) -> Tensor:
        assert logits is not None
        return (logits + noise).masked_fill_(targets[:, None] == labels, -torch.inf).argmax(1)


class UniformLabels(WrongLabels):
    """ "random": all wrong classes alike."""

    def draw(self, size: int, classes: int, stream: Stream) -> Tensor:
        """(B,) uniform integers below C - 1."""
        return (stream.uniform((size,), torch.float64) * (classes - 1)).long()

    def choose(self, targets: Tensor, labels: Tensor, logits: Tensor | None, noise: Tensor) -> Tensor:
        return noise + (noise >= targets)


class LabelledViews(Views):
    """The true class in the positive row, a wrong one in the negative row, 1/C of each in the plain row.

    Args:
        features: D.
        classes: C.
        label: "overlay" or "concat".
        strength: s, the value that marks a class.
        wrong: which wrong classes are shown.
        stream: where they are drawn from.

    Raises:
        UsageError: unknown `label`, strength not positive, or fewer values than classes to overlay.
    """

    labelled = True
    candidates: Tensor

    def __init__(
        self, features: int, classes: int, label: str, strength: float, wrong: WrongLabels, stream: Stream
    ) -> None:
        super().__init__()
        if label not in LABELS:
            raise unknown_name("label", label, LABELS)
        if not strength > 0:
            raise UsageError(f"label_strength must be positive, got {strength}")
        if label == "overlay" and features < classes:
            raise UsageError(f"{classes} labels do not fit over {features} values; use label=concat")
        self.classes, self.strength, self.wrong, self.stream = classes, strength, wrong, stream
        self.asks_readout = wrong.asks_readout
        self.appended = classes if label == "concat" else 0
        self.register_buffer("candidates", torch.arange(classes), persistent=False)

    def blank(self, inputs: Tensor) -> Tensor:
        """(B, D) -> (B, W), the label's columns zero; a copy."""
        if self.appended:
            return F.pad(inputs, (self.appended, 0))
        rows = inputs.clone()
        rows[:, : self.classes] = 0
        return rows

    def plain(self, inputs: Tensor) -> Tensor:
        rows = self.blank(inputs)
        rows[:, : self.classes] = self.strength / self.classes
        return rows

    def every(self, inputs: Tensor) -> Tensor:
        """(B, D) -> (B C, W) rows, each input with each of the labels."""
        rows = self.blank(inputs)[:, None].repeat(1, self.classes, 1)
        rows[:, self.candidates, self.candidates] = self.strength
        return rows.flatten(0, 1)

    def draw(self, size: int) -> Tensor:
        return self.wrong.draw(size, self.classes, self.stream)

    def contrast(self, inputs: Tensor, targets: Tensor, logits: Tensor | None, noise: Tensor) -> Tensor:
        rows = self.blank(inputs).repeat(2, 1)
        shown = torch.cat([targets, self.wrong.choose(targets, self.candidates, logits, noise)])
        rows[:, : self.classes] = (shown[:, None] == self.candidates) * self.strength
        return rows


class HybridViews(Views):
    """The image itself, and mask * image + (1 - mask) * another image: long-range structure is all that is wrong.

    A mask is random bits, blurred ten times with [1/4, 1/2, 1/4] along both axes, and cut at 1/2: large patches. The
    other image is the batch's next.

    Args:
        shape: (channels, height, width) of an image.
        stream: where masks are drawn from.

    Raises:
        UsageError: inputs are not images.
    """

    blur_rows: Tensor
    blur_columns: Tensor

    def __init__(self, shape: Shape, stream: Stream) -> None:
        super().__init__()
        if len(shape) != 3:
            raise UsageError(
                f"hybrid negatives are made of images (channels, height, width), inputs have shape {shape}"
            )
        self.shape, self.stream = shape, stream
        for name, size in (("blur_rows", shape[1]), ("blur_columns", shape[2])):
            self.register_buffer(name, blur_matrix(size).float(), persistent=False)

    def draw(self, size: int) -> Tensor:
        """(B, 1, H, W) masks of zeros and ones."""
        bits = self.stream.uniform((size, *self.shape[1:]), torch.float64) < THRESHOLD
        with torch.autocast(bits.device.type, enabled=False):
            blurred = self.blur_rows @ bits.to(self.blur_rows.dtype) @ self.blur_columns.T
        return (blurred > THRESHOLD)[:, None]

    def plain(self, inputs: Tensor) -> Tensor:
        return inputs

    def contrast(self, inputs: Tensor, targets: Tensor, logits: Tensor | None, noise: Tensor) -> Tensor:
        images = inputs.unflatten(1, self.shape)
        hybrids = torch.where(noise, images, images.roll(1, 0))
        return torch.cat([inputs, hybrids.flatten(1)])


NEGATIVES: Final[dict[str, WrongLabels | type[HybridViews]]] = {
    "hard": LikelyLabels(),
    "random": UniformLabels(),
    "hybrid": HybridViews,
}


def check_views(views: Views, shape: Shape, classes: int, name: str) -> None:
    """Whether views that were handed in can be made of inputs of this shape; tried on a copy of them.

    Raises:
        UsageError: they cannot, or rows are not as wide as the views say.
    """
    views = copy.deepcopy(views)
    device = next((buffer.device for buffer in views.buffers()), torch.device("cpu"))
    features = torch.Size(shape).numel()
    inputs, targets = torch.zeros(2, features, device=device), torch.zeros(2, dtype=torch.long, device=device)
    logits = torch.zeros(2, classes, device=device) if views.asks_readout else None
    try:
        rows = views.contrast(inputs, targets, logits, views.draw(2))
    except (RuntimeError, IndexError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{name} negatives cannot be made of inputs of shape {tuple(shape)}: {reason}") from error
    if rows.shape != (wanted := (4, features + views.appended)):
        raise UsageError(f"{name} negatives of 2 inputs have shape {tuple(rows.shape)}, and should have {wanted}")


def blur_matrix(size: int) -> Tensor:
    """(size, size) float64: ten times [1/4, 1/2, 1/4] along an axis, with the border's values repeated outside."""
    once = torch.diag(torch.full((size,), 0.5, dtype=torch.float64))
    for place in range(size):
        for neighbour in (place - 1, place + 1):
            once[place, min(max(neighbour, 0), size - 1)] += 0.25
    return torch.linalg.matrix_power(once, BLURS)
