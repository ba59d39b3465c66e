"""Folders of image files, a folder per class, as ImageNet is laid out: `DATA/train/<class>/*.JPEG`, `DATA/val/..`.

Images are decoded by Pillow, scaled so that their shorter side fits, cropped around the centre, and kept in memory as
bytes: sets that fit there, not the 1.3 million images of ImageNet at 224 pixels (193 GB).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

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
            those of the training part in the order of their names; the test part may lack some.
        size: height and width of the images taken, pixels.
        shorter_side: what an image's shorter side is scaled to before the centre is cut out; 8/7 of `size` by default.
        augmentation: "none", "crop-flip" or "shift".
        validation: default number of validation samples; a tenth of the training part if None.
        max_bytes: refuse sets that would take more memory.

    Returns:
        uint8 images (N, 3, size, size); mean and standard deviation of each channel are those of the training part.

    Raises:
        UsageError: Pillow is not installed, or a size that makes no sense.
        DataError: a folder is missing or empty, a file is no image, or the set is too large; names the file.
    """
    shorter_side = round(size * SHORTER_SIDE) if shorter_side is None else shorter_side
    if size < 1 or shorter_side < size:
        raise UsageError(f"shorter_side must be at least size, and that at least 1, got {shorter_side} and {size}")
    root = Path(path)
    test_folder = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), root / TEST_FOLDERS[0])
    class_names = _folders(root / "train")
    listed = [_files(root / "train", class_names), _files(test_folder, class_names)]
    needed = sum(len(files) for files in listed) * 3 * size * size
    if needed > max_bytes:
        raise DataError(
            f"{root}: its images take {needed / 2**30:.1f} GiB at {size}x{size}, more than the {max_bytes / 2**30:.1f} "
            "allowed; use a smaller size or fewer images"
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


def _folders(folder: Path) -> list[str]:
    """The classes: names of folders, sorted, hidden ones left out."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error
    if len(names) < 2:
        raise DataError(f"{folder} must hold a folder for each of at least two classes, it holds {len(names)}")
    return names


def _files(folder: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """Every image of a part with its class."""
    known = {name: index for index, name in enumerate(class_names)}
    listed = []
    try:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.is_dir() or entry.name.startswith("."):
                continue
            if entry.name not in known:
                raise DataError(f"{folder} has a class {entry.name!r} that the training part has not")
            files = sorted(Path(entry.path).iterdir())
            listed += [(file, known[entry.name]) for file in files if file.suffix.lower() in EXTENSIONS]
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error
    if not listed:
        raise DataError(f"{folder} holds no images ({', '.join(EXTENSIONS)}) in folders of classes")
    return listed


def _read_part(files: Sequence[tuple[Path, int]], size: int, shorter_side: int) -> Part:
    reader = _pillow()
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def read(index: int) -> None:
        images[index] = torch.from_numpy(_read_image(reader, files[index][0], size, shorter_side))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders let other threads run
        for _ in pool.map(read, range(len(files))):
            pass
    return Part(images, torch.tensor([label for _, label in files]))


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
            if image.width * image.height > reader.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            scale = shorter_side / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            left, top = (width - size) // 2, (height - size) // 2
            scaled = image.convert("RGB").resize((width, height), reader.Resampling.BILINEAR)
            pixels = np.asarray(scaled.crop((left, top, left + size, top + size)), dtype=np.uint8)
    # Not a list of types: Pillow's decoders raise nearly all there are on hostile bytes.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read {file}: {reason}") from error
    return pixels.transpose(2, 0, 1).copy()
