"""Pure readers of the formats data sets are published in: a path in, NumPy arrays out.

Nothing here downloads, writes or unpacks to disk, and no file can make a reader run code: pickles are read
by an unpickler that knows three harmless names. Whatever is wrong with a file, the reader raises one
`DataError` that names it; `registry.load` adds what to do about it.

Shapes: `N` samples, `C` channels, `H` x `W` pixels. Labels are int64.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, NoReturn, cast

import numpy as np
import numpy.typing as npt

from bpfree.errors import DataError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Sets = tuple[tuple[npt.NDArray[Any], Labels], tuple[npt.NDArray[Any], Labels]]
"""((training inputs, training labels), (test inputs, test labels))."""

MAX_BYTES = 1 << 30
"""The most bytes a reader takes into memory for one file, whatever the file declares (1 GiB)."""

CIFAR_BATCHES = {
    10: (("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"), ("test_batch",)),
    100: (("train",), ("test",)),
}
"""Classes -> the names of the training batches and of the test batches; the binary version adds `.bin`."""

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_PIXELS = math.prod(_CIFAR_SHAPE)
_CIFAR_COARSE_CLASSES = 20
_STL10_SHAPE = (3, 96, 96)
_SVHN_SHAPE = (32, 32, 3)
_USPS_PIXELS = 256
_USPS_MAX_BYTES = 1 << 26  # the larger part is 14 MiB of text


def read_idx(path: str | Path) -> npt.NDArray[np.uint8]:
    """An idx file of unsigned bytes, as MNIST and Fashion-MNIST use, gzipped or not.

    Format: http://yann.lecun.com/exdb/mnist (two zero bytes, element type, number of dimensions, the
    dimensions as big-endian 32-bit integers, the elements in row-major order).

    Returns:
        uint8 array of the shape that the file declares: (N, H, W) for images, (N,) for labels.

    Raises:
        DataError: not an idx file, elements that are not unsigned bytes, or fewer or more than declared.
    """
    path = Path(path)
    with _reading(path), open_gunzipped(path) as stream:
        header = stream.read(4)
        if len(header) < 4 or header[:2] != b"\0\0":
            raise ValueError("not an idx file (wrong magic number)")
        element, dimensions = header[2], header[3]
        if element != 0x08:
            raise ValueError(f"idx element type 0x{element:02x}; only unsigned bytes (0x08) are supported")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"idx file of {dimensions} dimensions; 1 to 4 are supported")
        sizes = stream.read(4 * dimensions)
        if len(sizes) < 4 * dimensions:
            raise ValueError("truncated in the idx header")
        shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
        declared = math.prod(shape)
        if declared > MAX_BYTES:
            raise ValueError(f"declares {declared} bytes of shape {shape}, more than the {MAX_BYTES} allowed")
        # One byte more than declared: shows a file that is too long and brings gzip to its checksum.
        data = stream.read(declared + 1)
        if len(data) != declared:
            found = f"only {len(data)}" if len(data) < declared else "more"
            raise ValueError(f"declares {declared} bytes of shape {shape} but holds {found}")
        array: npt.NDArray[np.uint8] = np.frombuffer(data, np.uint8).reshape(shape).copy()
        return array


def read_cifar_binary(path: str | Path, classes: int = 10) -> Sets:
    """CIFAR-10 or CIFAR-100, binary version: the unpacked folder or the `.tar.gz` as downloaded.

    Format: https://www.cs.toronto.edu/~kriz/cifar.html (rows of one label byte, or a coarse and a fine one,
    then 3,072 pixels: the red, the green and the blue plane).

    Args:
        path: folder or archive; the archive is read without unpacking it to disk.
        classes: 10 for CIFAR-10, 100 for CIFAR-100, of which the fine labels are taken.

    Returns:
        Training and test part; images are uint8 (N, 3, 32, 32).

    Raises:
        DataError: a batch is missing, is not a whole number of rows, or has a label out of range.
    """
    return _read_cifar(Path(path), classes, suffix=".bin", decode=_decode_cifar_rows)


def read_cifar_python(path: str | Path, classes: int = 10) -> Sets:
    """CIFAR-10 or CIFAR-100, python version: the unpacked folder or the `.tar.gz` as downloaded.

    The batches are pickles. They are read without importing, calling or building anything but containers,
    numbers, bytes, text and the description of one array, so that a hostile file can do no harm.

    Args and returns: as `read_cifar_binary`.

    Raises:
        DataError: a batch is missing, is no such pickle, asks for another object, or holds arrays of another
            shape or labels out of range.
    """
    return _read_cifar(Path(path), classes, suffix="", decode=_decode_cifar_pickle)


def read_usps(path: str | Path) -> tuple[npt.NDArray[np.float32], Labels]:
    """One part of USPS, `zip.train.gz` or `zip.test.gz`: text rows of a label and 256 grey values.

    Format: "The Elements of Statistical Learning", data of the ZIP code example.

    Returns:
        float32 images (N, 1, 16, 16) with values in [-1, 1] and labels (N,) in 0..9.

    Raises:
        DataError: a row of another length, something that is not a number, values or labels out of range.
    """
    path = Path(path)
    with _reading(path):
        with open_gunzipped(path) as stream:
            text = stream.read(_USPS_MAX_BYTES + 1).decode("ascii")
        if len(text) > _USPS_MAX_BYTES:
            raise ValueError(f"more than the {_USPS_MAX_BYTES} bytes allowed")
        if not text.strip():
            raise ValueError("no rows")
        table = np.loadtxt(io.StringIO(text), dtype=np.float32, comments=None, ndmin=2)
        if table.shape[1] != 1 + _USPS_PIXELS:
            raise ValueError(f"rows of {table.shape[1]} numbers instead of {1 + _USPS_PIXELS}")
        labels, pixels = table[:, 0], table[:, 1:]
        if not np.isin(labels, np.arange(10)).all():
            raise ValueError("labels that are not one of 0..9")
        if not (np.abs(pixels) <= 1).all():  # written so that NaN fails too
            raise ValueError("grey values outside [-1, 1]")
        return pixels.reshape(-1, 1, 16, 16).copy(), labels.astype(np.int64)


def read_svhn(path: str | Path) -> tuple[Images, Labels]:
    """One part of SVHN's cropped digits, `train_32x32.mat` or `test_32x32.mat`: a MATLAB file of version 5.

    Format: http://ufldl.stanford.edu/housenumbers (X, 32 x 32 x 3 x N bytes; y, labels 1..10, 10 being the digit 0).

    Returns:
        uint8 images (N, 3, 32, 32) and labels (N,) in 0..9, which are the digits.

    Raises:
        DataError: not such a file, arrays of another shape or kind, or labels out of range.
    """
    from scipy.io import loadmat, whosmat

    path = Path(path)
    with _reading(path), path.open("rb") as stream:
        shapes = {name: shape for name, shape, _ in whosmat(stream)}
        missing = [name for name in ("X", "y") if name not in shapes]
        if missing:
            raise ValueError(f"no variable {missing[0]}")
        shape, count = tuple(shapes["X"]), math.prod(shapes["y"])
        if len(shape) == 3:  # MATLAB leaves out a last axis of one sample
            shape = (*shape, 1)
        if shape[:-1] != _SVHN_SHAPE or shape[-1] != count:
            raise ValueError(f"images of shape {shape} for {count} labels instead of (32, 32, 3, N) for N")
        if math.prod(shape) > MAX_BYTES:
            raise ValueError(f"declares {math.prod(shape)} bytes, more than the {MAX_BYTES} allowed")
        stream.seek(0)
        variables = loadmat(stream, variable_names=("X", "y"))
        images, digits = variables["X"], variables["y"].ravel()
        if images.dtype != np.uint8:
            raise ValueError(f"images of {images.dtype} instead of bytes")
        if not np.isin(digits, np.arange(1, 11)).all():
            raise ValueError("labels that are not one of 1..10")
        return images.reshape(shape).transpose(3, 2, 0, 1).copy(), digits.astype(np.int64) % 10


def read_stl10(path: str | Path) -> Sets:
    """STL-10's labelled images, binary version: the unpacked folder `stl10_binary`, or the `.tar.gz` as downloaded.

    Format: https://cs.stanford.edu/~acoates/stl10 (images one after another, in them the red, the green and the blue
    plane, each column by column; labels 1..10).

    Args:
        path: folder or archive; the archive is read without unpacking it to disk.

    Returns:
        Training and test part; images are uint8 (N, 3, 96, 96).

    Raises:
        DataError: a file is missing or not a whole number of images, counts differ, or a label is out of range.
    """
    path = Path(path)
    files = _read_files(path, [f"{which}_{what}.bin" for which in ("train", "test") for what in ("X", "y")])
    parts = []
    for which in ("train", "test"):
        with _reading(path / f"{which}_X.bin"):
            pixels = files[f"{which}_X.bin"]
            if not pixels or len(pixels) % math.prod(_STL10_SHAPE):
                raise ValueError(f"{len(pixels)} bytes are not a whole number of images of {math.prod(_STL10_SHAPE)}")
            images = np.frombuffer(pixels, np.uint8).reshape(-1, *_STL10_SHAPE).transpose(0, 1, 3, 2).copy()
            labels = np.frombuffer(files[f"{which}_y.bin"], np.uint8).astype(np.int64) - 1
            if len(labels) != len(images):
                raise ValueError(f"{len(images)} images but {len(labels)} labels")
            _check_labels(labels, 10)
        parts.append((images, labels))
    return parts[0], parts[1]


def read_npz(path: str | Path) -> Sets:
    """An `.npz` of `train_inputs`, `train_targets`, `test_inputs`, `test_targets`, as the packaged sets are.

    Arrays that need a pickle are refused.

    Returns:
        Training and test part; inputs as stored, targets as int64 (N,).

    Raises:
        DataError: not an `.npz`, an array is missing or needs a pickle, or targets are not whole numbers.
    """
    path = Path(path)
    with _reading(path), path.open("rb") as stream:
        if not zipfile.is_zipfile(stream):
            raise ValueError("not an .npz file")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as archive:
            parts = [_read_npz_part(archive, which) for which in ("train", "test")]
        return parts[0], parts[1]


def open_gunzipped(path: Path) -> BinaryIO:
    """A file opened for reading, through gzip if its first bytes (not its name) say that it is gzipped."""
    stream = path.open("rb")
    magic = stream.read(2)
    stream.seek(0)
    if magic != b"\x1f\x8b":
        return stream
    stream.close()
    return cast(BinaryIO, gzip.open(path, "rb"))


def _read_npz_part(archive: Any, which: str) -> tuple[npt.NDArray[Any], Labels]:
    missing = [key for key in (f"{which}_inputs", f"{which}_targets") if key not in archive]
    if missing:
        raise ValueError(f"no array {missing[0]!r}")
    inputs, targets = archive[f"{which}_inputs"], archive[f"{which}_targets"]
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"{which}_targets of dtype {targets.dtype} instead of integers")
    return inputs, targets.astype(np.int64)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns whatever a damaged or foreign file makes a parser raise into a `DataError` that names `path`."""
    try:
        yield
    except DataError:
        raise
    # Not a list of types: gzip, tarfile, zipfile, pickle and NumPy together raise nearly all there are
    # (zlib.error, EOFError, struct.error, IndexError, RecursionError, MemoryError, ...) on hostile bytes.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read {path}: {reason}") from error


