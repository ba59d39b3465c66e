"""A labelled data set in memory: a training and a test part, and the one way to split off validation samples.

Shapes: `N` samples, `C` channels, `H` x `W` pixels, `d` features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bpfree.data.batches import AUGMENTATIONS
from bpfree.errors import DataError

SPLIT_SEED = 20221227
"""Seed of the validation split, the same for every run: all of them are tuned on the same samples."""

ArrayLike = npt.NDArray[Any] | Tensor
TorchDataset = torch.utils.data.Dataset[Any] | Iterable[Any]


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a data set: training, validation or test.

    Attributes:
        inputs: (N, C, H, W) uint8 images, or (N, d) or (N, C, H, W) floating point features, all finite.
        targets: (N,) int64 class indices.

    Raises:
        DataError: shapes, lengths or types other than these, or values that are not finite.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        inputs, targets = self.inputs, self.targets
        shape = tuple(inputs.shape)
        if inputs.dtype == torch.uint8:
            if inputs.ndim != 4:
                raise DataError(f"uint8 inputs must be images of shape (N, C, H, W), not {shape}")
        elif not inputs.is_floating_point():
            raise DataError(f"inputs must be uint8 images or floating point, not {inputs.dtype}")
        elif inputs.ndim not in (2, 4):
            raise DataError(f"inputs must have shape (N, d) or (N, C, H, W), not {shape}")
        if targets.dtype != torch.int64 or targets.ndim != 1:
            found = f"{targets.dtype} of shape {tuple(targets.shape)}"
            remedy = "" if targets.ndim != 1 else "; convert them to integers if they number classes from 0 on"
            raise DataError(f"targets must be int64 class indices of shape (N,), not {found}{remedy}")
        if len(inputs) != len(targets):
            raise DataError(f"{len(inputs)} inputs but {len(targets)} targets")
        if inputs.is_floating_point() and not torch.isfinite(inputs).all():
            first = int((~torch.isfinite(inputs).flatten(1).all(1)).nonzero()[0])
            raise DataError(
                f"inputs hold NaN or infinite values, first in sample {first}; replace them or drop the samples"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"Part({len(self)} x {tuple(self.inputs.shape[1:])} {self.inputs.dtype})"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for classification.

    Attributes:
        name: as users call it.
        train: every training sample; `split` takes the validation samples out of these.
        test: the test samples.
        classes: number of classes; targets lie in [0, classes).
        mean: one value per channel, or per feature of (N, d) inputs, in input units (uint8 images: after
            division by 255). () = no normalisation.
        std: as `mean`, positive.
        class_names: one per class, in the order of the targets.
        validation: how many samples `split` takes out of the training part by default.
        augmentation: what is done by default to a training batch: "none" or "crop-flip".

    Raises:
        DataError: targets out of range, parts that do not match, or statistics or names of the wrong length.
    """

    name: str
    train: Part
    test: Part
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    validation: int
    augmentation: str = "none"

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise DataError(f"data set {self.name!r}: {problem}")

    def _problem(self) -> str | None:
        for which, part in (("training", self.train), ("test", self.test)):
            if not len(part):
                return f"the {which} part is empty"
            low, high = int(part.targets.min()), int(part.targets.max())
            if low < 0 or high >= self.classes:
                remedy = "subtract 1 from all labels" if (low, high) == (1, self.classes) else "number them like that"
                return f"the {which} targets span {low}..{high}, outside 0..{self.classes - 1}; {remedy}"
        train, test = (f"{tuple(p.inputs.shape[1:])} {p.inputs.dtype}" for p in (self.train, self.test))
        if train != test:
            return f"training samples are {train}, test samples {test}"
        channels = self.train.inputs.shape[1]
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, channels):
            return f"mean and std must have {channels} values each, or none"
        if not all(value > 0 for value in self.std):
            return f"std must be positive, not {self.std}"
        if len(self.class_names) != self.classes:
            return f"{len(self.class_names)} class names for {self.classes} classes"
        if self.augmentation not in AUGMENTATIONS:
            return f"augmentation must be one of {', '.join(AUGMENTATIONS)}, not {self.augmentation!r}"
        return self._validation_problem(self.validation)

    def _validation_problem(self, validation: int) -> str | None:
        if 0 <= validation < len(self.train):
            return None
        return f"cannot take {validation} validation samples out of {len(self.train)}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample: (C, H, W) or (d,)."""
        return tuple(self.train.inputs.shape[1:])

    def split(self, validation: int | None = None, seed: int = SPLIT_SEED) -> tuple[Part, Part, Part]:
        """Training, validation and test part; no training sample is also a validation sample.

        The first `validation` samples of one fixed random order are taken out, so a smaller validation part
        is contained in a larger one. The order depends on `seed` and the size of the training part only: not
        on the seed of a run, the machine, or the version of NumPy or PyTorch.

        Args:
            validation: how many samples to take out, 0 for none; the default of this data set if None.
            seed: leave it alone to compare with other runs.

        Raises:
            DataError: `validation` is negative or leaves nothing to train on.
        """
        if validation is None:
            validation = self.validation
        problem = self._validation_problem(validation)
        if problem:
            raise DataError(f"data set {self.name!r}: {problem}")
        # Sorting the generator's raw bits: NumPy freezes those, but not `Generator.permutation`.
        keys = np.random.Philox(key=seed).random_raw(len(self.train))
        order = torch.from_numpy(np.argsort(keys, kind="stable"))
        held_out, kept = order[:validation], order[validation:]
        inputs, targets = self.train.inputs, self.train.targets
        return Part(inputs[kept], targets[kept]), Part(inputs[held_out], targets[held_out]), self.test

    @classmethod
    def from_arrays(
        cls,
        train: tuple[ArrayLike, ArrayLike],
        test: tuple[ArrayLike, ArrayLike],
        *,
        name: str = "custom",
        classes: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        class_names: tuple[str, ...] | None = None,
        validation: int | None = None,
        augmentation: str = "none",
        channels_last: bool | None = None,
    ) -> Dataset:
        """A data set from arrays or tensors, which are copied.

        Floating point inputs take PyTorch's default type. Images of shape (N, H, W) get a channel axis.

        Args:
            train: (inputs, targets) of the training part. Inputs are uint8 images (N, C, H, W) or (N, H, W),
                or floating point (N, d), (N, H, W) or (N, C, H, W). Targets are (N,) integers of any width.
            test: the same for the test part.
            name: shown in tables and records.
            classes: number of classes; by default what the training targets reach, if they number classes from 0.
            mean: per channel (or per feature); computed from the training part by default, () for none.
            std: as `mean`. Give both or none.
            class_names: "0", "1", ... by default.
            validation: default number of validation samples; a tenth of the training part if None.
            augmentation: "none" or "crop-flip".
            channels_last: True for images of shape (N, H, W, C), False for (N, C, H, W). By default the
                latter, and an error if the shape looks like the former.

        Raises:
            DataError: inputs or targets of another kind, shape or range; says which part.
        """
        for which, pair in (("training", train), ("test", test)):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise DataError(f"{which} part: a pair (inputs, targets) is wanted, got {type(pair).__name__}")
        parts = {
            which: _part(inputs, targets, which, channels_last)
            for which, (inputs, targets) in (("training", train), ("test", test))
        }
        if (mean is None) != (std is None):
            raise DataError(f"data set {name!r}: give both mean and std, or neither")
        if mean is None or std is None:
            mean, std = channel_statistics(parts["training"].inputs)
        if classes is None:
            classes = _classes(parts["training"].targets, parts["test"].targets, class_names, name)
        return cls(
            name=name,
            train=parts["training"],
            test=parts["test"],
            classes=classes,
            mean=tuple(mean),
            std=tuple(std),
            class_names=tuple(map(str, range(classes))) if class_names is None else tuple(class_names),
            validation=len(parts["training"]) // 10 if validation is None else validation,
            augmentation=augmentation,
        )

    @classmethod
    def from_torch(cls, train: TorchDataset, test: TorchDataset, **options: Any) -> Dataset:
        """A data set from PyTorch data sets of (input, label) pairs, each read once from end to end.

        Random transforms would be frozen by this: leave augmentation to bpfree. Images that are not tensors
        (Pillow's, as torchvision gives them without a transform) are channel-last: pass `channels_last=True`.

        Args:
            train: a `torch.utils.data.Dataset`, map-style or iterable; inputs and labels are tensors, arrays,
                images or numbers, all inputs of one shape.
            test: the same for the test part.
            **options: those of `from_arrays`.

        Raises:
            DataError: an item is no pair, inputs differ in shape, or as `from_arrays`.
        """
        return cls.from_arrays(_materialise(train, "training"), _materialise(test, "test"), **options)


