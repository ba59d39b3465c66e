"""Parts, the fixed split, and data sets from users' own arrays and PyTorch data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, TensorDataset

from bpfree.data import SPLIT_SEED, Dataset, Part
from bpfree.errors import DataError


def images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *(shape or (1, 4, 4))), dtype=np.uint8)


def labels(count: int, classes: int = 3) -> np.ndarray:
    return np.arange(count) % classes


def toy(count: int = 20, **options: Any) -> Dataset:
    """Image i is filled with i, so that a sample can be told from its pixels."""
    inputs = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, 2, 2))
    return Dataset.from_arrays((inputs, labels(count)), (images(5, 1, 2, 2), labels(5)), **options)


def philox(key: int, blocks: int) -> list[int]:
    """Philox4x64-10 in plain Python (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    mask = 2**64 - 1
    words = []
    for block in range(1, blocks + 1):
        c0, c1, c2, c3 = block, 0, 0, 0
        k0, k1 = key & mask, key >> 64
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += [c0, c1, c2, c3]
    return words


# --- Part ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "targets", "reason"),
    [
        (torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64), "3 inputs but 2 targets"),
        (torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "images of shape"),
        (torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int64), "torch.int32"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), "(3,)"),
        (torch.zeros(3, 4), torch.zeros(3), "torch.float32"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32), "torch.int32"),
        (torch.zeros(3, 4), torch.zeros(3, 10, dtype=torch.int64), "(3, 10)"),
        (
            torch.tensor([[0.0], [float("nan")]]),
            torch.zeros(2, dtype=torch.int64),
            "NaN or infinite values, first in sample 1",
        ),
        (torch.tensor([[0.0], [float("inf")]]), torch.zeros(2, dtype=torch.int64), "infinite"),
    ],
)
def test_part_refuses(inputs: torch.Tensor, targets: torch.Tensor, reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        Part(inputs, targets)


def test_part_has_a_length() -> None:
    assert len(Part(torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))) == 3


# --- the split -------------------------------------------------------------------------------------------


def members(part: Part) -> list[int]:
    return part.inputs[:, 0, 0, 0].tolist()


@settings(max_examples=50, deadline=None)
@given(count=st.integers(3, 200), data=st.data())
def test_split_is_disjoint_and_covers_the_training_part(count: int, data: st.DataObject) -> None:
    dataset = toy(count)
    train, validation, test = dataset.split(data.draw(st.integers(0, count - 1)))
    assert sorted(members(train) + members(validation)) == list(range(count))
    assert test is dataset.test
    for part in (train, validation):
        assert part.targets.tolist() == [index % 3 for index in members(part)]


def test_split_follows_the_published_generator() -> None:
    keys = philox(SPLIT_SEED, blocks=25)
    order = sorted(range(100), key=lambda index: keys[index])
    train, validation, _ = toy(100).split(30)
    assert members(validation) == order[:30]
    assert members(train) == order[30:]


def test_split_does_not_depend_on_the_seed_of_a_run() -> None:
    splits = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002  (the legacy state is what a user's script would set)
        torch.manual_seed(seed)
        splits.append(members(toy(50).split(10)[1]))
    assert splits[0] == splits[1]


def test_a_smaller_validation_part_is_contained_in_a_larger_one() -> None:
    dataset = toy(50)
    assert members(dataset.split(10)[1])[:4] == members(dataset.split(4)[1])


def test_another_split_seed_gives_another_split() -> None:
    dataset = toy(50)
    assert members(dataset.split(10)[1]) != members(dataset.split(10, seed=1)[1])


def test_split_takes_the_default_of_the_data_set() -> None:
    assert [len(part) for part in toy(50).split()] == [45, 5, 5]
    assert [len(part) for part in toy(50, validation=7).split()] == [43, 7, 5]


def test_split_leaves_the_data_set_alone() -> None:
    dataset = toy(20)
    train, _, _ = dataset.split(5)
    train.inputs.zero_()
    assert members(dataset.train) == list(range(20))


@pytest.mark.parametrize("validation", [-1, 20, 21])
def test_split_refuses(validation: int) -> None:
    with pytest.raises(DataError, match=f"cannot take {validation} validation samples out of 20"):
        toy(20).split(validation)


def test_a_part_that_is_no_pair_is_named() -> None:
    pair = (images(6, 5, 4), labels(6))
    with pytest.raises(DataError, match=r"test part: a pair \(inputs, targets\) is wanted, got NoneType"):
        Dataset.from_arrays(pair, None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"training part: a pair .* got ndarray"):
        Dataset.from_arrays(pair[0], pair)  # type: ignore[arg-type]


# --- from_arrays -----------------------------------------------------------------------------------------


def test_grey_images_get_a_channel_axis() -> None:
    dataset = Dataset.from_arrays((images(6, 5, 4), labels(6)), (images(2, 5, 4), labels(2)))
    assert dataset.input_shape == (1, 5, 4)
    assert dataset.train.inputs.dtype == torch.uint8
    np.testing.assert_array_equal(dataset.train.inputs[:, 0].numpy(), images(6, 5, 4))


def test_features_take_the_default_type() -> None:
    features = np.random.default_rng(0).normal(size=(6, 3))
    dataset = Dataset.from_arrays((features, labels(6)), (features[:2], labels(2)))
    assert dataset.input_shape == (3,)
    assert dataset.train.inputs.dtype == torch.float32


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8, 1), (8, 8, 4)])
def test_channel_last_images_are_refused_with_the_way_out(shape: tuple[int, ...]) -> None:
    parts = (images(6, *shape), labels(6)), (images(2, *shape), labels(2))
    with pytest.raises(DataError, match=r"training part: .*channels_last=True"):
        Dataset.from_arrays(*parts)
    assert Dataset.from_arrays(*parts, channels_last=False).input_shape == shape
    moved = Dataset.from_arrays(*parts, channels_last=True)
    assert moved.input_shape == (shape[2], 8, 8)
    assert moved.train.inputs.is_contiguous()
    assert moved.train.inputs[4, 0, 2, 7] == parts[0][0][4, 2, 7, 0]


