"""Blocks that predict a class from an input and a noisy embedding of its label, after Li, Teh and Pascanu.

Architecture: arXiv 2503.24322, figure 6 of v1 (5 of v2). Sizes that the figure leaves open (no padding, no read-out and
no embeddings in the count) follow from the parameter counts of v2's Table 5, all of which these blocks reproduce.

Shapes: `B` batch, `C` classes, `d` width of an embedding, `F` features of the image branch, `w` = 256 units.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final, Literal

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape, as_blocks, block_output_shapes
from bpfree.networks.convolution import RectifiedConvolution
from bpfree.networks.normalization import VectorNorm
from bpfree.networks.streams import Stream

BRANCH_WIDTH: Final = 256
BRANCH_CHANNELS: Final = (32, 64, 128)
BRANCH_DROPOUT: Final = 0.2
BRANCHES: Final = ("dt", "ct")
TIME_FEATURES: Final = 64
TIME_SCALE: Final = 1000.0  # positional embeddings are made for positions that differ by about one
TIME_PERIOD: Final = 10_000.0
Kind = Literal["dt", "ct"]


def image_branch(input_shape: Shape, kind: Kind = "dt") -> nn.Sequential:
    """The paper's image branch, as one block: three 3x3 convolutions without padding and a linear layer to 256 units.

    `conv 32, ReLU, max-pool, dropout; conv 64, ReLU, dropout; conv 128, ReLU, max-pool, dropout; linear`, followed by
    batch normalisation in NoProp-DT ("dt") and by ReLU in NoProp-CT and FM ("ct").

    Args:
        input_shape: (channels, height, width).
        kind: "dt" or "ct".

    Raises:
        UsageError: unknown kind, or inputs that are not images of at least 18 x 18.
    """
    if kind not in BRANCHES:
        raise unknown_name("noprop network", kind, BRANCHES)
    if len(input_shape) != 3:
        raise UsageError(
            f"noprop needs images (channels, height, width), the data have shape {input_shape}; use an mlp"
        )
    height, width = (((side - 2) // 2 - 4) // 2 for side in input_shape[1:])
    if min(height, width) < 1:
        raise UsageError(
            f"images of {input_shape[1]}x{input_shape[2]} are too small for noprop's convolutions without padding; "
            "use a cnn or an mlp"
        )
    first, second, third = BRANCH_CHANNELS
    last = VectorNorm(BRANCH_WIDTH) if kind == "dt" else nn.ReLU()
    branch = nn.Sequential(
        RectifiedConvolution(nn.Conv2d(input_shape[0], first, 3), BRANCH_DROPOUT, pooled=True),
        RectifiedConvolution(nn.Conv2d(first, second, 3), BRANCH_DROPOUT),
        RectifiedConvolution(nn.Conv2d(second, third, 3), BRANCH_DROPOUT, pooled=True),
        *(nn.Flatten(), nn.Linear(third * height * width, BRANCH_WIDTH), last),
    )
    return nn.Sequential(branch)


def fresh_copy(network: nn.Module) -> nn.Module:
    """A copy with weights of its own: the values of each tensor in another order.

    They come from the same distribution, whoever drew them and however; what is constant (zero, one) stays so.
    """
    fresh = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in fresh.parameters():
            order = torch.randperm(parameter.numel(), device=parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    for module in fresh.modules():
        if isinstance(module, Stream):  # dropout draws masks of its own
            module.draw_key()
    return fresh


class Denoiser(nn.Module, ABC):
    """What a NoProp learner trains: from an input, a noisy embedding of its class, and perhaps a time, to class logits.

    The input's features do not depend on the embedding, so that many steps of denoising can share them.
    """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """(B, *input_shape) -> features of the input, of any shape."""

    @abstractmethod
    def decode(self, features: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
        """Features, (B, d) embeddings and (B,) times in [0, 1] (None where there is no time) -> (B, C) logits."""

    def forward(self, x: Tensor, z: Tensor, time: Tensor | None = None, *, features: Tensor | None = None) -> Tensor:
        """(B, *input_shape), (B, d), (B,) -> (B, C) logits; `features` are those of x, where they are known already."""
        return self.decode(self.encode(x) if features is None else features, z, time)


class BranchDenoiser(Denoiser):
    """The paper's block: an image branch, a label branch, perhaps a time branch, and a trunk on what they say.

    Args:
        image: (B, *input_shape) -> features, flattened to F.
        features: F.
        input_shape: shape of one input.
        classes: C.
        dim: d.
        timed: the block of NoProp-CT and FM, which has a time branch and no batch normalisation.
        prototypes: embeddings are images, so the label branch is another image branch.
        width: w, units of the label and time branches and of the trunk's first layer; its second has w / 2.

    Raises:
        UsageError: the image branch cannot be copied for prototypes.
    """

    def __init__(
        self,
        image: nn.Module,
        features: int,
        input_shape: Shape,
        classes: int,
        dim: int,
        *,
        timed: bool,
        prototypes: bool,
        width: int = BRANCH_WIDTH,
    ) -> None:
        super().__init__()
        self.image = image
        self.label: nn.Module
        if prototypes:
            self.label = nn.Sequential(nn.Unflatten(1, input_shape), fresh_copy(image), nn.Flatten())
        elif timed:
            self.label = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        else:
            self.label = LabelBranch(dim, width)
        self.time = nn.Sequential(TimeEmbedding(), nn.Linear(TIME_FEATURES, width), nn.ReLU()) if timed else None
        labels, times = features if prototypes else width, width if timed else 0
        half = max(1, width // 2)
        self.trunk = nn.Sequential(
            *_hidden(features + labels + times, width, norm=not timed),
            *_hidden(width, half, norm=not timed),
            nn.Linear(half, classes),
        )

    def encode(self, x: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, F)."""
        features: Tensor = self.image(x)
        return features.flatten(1)

    def decode(self, features: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
        """(B, F), (B, d), (B,) -> (B, C) logits."""
        parts = [features, self.label(z)]
        if self.time is not None:
            assert time is not None, "a block with a time branch needs times"
            parts.append(self.time(time))
        logits: Tensor = self.trunk(torch.cat(parts, 1))
        return logits


def _hidden(inputs: int, width: int, *, norm: bool) -> list[nn.Module]:
    return [nn.Linear(inputs, width), VectorNorm(width, rectified=True) if norm else nn.ReLU()]


class LabelBranch(nn.Module):
    """Label branch of NoProp-DT: h = relu(BN(FC z)); BN(FC relu(BN(FC h))) + h."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(*_hidden(dim, width, norm=True))
        self.residual = nn.Sequential(*_hidden(width, width, norm=True), nn.Linear(width, width), VectorNorm(width))

    def forward(self, z: Tensor) -> Tensor:
        """(B, d) -> (B, w)."""
        hidden: Tensor = self.enter(z)
        return hidden + self.residual(hidden)


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time at geometrically spaced frequencies (Vaswani et al. 2017)."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        half = TIME_FEATURES // 2
        exponents = torch.arange(half, dtype=torch.float64) / half
        self.register_buffer("frequencies", TIME_SCALE * TIME_PERIOD**-exponents, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """(B,) -> (B, 64)."""
        angles = time[:, None].double() * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], 1).to(time.dtype)


def denoisers(
    network: nn.Sequential | Iterable[nn.Module],
    count: int,
    classes: int,
    dim: int,
    input_shape: Shape,
    *,
    timed: bool,
    prototypes: bool,
    width: int = BRANCH_WIDTH,
) -> list[Denoiser]:
    """`count` blocks whose image branches are `network` itself and fresh copies of it.

    Args:
        network: an image branch, of any number of blocks.
        count: number of denoising blocks.
        classes: C.
        dim: d.
        input_shape: shape of one input.
        timed: see `BranchDenoiser`.
        prototypes: see `BranchDenoiser`.
        width: see `BranchDenoiser`.

    Raises:
        UsageError: a network that does not fit the inputs or that cannot be copied, or no units.
    """
    if width < 1:
        raise UsageError(f"width must be at least 1, got {width}")
    parts = list(as_blocks(network))
    features = math.prod(block_output_shapes(parts, input_shape)[-1])
    first = nn.Sequential(*parts)
    images = [first, *(fresh_copy(first) for _ in range(count - 1))]
    return [
        BranchDenoiser(image, features, input_shape, classes, dim, timed=timed, prototypes=prototypes, width=width)
        for image in images
    ]