def _part(inputs: ArrayLike, targets: ArrayLike, which: str, channels_last: bool | None) -> Part:
    try:
        part = Part(_images_first(_tensor(inputs), channels_last), _class_indices(_tensor(targets)))
    except DataError as error:
        raise DataError(f"{which} part: {error}") from None
    if not len(part):
        raise DataError(f"{which} part: no samples")
    return part


def _tensor(values: ArrayLike) -> Tensor:
    """A copy in main memory, so that the caller's array may change afterwards."""
    if isinstance(values, Tensor):
        return values.detach().cpu().clone()
    try:
        return torch.tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot become a tensor: {error}") from error


def _images_first(inputs: Tensor, channels_last: bool | None) -> Tensor:
    if inputs.is_floating_point():
        inputs = inputs.to(torch.get_default_dtype())
    if inputs.ndim == 3:
        return inputs.unsqueeze(1)
    if inputs.ndim != 4:
        return inputs
    if channels_last is None and inputs.shape[3] in (1, 3, 4) and inputs.shape[1] not in (1, 3, 4):
        raise DataError(
            f"images of shape {tuple(inputs.shape)} look channel-last (N, H, W, C): pass channels_last=True "
            "to move the axis, or channels_last=False if they are (N, C, H, W)"
        )
    return inputs.permute(0, 3, 1, 2).contiguous() if channels_last else inputs


