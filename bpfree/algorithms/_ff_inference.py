"""How Forward-Forward answers: by the goodness of every label in turn, or by a read-out of the layers.

Shapes: `B` batch, `C` classes, `M` rows, `N` units of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor

from bpfree.algorithms._ff_goodness import Activity
from bpfree.algorithms._ff_layers import Layer, Parts, labelled_activity, read
from bpfree.algorithms._ff_negatives import LabelledViews


class Inference(ABC):
    """What rows go through the layers when classes are to be told, and how scores come from what each layer says.

    Attributes:
        of_labels: whether rows carry labels.
        of_readout: whether it asks the softmax read-out, which has no part in a layer that does not count.
    """

    of_labels: ClassVar[bool] = False
    of_readout: ClassVar[bool] = False

    @abstractmethod
    def enter(self, parts: Parts, inputs: Tensor) -> Activity:
        """(B, ...) inputs -> the first layer's activity."""

    @abstractmethod
    def hear(self, parts: Parts, layer: Layer, activity: Activity, passed: Tensor) -> tuple[Tensor, ...]:
        """What counts of a layer: any tensors, always as many.

        Args:
            parts: what rows go through.
            layer: one of its layers.
            activity: of that layer; of the first one `hidden` alone, as z_0 need not be made for every label.
            passed: z_l, (M, N).
        """

    @abstractmethod
    def scores(self, parts: Parts, heard: Sequence[Tensor], size: int) -> Tensor:
        """What was heard of the first layers, in their order, and B -> (B, C) scores."""


class LabelGoodness(Inference):
    """ "goodness": each label in turn, by the goodness of the layers that count, added up."""

    of_labels = True

    def enter(self, parts: Parts, inputs: Tensor) -> Activity:
        assert isinstance(parts.views, LabelledViews)
        return labelled_activity(parts.layers[0], parts.views, parts.normalizer, inputs)

    def hear(self, parts: Parts, layer: Layer, activity: Activity, passed: Tensor) -> tuple[Tensor, ...]:
        return (parts.goodness.value(activity.hidden),)

    def scores(self, parts: Parts, heard: Sequence[Tensor], size: int) -> Tensor:
        first = min(parts.first, len(heard) - 1)  # there may be no other layer yet
        return torch.stack(list(heard)).unflatten(1, (size, -1))[first:].sum(0)


class SoftmaxReadout(Inference):
    """ "softmax": logits of the read-out, on one row that says nothing of a class."""

    of_readout = True

    def enter(self, parts: Parts, inputs: Tensor) -> Activity:
        return parts.layers[0].activate(parts.normalizer.of(parts.views.plain(inputs.flatten(1))))

    def hear(self, parts: Parts, layer: Layer, activity: Activity, passed: Tensor) -> tuple[Tensor, ...]:
        return () if layer.head is None else (passed,)

    def scores(self, parts: Parts, heard: Sequence[Tensor], size: int) -> Tensor:
        heads = [layer.head for layer in parts.layers if layer.head is not None][: len(heard)]
        if not heads:  # only the first layer is there, and it is not read
            return parts.layers[0].linear.weight.new_zeros(size, parts.classes)
        return read(heads, [signal.to(head.weight.dtype) for head, signal in zip(heads, heard, strict=True)])


INFERENCES: Final[dict[str, Inference]] = {"goodness": LabelGoodness(), "softmax": SoftmaxReadout()}


@torch.no_grad()
def answer(inference: Inference, parts: Parts, inputs: Tensor, depth: int) -> Tensor:
    """(B, ...) inputs -> (B, C) scores by the first `depth` layers."""
    heard: list[Tensor] = []
    activity = inference.enter(parts, inputs)
    for index, layer in enumerate(parts.layers[:depth]):
        passed = parts.normalizer.of(activity.hidden)
        heard += inference.hear(parts, layer, activity, passed)
        if index + 1 < depth:
            activity = parts.layers[index + 1].activate(passed)
    return inference.scores(parts, heard, len(inputs))
