"""Samples that live on the training device and are served as batches of one size.

The whole part of a data set stays on the device as it was stored (images as uint8). Order, crops and flips of
an epoch are a pure function of a seed, drawn on the CPU so that every device sees the same epoch, and applied to
many batches at once, so that a training step meets ready-made batches and no small kernels of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import DataError, UsageError, unknown_name

AUGMENTATIONS: Final = ("none", "crop-flip", "shift")
CROP_PADDING: Final = 4  # pixels of reflected border, as in the studies that bpfree compares with
SHIFT: Final = 2  # pixels, as in Hinton, arXiv 2212.13345
MOMENTS_BATCH: Final = 2000


@dataclass(frozen=True)
class Draw:
    """One epoch's random choices, on the device: sample order and, when augmenting, crop offsets and flips."""

    order: Tensor  # (N,) int64
    offsets: Tensor | None = None  # (N, 2) int64 rows, columns, in [0, 2 * CROP_PADDING] or [0, 2 * SHIFT]
    flips: Tensor | None = None  # (N, 1) bool, of crop-flip


class Batches:
    """One part of a data set on one device.

    Args:
        inputs: (N, ...) uint8 images (N, C, H, W), or floating point features.
        targets: (N,) int64, classes.
        device: where the samples live and are transformed.
        dtype: floating point type of the samples served.
        mean: per channel, subtracted after images are scaled to [0, 1]; empty for none.
        std: per channel, divided by; empty for none.
        augmentation: "none", or "crop-flip": a random crop after reflecting 4 pixels around the image, and a
            horizontal flip of every other image; or "shift": by up to 2 pixels along both axes, zeros coming in.
        layout: memory format of the images served, `torch.channels_last` or the default.
        reconstruct: serve every sample, as it is served, as its own target.

    Raises:
        DataError: not as many targets as inputs, augmentation of something that is not an image, or channels that do
            not match `mean`.
        UsageError: unknown augmentation, or there is no such device.
    """

    fixed_shapes: ClassVar[bool] = True  # of a step's batch, so that a CUDA graph can replay it

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        augmentation: str = "none",
        layout: torch.memory_format = torch.contiguous_format,
        reconstruct: bool = False,
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise unknown_name("augmentation", augmentation, AUGMENTATIONS)
        border = {"none": 0, "crop-flip": CROP_PADDING, "shift": SHIFT}[augmentation]
        if border and (inputs.ndim != 4 or min(inputs.shape[2:]) <= border):
            raise DataError(
                f"{augmentation} needs images larger than {border} pixels, samples have shape "
                f"{tuple(inputs.shape[1:])}; use --augmentation none"
            )
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"there is no {device} here: give device='cpu'")
        if len(inputs) != len(targets):
            raise DataError(f"{len(inputs)} inputs but {len(targets)} targets")
        if mean and inputs.shape[1] != len(mean):
            raise DataError(f"samples have {inputs.shape[1]} channels, mean and std are given for {len(mean)}")
        self.inputs = inputs.to(device)
        self.targets = targets.to(device)
        self.dtype = dtype
        self.augmentation = augmentation
        self.reconstruct = reconstruct
        self.layout = layout if inputs.ndim == 4 else torch.contiguous_format
        # (x * unit - mean) / std as one multiplication and one addition
        unit = 1 / 255 if inputs.dtype == torch.uint8 else 1.0
        channels = (-1,) + (1,) * (inputs.ndim - 2)
        self._scale = torch.tensor([unit / s for s in std] or [unit], dtype=dtype, device=device).view(channels)
        self._shift = torch.tensor(
            [-m / s for m, s in zip(mean, std, strict=True)] or [0.0], dtype=dtype, device=device
        ).view(channels)
        self._plain = not mean and inputs.dtype != torch.uint8

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        return tuple(self.inputs.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        return self.inputs.device

    @property
    def nbytes(self) -> int:
        """Bytes that the samples and targets take on the device."""
        return self.inputs.nbytes + self.targets.nbytes

    @property
    def metric(self) -> str:
        """What `hits` counts: accuracy, or of reconstructions the share of the samples' variance, R squared."""
        return "R2" if self.reconstruct else "accuracy"

    @property
    def criterion(self) -> str:
        """What `losses` adds up."""
        return "MSE" if self.reconstruct else "cross-entropy"

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Scores -> the sum over samples of `criterion`; the MSE of a sample is a mean over its values."""
        if self.reconstruct:
            return F.mse_loss(scores, targets.float(), reduction="sum") / targets[0].numel()
        return F.cross_entropy(scores, targets, reduction="sum")

    def hits(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(B, C) scores -> number of samples whose highest score is their class.

        (B, ...) reconstructions -> what adds up, over all samples, to R squared times their number.
        """
        if self.reconstruct:
            return len(targets) - self.losses(scores, targets) / self._variance
        return (scores.argmax(1) == targets).sum()

    @cached_property
    def _variance(self) -> Tensor:
        """Variance of the samples as they are served, each value about its own mean, averaged over values: 0-d."""
        moments = torch.zeros(2, *self.sample_shape, dtype=torch.float64, device=self.device)
        for samples, _ in self.in_order(MOMENTS_BATCH):
            moments += torch.stack([samples.double().sum(0), samples.double().square().sum(0)])
        mean, square = moments / len(self)
        return (square - mean.square()).mean()

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches of one epoch."""
        return len(self) // batch_size

    def step_size(self, batch_size: int) -> int:
        """How many samples one step learns from."""
        return batch_size

    def bytes_per_step(self, batch_size: int) -> int:
        """What staging one more step takes."""
        sample = torch.Size(self.sample_shape).numel() * self.dtype.itemsize
        return 0 if self._served_whole(batch_size) else batch_size * sample

    def _served_whole(self, batch_size: int) -> bool:
        """Whether every step meets all samples just as they are stored: full-batch steps on cached outputs."""
        plain = self._plain and self.inputs.dtype == self.dtype and self.augmentation == "none"
        return plain and batch_size == len(self)

    def stage(self, count: int, batch_size: int) -> Staged | Whole:
        """Ready-made batches for up to `count` consecutive steps."""
        if self._served_whole(batch_size):
            return Whole(*self.pair(self.inputs, self.targets))
        return Staged(self, count, batch_size)

    def staging(self, count: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Uninitialised buffers for `count` batches: (count, batch_size, *sample_shape) and (count, batch_size)."""
        inputs = torch.empty(count * batch_size, *self.sample_shape, dtype=self.dtype, device=self.device)
        inputs = inputs.to(memory_format=self.layout).unflatten(0, (count, batch_size))
        return inputs, torch.empty(count, batch_size, dtype=torch.int64, device=self.device)

    def _normalized(self, samples: Tensor, out: Tensor) -> Tensor:
        out.copy_(samples)
        return out if self._plain else torch.addcmul(self._shift, out, self._scale, out=out)

    def pair(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs as served, and the targets that go with them."""
        return (inputs, inputs) if self.reconstruct else (inputs, targets)

    def draw(self, *seed: int) -> Draw:
        """An epoch's order and augmentation: the same seed gives the same epoch, on every device."""
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = torch.randperm(len(self), generator=generator).to(self.device)
        if self.augmentation == "none":
            return Draw(order)
        if self.augmentation == "shift":
            return Draw(order, torch.randint(2 * SHIFT + 1, (len(self), 2), generator=generator).to(self.device))
        offsets = torch.randint(2 * CROP_PADDING + 1, (len(self), 2), generator=generator)
        flips = torch.randint(2, (len(self), 1), generator=generator, dtype=torch.bool)
        return Draw(order, offsets.to(self.device), flips.to(self.device))

    def fill(self, draw: Draw, first: int, inputs: Tensor, targets: Tensor) -> None:
        """Write the samples from position `first` of the epoch into staging buffers, transformed.

        Args:
            draw: the epoch.
            first: position in the epoch's order of the first sample.
            inputs: (n, *sample_shape) buffer to fill.
            targets: (n,) int64 buffer to fill.
        """
        chosen = slice(first, first + len(targets))
        order = draw.order[chosen]
        torch.index_select(self.targets, 0, order, out=targets)
        if draw.offsets is None:
            samples = self.inputs.index_select(0, order)
        elif draw.flips is None:
            samples = shift(self.inputs, order, draw.offsets[chosen])
        else:
            samples = crop_flip(self.inputs, order, draw.offsets[chosen], draw.flips[chosen])
        self._normalized(samples, out=inputs)

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, in stored order, transformed but not augmented; the last batch may be smaller."""
        for inputs, targets in zip(self.inputs.split(batch_size), self.targets.split(batch_size), strict=True):
            buffer = torch.empty_like(inputs, dtype=self.dtype, memory_format=self.layout)
            yield self.pair(self._normalized(inputs, out=buffer), targets)

    def epoch(self, draw: Draw, batch_size: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample of an epoch once, transformed, from batch `first_batch` on; the last batch may be smaller."""
        for first in range(first_batch * batch_size, len(self), batch_size):
            inputs, targets = (buffer[0] for buffer in self.staging(1, min(batch_size, len(self) - first)))
            self.fill(draw, first, inputs, targets)
            yield self.pair(inputs, targets)

    @torch.no_grad()
    def map(self, function: Callable[[Tensor], Tensor], batch_size: int) -> Batches:
        """The same samples seen through `function`, computed once and kept on the device.

        Raises:
            DataError: these samples are augmented, so that no epoch equals another.
        """
        if self.augmentation != "none":
            raise DataError("outputs of augmented samples cannot be kept: every epoch has its own")
        outputs, done = torch.empty(0, device=self.device), 0
        for inputs, _ in self.in_order(batch_size):
            made = function(inputs)
            if not done:  # in their place at once: collecting them first would take twice the memory
                layout = self.layout if made.ndim == 4 else torch.contiguous_format
                shape = (len(self), *made.shape[1:])
                outputs = torch.empty(shape, dtype=made.dtype, device=made.device, memory_format=layout)
            outputs[done : done + len(made)] = made
            done += len(made)
        return Batches(outputs, self.targets, device=self.device, dtype=self.dtype, layout=self.layout)


class Staged:
    """Buffers on the device that hold the ready-made batches of consecutive steps."""

    def __init__(self, batches: Batches, count: int, batch_size: int) -> None:
        self._batches, self._batch_size = batches, batch_size
        self._inputs, self._targets = batches.staging(count, batch_size)

    def fill(self, draw: Draw, first_step: int, count: int) -> None:
        """Put the batches of `count` steps of an epoch, from step `first_step` on, into the buffers."""
        inputs, targets = self._inputs[:count].flatten(0, 1), self._targets[:count].flatten()
        self._batches.fill(draw, first_step * self._batch_size, inputs, targets)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        return self._batches.pair(self._inputs[position], self._targets[position])


class Whole:
    """Every step's batch: the same stored tensors, without a copy (a full-batch gradient has no order)."""

    def __init__(self, inputs: Any, targets: Tensor) -> None:
        self._batch = inputs, targets

    def fill(self, draw: Draw, first_step: int, count: int) -> None:
        """Nothing to do: the tensors do not change."""

    def __getitem__(self, position: int) -> tuple[Any, Tensor]:
        return self._batch


def crop_flip(images: Tensor, order: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Randomly cropped and flipped copies of chosen images, in one gather.

    Equals padding each image by reflection, cutting the window at its offset and mirroring it.

    Args:
        images: (N, C, H, W).
        order: (n,) which images.
        offsets: (n, 2) row and column of the window in the padded image, in [0, 2 * CROP_PADDING].
        flips: (n, 1) whether to mirror left and right.
    """
    channels, height, width = images.shape[1:]
    device = images.device
    rows = _reflected(height, device)[offsets[:, :1] + torch.arange(height, device=device)]
    columns = torch.arange(width, device=device)
    columns = _reflected(width, device)[offsets[:, 1:] + torch.where(flips, width - 1 - columns, columns)]
    channel = torch.arange(channels, device=device)
    return images[
        order[:, None, None, None],
        channel[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def shift(images: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Shifted copies of chosen images, in one gather; what comes in from outside is zero.

    Args:
        images: (N, C, H, W).
        order: (n,) which images.
        offsets: (n, 2) row and column of the window in the image with a border of `SHIFT`, in [0, 2 * SHIFT].
    """
    channels, height, width = images.shape[1:]
    device = images.device
    rows = offsets[:, :1] + torch.arange(height, device=device) - SHIFT
    columns = offsets[:, 1:] + torch.arange(width, device=device) - SHIFT
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    shifted = images[
        order[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows.clamp(0, height - 1)[:, None, :, None],
        columns.clamp(0, width - 1)[:, None, None, :],
    ]
    return shifted * inside


def _reflected(size: int, device: torch.device) -> Tensor:
    """Source position of every position of an axis padded by reflection: (size + 2 * CROP_PADDING,)."""
    line = torch.arange(size, dtype=torch.float32, device=device)[None, None]
    return F.pad(line, (CROP_PADDING, CROP_PADDING), mode="reflect")[0, 0].long()
