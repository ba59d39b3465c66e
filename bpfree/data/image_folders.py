"""Folders of image files, a folder per class, as ImageNet is laid out: `DATA/train/<class>/*.JPEG`, `DATA/val/..`.

Images are decoded by Pillow, scaled so that their shorter side fits, cropped around the centre, and kept in memory as
bytes: sets that fit there, not the 1.3 million images of ImageNet at 224 pixels (193 GB).

By name such a folder is `folder:PATH` or `folder:PATH@SIZE`, wherever the name of a data set is asked for.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from bpfree.data.dataset import Dataset, Part, channel_statistics
from bpfree.errors import DataError, UsageError

EXTENSIONS: Final = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
FORMATS: Final = ("JPEG", "PNG", "BMP", "WEBP")  # whatever the name says, no other decoder of Pillow's sees a file
TEST_FOLDERS: Final = ("val", "validation", "test")
SHORTER_SIDE: Final = 256 / 224  # to which images are scaled, times the crop's side: the usual evaluation on ImageNet
MAX_BYTES: Final = 16 << 30
PREFIX: Final = "folder:"
SIZE: Final = 224  # pixels, of ImageNet's usual crop
LISTED: Final = 3  # classes that a message names

Result = TypeVar("Result")


@dataclass(frozen=True)
class FolderInfo:
    """What is known of a folder of image files by its name alone; it is looked at when asked for more.

    Attributes:
        name: `folder:PATH` or `folder:PATH@SIZE`, as the user wrote it.
        path: the folder; relative to the working directory.
        size: height and width of the images taken, pixels.
    """

    name: str
    path: Path
    size: int

    @classmethod
    def of(cls, name: str) -> FolderInfo:
        """What a name says that begins with `folder:`.

        Raises:
            UsageError: it says no path, a size of 0, or a path that is no text and so cannot be recorded.
        """
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"cannot record the path in {name!r}, which is not UTF-8; link or rename it") from error
        parts = re.fullmatch(r"(.*?)(?:@(\d+))?", name.removeprefix(PREFIX), re.DOTALL)
        assert parts is not None, "any text is a path"
        path, size = parts[1], SIZE if parts[2] is None else int(parts[2])
        if not path or size < 1:
            raise UsageError(f"cannot read {name!r}; write folder:PATH, or folder:PATH@SIZE with a size in pixels")
        return cls(name, Path(path).expanduser(), size)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return 3, self.size, self.size

    @property
    def classes(self) -> int:
        """Number of classes.

        Raises:
            DataError: the folder is missing, or has no folders of classes.
        """
        return len(_classes_of(self.path))

    def load(self) -> Dataset:
        """The data set under this name; errors are those of `load_image_folder`."""
        return replace(load_image_folder(self.path, self.size), name=self.name)

    def check(self) -> None:
        """Look for the folders and files that `load` reads, without opening any of them.

        Raises:
            DataError: see `load_image_folder`.
        """
        _listed(self.path)

    def verify(self) -> list[tuple[Path, bool]]:
        """Every image with whether it can be read as `load` does.

        Raises:
            UsageError: Pillow is not installed.
            DataError: the folders are not as they should be.
        """
        _, train, test = _listed(self.path)
        reader = _pillow()

        def readable(file: Path) -> bool:
            try:
                _read_image(reader, file, self.size, _shorter_side(self.size))
            except DataError:
                return False
            return True

        files = [file for file, _ in (*train, *test)]
        return list(zip(files, _in_threads(readable, files), strict=True))


def load_image_folder(
    path: str | Path,
    size: int,
    *,
    shorter_side: int | None = None,
    augmentation: str = "crop-flip",
    validation: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Dataset:
    """A data set from folders of image files.

    Args:
        path: holds `train`, and `val`, `validation` or `test` as test part, each with a folder per class. Classes are
            numbered in the order of their names. A folder of the test part may be empty.
        size: height and width of the images taken, pixels.
        shorter_side: what an image's shorter side is scaled to before the centre is cut out; 8/7 of `size` by default.
        augmentation: "none", "crop-flip" or "shift".
        validation: default number of validation samples; a tenth of the training part if None.
        max_bytes: refuse sets that would take more memory.

    Returns:
        uint8 images (N, 3, size, size); mean and standard deviation of each channel are those of the training part.

    Raises:
        UsageError: Pillow is not installed, or a size that makes no sense.
        DataError: a folder is missing or empty, the parts have not the same classes, a file is no image, or the set is
            too large; names the file.
    """
    shorter_side = _shorter_side(size) if shorter_side is None else shorter_side
    if size < 1 or shorter_side < size:
        raise UsageError(f"shorter_side must be at least size, and that at least 1, got {shorter_side} and {size}")
    root = Path(path)
    class_names, *listed = _listed(root)
    needed = sum(len(files) for files in listed) * 3 * size * size
    if needed > max_bytes:
        raise DataError(
            f"{root}: its images take {needed / 2**30:.1f} GiB at {size}x{size}, more than the {max_bytes / 2**30:.1f} "
            "allowed; use a smaller size (by name folder:PATH@SIZE) or fewer images"
        )
    train, test = (_read_part(files, size, shorter_side) for files in listed)
    mean, std = channel_statistics(train.inputs)
    return Dataset(
        name=root.resolve().name,
        train=train,
        test=test,
        classes=len(class_names),
        mean=mean,
        std=std,
        class_names=tuple(class_names),
        validation=len(train) // 10 if validation is None else validation,
        augmentation=augmentation,
    )


def _shorter_side(size: int) -> int:
    """What images are scaled to by default, pixels."""
    return round(size * SHORTER_SIDE)


def _listed(root: Path) -> tuple[list[str], list[tuple[Path, int]], list[tuple[Path, int]]]:
    """The classes, and every image of the training and of the test part with its class."""
    train_names = _classes_of(root)
    test_folder = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if test_folder is None:
        raise DataError(f"{root} has no folder {TEST_FOLDERS[0]!r} (or {' or '.join(TEST_FOLDERS[1:])}) beside 'train'")
    test_names = _folders(test_folder)
    for having, lacking, missing in (
        (root / "train", test_folder, set(train_names) - set(test_names)),
        (test_folder, root / "train", set(test_names) - set(train_names)),
    ):
        if missing:
            raise DataError(
                f"{having} has classes that {lacking} has not: {_some(missing)}; both need the same folders"
            )
    train, test = _files(root / "train", train_names), _files(test_folder, train_names)
    empty = set(train_names) - {train_names[label] for _, label in train}
    if empty:
        raise DataError(f"{root / 'train'} has no images ({', '.join(EXTENSIONS)}) in the folders of {_some(empty)}")
    if not test:
        raise DataError(f"{test_folder} has no images ({', '.join(EXTENSIONS)}) in its folders of classes")
    return train_names, train, test


def _some(names: Iterable[str]) -> str:
    """The first few of many names."""
    ordered = sorted(names)
    rest = len(ordered) - LISTED
    return ", ".join(map(repr, ordered[:LISTED])) + (f" and {rest} more" if rest > 0 else "")


def _classes_of(root: Path) -> list[str]:
    """The names of the training part's classes, sorted."""
    if not root.is_dir():
        begins = "" if root.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"there is no folder {root}{begins}")
    if not (root / "train").is_dir():
        raise DataError(f"{root} has no folder 'train'; lay it out as train/<class>/*.jpg and val/<class>/*.jpg")
    names = _folders(root / "train")
    if len(names) < 2:
        raise DataError(f"{root / 'train'} must hold a folder for each of at least two classes, it holds {len(names)}")
    return names


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, hidden ones left out."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error


