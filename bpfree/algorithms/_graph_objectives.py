"""What a graph layer's output is trained for, and what it says about the nodes asked about.

An objective gives the local `loss` of the rows that a layout names, and the `evidence` of one layer, (M, C), which adds
up over layers and is turned into `scores` at the end.

Shapes: `C` classes, `M` nodes or pairs asked about, `d` width, `K` views.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.algorithms._graph_labels import Layout
from bpfree.networks.heads import pair_scores

SYMBA_ALPHA: Final = 4.0  # Lee and Song, "SymBa", 2023, arXiv 2303.08418


class Objective(ABC):
    """A local loss and what it reads out."""

    @abstractmethod
    def loss(self, h: Tensor, layout: Layout, targets: Tensor) -> Tensor:
        """(rows, d) -> 0-d."""

    @abstractmethod
    def evidence(self, h: Tensor, layout: Layout) -> Tensor:
        """(rows, d) -> (M, C)."""

    @abstractmethod
    def scores(self, evidence: Tensor) -> Tensor:
        """Summed evidence -> (M, C) class scores."""


class _Classifier(Objective):
    """Softmax over logits: cross-entropy, and probabilities that are added up."""

    @abstractmethod
    def logits(self, h: Tensor, layout: Layout) -> Tensor:
        """(rows, d) -> (M, C)."""

    def loss(self, h: Tensor, layout: Layout, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(h, layout).to(torch.promote_types(h.dtype, torch.float32)), targets)

    def evidence(self, h: Tensor, layout: Layout) -> Tensor:
        return self.logits(h, layout).to(torch.promote_types(h.dtype, torch.float32)).softmax(1)

    def scores(self, evidence: Tensor) -> Tensor:
        return (evidence / evidence.sum(1, keepdim=True)).clamp_min(torch.finfo(evidence.dtype).tiny).log()


@dataclass(frozen=True)
class Prototypes(_Classifier):
    """S = H_asked H_virtual^T / tau: the virtual nodes' embeddings are the class prototypes."""

    classes: int
    tau: float

    def logits(self, h: Tensor, layout: Layout) -> Tensor:
        return h[: -self.classes] @ h[-self.classes :].T / self.tau


class InnerProducts(_Classifier):
    """s_uv = z_u . z_v is the logit of an edge between u and v."""

    def logits(self, h: Tensor, layout: Layout) -> Tensor:
        return pair_scores(layout.with_x(h))


@dataclass(frozen=True)
class PairGoodness(_Classifier):
    """q_uv = sum_d (z_u z_v)_d^2 is the goodness of an edge, q - theta its logit.

    loss: mean over edges of softplus(theta - q) + mean over other pairs of softplus(q - theta)
    """

    theta: float

    def logits(self, h: Tensor, layout: Layout) -> Tensor:
        first, second = layout.with_x(h).ends
        goodness = (first * second).square().sum(1)
        return torch.stack([torch.zeros_like(goodness), goodness - self.theta], 1)

    def loss(self, h: Tensor, layout: Layout, targets: Tensor) -> Tensor:
        margin = self.logits(h, layout)[:, 1]
        edge = targets.to(margin.dtype)
        real = (F.softplus(-margin) * edge).sum() / edge.sum()
        return real + (F.softplus(margin) * (1 - edge)).sum() / (1 - edge).sum()


@dataclass(frozen=True)
class Goodness(Objective):
    """q = sum_d h_d^2, high in the positive view and low in the negative ones; rows are K = C views of M nodes.

    loss "ff":    mean_i softplus(theta - q_i^+) + mean_ij softplus(q_ij^- - theta)
    loss "symba": mean_ij log(1 + exp(-alpha (q_i^+ - q_ij^-)))
    """

    classes: int
    theta: float
    symba: bool

    def loss(self, h: Tensor, layout: Layout, targets: Tensor) -> Tensor:
        q = h.square().sum(1).unflatten(0, (self.classes, -1))
        positive, negative = q[:1], q[1:]
        if self.symba:
            return F.softplus(-SYMBA_ALPHA * (positive - negative)).mean()
        return F.softplus(self.theta - positive).mean() + F.softplus(negative - self.theta).mean()

    def evidence(self, h: Tensor, layout: Layout) -> Tensor:
        return (h.square().mean(1) - self.theta).unflatten(0, (self.classes, -1)).T

    def scores(self, evidence: Tensor) -> Tensor:
        return evidence
