"""What a block learns from where no gradient comes back from the blocks after it: auxiliary networks with a loss.

Shapes: `B` batch, `C` classes, `h` a block's output, (B, channels, height, width) or (B, d).

    greedy            CE(head(h), y)
    dgl               CE(head(h), y), a head that shrinks maps first and costs little
    predsim           (1 - b) CE(W pool(h), y) + b MSE(S(conv(h)), S(onehot(y))), b = 0.99
    infopro           l1 BCE(decoder(h), x) + l2 CE(head(h), y), x the image in [0, 1]
    infopro-contrast  l1 BCE(decoder(h), x) + l2 SupCon(head(h), y)

greedy: Belilovsky et al., arXiv 1812.11446; dgl: the same, arXiv 1901.08164; predsim: Nokland and Eidnes, arXiv
1901.06656; infopro: Wang et al., arXiv 2101.10832. S is the matrix of cosine similarities between samples, after each
sample's mean over features is taken off. SupCon is the supervised contrastive loss of Khosla et al. (arXiv 2004.11362),
temperature 0.07.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape
from bpfree.networks.heads import Head
from bpfree.networks.normalization import MapNorm, VectorNorm
from bpfree.networks.pooling import grid_mean

SIMILARITY_WEIGHT: Final = 0.99
TEMPERATURE: Final = 0.07
CONTRAST_FEATURES: Final = 128
HIDDEN_FEATURES: Final = 128  # of the linear layers of "NcMf" heads
MOST_CHANNELS: Final = 64  # "NcMf" heads double the channels until they have as many
LEAST_SIDE: Final = 8  # pixels, below which "NcMf" heads keep a map's size
WIDE_CHANNELS: Final = 128
WIDE_FEATURES: Final = 512
WIDE_SIDE: Final = 8
BOTTLENECK_HEAD: Final = (256, 512, 2048)
DECODER_CHANNELS: Final = 12
VARIANCE_FLOOR: Final = 1e-8  # the standard deviation of a constant map has no gradient


@dataclass(frozen=True)
class HeadOptions:
    """What a user may choose about auxiliary losses; None or "" is the default of the host.

    Attributes:
        head: the auxiliary classifier, see `classifier`.
        reconstruct: InfoPro's l1 of the first and of the last block that has an auxiliary loss, linear in between.
        classify: the same for l2.
    """

    head: str = ""
    reconstruct: tuple[float, float] | None = None
    classify: tuple[float, float] | None = None


@dataclass(frozen=True)
class Place:
    """Where in a network an auxiliary loss stands.

    Attributes:
        shape: of one sample of h.
        classes: C.
        input_shape: of one sample of the network's input.
        depth: 0 for the first block that has an auxiliary loss, 1 for the last.
    """

    shape: Shape
    classes: int
    input_shape: Shape
    depth: float


class AuxiliaryLoss(nn.Module, ABC):
    """A loss of one block, with the networks that it needs.

    Attributes:
        needs_images: whether it looks at the network's inputs.
    """

    needs_images: ClassVar[bool] = False

    @abstractmethod
    def forward(self, features: Tensor, images: Tensor | None, targets: Tensor) -> Tensor:
        """The loss, 0-d.

        Args:
            features: h.
            images: (B, *input_shape) in [0, 1], for losses that `needs_images`.
            targets: (B,) int64.
        """

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor | None:
        """h -> (B, C) scores of the block's own classifier, if it has one."""


class Classification(AuxiliaryLoss):
    """Cross-entropy of an auxiliary classifier: greedy learning and DGL."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, images: Tensor | None, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(features), targets)

    def scores(self, features: Tensor) -> Tensor:
        scores: Tensor = self.head(features)
        return scores


class SimilarityMatching(AuxiliaryLoss):
    """PredSim: samples of one class should look alike, and a linear classifier a little."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.head = Head(shape, classes, pool="gap", bias=True)
        maps = len(shape) == 3
        self.project = nn.Conv2d(shape[0], shape[0], 3, padding=1) if maps else nn.Linear(shape[0], shape[0])

    def forward(self, features: Tensor, images: Tensor | None, targets: Tensor) -> Tensor:
        projected = self.project(features)
        onehot = (targets[:, None] == torch.arange(self.classes, device=targets.device)).to(self.head.weight.dtype)
        with torch.autocast(features.device.type, enabled=False):
            seen = similarities(spatial_deviation(projected.to(onehot.dtype)))
            alike = F.mse_loss(seen, similarities(onehot))
        loss = F.cross_entropy(self.head(features), targets)
        return (1 - SIMILARITY_WEIGHT) * loss + SIMILARITY_WEIGHT * alike

    def scores(self, features: Tensor) -> Tensor:
        scores: Tensor = self.head(features)
        return scores


