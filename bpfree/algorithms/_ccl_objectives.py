"""What is compared at each level where the two networks of counter-current learning meet, with derivatives.

An objective says what the feedback network is fed, and rates level l: the forward activations A = a_l against the
feedback activations B = b_l. It returns the loss and its derivatives by A and by B, neither of them a constant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from bpfree.algorithms._cross_entropy import softmax_cross_entropy
from bpfree.algorithms._whole_batch import WholeBatch

REFERENCE_WIDTH: Final = 256  # of the layers for which the paper's code states the scale of "dot"
ZERO: Final = 1e-8  # a row shorter than this has no direction


@dataclass(frozen=True)
class Rating:
    """A level's loss, 0-d, and its derivatives by A and B; None by what has no weights: the input, the targets."""

    loss: Tensor
    by_forward: Tensor | None
    by_feedback: Tensor | None


@dataclass(frozen=True)
class Asked:
    """What a batch asks for.

    Attributes:
        targets: M, (N, K) 1 where a sample is of a class; or (N, ...) images to be reconstructed.
        kept: (N, 1) 1 for samples that hidden levels learn from and 0 for others, or None for all.
    """

    targets: Tensor
    kept: Tensor | None = None


class Objective(nn.Module, ABC):
    """How levels are rated.

    Attributes:
        flood: above 0, hidden levels leave out samples whose class has a probability above 1 - flood already.
    """

    flood: float = 0.0

    @abstractmethod
    def feedback_input(self, targets: Tensor) -> Tensor:
        """b_L, what the feedback network starts from."""

    @abstractmethod
    def paired(self, feedback: Tensor, targets: Tensor) -> Tensor:
        """Of feedback activations, the one that belongs to each sample."""

    @abstractmethod
    def asked(self, targets: Tensor) -> Asked:
        """Targets of the batch in the form that the ratings need."""

    def flooded(self, asked: Asked, output: Tensor) -> Asked:
        """The same without the samples, for hidden levels, that the network's output a_L is sure of."""
        return asked

    @abstractmethod
    def rate(self, forward: Tensor, feedback: Tensor, asked: Asked, *, at_input: bool) -> Rating:
        """Level l < L.

        Args:
            forward: A.
            feedback: B.
            asked: as `asked` returned it.
            at_input: whether this is level 0, whose A is the input and wants no derivative.
        """

    @abstractmethod
    def rate_output(self, output: Tensor, asked: Asked) -> Rating:
        """Level L: a_L against the targets."""


