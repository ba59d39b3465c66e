"""What NoProp networks are made of beside their processes: blocks, embeddings of the classes, read-out, noise.

Shapes: `B` batch, `C` classes, `d` width of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms.learner import Batch, refuse_idle
from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape
from bpfree.networks.noprop import Denoiser, denoisers
from bpfree.networks.streams import Stream, StreamDropout, content_keys, derive, mix, normal_numbers

EmbeddingKind = Literal["onehot", "learned", "prototype"]
ReadoutKind = Literal["linear", "radial"]
EMBEDDINGS: Final = ("onehot", "learned", "prototype")
READOUTS: Final = ("linear", "radial")
EMBEDDING_DIM: Final = 20  # of the paper's learned embeddings
RADIAL_SIGMA: Final = 0.5
MEDOID_DISTANCES: Final = 2**23  # at a time; torch.quantile takes no more than 2^24
DRAW: Final = 0x2545F4914F6CDD1D  # odd: keeps the noise of draws apart


class Embeddings(nn.Module):
    """W_E, one row per class: `scale` times `rows`.

    "onehot" has the identity and is fixed; "learned" starts with orthonormal rows where d allows it; "prototype"
    has rows as wide as an input, is learned too, and starts at random until `prepare` is called.

    What learns is the rows: an optimiser whose steps have the size of its rate, as Adam's, then moves embeddings by
    the same part of their distances whatever the scale.

    Args:
        kind: "onehot", "learned" or "prototype".
        classes: C.
        dim: d, see `embedding_width`.
        scale: of W_E against the unit vectors, or against the images. Noise has the variance 1 - abar whatever the
            embeddings are, so it decides how soon a noisy embedding gives the class away.

    Raises:
        UsageError: `scale` is not positive.
    """

    rows: Tensor

    def __init__(self, kind: EmbeddingKind, classes: int, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise UsageError(f"embedding_scale must be positive, got {scale}")
        self.kind, self.dim, self.scale = kind, dim, scale
        if kind == "onehot":
            self.register_buffer("rows", torch.eye(classes))
        elif kind == "learned" and dim >= classes:
            self.rows = nn.Parameter(nn.init.orthogonal_(torch.empty(classes, dim)))
        else:  # of the scale of a standardised image
            self.rows = nn.Parameter(torch.randn(classes, dim))

    @property
    def weight(self) -> Tensor:
        """W_E, (C, d)."""
        return self.rows if self.scale == 1 else self.scale * self.rows

    @property
    def learned(self) -> bool:
        """Whether W_E is trained."""
        return self.kind != "onehot"

    def forward(self, targets: Tensor) -> Tensor:
        """(B,) classes -> (B, d) embeddings u_y."""
        return F.embedding(targets, self.weight)

    def project(self, coefficients: Tensor) -> Tensor:
        """(B, C) coefficients -> (B, d) combinations of embeddings."""
        if not self.learned:
            return coefficients if self.scale == 1 else self.scale * coefficients
        with torch.autocast(coefficients.device.type, enabled=False):
            return coefficients @ self.weight

    def estimate(self, logits: Tensor) -> Tensor:
        """(B, C) logits of a block -> (B, d) expected embedding softmax(logits) W_E."""
        return self.project(logits.to(self.weight.dtype).softmax(1))

    @torch.no_grad()
    def closest(self) -> Tensor:
        """The smallest distance between two rows, 0-d."""
        return torch.pdist(self.weight).min()

    def log_similarity(self, z: Tensor, variance: float) -> Tensor:
        """(B, d) -> (B, C): -||z - u_c||^2 / (2 variance), highest for the nearest embedding."""
        with torch.autocast(z.device.type, enabled=False):
            # not by the expanded product, which would cancel
            distances = torch.cdist(z, self.weight, compute_mode="donot_use_mm_for_euclid_dist")
            return -distances.square() / (2 * variance)

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch]) -> None:
        """Make each prototype its class's medoid: the sample whose median distance to the class is smallest.

        Args:
            batches: all training samples, of d values each, and their classes. Other embeddings leave them unread.

        Raises:
            UsageError: a class has no sample.
        """
        if self.kind != "prototype":
            return
        parts = list(batches)
        inputs, targets = (torch.cat(list(column)) for column in zip(*parts, strict=True))
        for label, row in enumerate(self.rows):
            samples = inputs[targets == label].flatten(1)
            if not len(samples):
                raise UsageError(f"class {label} has no sample, so it has no prototype")
            row.copy_(samples[medoid(samples)])


def medoid(samples: Tensor) -> Tensor:
    """Index of the sample with the smallest median Euclidean distance to all of (n, d) samples, itself included."""
    at_once = max(1, MEDOID_DISTANCES // len(samples))
    medians = [torch.cdist(rows, samples).quantile(0.5, dim=1) for rows in samples.split(at_once)]
    return torch.cat(medians).argmin()


class Readout(nn.Module):
    """p_out(y | z), from one linear layer f_out.

    "linear" is softmax(f_out(z)); "radial" is proportional to exp(-||softmax(f_out(z)) W_E - u_y||^2 / (2 sigma^2)).

    f_out starts with the embeddings as its rows, divided by their mean squared length, so that z = u_y is read as y.
    (From PyTorch's usual start a chain under back-propagation merges classes, and its softmax keeps them merged.)

    Args:
        kind: "linear" or "radial".
        embeddings: W_E, which stays with its owner.
        sigma: of the radial one.

    Raises:
        UsageError: unknown kind or a sigma that is not positive.
    """

    def __init__(self, kind: ReadoutKind, embeddings: Embeddings, sigma: float) -> None:
        super().__init__()
        if kind not in READOUTS:
            raise unknown_name("p_out", kind, READOUTS)
        if not sigma > 0:
            raise UsageError(f"radial_sigma must be positive, got {sigma}")
        self.kind, self.sigma = kind, sigma
        classes, dim = embeddings.weight.shape
        self.linear = nn.Linear(dim, classes)
        self.start_from(embeddings)

    @torch.no_grad()
    def start_from(self, embeddings: Embeddings) -> None:
        """Set f_out to read the embeddings."""
        self.linear.weight.copy_(embeddings.weight / embeddings.weight.square().sum(1).mean())
        self.linear.bias.zero_()

    def forward(self, z: Tensor, embeddings: Embeddings) -> Tensor:
        """(B, d) -> (B, C) logits of p_out, up to a constant per row."""
        with torch.autocast(z.device.type, enabled=False):
            logits: Tensor = self.linear(z)
        if self.kind == "linear":
            return logits
        return embeddings.log_similarity(embeddings.estimate(logits), self.sigma**2)


@dataclass(frozen=True, eq=False)
class Shared:
    """What all blocks share: W_E, and p_out where there is one."""

    embeddings: Embeddings
    readout: Readout | None

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Choose prototypes, see `Embeddings.prepare`, and let p_out start from them."""
        self.embeddings.prepare(batches)
        if self.readout is not None:
            self.readout.start_from(self.embeddings)

    def read(self, z: Tensor) -> Tensor:
        """(B, d) -> (B, C) logits of p_out."""
        assert self.readout is not None, "this process reads no p_out"
        return self.readout(z, self.embeddings)


class SampleNoise:
    """Gaussian noise of inference: a function of the seed, the draw, the step and the sample's own values.

    So an answer does not depend on the batch that a sample is in, and labels are nowhere near.

    Args:
        inputs: (B, ...) samples.
        key: 0-d int64 seed.
        draw: which of many independent draws.
        dim: d.
        dtype: of the noise.
    """

    def __init__(self, inputs: Tensor, key: Tensor, draw: int, dim: int, dtype: torch.dtype) -> None:
        self._keys = mix(content_keys(inputs) ^ mix(key + torch.full_like(key, draw) * DRAW))
        self._dim, self._dtype = dim, dtype

    def __call__(self, step: int | Tensor) -> Tensor:
        """(B, d) noise of one step, whose number may be 0-d int64."""
        count = step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=self._keys.device)
        return normal_numbers(self._keys, count, self._dim, self._dtype)