def _files(folder: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """Every image of a part with its class, hidden files left out."""
    listed = []
    try:
        for label, name in enumerate(class_names):
            files = sorted((folder / name).iterdir())
            listed += [(file, label) for file in files if file.suffix.lower() in EXTENSIONS and file.name[0] != "."]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return listed


def _read_part(files: Sequence[tuple[Path, int]], size: int, shorter_side: int) -> Part:
    reader = _pillow()
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def read(index: int) -> None:
        images[index] = torch.from_numpy(_read_image(reader, files[index][0], size, shorter_side))

    _in_threads(read, range(len(files)))
    return Part(images, torch.tensor([label for _, label in files]))


def _in_threads(function: Callable[[Any], Result], items: Iterable[Any]) -> list[Result]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders let other threads run
        return list(pool.map(function, items))


def _pillow() -> Any:
    """Pillow's module of images.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(f"image files need Pillow ({error}): pip install 'bpfree[images]'") from None
    return Image


def _read_image(reader: Any, file: Path, size: int, shorter_side: int) -> npt.NDArray[np.uint8]:
    """(3, size, size): scaled, cut out around the centre, in RGB."""
    try:
        with reader.open(file, formats=FORMATS) as image:
            most = reader.MAX_IMAGE_PIXELS or math.inf  # None lifts the limit
            if image.width * image.height > most:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            scale = shorter_side / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            if width * height > most:
                raise ValueError(f"{image.width}x{image.height} is too long: {width}x{height} pixels when scaled")
            left, top = (width - size) // 2, (height - size) // 2
            scaled = _in_rgb(reader, image).resize((width, height), reader.Resampling.BILINEAR)
            pixels = np.asarray(scaled.crop((left, top, left + size, top + size)), dtype=np.uint8)
    # Not a list of types: Pillow's decoders raise nearly all there are on hostile bytes.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read {file}: {reason}") from error
    return pixels.transpose(2, 0, 1).copy()


def _in_rgb(reader: Any, image: Any) -> Any:
    """Eight bits for each of three colours."""
    if image.mode.startswith("I"):  # grey of 16 bits, of which `convert` would make white wherever it exceeds 255
        image = reader.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
