"""The layers of Forward-Forward and its softmax read-out.

Shapes as in `forward_forward`: `B` batch, `C` classes, `M` rows, `N` units of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._cross_entropy import encode_targets, softmax_cross_entropy
from bpfree.algorithms._ff_goodness import (
    Activity,
    Goodness,
    Normalizer,
    PeerNormalization,
    SquaredGoodness,
    length_of,
)
from bpfree.algorithms._ff_negatives import LabelledViews, Views
from bpfree.algorithms._optim import set_gradients
from bpfree.networks.kernels import triton_kernels

KERNELS: Final = "bpfree.algorithms._ff_kernels"


@dataclass(frozen=True, eq=False)
class Layer:
    """Everything that one layer's update touches.

    Attributes:
        name: shown in metrics.
        linear: W_l and b_l.
        goodness: g.
        peer: m_l.
        head: its part of the softmax read-out, U_l (C, N_l), or None.
    """

    name: str
    linear: nn.Linear
    goodness: Goodness
    peer: PeerNormalization
    head: nn.Linear | None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What a stage of this layer alone trains."""
        return (self.linear, self.peer) if self.head is None else (self.linear, self.peer, self.head)

    def activate(self, signal: Tensor) -> Activity:
        """z_{l-1}, (M, N_{l-1}) -> the layer's activity."""
        return Activity(signal, F.relu(F.linear(signal, self.linear.weight, self.linear.bias)))

    def learn(self, activity: Activity, slope: Tensor) -> None:
        """Set the gradients of W_l and b_l.

        Args:
            activity: of B positive rows and the B negative ones.
            slope: dL/dg, (2B,).
        """
        errors, sums = self._errors(activity.hidden, slope)
        gradients = [errors.T @ activity.inputs, sums]
        set_gradients(self.linear.parameters(), gradients[: 1 if self.linear.bias is None else 2])

    def _errors(self, hidden: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """dL/da of (2B, N) activities, and its sums over rows, (N,)."""
        # no subclass, which may have errors of its own
        if type(self.goodness) is SquaredGoodness and (kernels := self._kernels(hidden)) is not None:
            return self.peer.fused_errors(kernels, hidden, slope, 2 * self.goodness.scale(hidden.shape[1]))
        errors = self.goodness.errors(hidden, slope).to(hidden.dtype)
        if not self.goodness.zero_at_silence:
            errors = errors.masked_fill(hidden <= 0, 0)
        if self.peer.strength:
            positive = len(hidden) // 2
            errors[:positive] += self.peer(hidden[:positive]).to(hidden.dtype)
        return errors, errors.sum(0)

    def _kernels(self, hidden: Tensor) -> ModuleType | None:
        """The kernels, if they can work on these activities."""
        suits = hidden.is_cuda and hidden.is_contiguous() and hidden.dtype.itemsize <= 4
        return triton_kernels(KERNELS) if suits and self.peer.mean.dtype == torch.float32 else None


@dataclass(frozen=True, eq=False)
class Parts:
    """What rows go through.

    Attributes:
        layers: in forward order.
        views: how a batch becomes rows.
        goodness: g.
        normalizer: of what a layer sees.
        first: the first layer that counts when classes are rated.
        classes: C.
    """

    layers: tuple[Layer, ...]
    views: Views
    goodness: Goodness
    normalizer: Normalizer
    first: int
    classes: int

    def run(self, rows: Tensor, depth: int) -> Iterator[Activity]:
        """The first `depth` layers on (M, W) rows, one after another."""
        return self.run_from(self.layers[0].activate(self.normalizer.of(rows)), depth)

    def run_from(self, first: Activity, depth: int) -> Iterator[Activity]:
        """The same, behind the first layer's activity."""
        yield (activity := first)
        for layer in self.layers[1:depth]:
            yield (activity := layer.activate(self.normalizer.of(activity.hidden)))


def labelled_activity(layer: Layer, views: LabelledViews, normalizer: Normalizer, inputs: Tensor) -> Activity:
    """The first layer for every label of every sample, (B C, N).

    The product with the image is computed once where a label only adds its column, |z_0| being the same for all of
    them.

    Args:
        layer: the first one.
        views: how labels are written.
        normalizer: of z_0.
        inputs: (B, ...).
    """
    linear, strength = layer.linear, views.strength
    blank = views.blank(inputs.flatten(1))
    length = torch.sqrt(length_of(blank).square() + strength**2)
    divisor = normalizer.divisor(length, blank.shape[1])
    if divisor is None:
        return layer.activate(normalizer.of(views.every(inputs.flatten(1))))
    divisor = divisor.to(blank.dtype)
    image = F.linear(blank / divisor, linear.weight, linear.bias)
    label = (strength * linear.weight[:, : views.classes].T) / divisor[:, None]  # (B, C, N)
    return Activity(blank, F.relu(image[:, None] + label.to(image.dtype)).flatten(0, 1))


def read(heads: Sequence[nn.Linear], seen: Sequence[Tensor]) -> Tensor:
    """(B, C) logits of the read-out: the sum of its parts, each of what it sees, (B, N_l)."""
    with torch.autocast(seen[0].device.type, enabled=False):
        logits: Tensor = heads[0](seen[0])
        for head, signal in zip(heads[1:], seen[1:], strict=True):
            logits = logits + head(signal)
    return logits


def learn_readout(logits: Tensor, parts: Iterable[tuple[nn.Linear, Tensor]], targets: Tensor) -> Tensor:
    """Set the gradients of some parts of the read-out, (softmax(logits) - onehot(y))^T z_l / B; return the loss, 0-d.

    Args:
        logits: (B, C), of all parts.
        parts: those that learn, with what they see.
        targets: (B,).
    """
    loss, errors = softmax_cross_entropy(logits, encode_targets(targets, logits.shape[1], logits.dtype))
    with torch.autocast(logits.device.type, enabled=False):
        for head, signal in parts:
            set_gradients(head.parameters(), [errors.T @ signal])
    return loss