class BlockNoise(nn.Module):
    """The random streams of a NoProp network: one per block, those of its dropout, and the key of inference.

    Args:
        blocks: the network's blocks.
        seed: fixes all of them; None draws one from PyTorch's global generator.
    """

    key: Tensor

    def __init__(self, blocks: Iterable[nn.Module], seed: int | None) -> None:
        super().__init__()
        seed = int(torch.randint(1 << 62, ())) if seed is None else seed
        self.register_buffer("key", torch.tensor(derive(seed, 0)))
        streams = []
        for index, block in enumerate(blocks):
            streams.append(Stream(derive(seed, 1, index)))
            dropouts = (part for part in block.modules() if isinstance(part, StreamDropout))
            for place, dropout in enumerate(dropouts):
                dropout.stream.rekey(derive(seed, 2, index, place))
        self.streams = nn.ModuleList(streams)


def embedding_width(kind: EmbeddingKind, classes: int, dim: int | None, input_shape: Shape) -> int:
    """d: C of one-hot embeddings, `dim` of learned ones (None: 20), an input's size of prototypes.

    Raises:
        UsageError: unknown kind, less than 1, or a width of embeddings that have one of their own.
    """
    if kind not in EMBEDDINGS:
        raise unknown_name("embeddings", kind, EMBEDDINGS)
    if kind != "learned":
        refuse_idle({"embedding_dim": dim}, ("embedding_dim",), f"embeddings={kind}")
        return classes if kind == "onehot" else math.prod(input_shape)
    if dim is not None and dim < 1:
        raise UsageError(f"embedding_dim must be at least 1, got {dim}")
    return EMBEDDING_DIM if dim is None else dim


def radial_width(kind: ReadoutKind, sigma: float | None) -> float:
    """sigma of the radial p_out; None: 0.5.

    Raises:
        UsageError: the read-out is linear and has none.
    """
    if kind == "linear":
        refuse_idle({"radial_sigma": sigma}, ("radial_sigma",), "p_out=linear")
    return RADIAL_SIGMA if sigma is None else sigma


def blocks_of(
    modules: list[nn.Module],
    count: int,
    classes: int,
    dim: int,
    input_shape: Shape,
    timed: bool,
    prototypes: bool,
    width: int,
) -> list[Denoiser]:
    """The user's own denoisers, or `count` blocks around the user's image branch.

    Raises:
        UsageError: another number of denoisers than steps.
    """
    own = [module for module in modules if isinstance(module, Denoiser)]
    if not own:
        return denoisers(modules, count, classes, dim, input_shape, timed=timed, prototypes=prototypes, width=width)
    if len(own) != len(modules) or len(own) != count:
        raise UsageError(f"expected {count} denoisers, one per block, got {len(own)} among {len(modules)} modules")
    return own
