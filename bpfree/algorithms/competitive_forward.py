"""Forward-Forward without labels in the input or negative data: in every layer classes compete for goodness.

For layers l = 1..L, K classes, targets y, each layer with a goodness per class and a loss of its own:

    h_l = f_l(z_{l-1})                       z_{l-1} is a constant to layer l
    G_l = goodness(h_l)                      (B, K)
    loss_l = CE(G_l, y)                      all that f_l learns from
    z_l = norm(h_l)                          + shortcut, where the network has one

DeeperForward (Sun et al., "DeeperForward: Enhanced Forward-Forward Training for Deeper and Better Performance", ICLR
    2025): G_lk = mean of h_l over the channels of class k and all positions; norm leaves a mean of 0 over a class's
    channels, so nothing of the goodness; images are normalised first; scores are sums over layers.
CwComp (Papachristodoulou et al., "Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm",
    AAAI 2024, arXiv 2312.12668): G_lk = mean of squares of the channels of class k; blocks end in batch normalisation;
    other losses (PvN, CWG); scores are the last layer's, or a linear read-out's.
Scalable Forward-Forward (Krutsylo, 2025, arXiv 2501.03176): G_lk = mean over positions of (1x1 convolution to K
    channels)^2; blocks may be of several layers, with back-propagation inside; scores are averages over blocks.

DeeperForward picks the layers that are summed on held-out data (its SIP): `inference = "selected"`, for which a run
picks anew before each validation.

Deviations from the papers: DeeperForward cools its rate to a tenth, `lr_schedule = "cosine"` to zero. CwComp trains
each layer in a window of epochs and grows super-classes for CIFAR-100; here all layers learn on every batch. Scalable
Forward-Forward's loss, rates and placement of the normalisation are not known from the paper's text: cross-entropy with
goodness as logits, Adam, normalisation over channels at every position; goodness is added up, which ranks classes as
averages do, and over the blocks that validation data choose. Groups of channels may be uneven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._ff_classes import (
    GOODNESS,
    LOSSES,
    NORMALIZERS,
    ClassGoodness,
    ClassNormalizer,
    Competition,
    GoodnessFactory,
    normalize_sample,
)
from bpfree.algorithms._lanes import Lanes, check_lanes
from bpfree.algorithms._optim import OptimizerFactory, make_optimizer, set_gradients, trained
from bpfree.algorithms._options import chosen_function
from bpfree.algorithms.learner import Batch, Learner, Metrics, Paper, Stage, Support, Trial, accuracy, evaluation_mode
from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape, block_output_shapes
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.heads import Head, check_pooled
from bpfree.networks.residual import ShortcutBlock

__all__ = ["ClassGoodness", "CompetitiveForward"]

INFERENCES: Final = ("sum", "selected", "last", "readout")

DEEPER_FORWARD: Final = Paper(
    title="DeeperForward: Enhanced Forward-Forward Training for Deeper and Better Performance",
    authors="Sun et al.",
    year=2025,
    arxiv=None,
    follows="mean goodness, normalisation by class, shortcuts without parameters",
)
CWCOMP: Final = Paper(
    title="Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm",
    authors="Papachristodoulou, Kyrkou, Timotheou, Theocharides",
    year=2024,
    arxiv="2312.12668",
    follows="goodness of channel groups, losses CwC-CE, PvN and CWG",
)
SCALABLE: Final = Paper(
    title="Scalable Forward-Forward Algorithm",
    authors="Krutsylo",
    year=2025,
    arxiv="2501.03176",
    follows="goodness of an auxiliary 1x1 convolution, back-propagation inside a block",
)


class CompetitiveForward(Learner):
    """Label-free Forward-Forward over any sequence of blocks.

    Args:
        network: hidden blocks in forward order. The layers of a `ShortcutBlock` learn one by one, any other block as a
            whole: a block of one layer is strictly local, in one of several there is back-propagation.
        classes: number of classes K.
        lr: learning rate.
        optimizer: "adamw", "adam", "sgd", "momentum", or a function from parameters to an optimiser.
        weight_decay: decay of all weights.
        goodness: "mean" or "squares" of the channels of each class, "auxiliary", or a function from the shape of a
            layer's output and K to a `ClassGoodness`.
        loss: "cross-entropy", "pvn", "cwg", or a function of (B, K) goodness and (B,) targets.
        normalizer: what a layer passes on: "groups" of channels, "channels" at every position, "none", or a function of
            activities and K.
        normalize_input: take mean 0 and variance 1 over each sample's values first.
        inference: "sum" of the layers' goodness, that of a run of layers "selected" on validation data, the "last"
            layer's, or a linear "readout" of the last layer.
        first_layer: how many layers "sum" leaves out at the beginning.
        lanes: layers that learn at the same time in a CUDA graph; more of them take more memory, to save time.
        head_pool: how feature maps reach the read-out: "flatten", "gap" or "adaptive".
        input_shape: shape of one input sample; needed when the first layer is not a `Linear`.

    Raises:
        UsageError: a network or value that does not fit.

    Example:
        >>> blocks = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU())
        >>> learner = CompetitiveForward(blocks, classes=3)
        >>> sorted(learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))))
        ['layer 0 loss', 'layer 1 loss']
    """

    paper = DEEPER_FORWARD
    locality = "block"
    undivided = "its layers are local, but shortcuts and class selection over all of them are not cut into units"
    counted: Tensor

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        lr: float = 1e-2,
        optimizer: str | OptimizerFactory = "adamw",
        weight_decay: float = 0.0,
        goodness: str | GoodnessFactory = "mean",
        loss: str | Competition = "cross-entropy",
        normalizer: str | ClassNormalizer = "groups",
        normalize_input: bool = True,
        inference: str = "sum",
        first_layer: int = 0,
        head_pool: str = "flatten",
        lanes: int = 2,
        input_shape: Shape | None = None,
    ) -> None:
        check_lanes(lanes)
        super().__init__(network, classes, input_shape)
        if inference not in INFERENCES:
            raise unknown_name("inference", inference, INFERENCES)
        self.inference, self.normalize_input, self.lanes = inference, normalize_input, lanes
        if isinstance(goodness, ClassGoodness):
            raise UsageError(
                f"each layer has a goodness of its own: pass a function that makes it, such as the class "
                f"{type(goodness).__name__} itself"
            )
        self.kind, make_goodness = chosen_function("goodness", goodness, GOODNESS)
        self.loss, self._compete = chosen_function("loss", loss, LOSSES)
        self.norm, self._normalize = chosen_function("normalizer", normalizer, NORMALIZERS)
        shapes = self._layer_shapes()
        if not 0 <= first_layer < len(shapes):
            raise UsageError(f"first_layer must lie in [0, {len(shapes)}), got {first_layer}")
        if first_layer and inference != "sum":
            raise UsageError(f"first_layer is of inference=sum, not of {inference}; leave it out, or set inference=sum")
        self.goodness = nn.ModuleList(make_goodness(shape, classes) for shape in shapes)
        self.readout = Head(shapes[-1], classes, pool=head_pool, bias=True) if inference == "readout" else None
        if self.readout is None and head_pool != "flatten":
            raise UsageError("head_pool is of the read-out; it needs inference=readout")
        check_pooled(head_pool, [] if self.readout is None else [self.readout])
        counted = torch.arange(len(shapes)) >= (len(shapes) - 1 if inference == "last" else first_layer)
        self.register_buffer("counted", counted.float())
        parts = iter(zip(range(len(shapes)), self.goodness, strict=True))
        self._blocks = tuple(
            Block(block if isinstance(block, ShortcutBlock) else None, tuple(Layer.of(*next(parts), f) for f in layers))
            for block, layers in zip(self.network, map(layers_of, self.network), strict=True)
        )
        self._optimizer = make_optimizer(self.parameters(), optimizer, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def _layer_shapes(self) -> list[Shape]:
        """Shapes of one sample behind every layer, those inside blocks included."""
        block_output_shapes(self.network, self.input_shape)  # refuses, in words, what does not fit
        parameter = next(self.network.parameters())
        signal = torch.zeros(2, *self.input_shape, dtype=parameter.dtype, device=parameter.device)
        shapes: list[Shape] = []
        with evaluation_mode(self.network):
            for block in self.network:
                inputs = signal
                for layer in layers_of(block):
                    signal = layer(signal)
                    shapes.append(tuple(signal.shape[1:]))
                signal = block.join(signal, inputs) if isinstance(block, ShortcutBlock) else signal
        return shapes

    def _run(self, inputs: Tensor, hear: Callable[[Layer, Tensor], None], lanes: Lanes) -> Tensor:
        """Pass `inputs` through all layers; `hear` is told each one's h_l when the next has what it needs.

        Returns:
            h_L.
        """
        hidden = signal = normalize_sample(inputs) if self.normalize_input else inputs
        for block in self._blocks:
            entered = signal
            for layer in block.layers:
                with lanes.turn(signal, entered):
                    hidden = layer.activate(signal)
                    signal = self._normalize(hidden.detach(), self.classes)
                    if block.shortcut is not None and layer is block.layers[-1]:
                        signal = block.shortcut.join(signal, entered)
                    lanes.hand_on()
                    hear(layer, hidden)
        lanes.join()
        return hidden.detach()

    @torch.no_grad()
    def layer_goodness(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Goodness of every class in every layer.

        Args:
            inputs: (B, *input_shape).

        Returns:
            (L, B, K), and h_L.
        """
        said: list[Tensor] = []
        last = self._run(inputs, lambda layer, hidden: said.append(layer.goodness(hidden)), Lanes(inputs.device, 1))
        return torch.stack(said), last

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, K) goodness of the layers that count, added up, or the read-out's scores."""
        goodness, last = self.layer_goodness(inputs)
        if self.readout is not None:
            scores: Tensor = self.readout(last)
            return scores
        return (goodness * self.counted[:, None, None].to(goodness.dtype)).sum(0)

    def select_layers(self, batches: Iterable[Batch]) -> tuple[int, int]:
        """Count the run of layers with the best accuracy on held-out data (DeeperForward's SIP).

        `bpfree.Trainer` does so with inference="selected", before each validation. Until then all layers count.

        Args:
            batches: validation samples, on the learner's device.

        Returns:
            The first and the last layer that count, from 0.

        Raises:
            UsageError: inference is neither "selected" nor "sum".
        """
        if self.inference not in ("selected", "sum"):
            raise UsageError(f"inference={self.inference} reads the last layer only")
        counting = self._select(batches).nonzero().flatten().tolist()
        return counting[0], counting[-1]

    @torch.no_grad()
    def _select(self, batches: Iterable[Batch]) -> Tensor:
        """The layers that count, chosen without waiting for the device."""
        depth, device = len(self.counted), self.counted.device
        hits = torch.full((depth, depth), -1.0, device=device).triu_(1).T.contiguous()  # of runs (first, last)
        with evaluation_mode(self):
            for inputs, targets in batches:
                summed = F.pad(self.layer_goodness(inputs)[0].cumsum(0), (0, 0, 0, 0, 1, 0))
                for first in range(depth):
                    said = (summed[first + 1 :] - summed[first]).argmax(2)
                    hits[first, first:] += (said == targets).sum(1)
        best, number = hits.argmax(), torch.arange(depth, device=device)
        return self.counted.copy_((number >= best // depth) & (number <= best % depth))

    def stages(self) -> tuple[Stage, ...]:
        """One stage: all layers learn on every batch."""
        select = self._select if self.inference == "selected" else None
        return (self.joint_stage("all layers", (self._optimizer,), self._update, select=select),)

    def _update(self, batch: Batch) -> Metrics:
        inputs, targets = batch
        metrics: Metrics = {}

        def learn(layer: Layer, hidden: Tensor) -> None:
            """A graph of its own for each layer, freed in here."""
            loss = self._compete(layer.goodness(hidden), targets)
            if layer.parameters:  # else the user has frozen them all
                set_gradients(layer.parameters, torch.autograd.grad(loss, layer.parameters))
            metrics[f"{layer.name} loss"] = loss.detach()

        with torch.enable_grad():
            last = self._run(inputs, learn, Lanes(targets.device, self.lanes))
        if self.readout is not None:
            with torch.enable_grad():
                loss = F.cross_entropy(self.readout(last), targets)
            parameters = tuple(self.readout.parameters())
            set_gradients(parameters, torch.autograd.grad(loss, parameters))
            metrics["read-out loss"] = loss.detach()
        self._optimizer.step()
        return metrics

    @property
    def variant(self) -> str:
        """Goodness, loss, what is passed on, and inference."""
        return f"{self.kind}, {self.loss}, {self.norm}, {self.inference}"

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Accuracy of each layer's goodness alone, and of the sum of all; which layers count, if they are selected."""
        inputs, targets = batch
        goodness, _ = self.layer_goodness(inputs)
        report = {f"layer {index} accuracy": accuracy(layer, targets) for index, layer in enumerate(goodness)}
        report["sum of all layers accuracy"] = accuracy(goodness.sum(0), targets)
        if self.inference == "selected":
            number = torch.arange(len(self.counted), device=self.counted.device)
            report["first layer that counts"] = number[self.counted > 0].amin().float()
            report["last layer that counts"] = number[self.counted > 0].amax().float()
        return report

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Networks for images and vectors."""
        if any(isinstance(block, GraphBlock) for block in network):
            return Support(False, "its goodness is of channels and positions, not of nodes; for graphs see fgnn")
        return Support(True)

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing of its own: goodness, loss and normalisation are what tells its three rules apart."""
        return {}


def layers_of(block: nn.Module) -> tuple[nn.Module, ...]:
    """What learns on its own inside a block."""
    return tuple(block.layers) if isinstance(block, ShortcutBlock) else (block,)


@dataclass(frozen=True, eq=False)
class Layer:
    """What learns on its own, with its goodness.

    Attributes:
        name: shown in metrics.
        activate: f_l.
        goodness: (B, channels, ..) -> (B, K).
        parameters: of both, without those that the user has frozen.
    """

    name: str
    activate: nn.Module
    goodness: nn.Module
    parameters: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, index: int, goodness: nn.Module, activate: nn.Module) -> Layer:
        """A layer, with what follows from its parts."""
        return cls(f"layer {index}", activate, goodness, tuple(trained(activate, goodness)))


@dataclass(frozen=True, eq=False)
class Block:
    """Layers, and the shortcut around them, if any."""

    shortcut: ShortcutBlock | None
    layers: tuple[Layer, ...]