def _check_labels(labels: Labels, classes: int) -> None:
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        worst = labels.max() if labels.max() >= classes else labels.min()
        raise ValueError(f"label {worst} outside 0..{classes - 1}")


# --- CIFAR ---------------------------------------------------------------------------------------------


def _read_cifar(path: Path, classes: int, suffix: str, decode: Callable[[bytes, int], tuple[Images, Labels]]) -> Sets:
    if classes not in CIFAR_BATCHES:
        raise ValueError(f"classes must be 10 or 100, not {classes}")
    names = [[batch + suffix for batch in batches] for batches in CIFAR_BATCHES[classes]]
    files = _read_files(path, [name for part in names for name in part])
    parts = []
    for part in names:
        decoded = []
        for name in part:
            with _reading(path / name):
                decoded.append(decode(files[name], classes))
        images, labels = zip(*decoded, strict=True)
        parts.append((np.concatenate(images), np.concatenate(labels)))
    return parts[0], parts[1]


def _read_files(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The bytes of the files called `names` in a folder, or in a `.tar.gz` without unpacking it to disk."""
    files: dict[str, bytes] = {}
    if path.is_dir():
        for name in names:
            with _reading(path / name):
                if (path / name).stat().st_size > MAX_BYTES:
                    raise ValueError(f"more than the {MAX_BYTES} bytes allowed")
                files[name] = (path / name).read_bytes()
        return files
    with _reading(path), gzip.open(path) as stream:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in names and member.isreg():
                    if member.size > MAX_BYTES:
                        raise ValueError(f"{name} has more than the {MAX_BYTES} bytes allowed")
                    content = archive.extractfile(member)
                    assert content is not None  # a regular member always has content
                    files[name] = content.read()
        while stream.read(1 << 20):  # to the end, where gzip compares its checksum
            pass
        missing = [name for name in names if name not in files]
        if missing:
            raise ValueError(f"no {missing[0]} in the archive")
    return files


def _decode_cifar_rows(data: bytes, classes: int) -> tuple[Images, Labels]:
    """Rows of the binary version; the last label byte of a row is the one that counts."""
    label_bytes = 1 if classes == 10 else 2
    width = label_bytes + _CIFAR_PIXELS
    if not data or len(data) % width:
        raise ValueError(f"{len(data)} bytes are not a whole number of rows of {width}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, width)
    if label_bytes == 2:
        _check_labels(rows[:, 0].astype(np.int64), _CIFAR_COARSE_CLASSES)
    labels = rows[:, label_bytes - 1].astype(np.int64)
    _check_labels(labels, classes)
    return rows[:, label_bytes:].reshape(-1, *_CIFAR_SHAPE), labels


def _decode_cifar_pickle(data: bytes, classes: int) -> tuple[Images, Labels]:
    """One pickled batch of the python version: a dict of bytes keys, written by Python 2."""
    batch = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
    label_key = b"labels" if classes == 10 else b"fine_labels"
    if not isinstance(batch, dict) or b"data" not in batch or label_key not in batch:
        raise ValueError(f"not a CIFAR-{classes} batch (no data or no {label_key.decode()})")
    if not isinstance(batch[b"data"], _PickledArray):
        raise ValueError("the images are not an array")
    images = batch[b"data"].to_numpy()
    labels = batch[label_key]
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError("the labels are not a list of whole numbers")
    if images.ndim != 2 or images.shape[1] != _CIFAR_PIXELS or not 0 < len(images) == len(labels):
        raise ValueError(f"images of shape {images.shape} for {len(labels)} labels")
    labels = np.array(labels, np.int64)
    _check_labels(labels, classes)
    return images.reshape(-1, *_CIFAR_SHAPE), labels


class _PickledDtype:
    """Stands in for `numpy.dtype` while unpickling: remembers what it was called with, nothing more."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        """Byte order and flags; of no interest for single bytes."""


class _PickledArray:
    """Stands in for `numpy.ndarray` while unpickling.

    NumPy's own reconstruction trusts the flags and sizes in the file, which is no way to treat a foreign
    file; this one takes the state as data and lets `to_numpy` decide.
    """

    def __init__(self, *args: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_numpy(self) -> Images:
        """The array, if it is a plain one of unsigned bytes.

        Raises:
            ValueError: any other array.
        """
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("an array without content")
        _, shape, dtype, is_fortran, content = self.state
        if not isinstance(dtype, _PickledDtype) or dtype.args[:1] not in [(b"u1",), ("u1",)]:
            raise ValueError("an array of something else than unsigned bytes")
        if not isinstance(content, bytes) or not isinstance(shape, tuple):
            raise ValueError("an array without content")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _CifarUnpickler(pickle.Unpickler):
    """Admits what the published batches contain: containers, numbers, bytes, text and byte arrays."""

    _STAND_INS: ClassVar[dict[tuple[str, str], type]] = {
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
    }

    def find_class(self, module: str, name: str) -> type:
        try:
            return self._STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which no CIFAR batch does") from None

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("asks for an outside object, which no CIFAR batch does")