def test_channel_first_images_pass() -> None:
    assert Dataset.from_arrays((images(6, 3, 8, 8), labels(6)), (images(2, 3, 8, 8), labels(2))).classes == 3


@pytest.mark.parametrize("as_tensor", [False, True])
def test_arrays_are_copied(as_tensor: bool) -> None:
    inputs, targets = images(6), labels(6)
    train = (torch.from_numpy(inputs), torch.from_numpy(targets)) if as_tensor else (inputs, targets)
    dataset = Dataset.from_arrays(train, (images(2), labels(2)))
    before = inputs.copy()
    inputs[:], targets[:] = 0, 0
    np.testing.assert_array_equal(dataset.train.inputs.numpy(), before)
    assert dataset.train.targets.tolist() == [0, 1, 2, 0, 1, 2]


def test_statistics_are_those_of_the_training_part() -> None:
    train, test = images(50, 3, 4, 4), images(5, 3, 4, 4, seed=1)
    dataset = Dataset.from_arrays((train, labels(50)), (test, labels(5)))
    scaled = train.astype(np.float64) / 255
    np.testing.assert_allclose(dataset.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, scaled.std((0, 2, 3)), rtol=1e-12)


def test_statistics_of_features() -> None:
    features = np.random.default_rng(0).normal(5, [1, 2, 3], size=(50, 3)).astype(np.float32)
    features[:, 2] = 7  # constant
    dataset = Dataset.from_arrays((features, labels(50)), (features[:3], labels(3)))
    np.testing.assert_allclose(dataset.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std[:2], features[:, :2].astype(np.float64).std(0), rtol=1e-12)
    assert dataset.std[2] == 1


def test_statistics_can_be_given() -> None:
    assert toy(mean=(0.25,), std=(2.0,)).mean == (0.25,)
    dataset = toy(mean=(), std=())
    assert (dataset.mean, dataset.std) == ((), ())


