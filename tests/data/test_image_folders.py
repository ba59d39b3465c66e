"""Folders of image files: made here, small, and every way in which they can be wrong."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bpfree import data
from bpfree.cli import cli
from bpfree.data import load_image_folder
from bpfree.errors import DataError, UsageError

Image = pytest.importorskip("PIL.Image")


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def colour(height: int, width: int, *rgb: int) -> np.ndarray:
    return np.broadcast_to(np.array(rgb, np.uint8), (height, width, 3)).copy()


def image_folder(root: Path, classes: tuple[str, ...], images: int) -> Path:
    """A folder with so many images of each class, of a colour that tells the class, in both parts."""
    for part in ("train", "val"):
        for index, name in enumerate(classes):
            for number in range(images):
                save(root / part / name / f"{number}.png", colour(12, 12, 200 * index, 10 * number, 50))
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, images of different sizes and kinds; one class has no image in the test part."""
    root = tmp_path / "pets"
    save(root / "train" / "cat" / "b.png", colour(40, 30, 255, 0, 0))
    save(root / "train" / "cat" / "a.JPEG", colour(20, 50, 0, 255, 0))
    save(root / "train" / "dog" / "c.bmp", colour(16, 16, 0, 0, 255))
    save(root / "train" / "dog" / "grey.png", np.full((30, 30), 77, np.uint8))
    save(root / "val" / "dog" / "d.png", colour(12, 70, 10, 20, 30))
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    (root / "val" / "cat").mkdir()
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


def test_images_that_are_too_long_when_scaled_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert len(load_image_folder(folder, 8).train) == 4
    long = save(folder / "train" / "cat" / "long.png", colour(1, 70, 0, 0, 0))  # 9x630 pixels
    with pytest.raises(DataError, match=r"cannot read .*long\.png: 70x1 is too long: 630x9 pixels when scaled"):
        load_image_folder(folder, 8)
    assert dict(data.verify(f"folder:{folder}@8"))[long] == "corrupt"  # as `load` reads it
    assert dict(data.verify(f"folder:{folder}@1"))[long] == "ok"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as Pillow's users lift its limit
    assert len(load_image_folder(folder, 8).train) == 5


def test_grey_of_16_bits_keeps_its_shades(folder: Path) -> None:
    shades = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    file = save(folder / "val" / "cat" / "grey.png", shades)
    with Image.open(file) as image:
        assert image.mode.startswith("I"), "it was written with 16 bits"
    (read,) = load_image_folder(folder, 16, shorter_side=16).test.inputs[:1]
    assert np.array_equal(read, np.broadcast_to(shades >> 8, (3, 16, 16)))


def test_hidden_files_are_left_out(folder: Path) -> None:
    (folder / "train" / "cat" / "._a.jpg").write_bytes(b"what macOS puts beside a.jpg")
    assert len(load_image_folder(folder, 8).train) == 4


def test_sets_that_do_not_fit_are_refused_before_they_are_read(folder: Path) -> None:
    (folder / "train" / "cat" / "b.png").write_bytes(b"would not be readable")
    with pytest.raises(DataError, match="use a smaller size"):
        load_image_folder(folder, 8, max_bytes=5 * 3 * 64 - 1)


def test_a_missing_folder_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"there is no folder nowhere in {tmp_path}$"):
        data.load("folder:nowhere")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere$"):
        load_image_folder(tmp_path / "nowhere", 8)
    with pytest.raises(DataError, match=r"pets/val has no folder 'train'; lay it out as train/<class>/\*\.jpg"):
        load_image_folder(folder / "val", 8)
    (folder / "val").rename(folder / "other")
    with pytest.raises(DataError, match=r"pets has no folder 'val' \(or validation or test\) beside 'train'"):
        load_image_folder(folder, 8)
    (folder / "other").rename(folder / "validation")
    assert len(load_image_folder(folder, 8).test) == 1


def test_folders_of_classes_are_needed(tmp_path: Path) -> None:
    save(tmp_path / "flat" / "train" / "a.png", colour(9, 9, 0, 0, 0))
    with pytest.raises(DataError, match=r"flat/train must hold a folder .* at least two classes, it holds 0"):
        load_image_folder(tmp_path / "flat", 8)
    save(tmp_path / "one" / "train" / "cat" / "a.png", colour(9, 9, 0, 0, 0))
    with pytest.raises(DataError, match="at least two classes, it holds 1"):
        load_image_folder(tmp_path / "one", 8)