def spatial_deviation(maps: Tensor) -> Tensor:
    """(B, channels, height, width) -> (B, channels) standard deviation over positions; vectors stay as they are."""
    if maps.ndim == 2:
        return maps
    if maps[0, 0].numel() == 1:  # a single position does not deviate
        return maps.flatten(1)
    return (maps.flatten(2).var(2) + VARIANCE_FLOOR).sqrt()


def similarities(features: Tensor) -> Tensor:
    """(B, d) -> (B, B) cosine similarities of samples after each sample's mean is taken off."""
    unit = F.normalize(features - features.mean(1, keepdim=True))
    return unit @ unit.T


class InformationPropagation(AuxiliaryLoss):
    """InfoPro: a decoder that keeps what is in the image, and a head that keeps what matters for the class.

    Args:
        place: where it stands.
        head: to C scores, or for the contrastive loss to features.
        contrast: use the supervised contrastive loss instead of cross-entropy.
        reconstruct: l1 at this place.
        classify: l2 at this place.
    """

    needs_images = True

    def __init__(self, place: Place, head: nn.Module, *, contrast: bool, reconstruct: float, classify: float) -> None:
        super().__init__()
        self.head, self.contrast = head, contrast
        self.reconstruct, self.classify = reconstruct, classify
        self.decoder = decoder(place.shape, place.input_shape)

    def forward(self, features: Tensor, images: Tensor | None, targets: Tensor) -> Tensor:
        assert images is not None
        pixels = self.decoder(features).to(images.dtype).flatten(1)
        kept = F.binary_cross_entropy_with_logits(pixels, images.flatten(1))
        said = self.head(features)
        loss = supervised_contrast(said, targets) if self.contrast else F.cross_entropy(said, targets)
        return self.reconstruct * kept + self.classify * loss

    def scores(self, features: Tensor) -> Tensor | None:
        return None if self.contrast else self.head(features)


def supervised_contrast(features: Tensor, targets: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss of (B, d) features, normalised here.

    -(1 / B) sum_i (1 / |P_i|) sum_{p in P_i} log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)), P_i the other
    samples of i's class; samples that are alone in theirs add nothing.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features if features.dtype == torch.float64 else features.float())
        alike = unit @ unit.T / temperature
        self_pairs = torch.eye(len(alike), dtype=torch.bool, device=alike.device)
        others = alike.masked_fill(self_pairs, torch.finfo(alike.dtype).min)
        positive = (targets[:, None] == targets[None, :]) & ~self_pairs
        log_probabilities = (alike - others.logsumexp(1, keepdim=True)).masked_fill(~positive, 0)
        return -(log_probabilities.sum(1) / positive.sum(1).clamp(min=1)).mean()


# --- auxiliary networks -------------------------------------------------------------------------------------------


def classifier(name: str, shape: Shape, outputs: int) -> nn.Module:
    """An auxiliary classifier for maps or vectors.

    Args:
        name: "NcMf" (InfoPro): N convolutions 3x3, the mean over positions, and M linear layers, hidden ones of 128
            units, so that "0c1f" is a linear classifier; for vectors there are no convolutions. "shrink": DGL's head,
            maps averaged to a quarter of their side, three 1x1 convolutions, 2x2, and three linear layers. "wide": the
            same idea in MAN++, 8x8, three 1x1 convolutions of 128 and three linear layers of 512. "bottleneck":
            InfoPro's for ImageNet, 1x1 to a quarter of the channels, two 3x3 of stride 2 (256, 512), 1x1 to 2,048.
        shape: of one sample.
        outputs: width of the read-out.

    Raises:
        UsageError: unknown name.
    """
    counts = re.fullmatch(r"(\d)c([1-9])f", name)
    if counts:
        return _convolutional_head(shape, outputs, int(counts[1]), int(counts[2]))
    if name not in CLASSIFIERS:
        raise unknown_name("head", name, ["0c1f", "1c2f", "2c2f", *CLASSIFIERS])
    return CLASSIFIERS[name](shape, outputs)


