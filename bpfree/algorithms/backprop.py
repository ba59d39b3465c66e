"""Back-propagation: the baseline, and the two controls that tell what a local rule's detach is worth.

Paper: Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature 323 (1986);
deep supervision: Lee, Xie, Gallagher, Zhang, Tu, "Deeply-Supervised Nets", 2015, arXiv 1409.5185.

With blocks a_i = f_i(a_{i-1}), a_0 = x, local heads G_i = a_i M_i^T and cross-entropy CE, one step descends

    bp         CE(a_L W^T + b, y)
    bp-ds      CE(a_L W^T + b, y) + w sum_{i=1..L}   CE(G_i, y)      deep supervision
    mf-joint   CE(G_L, y)         + w sum_{i=1..L-1} CE(G_i, y)      Mono-Forward's read-out, global gradients

with the gradient of the whole sum flowing through the whole network. `bp-ds` and `mf-joint` have the heads of
Mono-Forward without its detach (the ablation ladder of Spyra and Dzwinel, PPAM 2026, arXiv 2511.01061).
Shapes: x (B, *input), a_i (B, d_i) or maps, M_i (C, d_i) without bias, W (C, d_L).

Deviations from the paper: none for `bp`. The ladder's weight w is published per configuration but not whether it
multiplies the sum or the mean of the head losses; here the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._optim import OptimizerFactory, centralize_gradients, make_optimizer
from bpfree.algorithms._recompute import recomputed, refuse_noise
from bpfree.algorithms.learner import Batch, Learner, Metrics, Paper, Stage, Support, Trial, accuracy
from bpfree.errors import UsageError, unknown_name
from bpfree.networks.autoencoder import check_reconstructs
from bpfree.networks.blocks import Shape, block_output_shapes
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.graph import Graph
from bpfree.networks.heads import ConvolutionHead, Head, check_pooled

Readout = Literal["linear", "goodness", "conv", "dot"]
READOUTS: Final = ("linear", "goodness", "conv", "dot")

DEEP_SUPERVISION: Final = Paper(
    title="Deeply-Supervised Nets",
    authors="Lee, Xie, Gallagher, Zhang, Tu",
    year=2015,
    arxiv="1409.5185",
    follows="a classifier on every hidden layer, its loss added to that of the read-out",
)
LADDER: Final = Paper(
    title="Energy-Efficient Deep Learning Without Backpropagation",
    authors="Spyra, Dzwinel",
    year=2026,
    arxiv="2511.01061",
    follows="the step MF-Joint of the ablation ladder in the PPAM 2026 version",
)


class Backprop(Learner):
    """Back-propagation through the blocks and a linear read-out.

    Args:
        network: hidden blocks in forward order.
        classes: number of classes C; 0 for the task "autoencode", in which the network returns what has the shape of
            its inputs, there is no read-out, and the loss is the mean squared error.
        lr: learning rate.
        optimizer: "adamw", "adam", "sgd", "momentum", "gd", or a function from parameters to an optimiser.
        momentum: of optimizer=sgd and momentum, 0.9 if left out.
        weight_decay: decay of all weights.
        clip: longest gradient of the whole network allowed, 2-norm; 0 for any.
        centralize: take the mean over inputs off each unit's gradient.
        readout: "linear" is W with bias; "goodness" is Mono-Forward's bias-free M_L. On graphs also "conv", a
            convolution to the class scores, and for pairs of nodes "dot", z_u . z_v of a convolution as wide as a_L.
        auxiliary_weight: weight w of the local heads' losses; 0 has no local heads.
        head_pool: how feature maps reach a linear map: "flatten", "gap" or "adaptive".
        recompute: keep only the blocks' inputs for the backward pass and compute the rest again (gradient
            checkpointing): less memory, one more forward pass, the same bits.
        dropout: probability with which each input of a block or of the read-out is set to zero while training.
        input_shape: shape of one input sample; needed when the first layer is not a `Linear`.

    Raises:
        UsageError: a network or value that does not fit.

    Example:
        >>> blocks = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> learner = Backprop(blocks, classes=3)
        >>> sorted(learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))))
        ['loss']
    """

    paper = Paper(
        title="Learning representations by back-propagating errors",
        authors="Rumelhart, Hinton, Williams",
        year=1986,
        arxiv=None,
        follows="reverse-mode gradient of the cross-entropy through the whole network",
    )
    locality = "network"
    undivided = "the error of a block comes from the blocks behind it, so that each rank would wait for the next one"
    tasks = ("classify", "autoencode")

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        lr: float = 1e-3,
        optimizer: str | OptimizerFactory = "adamw",
        momentum: float | None = None,
        weight_decay: float = 0.0,
        clip: float = 0.0,
        centralize: bool = False,
        readout: Readout = "linear",
        auxiliary_weight: float = 0.0,
        head_pool: str = "flatten",
        recompute: bool = False,
        dropout: float = 0.0,
        input_shape: Shape | None = None,
    ) -> None:
        super().__init__(network, classes, input_shape)
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must lie in [0, 1), got {dropout}")
        if readout not in READOUTS:
            raise unknown_name("readout", readout, READOUTS)
        if not (auxiliary_weight >= 0 and clip >= 0):
            raise UsageError(f"auxiliary_weight and clip must not be negative, got {auxiliary_weight} and {clip}")
        shapes = block_output_shapes(self.network, self.input_shape)
        self.auxiliary_weight = auxiliary_weight
        self.dropout, self.clip, self.centralize, self.recompute = dropout, clip, centralize, recompute
        if recompute:
            refuse_noise(self.network)
        self.readout = self._readout(readout, shapes[-1], head_pool)
        supervised = shapes[:-1] if readout == "goodness" else shapes
        self.heads = nn.ModuleList(
            Head(shape, classes, pool=head_pool) for shape in (supervised if auxiliary_weight > 0 else [])
        )
        check_pooled(head_pool, [head for head in (self.readout, *self.heads) if isinstance(head, Head)])
        self._optimizer = make_optimizer(
            self.parameters(), optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum
        )

    def _readout(self, kind: str, shape: Shape, head_pool: str) -> nn.Module:
        """Maps the last block's output to scores."""
        if self.task == "autoencode":
            if kind != "linear" or head_pool != "flatten" or self.auxiliary_weight:
                raise UsageError("readout, head_pool and auxiliary_weight are for classes, not for task=autoencode")
            check_reconstructs(shape, self.input_shape)
            return nn.Identity()
        if kind in ("linear", "goodness"):
            return Head(shape, self.classes, pool=head_pool, bias=kind == "linear")
        last = self.network[-1]
        if not isinstance(last, GraphBlock):
            raise UsageError(f"the read-out {kind} needs graph convolutions as blocks")
        if kind == "dot" and self.classes != 2:
            raise UsageError(
                f"the read-out dot tells edges from other pairs of nodes, 2 classes, and here are {self.classes}; ask "
                "for links by split=edges, or use readout=conv"
            )
        return ConvolutionHead(last, shape[0], self.classes, pairs=kind == "dot")

    def _dropped(self, signal: Any) -> Any:
        """A tensor's or graph's values after dropout."""
        if not self.dropout:
            return signal
        if isinstance(signal, Graph):
            return signal.with_x(F.dropout(signal.x, self.dropout, self.training))
        return F.dropout(signal, self.dropout, self.training)

    def forward(self, inputs: Any) -> Tensor:
        """(B, *input_shape) or a graph -> (B, C) scores of the read-out, or reconstructions."""
        return self._outputs(inputs)[1]

    def stages(self) -> tuple[Stage, ...]:
        """One stage: everything learns together."""
        return (self.joint_stage("all", (self._optimizer,), self._update),)

    @property
    def variant(self) -> str:
        """Empty for plain back-propagation."""
        parts = [f"auxiliary weight {self.auxiliary_weight:g}"] * bool(self.heads) + ["recompute"] * self.recompute
        return ", ".join(parts)

    def _outputs(self, inputs: Any) -> tuple[list[Tensor], Tensor]:
        """Scores of the local heads (there may be none) and of the read-out."""
        local = []
        signal = inputs
        for index, block in enumerate(self.network):
            signal = self._block_outputs(block, self._dropped(signal))
            if index < len(self.heads):
                local.append(self.heads[index](signal))
        return local, self.readout(self._dropped(signal))

    def _block_outputs(self, block: nn.Module, signal: Any) -> Any:
        return recomputed(block, signal) if self.recompute and torch.is_grad_enabled() else block(signal)

    @torch.enable_grad()
    def _update(self, batch: Batch) -> Metrics:
        inputs, targets = batch
        local, scores = self._outputs(inputs)
        losses = [F.cross_entropy(goodness, targets) for goodness in local]
        loss = F.cross_entropy(scores, targets) if self.task == "classify" else F.mse_loss(scores, targets)
        total = torch.add(loss, torch.stack(losses).sum(), alpha=self.auxiliary_weight) if losses else loss
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.centralize:
            centralize_gradients(self.parameters())
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip, foreach=True)
        self._optimizer.step()
        metrics = {"loss": loss.detach()}
        metrics.update({f"block {index} loss": head_loss.detach() for index, head_loss in enumerate(losses)})
        return metrics

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Accuracy of each local head; empty for plain back-propagation."""
        inputs, targets = batch
        local, _ = self._outputs(inputs)
        return {f"block {index} accuracy": accuracy(goodness, targets) for index, goodness in enumerate(local)}

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Any network that PyTorch can differentiate."""
        return Support(True)

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing of its own: back-propagation has only what every rule has."""
        return {}
