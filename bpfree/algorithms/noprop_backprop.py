"""The baseline of the NoProp paper: its blocks in a chain, trained end to end by back-propagation.

Paper: Li, Teh, Pascanu, arXiv 2503.24322, the baseline of its experiments. Blocks as in NoProp-DT, learned gates k_t:

    z_0 ~ N(0, I)                                       (B, d)
    uhat_t = softmax(block_t(x, z_{t-1})) W_E           t = 1..T
    z_t = (1 - k_t) z_{t-1} + k_t uhat_t                k_t = tanh(w_t), w_t a number
    loss = -log p_out(y | z_T)                          through all blocks

Deviations from the paper: where w_t starts is not given; here at 1 (k = 0.76), nor where p_out starts; see
`_noprop_parts.Readout`. W_E and the gates do not decay. Noise comes from streams as in `noprop.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._lanes import Lanes, check_lanes
from bpfree.algorithms._noprop_parts import (
    BlockNoise,
    EmbeddingKind,
    Embeddings,
    Readout,
    ReadoutKind,
    SampleNoise,
    Shared,
    blocks_of,
    embedding_width,
    radial_width,
)
from bpfree.algorithms._optim import OptimizerFactory, make_optimizer, parameters_of, set_gradients, trained
from bpfree.algorithms.learner import (
    Batch,
    Learner,
    Metrics,
    Paper,
    Stage,
    Support,
    Trial,
    accuracy,
    check_classes,
    evaluation_mode,
)
from bpfree.errors import UsageError
from bpfree.networks.blocks import Shape, as_blocks, children_of, sample_shape
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.noprop import BRANCH_WIDTH, Denoiser
from bpfree.networks.streams import Stream


class NoPropBackprop(Learner):
    """Back-propagation through the chain of NoProp-DT's blocks.

    Args:
        network: the image branch of each block, as for `NoProp`.
        classes: number of classes C.
        lr: learning rate.
        optimizer: "adamw", "adam", "sgd", or a function from parameters to an optimiser.
        weight_decay: decay of the blocks and of p_out.
        embeddings: "onehot", "learned" or "prototype".
        embedding_dim: d of learned embeddings; None: 20 as in the paper.
        embedding_scale: of W_E against unit vectors, or against the images; what learns is W_E over it.
        p_out: "linear" or "radial".
        radial_sigma: sigma of the radial p_out; None: 0.5.
        steps: T, the number of blocks.
        width: units of the label branches and of the trunks.
        noise_seed: fixes z_0 and dropout; None takes it from PyTorch's global generator.
        draw: which draw of z_0 `scores` uses.
        lanes: blocks that look at the input at the same time in a CUDA graph; what they say of labels is a chain.
        input_shape: shape of one input sample; needed when the first layer is not a `Linear`.

    Raises:
        UsageError: a network or value that does not fit, or a value that the other choices leave without effect.

    Example:
        >>> learner = NoPropBackprop(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), classes=3, steps=2)
        >>> sorted(learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))))
        ['loss']
    """

    paper = Paper(
        title="NoProp: Training Neural Networks without Full Back-propagation or Full Forward-propagation",
        authors="Li, Teh, Pascanu",
        year=2025,
        arxiv="2503.24322",
        follows="the back-propagation baseline: the same blocks, gated residual steps, trained end to end",
    )
    locality = "network"
    undivided = "the error of a block comes from the blocks behind it, so that each rank would wait for the next one"

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        lr: float = 1e-3,
        optimizer: str | OptimizerFactory = "adamw",
        weight_decay: float = 1e-3,
        embeddings: EmbeddingKind = "onehot",
        embedding_dim: int | None = None,
        embedding_scale: float = 1.0,
        p_out: ReadoutKind = "linear",
        radial_sigma: float | None = None,
        steps: int = 10,
        width: int = BRANCH_WIDTH,
        noise_seed: int | None = None,
        draw: int = 0,
        lanes: int = 6,
        input_shape: Shape | None = None,
    ) -> None:
        if steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        check_lanes(lanes)
        modules = children_of(network)
        check_classes(classes)
        shape = sample_shape(input_shape, list(as_blocks(modules)))
        dim = embedding_width(embeddings, classes, embedding_dim, shape)
        super().__init__(
            blocks_of(modules, steps, classes, dim, shape, False, embeddings == "prototype", width), classes, shape
        )
        self.draw, self.lanes = draw, lanes
        self.embeddings = Embeddings(embeddings, classes, dim, embedding_scale)
        self.readout = Readout(p_out, self.embeddings, radial_width(p_out, radial_sigma))
        self.gates = nn.Parameter(torch.ones(steps))  # w_t
        self.noise = BlockNoise(self.network, noise_seed)
        decayed = trained(self.network, self.readout)
        self._optimizers = (
            make_optimizer(decayed, optimizer, lr=lr, weight_decay=weight_decay),
            make_optimizer([self.gates, *trained(self.embeddings)], optimizer, lr=lr),
        )

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Make prototypes the medoids of a training set, as `NoProp.prepare`."""
        Shared(self.embeddings, self.readout).prepare(batches)

    def _chain(self, inputs: Tensor, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores, and each block's logits, from (B, d) z_0."""
        lanes = Lanes(inputs.device, self.lanes)
        seen, every = [], []
        for index, block in enumerate(self.network):
            assert isinstance(block, Denoiser)
            with lanes.lane(index % self.lanes):
                seen.append(block.encode(inputs))
        lanes.join()
        for block, features, gate in zip(self.network, seen, self.gates.tanh(), strict=True):
            every.append(block(inputs, z, features=features))
            z = (1 - gate) * z + gate * self.embeddings.estimate(every[-1])
        return self.readout(z, self.embeddings), every

    def _start(self, inputs: Tensor, draw: int) -> Tensor:
        """(B, d) z_0 of inference."""
        weight = self.embeddings.weight
        return SampleNoise(inputs, self.noise.key, draw, self.embeddings.dim, weight.dtype)(0)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, C) logits of p_out(y | z_T)."""
        return self._chain(inputs, self._start(inputs, self.draw))[0]

    @torch.no_grad()
    def sample(self, inputs: Tensor, *, draw: int) -> Tensor:
        """(B, *input_shape) -> (B, C) scores from another draw of z_0, in evaluation mode."""
        with evaluation_mode(self):
            return self._chain(inputs, self._start(inputs, draw))[0]

    def stages(self) -> tuple[Stage, ...]:
        """One stage: everything learns together."""
        return (self.joint_stage("all", self._optimizers, self._update),)

    @torch.enable_grad()
    def _update(self, batch: Batch) -> Metrics:
        inputs, targets = batch
        stream = self.noise.streams[0]
        assert isinstance(stream, Stream)
        z = stream.normal((len(targets), self.embeddings.dim), self.embeddings.weight.dtype)
        loss = F.cross_entropy(self._chain(inputs, z)[0], targets)
        parameters = parameters_of(self._optimizers)
        # not backward(), which would add up in a stream of its own; a block's derivatives stay in its lane
        set_gradients(parameters, torch.autograd.grad(loss, parameters))
        for optimizer in self._optimizers:
            optimizer.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Accuracy of each block's own logits on the way."""
        inputs, targets = batch
        _, every = self._chain(inputs, self._start(inputs, self.draw))
        return {f"block {index} accuracy": accuracy(logits, targets) for index, logits in enumerate(every)}

    @property
    def variant(self) -> str:
        """The embeddings."""
        return self.embeddings.kind

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Networks for images and vectors, as NoProp."""
        if any(isinstance(block, GraphBlock) for block in network):
            return Support(False, "its blocks read one input per label, not a graph")
        return Support(True)

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing of its own."""
        return {}