class ClassObjective(Objective):
    """Classes: A's similarity to the activations of K class templates, regressed onto who belongs to which class.

    M is the (N, K) indicator of classes. The feedback network is fed the identity, one row per class. The output
    learns from cross-entropy.

    Args:
        classes: K.
        flood: see `Objective`.
    """

    templates: Tensor

    def __init__(self, classes: int, flood: float) -> None:
        super().__init__()
        self.flood = flood
        self.register_buffer("templates", torch.eye(classes), persistent=False)

    def feedback_input(self, targets: Tensor) -> Tensor:
        return self.templates

    def paired(self, feedback: Tensor, targets: Tensor) -> Tensor:
        return feedback[targets]

    def asked(self, targets: Tensor) -> Asked:
        return Asked(self.templates[targets])

    def flooded(self, asked: Asked, output: Tensor) -> Asked:
        if not self.flood:
            return asked
        probability = (output.to(asked.targets.dtype).softmax(1) * asked.targets).sum(1, keepdim=True)
        return replace(asked, kept=(probability <= 1 - self.flood).to(asked.targets.dtype))

    def rate(self, forward: Tensor, feedback: Tensor, asked: Asked, *, at_input: bool) -> Rating:
        with torch.autocast(forward.device.type, enabled=False):
            dtype = asked.targets.dtype
            maps = forward.ndim == 4 and forward.is_contiguous(memory_format=torch.channels_last)
            a, b = (_rows(values, maps).to(dtype) for values in (forward, feedback))
            if asked.kept is not None:
                a = a * asked.kept
            loss, by_a, by_b = self.similarity(a, b, asked.targets, by_forward=not at_input)
            if by_a is not None and asked.kept is not None:
                by_a = by_a * asked.kept
        return Rating(
            loss,
            None if by_a is None else _unrolled(by_a, forward, maps),
            _unrolled(by_b, feedback, maps),
        )

    def rate_output(self, output: Tensor, asked: Asked) -> Rating:
        with torch.autocast(output.device.type, enabled=False):
            target_errors = asked.targets * (-1 / len(output))
            return Rating(*softmax_cross_entropy(output.to(asked.targets.dtype), target_errors), None)

    @abstractmethod
    def similarity(
        self, a: Tensor, b: Tensor, indicator: Tensor, *, by_forward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(N, d), (K, d) and M -> the loss and its derivatives by a (or None) and by b."""


class DotObjective(ClassObjective):
    """loss = w mean((A B^T - M)^2), w = 256 s / d: what the paper's code does in networks without convolutions.

    Args:
        classes: K.
        flood: see `Objective`.
        scale: s.
    """

    def __init__(self, classes: int, flood: float, scale: float) -> None:
        super().__init__(classes, flood)
        self.scale = scale

    def similarity(
        self, a: Tensor, b: Tensor, indicator: Tensor, *, by_forward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        weight = REFERENCE_WIDTH * self.scale / a.shape[1]
        k = 2 * weight / indicator.numel()
        slope = torch.addmm(indicator, a, b.T, beta=-k, alpha=k)  # k (A B^T - M)
        loss = torch.dot(slope.flatten(), slope.flatten()) / (2 * k)
        return loss, slope @ b if by_forward else None, slope.T @ a


class CosineObjective(ClassObjective):
    """loss = s mean((P Q^T - M)^2) + r mean((P P^T - I)^2) + r mean((Q Q^T - I)^2), P and Q being A and B with rows of
    length 1: the paper's loss, and its code's in convolutional networks.

    A row of zeros has no direction and takes no part.

    Args:
        classes: K.
        flood: see `Objective`.
        scale: s.
        decorrelation: r, the weight against samples (and templates) that are all alike.
    """

    def __init__(self, classes: int, flood: float, scale: float, decorrelation: float) -> None:
        super().__init__(classes, flood)
        self.scale, self.decorrelation = scale, decorrelation
        self.batch = WholeBatch()

    def similarity(
        self, a: Tensor, b: Tensor, indicator: Tensor, *, by_forward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        p, p_inverse = _directions(a)
        q, q_inverse = _directions(b)
        error = torch.addmm(indicator, p, q.T, beta=-1)
        slope = error * (2 * self.scale / error.numel())
        loss = self.scale * error.square().mean()
        by_p = slope @ q if by_forward else None
        by_q = slope.T @ p
        if self.decorrelation:
            p_loss, by_p = self._decorrelate(p, *self.batch.rows(p), by_p)
            q_loss, by_q_more = self._decorrelate(q, q, 0, by_q)
            assert by_q_more is not None
            loss, by_q = loss + self.decorrelation * (p_loss + q_loss), by_q_more
        by_a = None if by_p is None else _by_rows(p, p_inverse, by_p)
        return loss, by_a, _by_rows(q, q_inverse, by_q)

    def _decorrelate(
        self, p: Tensor, everyone: Tensor, first: int, by_p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """mean((P P^T - I)^2), and `by_p` with its derivative added if there is one.

        Args:
            p: the rows of P of this process.
            everyone: P.
            first: where the former begin in the latter. Means over processes of what they return are those of P.
            by_p: what the derivative is added to.
        """
        error = p @ everyone.T
        error.diagonal(first).sub_(1)
        if by_p is not None:
            by_p = torch.addmm(by_p, error, everyone, alpha=4 * self.decorrelation / error.numel())
        return error.square().mean(), by_p


class ReconstructionObjective(Objective):
    """Autoencoders: H mean((A - B)^2) + H mean((P - Q)^2), as in the paper's code, H being the height of the maps.

    P and Q are A and B with each map centred and scaled to length 1. At both ends, where images meet, there is the
    first term alone. The feedback network is fed the images. Vectors have no maps and H = 1.
    """

    def feedback_input(self, targets: Tensor) -> Tensor:
        return targets

    def paired(self, feedback: Tensor, targets: Tensor) -> Tensor:
        return feedback

    def asked(self, targets: Tensor) -> Asked:
        return Asked(targets)

    def rate(self, forward: Tensor, feedback: Tensor, asked: Asked, *, at_input: bool) -> Rating:
        with torch.autocast(forward.device.type, enabled=False):
            a, b = (values.to(asked.targets.dtype) for values in (forward, feedback))
            loss, by_a = _distance(a, b, _height(a))
            if at_input:
                return Rating(loss, None, -by_a)
            by_b = -by_a
            if a.ndim == 4:
                (p, p_inverse), (q, q_inverse) = (_directions(_centred(values.flatten(2))) for values in (a, b))
                more, by_p = _distance(p, q, _height(a))
                loss = loss + more
                by_a = by_a + _centred(_by_rows(p, p_inverse, by_p)).view(a.shape)
                by_b = by_b + _centred(_by_rows(q, q_inverse, -by_p)).view(a.shape)
        return Rating(loss, by_a, by_b)

    def rate_output(self, output: Tensor, asked: Asked) -> Rating:
        with torch.autocast(output.device.type, enabled=False):
            return Rating(*_distance(output.to(asked.targets.dtype), asked.targets, _height(output)), None)


def _height(values: Tensor) -> int:
    return values.shape[2] if values.ndim == 4 else 1


def _distance(a: Tensor, b: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """weight * mean((A - B)^2), and its derivative by A."""
    difference = a - b
    return weight * difference.square().mean(), difference * (2 * weight / a.numel())


def _centred(rows: Tensor) -> Tensor:
    """(..., d) with mean 0 along the last axis."""
    return rows - rows.mean(-1, keepdim=True)


def _rows(values: Tensor, maps: bool) -> Tensor:
    """(n, ...) -> (n, d), in the order in which channels-last maps lie in memory if that is what they are."""
    return (values.permute(0, 2, 3, 1) if maps else values).flatten(1)


def _unrolled(rows: Tensor, like: Tensor, maps: bool) -> Tensor:
    """The inverse of `_rows`."""
    if not maps:
        return rows.view(like.shape)
    n, channels, height, width = like.shape
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


def _directions(a: Tensor) -> tuple[Tensor, Tensor]:
    """(..., d) with rows of length 1, and (..., 1) one over the lengths that they had; both 0 for rows of zeros."""
    length = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    inverse = torch.where(length > ZERO, 1 / length, 0)
    return a * inverse, inverse


def _by_rows(p: Tensor, inverse: Tensor, by_p: Tensor) -> Tensor:
    """The derivative by A of a loss whose derivative by P = A / |A| is `by_p`."""
    return (by_p - p * (p * by_p).sum(-1, keepdim=True)) * inverse