def test_defaults_of_from_arrays() -> None:
    dataset = toy(20)
    assert (dataset.name, dataset.classes, dataset.validation, dataset.augmentation) == (
        "custom",
        3,
        2,
        "none",
    )
    assert dataset.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"classes": 2}, "training targets span 0..2, outside 0..1"),
        ({"mean": (0.5,)}, "both mean and std"),
        ({"mean": (0.5, 0.5), "std": (1, 1)}, "1 values each"),
        ({"mean": (0.5,), "std": (0,)}, "positive"),
        ({"mean": (0.5,), "std": (float("nan"),)}, "positive"),
        ({"class_names": ("a", "b")}, "2 class names for 3 classes"),
        ({"validation": 20}, "cannot take 20"),
        ({"augmentation": "mixup"}, "'mixup'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        toy(20, **options)


@pytest.mark.parametrize(
    ("train", "test", "reason"),
    [
        ((images(3), labels(3)), (images(3), labels(3) + 5), "test targets span 5..7, outside 0..2"),
        ((images(3), labels(3) - 1), (images(3), labels(3)), "training targets span -1..1"),
        ((images(3), labels(3)), (images(3, 1, 5, 5), labels(3)), "(1, 5, 5)"),
        ((images(3), labels(3)), (images(3) / 255, labels(3)), "torch.float32"),
        ((images(3), labels(3)), (images(0), labels(0)), "test part: no samples"),
        ((images(0), labels(0)), (images(3), labels(3)), "training part: no samples"),
        ((images(3), labels(4)), (images(3), labels(3)), "training part: 3 inputs but 4 targets"),
        ((images(3), labels(3)), (images(3).astype(int), labels(3)), "test part: inputs must be uint8"),
        ((images(3), labels(3) / 2), (images(3), labels(3)), "class indices"),
        ((images(3), np.eye(3, dtype=int)), (images(3), labels(3)), "(3, 3)"),
        ((images(3), labels(3) == 1), (images(3), labels(3)), "torch.bool"),
        ((np.full((3, 2), np.nan), labels(3)), (np.zeros((3, 2)), labels(3)), "NaN"),
        ((np.array(["a", "b"]), labels(2)), (np.zeros((3, 2)), labels(3)), "tensor"),
        ((np.array([{}, {}]), labels(2)), (np.zeros((3, 2)), labels(3)), "tensor"),
    ],
)
def test_arrays_that_do_not_fit(train: Any, test: Any, reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        Dataset.from_arrays(train, test)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "reason"),
    [
        (
            [1, 2, 3],
            [1, 3],
            "labels run from 1 to 3 and none is 0, but classes are numbered from 0 on: subtract 1 from",
        ),
        ([2, 3], [3], "subtract 2 from all of them, or pass classes=4 if the others merely do not occur"),
        ([0, 10, 20], [0], "only 3 of the classes 0..20 occur in the training labels, but"),
        ([-1, 1], [1], "the training targets span -1..1, outside 0..1; number them like that"),
        ([0.0, 1.0], [0], "convert them to integers"),
        ([False, True], [0], "convert them to integers"),
    ],
)
def test_labels_that_do_not_number_classes_from_0(train: list[Any], test: list[int], reason: str) -> None:
    parts = [(np.zeros((len(targets), 2)), np.array(targets)) for targets in (train, test)]
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        Dataset.from_arrays(parts[0], parts[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "options", "classes"),
    [
        ([1, 2, 3], [1], {"classes": 4}, 4),
        ([1, 2, 3], [1], {"class_names": ("none", "a", "b", "c")}, 4),
        ([1, 2, 3], [0], {}, 4),  # which shows how they are numbered
        ([0, 2, 5], [1], {}, 6),
        ([0, 10, 20], [0], {"classes": 30}, 30),
    ],
)
def test_subsets_without_some_classes(train: list[int], test: list[int], options: dict[str, Any], classes: int) -> None:
    parts = [(np.zeros((len(targets), 2)), np.array(targets)) for targets in (train, test)]
    assert Dataset.from_arrays(parts[0], parts[1], **options).classes == classes


def test_labels_from_1_with_their_number_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"the training targets span 1..3, outside 0..2; subtract 1 from all labels"):
        Dataset.from_arrays((images(3), labels(3) + 1), (images(3), labels(3) + 1), classes=3)
    with pytest.raises(DataError, match="none is 0"):
        Dataset.from_arrays((images(3), labels(3) + 1), (images(3), labels(3) + 1), class_names=("a", "b", "c"))


def test_a_part_without_samples_is_no_data_set() -> None:
    dataset = toy()
    with pytest.raises(DataError, match="the test part is empty"):
        replace(dataset, test=Part(dataset.test.inputs[:0], dataset.test.targets[:0]))


# --- from_torch ------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Yields what it is given, once per iteration."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.samples)


class Endless(torch.utils.data.Dataset):
    """Map-style with a length, and no IndexError at the end."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((2, 2), index, np.uint8), index % 2


def test_from_torch_map_style() -> None:
    inputs, targets = torch.randn(6, 3), torch.arange(6) % 2
    dataset = Dataset.from_torch(TensorDataset(inputs, targets), TensorDataset(inputs[:2], targets[:2]))
    assert torch.equal(dataset.train.inputs, inputs)
    assert torch.equal(dataset.train.targets, targets)
    assert len(dataset.test) == 2


def test_from_torch_stops_at_the_length() -> None:
    dataset = Dataset.from_torch(Endless(), Endless(), name="endless")
    assert members(dataset.train) == [0, 1, 2, 3]
    assert dataset.name == "endless"


def test_from_torch_reads_an_iterable_once() -> None:
    train, test = (
        Stream([(torch.ones(2), 0), (torch.zeros(2), torch.tensor(1))]),
        Stream([(torch.ones(2), 1)]),
    )
    dataset = Dataset.from_torch(train, test)
    assert dataset.train.targets.tolist() == [0, 1]
    assert (train.passes, test.passes) == (1, 1)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([], "no items"),
        ([torch.zeros(3)], "item 0 is not an (input, label) pair"),
        ([(torch.zeros(3), 0), (torch.zeros(3), 0, 0)], "item 1 is not an (input, label) pair"),
        ([5], "item 0 is not an (input, label) pair"),
        ([(torch.zeros(3), "cat")], "item 0 is not an (input, label) pair"),
        (
            [(torch.zeros(3), 0), (torch.zeros(4), 0)],
            "the input of item 1 has shape (4,), but that of item 0 (3,)",
        ),
        ([(torch.zeros(3), 0), (torch.zeros(3), [0, 1])], "the label of item 1 has shape (2,)"),
        ([(torch.zeros(3), 0.5)], "class indices"),
    ],
)
def test_from_torch_refuses(samples: list[Any], reason: str) -> None:
    good = TensorDataset(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(DataError, match=re.escape(f"test part: {reason}" if "class" not in reason else reason)):
        Dataset.from_torch(good, Stream(samples))
