"""Folders of image files: made here, small, and every way in which they can be wrong."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bpfree.data import load_image_folder
from bpfree.errors import DataError, UsageError

Image = pytest.importorskip("PIL.Image")


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def colour(height: int, width: int, *rgb: int) -> np.ndarray:
    return np.broadcast_to(np.array(rgb, np.uint8), (height, width, 3)).copy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, images of different sizes and kinds; one class is not in the test part."""
    root = tmp_path / "pets"
    save(root / "train" / "cat" / "b.png", colour(40, 30, 255, 0, 0))
    save(root / "train" / "cat" / "a.JPEG", colour(20, 50, 0, 255, 0))
    save(root / "train" / "dog" / "c.bmp", colour(16, 16, 0, 0, 255))
    save(root / "train" / "dog" / "grey.png", np.full((30, 30), 77, np.uint8))
    save(root / "val" / "dog" / "d.png", colour(12, 70, 10, 20, 30))
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    return root


def test_images_labels_and_names(folder: Path) -> None:
    dataset = load_image_folder(folder, 8)
    assert (dataset.name, dataset.class_names, dataset.classes) == ("pets", ("cat", "dog"), 2)
    assert dataset.train.inputs.shape == (4, 3, 8, 8)
    assert dataset.train.inputs.dtype == torch.uint8
    assert dataset.train.targets.tolist() == [0, 0, 1, 1]
    assert dataset.test.targets.tolist() == [1]
    # in the order of the names: a.JPEG (compressed, so nearly green), b.png, c.bmp, grey.png
    centres = dataset.train.inputs[:, :, 4, 4].tolist()
    assert centres[1:] == [[255, 0, 0], [0, 0, 255], [77, 77, 77]]
    np.testing.assert_allclose(centres[0], [0, 255, 0], atol=2)
    assert dataset.test.inputs[0, :, 0, 0].tolist() == [10, 20, 30]
    assert dataset.augmentation == "crop-flip"
    expected = dataset.train.inputs.double().div(255).mean((0, 2, 3))
    torch.testing.assert_close(torch.tensor(dataset.mean, dtype=torch.float64), expected)


def test_the_shorter_side_is_scaled_and_the_centre_cut_out(tmp_path: Path) -> None:
    # 8 x 24: left, middle and right third of different grey; the middle 8 x 8 is what stays at scale 1
    pixels = np.repeat(np.array([[0, 100, 200]], np.uint8), 8, axis=1).repeat(8, axis=0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            save(tmp_path / part / name / "wide.png", pixels)
            save(tmp_path / part / name / "tall.png", pixels.T)
    images = load_image_folder(tmp_path, 8, shorter_side=8).train.inputs
    assert (images == 100).all()
    smaller = load_image_folder(tmp_path, 4, shorter_side=16).train.inputs
    assert smaller.shape == (4, 3, 4, 4)
    assert (smaller == 100).all()


def test_sets_run_through_the_data_path(folder: Path) -> None:
    train, validation, test = load_image_folder(folder, 8, validation=1).split()
    assert (len(train), len(validation), len(test)) == (3, 1, 1)


def test_a_file_that_is_no_image_is_named(folder: Path) -> None:
    (folder / "train" / "cat" / "z.jpg").write_bytes(b"\xff\xd8 not really")
    with pytest.raises(DataError, match=r"cannot read .*z\.jpg"):
        load_image_folder(folder, 8)


def test_a_truncated_image_is_named(folder: Path) -> None:
    file = folder / "train" / "cat" / "b.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match=r"b\.png"):
        load_image_folder(folder, 8)


def test_only_decoders_of_the_listed_formats_see_a_file(folder: Path) -> None:
    Image.fromarray(colour(9, 9, 1, 2, 3)).save(folder / "train" / "cat" / "b.png", format="TIFF")
    with pytest.raises(DataError, match=r"b\.png"):
        load_image_folder(folder, 8)


@pytest.mark.filterwarnings("ignore:Image size")
def test_images_of_too_many_pixels_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    with pytest.raises(DataError, match="pixels are too many"):
        load_image_folder(folder, 8)


def test_sets_that_do_not_fit_are_refused_before_they_are_read(folder: Path) -> None:
    (folder / "train" / "cat" / "b.png").write_bytes(b"would not be readable")
    with pytest.raises(DataError, match="use a smaller size"):
        load_image_folder(folder, 8, max_bytes=5 * 3 * 64 - 1)


def test_folders_that_are_not_as_they_should_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        load_image_folder(tmp_path / "nowhere", 8)
    (folder / "val" / "bird").mkdir()
    with pytest.raises(DataError, match="class 'bird'"):
        load_image_folder(folder, 8)
    (folder / "val" / "bird").rmdir()
    (folder / "val" / "dog" / "d.png").unlink()
    with pytest.raises(DataError, match="val holds no images"):
        load_image_folder(folder, 8)
    save(tmp_path / "one" / "train" / "cat" / "a.png", colour(9, 9, 0, 0, 0))
    with pytest.raises(DataError, match="at least two classes"):
        load_image_folder(tmp_path / "one", 8)


@pytest.mark.parametrize(("size", "shorter_side"), [(0, None), (8, 7)])
def test_sizes_that_make_no_sense(size: int, shorter_side: int | None, folder: Path) -> None:
    with pytest.raises(UsageError, match="shorter_side"):
        load_image_folder(folder, size, shorter_side=shorter_side)


def test_without_pillow_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'")
        return there(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match=r"pip install 'bpfree\[images\]'"):
        load_image_folder(folder, 8)