def _conv_norm_relu(fan_in: int, width: int, kernel: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(fan_in, width, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, MapNorm(width)


def _linear_norm_relu(fan_in: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Linear(fan_in, width, bias=False), VectorNorm(width, rectified=True)


def _convolutional_head(shape: Shape, outputs: int, convolutions: int, linear: int) -> nn.Module:
    layers: list[nn.Module] = []
    if len(shape) == 3:
        width, side = shape[0], min(shape[1:])
        for index in range(convolutions):
            halve = index == 0 and side > LEAST_SIDE
            wider = max(width, min(2 * width, MOST_CHANNELS)) if halve else width
            layers += _conv_norm_relu(width, wider, 3, 2 if halve else 1)
            width, side = wider, -(-side // 2) if halve else side
        shape = (width, side, side)
    layers += [_Pooled(1)]
    features = shape[0]
    for _ in range(linear - 1):
        layers += [nn.Linear(features, HIDDEN_FEATURES), nn.ReLU()]
        features = HIDDEN_FEATURES
    return nn.Sequential(*layers, Head((features,), outputs, bias=True))


def _shrinking_head(shape: Shape, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    features = shape[0]
    if len(shape) == 3:
        side = min(shape[1:])
        layers = [_Resized(min(side, max(2, math.ceil(side / 4))))]
        for _ in range(3):
            layers += _conv_norm_relu(features, features, 1)
        grid = min(2, side)
        layers += [_Pooled(grid)]
        features *= grid * grid
    hidden = features
    for _ in range(2):
        layers += _linear_norm_relu(features, hidden)
    return nn.Sequential(*layers, Head((hidden,), outputs, bias=True))


def _wide_head(shape: Shape, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    features = shape[0]
    if len(shape) == 3:
        layers = [_Resized(min(WIDE_SIDE, *shape[1:]))]
        for _ in range(3):
            layers += _conv_norm_relu(features, WIDE_CHANNELS, 1)
            features = WIDE_CHANNELS
        layers += [_Pooled(1)]
    for _ in range(3):
        layers += _linear_norm_relu(features, WIDE_FEATURES)
        features = WIDE_FEATURES
    return nn.Sequential(*layers, Head((features,), outputs, bias=True))


def _bottleneck_head(shape: Shape, outputs: int) -> nn.Module:
    if len(shape) != 3:
        raise UsageError(f"the head bottleneck is for maps, not for vectors of {shape[0]}")
    narrow = max(1, shape[0] // 4)
    first, second, last = BOTTLENECK_HEAD
    layers = [
        *_conv_norm_relu(shape[0], narrow, 1),
        *_conv_norm_relu(narrow, first, 3, 2),
        *_conv_norm_relu(first, second, 3, 2),
        *_conv_norm_relu(second, last, 1),
    ]
    return nn.Sequential(*layers, _Pooled(1), Head((last,), outputs, bias=True))


CLASSIFIERS: Final[dict[str, Callable[[Shape, int], nn.Module]]] = {
    "shrink": _shrinking_head,
    "wide": _wide_head,
    "bottleneck": _bottleneck_head,
}


class _Resized(nn.Module):
    """Average maps to a square grid: by `grid_mean` where windows do not overlap."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        if height == width == self.side:
            return maps
        if height % self.side == 0 and width % self.side == 0:
            return grid_mean(maps, (self.side, self.side))
        return F.adaptive_avg_pool2d(maps, self.side)


class _Pooled(_Resized):
    """Average maps to a grid and flatten it; vectors pass."""

    def forward(self, activations: Tensor) -> Tensor:
        return super().forward(activations).flatten(1) if activations.ndim == 4 else activations


def decoder(shape: Shape, input_shape: Shape) -> nn.Module:
    """From h to logits of the image's values, (B, *input_shape) for maps of images and (B, values) otherwise.

    For maps: bilinear to the image's size, 3x3 convolution to 12, batch normalisation, ReLU, 3x3 to the image's
    channels; the sigmoid is in the loss. For vectors one linear layer.
    """
    if len(shape) != 3 or len(input_shape) != 3:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), math.prod(input_shape)))
    upsampling = [] if shape[1:] == input_shape[1:] else [Upsampling(shape[1:], input_shape[1:])]
    return nn.Sequential(
        *upsampling,
        *_conv_norm_relu(shape[0], DECODER_CHANNELS, 3),
        nn.Conv2d(DECODER_CHANNELS, input_shape[0], 3, padding=1),
    )


class Upsampling(nn.Module):
    """Bilinear interpolation of maps (corners aligned) as two matrix products.

    The backward pass of PyTorch's own adds up with atomic operations on GPUs, in no fixed order.

    Args:
        size: (height, width) of the maps.
        larger: (height, width) wanted.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, size: Shape, larger: Shape) -> None:
        super().__init__()
        for name, old, new in zip(("rows", "columns"), size, larger, strict=True):
            eye = torch.eye(old)[None]
            weights = F.interpolate(eye, new, mode="linear", align_corners=True)[0]
            self.register_buffer(name, weights, persistent=False)  # (old, new)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, channels, *size) -> (B, channels, *larger)."""
        wider = maps @ self.columns.to(maps.dtype)
        return (wider.transpose(2, 3) @ self.rows.to(maps.dtype)).transpose(2, 3)


# --- hosts --------------------------------------------------------------------------------------------------------

INFOPRO_RECONSTRUCT: Final = (5.0, 0.2)
INFOPRO_CLASSIFY: Final = (0.05, 0.5)


def _greedy(place: Place, options: HeadOptions) -> AuxiliaryLoss:
    return Classification(classifier(options.head or "0c1f", place.shape, place.classes))


def _dgl(place: Place, options: HeadOptions) -> AuxiliaryLoss:
    return Classification(classifier(options.head or "shrink", place.shape, place.classes))


def _predsim(place: Place, options: HeadOptions) -> AuxiliaryLoss:
    if options.head:
        raise UsageError("predsim has a linear classifier; leave out head")
    return SimilarityMatching(place.shape, place.classes)


def _infopro(place: Place, options: HeadOptions, *, contrast: bool = False) -> AuxiliaryLoss:
    def weight(ends: tuple[float, float]) -> float:
        return ends[0] + (ends[1] - ends[0]) * place.depth

    outputs = CONTRAST_FEATURES if contrast else place.classes
    return InformationPropagation(
        place,
        classifier(options.head or "1c2f", place.shape, outputs),
        contrast=contrast,
        reconstruct=weight(options.reconstruct or INFOPRO_RECONSTRUCT),
        classify=weight(options.classify or INFOPRO_CLASSIFY),
    )


def _infopro_contrast(place: Place, options: HeadOptions) -> AuxiliaryLoss:
    return _infopro(place, options, contrast=True)


Host = Callable[[Place, HeadOptions], AuxiliaryLoss]
HOSTS: Final[dict[str, Host]] = {
    "greedy": _greedy,
    "dgl": _dgl,
    "predsim": _predsim,
    "infopro": _infopro,
    "infopro-contrast": _infopro_contrast,
}


def auxiliary_loss(host: str | Host, options: HeadOptions) -> Callable[[Place], AuxiliaryLoss]:
    """What makes the auxiliary loss of each block.

    Args:
        host: "greedy", "dgl", "predsim", "infopro", "infopro-contrast", or a function of a place and these options.
        options: what the user chose.

    Raises:
        UsageError: unknown host, or options that it does not have.
    """
    if isinstance(host, str):
        if host not in HOSTS:
            raise unknown_name("host", host, HOSTS)
        if not host.startswith("infopro") and (options.reconstruct or options.classify):
            raise UsageError(f"reconstruct and classify are weights of infopro, not of host={host}")
    build = HOSTS[host] if isinstance(host, str) else host
    return lambda place: build(place, options)
