"""The chain of Forward-Forward's layers where a layer needs nothing from later ones.

Shapes as in `forward_forward`: `B` batch, `D` values of an input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._ff_inference import Inference
from bpfree.algorithms._ff_layers import Parts, learn_readout, read
from bpfree.algorithms._ff_losses import ContrastiveLoss
from bpfree.algorithms._lanes import Lanes
from bpfree.algorithms.learner import Batch, Metrics
from bpfree.algorithms.local_units import LocalUnit, LocalUnits, Signal


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
        parts: the layers, and how a batch becomes rows for them.
        contrast: the loss.
        optimizers: of all layers and of the read-out.
        inference: where scores come from.
    """

    parts: Parts
    contrast: ContrastiveLoss
    optimizers: tuple[Optimizer, ...]
    inference: Inference

    def units(self) -> LocalUnits:
        """The layers, and the read-out behind them."""
        layers = tuple(
            LocalUnit(
                layer.name, (layer.linear, layer.peer), partial(self._learn_layer, index), partial(self._pass, index)
            )
            for index, layer in enumerate(self.parts.layers)
        )
        return LocalUnits(
            units=(*layers, LocalUnit("read-out", tuple(self._heads), self._learn_heads, self._pass_heads)),
            begin=self._begin,
            enter=self._enter,
            end=self._end,
            join=lambda step: step.lanes.join(),
            ask=lambda inputs: inputs,
            offer=lambda inputs: (),
            answer=self._answer,
        )

    @property
    def _heads(self) -> list[nn.Linear]:
        return [layer.head for layer in self.parts.layers if layer.head is not None]

    # -- learning ---------------------------------------------------------------------------------------------

    def _begin(self, batch: Batch) -> Step:
        inputs, targets = batch[0].flatten(1), batch[1]
        lanes = Lanes(inputs.device, 1 + len(self.parts.layers))
        return Step(inputs, targets, self.parts.views.draw(len(inputs)), lanes, [])

    @torch.no_grad()
    def _enter(self, step: Step) -> Signal:
        rows = [self.parts.views.contrast(step.inputs, step.targets, None, step.noise)]
        if self.parts.views.labelled:
            rows.append(self.parts.views.plain(step.inputs))
        return tuple(self.parts.normalizer.of(some) for some in rows)

    @torch.no_grad()
    def _learn_layer(self, index: int, signal: Signal, step: Step) -> tuple[Signal, Metrics]:
        layer, size = self.parts.layers[index], len(step.targets)
        streams = 2 if self.parts.views.labelled else 1
        activity = layer.activate(signal[0])
        goodness = self.parts.goodness.value(activity.hidden)
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
        last = index + 1 == len(self.parts.layers)
        passed = [] if self.parts.views.labelled and last else [self.parts.normalizer.of(activity.hidden)]
        if self.parts.views.labelled:
            passed.append(self.parts.normalizer.of(layer.activate(signal[1]).hidden))
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

    def _pass(self, index: int, signal: Signal, inputs: Tensor) -> Signal:
        """z_{l-1} -> z_l; behind it what was heard of the layers so far. The first layer begins with the inputs."""
        parts, layer = self.parts, self.parts.layers[index]
        activity = layer.activate(signal[0]) if index else self.inference.enter(parts, inputs)
        passed = parts.normalizer.of(activity.hidden)
        return (passed, *signal[1:], *self.inference.hear(parts, layer, activity, passed))

    def _pass_heads(self, signal: Signal, inputs: Tensor) -> Signal:
        return (self.inference.scores(self.parts, signal[1:], len(inputs)),)

    @staticmethod
    def _answer(signal: Signal, inputs: Tensor) -> Tensor:
        scores: Tensor = signal[0]
        return scores