def test_parts_with_other_classes_are_refused(folder: Path) -> None:
    (folder / "val" / "bird").mkdir()
    with pytest.raises(DataError, match=r"pets/val has classes that .*pets/train has not: 'bird'; both need the same"):
        load_image_folder(folder, 8)
    (folder / "val" / "bird").rmdir()
    for name in ("ant", "bee", "cow", "yak"):
        save(folder / "train" / name / "a.png", colour(9, 9, 0, 0, 0))
    with pytest.raises(DataError, match=r"pets/train has .*pets/val has not: 'ant', 'bee', 'cow' and 1 more"):
        load_image_folder(folder, 8)


def test_classes_without_images_are_refused(folder: Path) -> None:
    for file in (folder / "train" / "cat").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"pets/train has no images \(.*\) in the folders of 'cat'"):
        load_image_folder(folder, 8)
    save(folder / "train" / "cat" / "a.png", colour(9, 9, 0, 0, 0))
    (folder / "val" / "dog" / "d.png").unlink()
    with pytest.raises(DataError, match="pets/val has no images"):
        load_image_folder(folder, 8)


def test_a_folder_by_its_name_is_the_same_data_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    by_name, by_path = data.load("folder:pets@8"), load_image_folder(folder, 8)
    assert torch.equal(by_name.train.inputs, by_path.train.inputs)
    assert torch.equal(by_name.test.targets, by_path.test.targets)
    assert by_name.name == "folder:pets@8"  # which loads it again
    info = data.info(by_name.name)
    assert (info.classes, info.input_shape) == (2, (3, 8, 8))
    assert data.path("folder:pets") == data.fetch("folder:pets") == Path("pets")


@pytest.mark.parametrize(
    ("name", "path", "size"),
    [
        ("folder:pets", "pets", 224),
        ("folder:/a/b c@64", "/a/b c", 64),
        ("folder:me@home", "me@home", 224),
        ("folder:me@2@64", "me@2", 64),
        ("folder:a:b", "a:b", 224),
    ],
)
def test_a_name_says_where_and_how_large(name: str, path: str, size: int) -> None:
    info = data.info(name)
    assert isinstance(info, data.FolderInfo)
    assert (info.path, info.size, info.name) == (Path(path), size, name)


@pytest.mark.parametrize("name", ["folder:", "folder:@64", "folder:pets@0"])
def test_names_that_say_no_folder(name: str) -> None:
    with pytest.raises(UsageError, match=r"write folder:PATH, or folder:PATH@SIZE"):
        data.info(name)


def test_a_path_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot record the path in 'folder:.*udcff', which is not UTF-8"):
        data.info(f"folder:{tmp_path}/\udcff")


def test_a_folder_that_is_too_large_says_how_to_take_less(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"its images take .* GiB at 40000x40000, more than the 16\.0 allowed; .*folder:PATH@SIZE"
    ):
        data.load(f"folder:{folder}@40000")


def test_verify_names_images_that_cannot_be_decoded(folder: Path) -> None:
    broken = folder / "train" / "cat" / "b.png"
    broken.write_bytes(broken.read_bytes()[:60])
    states = dict(data.verify(f"folder:{folder}"))
    assert len(states) == 5
    assert [file for file, state in states.items() if state != "ok"] == [broken]
    assert states[broken] == "corrupt"


def test_commands_take_folders(folder: Path) -> None:
    runner = CliRunner()
    name = f"folder:{folder}"
    assert runner.invoke(cli, ["data", "path", name]).output.strip() == str(folder)
    assert runner.invoke(cli, ["data", "fetch", name]).exit_code == 0
    verified = runner.invoke(cli, ["data", "verify", name, "--format", "json"])
    assert verified.exit_code == 0
    assert {row["dataset"] for row in json.loads(verified.output)} == {name}
    (folder / "val" / "dog" / "d.png").write_bytes(b"no image")
    assert runner.invoke(cli, ["data", "verify", name]).exit_code == 1


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
