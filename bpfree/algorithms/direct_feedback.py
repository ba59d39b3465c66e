"""Direct feedback alignment: the output's error reaches every block through fixed random weights.

Paper: Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", NIPS 2016, arXiv 1609.01596,
equations 7 and 8. With blocks a_l = f_l(a_{l-1}), read-out s = a_L W^T + b and cross-entropy, per batch:

    e = (softmax(s) - onehot(y)) / B        (B, C)
    dW = e^T a_L,  db = sum_B e             the read-out, by its own gradient
    da_l = e B_l                            (B, d_l), in place of the true gradient of a_l; B_l (C, d_l) fixed
    the parameters of block l descend the vector-Jacobian product of f_l with da_l

Nothing is sent backwards from block to block, but every block waits for the error of the whole network: it is not a
local rule, and its locality says so. On graphs a_l are the rows of the nodes asked about; the error is spread to their
neighbours by the block's own convolution only.

Deviations from the paper: B_l is normal with variance 1 / C (the paper tunes uniform ranges by hand).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._optim import OptimizerFactory, make_optimizer, set_gradients, trained
from bpfree.algorithms.learner import Batch, Channel, Learner, Metrics, Paper, Stage, Support, Trial
from bpfree.networks.blocks import Shape, block_output_shapes
from bpfree.networks.graph import Graph
from bpfree.networks.heads import Head

OUTPUT_ERROR: Final = Channel("output error", "the error of the whole network, through fixed random weights")


class DirectFeedback(Learner):
    """Direct feedback alignment over any sequence of blocks.

    Args:
        network: hidden blocks in forward order.
        classes: number of classes C.
        lr: learning rate.
        optimizer: "adam", "adamw", "sgd", or a function from parameters to an optimiser.
        weight_decay: decay of all weights.
        input_shape: shape of one input sample; needed when the first layer does not tell it.

    Raises:
        UsageError: a network or value that does not fit.

    Example:
        >>> learner = DirectFeedback(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), classes=3)
        >>> sorted(learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))))
        ['loss']
    """

    paper = Paper(
        title="Direct Feedback Alignment Provides Learning in Deep Neural Networks",
        authors="Nokland",
        year=2016,
        arxiv="1609.01596",
        follows="equations 7 and 8",
    )
    locality = "network"
    undivided = "every block learns from the output's error, which is known when the last block has answered"
    channels = (OUTPUT_ERROR,)

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        lr: float = 1e-3,
        optimizer: str | OptimizerFactory = "adam",
        weight_decay: float = 0.0,
        input_shape: Shape | None = None,
    ) -> None:
        super().__init__(network, classes, input_shape)
        shapes = block_output_shapes(self.network, self.input_shape)
        self.readout = Head(shapes[-1], classes, bias=True)
        for index, shape in enumerate(shapes):
            self.register_buffer(f"feedback_{index}", draw_feedback(classes, shape))
        self._optimizer = make_optimizer(self.parameters(), optimizer, lr=lr, weight_decay=weight_decay)

    def forward(self, inputs: Any) -> Tensor:
        """(B, *input_shape) or a graph -> (B, C) scores of the read-out."""
        signal = inputs
        for block in self.network:
            signal = block(signal)
        return self.readout(signal)

    def stages(self) -> tuple[Stage, ...]:
        """One stage: everything learns from the same error."""
        return (self.joint_stage("all", (self._optimizer,), self._update),)

    @property
    def variant(self) -> str:
        """There is one."""
        return ""

    def _update(self, batch: Batch) -> Metrics:
        feedback = [getattr(self, f"feedback_{index}") for index in range(len(self.network))]
        loss = set_feedback_gradients(list(self.network), self.readout, feedback, batch)
        self._optimizer.step()
        return {"loss": loss}

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Nothing of its own: blocks have no heads."""
        return {}

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Any network that PyTorch can differentiate."""
        return Support(True)

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing of its own."""
        return {}


def draw_feedback(classes: int, shape: Shape) -> Tensor:
    """B_l, (C, *shape), normal with variance 1 / C."""
    return torch.randn(classes, *shape) / classes**0.5


@torch.enable_grad()
def set_feedback_gradients(
    blocks: Sequence[nn.Module], readout: Head, feedback: Sequence[Tensor | None], batch: Batch
) -> Tensor:
    """Set the gradients of all blocks and of the read-out from one batch, and return the loss.

    Args:
        blocks: f_1..f_L.
        readout: W and b.
        feedback: B_1..B_L, each (C, *shape of a_l); None in the last place gives the last block the gradient that
            the read-out sends, which is local to the two.
        batch: (B, ...) inputs or a graph, and (B,) targets.
    """
    signal, targets = batch
    outputs = []
    for block in blocks:
        signal = block(signal.detach())  # a graph of its own for each block
        outputs.append(signal.answers if isinstance(signal, Graph) else signal)
    attached = list(blocks[-1:]) if feedback[-1] is None else []  # learn by the loss itself
    scores = readout(outputs[-1] if attached else outputs[-1].detach())
    loss = F.cross_entropy(scores, targets)
    directly = trained(readout, *attached)
    error, *gradients = torch.autograd.grad(loss, [scores, *directly])
    set_gradients(directly, gradients)
    for block, output, weights in zip(blocks, outputs, feedback, strict=True):
        parameters = trained(block)
        if weights is not None and parameters:  # else the user has frozen them all
            towards = torch.tensordot(error, weights.to(error.dtype), 1).to(output.dtype)
            set_gradients(parameters, torch.autograd.grad(output, parameters, towards))
    return loss.detach()