def _class_indices(targets: Tensor) -> Tensor:
    """Integers of any width as int64; anything else is left for `Part` to refuse."""
    is_integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    return targets.to(torch.int64) if is_integer else targets


def _classes(train: Tensor, test: Tensor, class_names: tuple[str, ...] | None, name: str) -> int:
    """The number of classes that the training labels reach.

    Raises:
        DataError: what they reach is hardly what is meant, since class 0 is nowhere, or most classes are.
    """
    low, high, classes = int(train.min()), int(train.max()), int(train.max()) + 1
    if low < 0 or (class_names is not None and len(class_names) == classes):  # refused elsewhere; known to be meant
        return classes
    if low > 0 and (test > 0).all():
        found = f"the labels run from {low} to {high} and none is 0"
        remedy = f"subtract {low} from all of them"
    elif 2 * len(train.unique()) < classes:
        found = f"only {len(train.unique())} of the classes 0..{high} occur in the training labels"
        remedy = "number those that there are"
    else:
        return classes
    raise DataError(
        f"data set {name!r}: {found}, but classes are numbered from 0 on: {remedy}, or pass classes={classes} if the "
        "others merely do not occur"
    )


def channel_statistics(inputs: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel, or feature, in float64.

    A constant channel gets the standard deviation 1, so that normalising it gives 0 and not NaN.
    """
    means, stds = [], []
    for channel in inputs.unbind(1):
        if inputs.dtype == torch.uint8:  # by histogram: exact, and without an eightfold copy of the images
            levels = torch.arange(256, dtype=torch.float64) / 255
            weights = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean = weights @ levels
            std = (weights @ (levels - mean).square()).sqrt()
        else:
            std, mean = torch.std_mean(channel.double(), correction=0)
        means.append(mean.item())
        stds.append(std.item() if channel.min() < channel.max() else 1.0)
    return tuple(means), tuple(stds)


def _materialise(samples: TorchDataset, which: str) -> tuple[Tensor, Tensor]:
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for index, sample in enumerate(_iterate(samples)):
        try:
            x, y = sample
            inputs.append(x if isinstance(x, Tensor) else torch.tensor(np.asarray(x)))
            targets.append(torch.as_tensor(y))
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"{which} part: item {index} is not an (input, label) pair of numbers") from None
        for what, values in (("input", inputs), ("label", targets)):
            if values[-1].shape != values[0].shape:
                shapes = f"{tuple(values[-1].shape)}, but that of item 0 {tuple(values[0].shape)}"
                raise DataError(f"{which} part: the {what} of item {index} has shape {shapes}")
    if not inputs:
        raise DataError(f"{which} part: no items")
    return torch.stack(inputs), torch.stack(targets)


def _iterate(samples: Any) -> Iterator[Any]:
    """Map-style data sets by index, since few of them raise the IndexError that would end a plain loop."""
    if hasattr(samples, "__getitem__") and hasattr(samples, "__len__"):
        return (samples[index] for index in range(len(samples)))
    return iter(samples)
