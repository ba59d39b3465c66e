"""The layers and the softmax read-out of Forward-Forward, and their chain where a layer needs nothing from later ones.

Shapes as in `forward_forward`: `B` batch, `C` classes, `M` rows, `N` units of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._ff_goodness import Activity, Goodness, Normalizer, PeerNormalization, length_of
from bpfree.algorithms._ff_losses import ContrastiveLoss
from bpfree.algorithms._ff_negatives import LabelledViews, Views
from bpfree.algorithms._lanes import Lanes
from bpfree.algorithms._optim import set_gradients
from bpfree.algorithms.learner import Batch, Metrics
from bpfree.algorithms.local_units import LocalUnit, LocalUnits, Signal
from bpfree.algorithms.mono_forward import encode_targets


@dataclass(frozen=True, eq=False)
class Layer:
    """Everything that one layer's update touches.

    Attributes:
        name: shown in metrics.
        linear: W_l and b_l.
        scale: c of its goodness.
        peer: m_l.
        head: its part of the softmax read-out, U_l (C, N_l), or None.
    """

    name: str
    linear: nn.Linear
    scale: float
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
        hidden = activity.hidden
        errors = hidden * (2 * self.scale * slope)[:, None].to(hidden.dtype)
        if self.peer.strength:
            positive = len(hidden) // 2
            errors[:positive] += self.peer(hidden[:positive]).to(hidden.dtype)
        gradients = [errors.T @ activity.inputs, errors.sum(0)]
        set_gradients(self.linear.parameters(), gradients[: 1 if self.linear.bias is None else 2])


def labelled_activity(layer: Layer, views: LabelledViews, normalizer: Normalizer, inputs: Tensor) -> Activity:
    """The first layer for every label of every sample, (B C, N).

    The product with the image is computed once: a label only adds its column, since |z_0| is the same for all of them.

    Args:
        layer: the first one.
        views: how labels are written.
        normalizer: of z_0.
        inputs: (B, ...).
    """
    linear, strength = layer.linear, views.strength
    blank = views.blank(inputs.flatten(1))
    length = torch.sqrt(length_of(blank).square() + strength**2)
    divisor = normalizer.divisor(length, blank.shape[1]).to(blank.dtype)
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
    target_errors = encode_targets(targets, logits.shape[1], logits.dtype)
    log_probabilities = F.log_softmax(logits, 1)
    errors = torch.add(target_errors, log_probabilities.exp(), alpha=1 / len(targets))
    with torch.autocast(logits.device.type, enabled=False):
        for head, signal in parts:
            set_gradients(head.parameters(), [errors.T @ signal])
    return (log_probabilities * target_errors).sum()


@dataclass(frozen=True, eq=False)
class Step:
    """What the layers of a step share.

    Attributes:
        inputs: (B, D).
        targets: (B,).
        noise: what is random in the negative rows.
        lanes: side streams of the updates.
        kept: what must stay referenced until they are joined.
    """

    inputs: Tensor
    targets: Tensor
    noise: Tensor
    lanes: Lanes
    kept: list[Any]


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers whose losses are of their own goodness, on negatives that no layer has a say in, and the read-out.

    A layer hands on z_l of the contrasted rows, z_l of the plain rows where the read-out has rows of its own, and what
    the read-out sees of the layers so far.

    Attributes:
        layers: in forward order.
        views: how a batch becomes rows.
        goodness: g.
        normalizer: of what a layer sees.
        contrast: the loss.
        optimizers: of all layers and of the read-out.
        first: the first layer whose goodness counts.
        by_goodness: whether scores are goodness, not the read-out's logits.
    """

    layers: tuple[Layer, ...]
    views: Views
    goodness: Goodness
    normalizer: Normalizer
    contrast: ContrastiveLoss
    optimizers: tuple[Optimizer, ...]
    first: int
    by_goodness: bool

    def units(self) -> LocalUnits:
        """The layers, and the read-out behind them."""
        layers = tuple(
            LocalUnit(
                layer.name, (layer.linear, layer.peer), partial(self._learn_layer, index), partial(self._pass, index)
            )
            for index, layer in enumerate(self.layers)
        )
        return LocalUnits(
            units=(*layers, LocalUnit("read-out", tuple(self._heads), self._learn_heads, self._pass_heads)),
            begin=self._begin,
            enter=self._enter,
            end=self._end,
            join=lambda step: step.lanes.join(),
            ask=lambda inputs: inputs,
            offer=self._offer,
            answer=self._answer,
        )

    @property
    def _heads(self) -> list[nn.Linear]:
        return [layer.head for layer in self.layers if layer.head is not None]

    # -- learning ---------------------------------------------------------------------------------------------

    def _begin(self, batch: Batch) -> Step:
        inputs, targets = batch[0].flatten(1), batch[1]
        lanes = Lanes(inputs.device, 1 + len(self.layers))
        return Step(inputs, targets, self.views.draw(len(inputs)), lanes, [])

    @torch.no_grad()
    def _enter(self, step: Step) -> Signal:
        rows = [self.views.contrast(step.inputs, step.targets, None, step.noise)]
        if self.views.labelled:
            rows.append(self.views.plain(step.inputs))
        return tuple(self.normalizer.of(some) for some in rows)

    @torch.no_grad()
    def _learn_layer(self, index: int, signal: Signal, step: Step) -> tuple[Signal, Metrics]:
        layer, size = self.layers[index], len(step.targets)
        streams = 2 if self.views.labelled else 1
        activity = layer.activate(signal[0])
        goodness = self.goodness.of(activity)
        (loss,), (slope,) = self.contrast(goodness[None], index)
        step.kept.append((activity, slope))
        with step.lanes.lane(1 + index):
            layer.learn(activity, slope)
        means = goodness.unflatten(0, (2, size)).mean(1)
        metrics = {
            f"{layer.name} loss": loss,
            f"{layer.name} positive goodness": means[0],
            f"{layer.name} negative goodness": means[1],
        }
        last = index + 1 == len(self.layers)
        passed = [] if self.views.labelled and last else [self.normalizer.of(activity.hidden)]
        if self.views.labelled:
            passed.append(self.normalizer.of(layer.activate(signal[1]).hidden))
        heard = signal[streams:] if layer.head is None else (*signal[streams:], passed[-1][:size])
        return (heard if last else (*passed, *heard)), metrics

    @torch.no_grad()
    def _learn_heads(self, signal: Signal, step: Step) -> tuple[Signal, Metrics]:
        seen = self._seen(signal)
        logits = read(self._heads, seen)
        step.kept.append((seen, logits))
        with step.lanes.lane(0):
            loss = learn_readout(logits, zip(self._heads, seen, strict=True), step.targets)
        return (), {"read-out loss": loss}

    def _seen(self, parts: Signal) -> list[Tensor]:
        return [part.to(head.weight.dtype) for part, head in zip(parts, self._heads, strict=True)]

    def _end(self, step: Step, members: range) -> Metrics:
        for optimizer in self.optimizers:
            optimizer.step()  # of the layers that have gradients
        return {}

    # -- answering --------------------------------------------------------------------------------------------

    def _offer(self, inputs: Tensor) -> Signal:
        return () if self.by_goodness else (self.normalizer.of(self.views.plain(inputs.flatten(1))),)

    def _pass(self, index: int, signal: Signal, inputs: Tensor) -> Signal:
        """z_{l-1} -> z_l; behind it the goodness of the layers so far, or what the read-out sees of them."""
        layer = self.layers[index]
        if self.by_goodness and index == 0:
            assert isinstance(self.views, LabelledViews)
            activity = labelled_activity(layer, self.views, self.normalizer, inputs)
        else:
            activity = layer.activate(signal[0])
        passed = self.normalizer.of(activity.hidden)
        if self.by_goodness:
            return (passed, *signal[1:], self.goodness.of(activity))
        return (passed, *signal[1:]) if layer.head is None else (passed, *signal[1:], passed)

    def _pass_heads(self, signal: Signal, inputs: Tensor) -> Signal:
        return signal[1:] if self.by_goodness else (read(self._heads, self._seen(signal[1:])),)

    def _answer(self, signal: Signal, inputs: Tensor) -> Tensor:
        if self.by_goodness:
            return torch.stack(signal).unflatten(1, (len(inputs), -1))[self.first :].sum(0)
        logits: Tensor = signal[0]
        return logits
