"""A graph on the device, served whole: the counterpart of `Batches` for networks on graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.data.batches import Batches, Draw, Whole
from bpfree.errors import DataError
from bpfree.metrics import roc_auc
from bpfree.networks.graph import Graph

VALIDATE_EVERY: Final = 2


class GraphBatches:
    """One part of a graph's nodes, or of its node pairs, asked about in the whole graph at every step.

    An epoch is a fixed number of steps on all of them, so that validation, patience and the cap on epochs mean
    the same as for samples in batches.

    Args:
        graph: the graph, on the device, asking about M nodes or pairs.
        targets: (M,) int64 classes; for pairs 1 where there is an edge and 0 elsewhere.
        steps: full-batch steps per epoch.

    Raises:
        DataError: targets that do not belong to the question.
    """

    augmentation: ClassVar[str] = "none"

    def __init__(self, graph: Graph, targets: Tensor, *, steps: int = VALIDATE_EVERY) -> None:
        if targets.dtype != torch.int64 or targets.shape != (len(graph),):
            raise DataError(
                f"the graph asks about {len(graph)} nodes or pairs, targets are {tuple(targets.shape)} {targets.dtype}"
            )
        self.graph, self.targets, self.steps = graph, targets.to(graph.device), steps

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def device(self) -> torch.device:
        """Where the graph lives."""
        return self.graph.device

    @property
    def nbytes(self) -> int:
        """Bytes that the graph and targets take on the device."""
        return self.graph.nbytes + self.targets.nbytes

    @property
    def metric(self) -> str:
        """What `hits` counts: accuracy of nodes, or the area under the ROC curve of pairs."""
        return "accuracy" if self.graph.nodes.ndim == 1 else "ROC-AUC"

    @property
    def criterion(self) -> str:
        """What `losses` adds up."""
        return "cross-entropy"

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(M, C) scores -> the sum of the cross-entropies."""
        return F.cross_entropy(scores, targets, reduction="sum")

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps of one epoch; the batch size does not matter."""
        return self.steps if len(self) else 0

    def step_size(self, batch_size: int) -> int:
        """How many nodes or pairs one step learns from: all."""
        return len(self)

    def stage(self, count: int, batch_size: int) -> Whole:
        """The batches of up to `count` consecutive steps."""
        return Whole(self.graph, self.targets)

    def bytes_per_step(self, batch_size: int) -> int:
        """What staging one more step takes: nothing, since every step meets the same tensors."""
        return 0

    def draw(self, *seed: int) -> Draw:
        """An epoch's order: there is none to choose."""
        return Draw(torch.empty(0, dtype=torch.int64))

    def epoch(self, draw: Draw, batch_size: int, first_batch: int = 0) -> Iterator[tuple[Graph, Tensor]]:
        """Everything once, unless it has been seen already."""
        if not first_batch:
            yield self.graph, self.targets

    def in_order(self, batch_size: int) -> Iterator[tuple[Graph, Tensor]]:
        """Everything once."""
        yield self.graph, self.targets

    @torch.no_grad()
    def map(self, function: Callable[[Graph], Graph], batch_size: int) -> GraphBatches:
        """The same question put to what `function` makes of the graph, computed once."""
        return GraphBatches(function(self.graph), self.targets, steps=self.steps)

    def hits(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(M, C) scores -> `metric` times M, so that it adds up as the number of right answers does."""
        if self.metric == "accuracy":
            return (scores.argmax(1) == targets).sum()
        return roc_auc(scores[:, 1] - scores[:, 0], targets) * len(targets)


AnyBatches = Batches | GraphBatches
