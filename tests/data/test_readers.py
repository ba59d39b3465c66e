"""Readers against hand-made bytes, published facts, and everything a disk or an enemy can do to a file."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import math
import os
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bpfree.data import readers
from bpfree.errors import DataError

needs_data = pytest.mark.skipif(not os.environ.get("BPFREE_DATA"), reason="BPFREE_DATA is not set")

read_idx, read_usps, read_npz = readers.read_idx, readers.read_usps, readers.read_npz
read_svhn, read_stl10 = readers.read_svhn, readers.read_stl10
read_binary, read_python = readers.read_cifar_binary, readers.read_cifar_python
read_binary_100 = functools.partial(read_binary, classes=100)
read_python_100 = functools.partial(read_python, classes=100)

CIFAR10_NAMES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
CIFAR100_NAMES = ("train", "test")


def idx_bytes(array: np.ndarray) -> bytes:
    """The format as its authors describe it: zero, zero, type, rank, big-endian sizes, elements."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def cifar_pixels(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 3072), dtype=np.uint8)


def cifar10_files() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Six batches of two images."""
    return {name: (cifar_pixels(2, i), [i, 9 - i]) for i, name in enumerate(CIFAR10_NAMES)}


def rows_bytes(pixels: np.ndarray, *label_columns: list[int]) -> bytes:
    return b"".join(bytes([*labels]) + row.tobytes() for row, *labels in zip(pixels, *label_columns, strict=True))


def python2_pickle(pixels: np.ndarray, labels: list[int], key: bytes = b"labels", fortran: bool = False) -> bytes:
    """A batch as cPickle of Python 2 wrote it (protocol 2), opcode by opcode."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    content = pixels.tobytes(order="F" if fortran else "C")
    minus_one = b"J" + struct.pack("<i", -1)
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + minus_one + minus_one + b"K\x00tb"
    shape = b"".join(b"J" + struct.pack("<i", size) for size in pixels.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + (b"\x88" if fortran else b"\x89")
    array += b"T" + struct.pack("<i", len(content)) + content + b"tb"
    label_list = b"](" + b"".join(b"J" + struct.pack("<i", label) for label in labels) + b"e"
    name = text(b"batch_label") + text(b"a batch")
    return b"\x80\x02}(" + name + text(b"data") + array + text(key) + label_list + b"u."


def tar_gz(members: dict[str, bytes], folder: str = "folder") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def usps_bytes(rows: list[list[Any]]) -> bytes:
    return gzip.compress("".join(" ".join(map(str, row)) + " \n" for row in rows).encode())


def npz_bytes(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def mat_bytes(compressed: bool = True, **variables: Any) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, variables, do_compression=compressed)
    return buffer.getvalue()


def svhn_images(count: int) -> np.ndarray:
    """(count, 3, 32, 32), no two of them alike."""
    return np.random.default_rng(7).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def svhn_bytes(labels: list[int], compressed: bool = True) -> bytes:
    x = svhn_images(len(labels)).transpose(2, 3, 1, 0)
    return mat_bytes(compressed, X=x, y=np.array(labels, np.uint8)[:, None])


def stl10_images() -> np.ndarray:
    return np.random.default_rng(8).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)


def stl10_members() -> dict[str, bytes]:
    """Two training images and a test image; each plane is written column by column."""
    columns = stl10_images().transpose(0, 1, 3, 2)
    return {
        "train_X.bin": columns[:2].tobytes(),
        "train_y.bin": bytes([10, 1]),
        "test_X.bin": columns[2:].tobytes(),
        "test_y.bin": bytes([4]),
        "unlabeled_X.bin": b"not read",
    }


def binary_members() -> dict[str, bytes]:
    return {f"{name}.bin": rows_bytes(*batch) for name, batch in cifar10_files().items()}


def python_members() -> dict[str, bytes]:
    return {name: python2_pickle(*batch) for name, batch in cifar10_files().items()}


@functools.cache
def valid_files() -> dict[str, tuple[Callable[[Path], Any], bytes]]:
    """One small valid file of every kind that is read whole, and its reader."""
    idx = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    arrays = {"inputs": np.zeros((2, 1, 3, 3), np.uint8), "targets": np.array([0, 1], np.uint8)}
    return {
        "idx": (read_idx, idx),
        "idx.gz": (read_idx, gzip.compress(idx)),
        "binary.tar.gz": (read_binary, tar_gz(binary_members())),
        "python.tar.gz": (read_python, tar_gz(python_members())),
        "usps.gz": (read_usps, usps_bytes([[3] + [0.5] * 256, [4] + [-0.5] * 256])),
        "svhn.mat": (read_svhn, svhn_bytes([1, 10])),
        "stl10.tar.gz": (read_stl10, tar_gz(stl10_members())),
        "npz": (
            read_npz,
            npz_bytes(**{f"{which}_{key}": array for which in ("train", "test") for key, array in arrays.items()}),
        ),
    }


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One path for many hypothesis examples, each of which overwrites it."""
    return tmp_path_factory.mktemp("readers") / "file"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(read: Callable[[Path], Any], path: Path) -> str:
    """The message with which `read` refuses `path`: one line that names it."""
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# --- any format ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", valid_files())
def test_the_valid_files_of_this_module_are_valid(kind: str, tmp_path: Path) -> None:
    read, content = valid_files()[kind]
    read(write(tmp_path / kind, content))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", valid_files())
def test_every_truncation_is_refused(kind: str, scratch: Path, data: st.DataObject) -> None:
    read, content = valid_files()[kind]
    end = data.draw(st.integers(0, len(content) - 1))
    refused(read, write(scratch, content[:end]))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", valid_files())
def test_a_damaged_byte_gives_a_data_error_or_nothing(kind: str, scratch: Path, data: st.DataObject) -> None:
    read, content = valid_files()[kind]
    position = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255))
    write(scratch, content[:position] + bytes([byte]) + content[position + 1 :])
    with contextlib.suppress(DataError):  # any other exception fails the test
        read(scratch)


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("read", [read_binary, read_python, read_usps, read_svhn, read_stl10, read_npz])
def test_random_bytes_are_refused(read: Callable[[Path], Any], scratch: Path, content: bytes) -> None:
    refused(read, write(scratch, content))


@settings(max_examples=100, deadline=None)
@given(pickled=st.binary(max_size=200))
def test_random_bytes_where_a_pickle_belongs_are_refused(pickled: bytes, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("cifar")
    for name in CIFAR10_NAMES:
        (folder / name).write_bytes(pickled)
    with pytest.raises(DataError, match="data_batch_1"):
        read_python(folder)


@pytest.mark.parametrize("read", [read_idx, read_binary, read_python, read_usps, read_svhn, read_stl10, read_npz])
def test_a_file_that_is_not_there(read: Callable[[Path], Any], tmp_path: Path) -> None:
    assert "No such file" in refused(read, tmp_path / "nothing")


# --- idx -------------------------------------------------------------------------------------------------


def test_idx_by_hand(tmp_path: Path) -> None:
    content = bytes.fromhex("00000803 00000002 00000001 00000003") + b"\x00\x01\x02\xfd\xfe\xff"
    array = read_idx(write(tmp_path / "images", content))
    assert array.tolist() == [[[0, 1, 2]], [[253, 254, 255]]]
    assert array.dtype == np.uint8


@settings(max_examples=100, deadline=None)
@given(
    array=npst.arrays(np.uint8, npst.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)),
    zipped=st.booleans(),
)
def test_idx_round_trip(array: np.ndarray, zipped: bool, scratch: Path) -> None:
    content = idx_bytes(array)
    read = read_idx(write(scratch, gzip.compress(content) if zipped else content))
    np.testing.assert_array_equal(read, array)
    read[...] = 0  # writable, as torch.from_numpy wants it


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x00\x01\x08\x01\x00\x00\x00\x00", "magic"),
        (b"\x89PNG\r\n\x1a\n", "magic"),
        (b"", "magic"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "0x0d"),
        (b"\x00\x00\x08\x00", "0 dimensions"),
        (b"\x00\x00\x08\x05" + bytes(20), "5 dimensions"),
        (b"\x00\x00\x08\x02\x00\x00\x00\x01", "header"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x02a", "only 1"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x02abc", "more"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "allowed"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_refuses(content: bytes, reason: str, zipped: bool, tmp_path: Path) -> None:
    content = gzip.compress(content) if zipped else content
    assert reason in refused(read_idx, write(tmp_path / "images", content))


def test_idx_does_not_inflate_a_bomb(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes.fromhex("00000801 00000004") + bytes(20_000_000))
    path = write(tmp_path / "bomb", bomb)
    tracemalloc.start()
    try:
        assert "more" in refused(read_idx, path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_idx_refuses_bytes_after_the_gzip_stream(tmp_path: Path) -> None:
    content = gzip.compress(idx_bytes(np.arange(3, dtype=np.uint8)))
    refused(read_idx, write(tmp_path / "labels.gz", content + b"more"))


# --- CIFAR -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "archive"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Puts files into a folder, or into a `.tar.gz`, and returns its path."""

    def put(members: dict[str, bytes]) -> Path:
        if request.param == "archive":
            return write(tmp_path / "cifar.tar.gz", tar_gz(members))
        folder = tmp_path / "cifar"
        folder.mkdir(exist_ok=True)
        for name, content in members.items():
            (folder / name).write_bytes(content)
        return folder

    return put


Store = Callable[[dict[str, bytes]], Path]


def assert_is_cifar10(sets: readers.Sets) -> None:
    files = list(cifar10_files().values())
    for (images, labels), batches in zip(sets, (files[:5], files[5:]), strict=True):
        expected = np.stack([row for pixels, _ in batches for row in pixels])
        assert images.dtype == np.uint8
        assert images.shape == (len(expected), 3, 32, 32)
        # the order of the format: red, green, blue; in each 32 rows of 32
        np.testing.assert_array_equal(images[:, 1, 2, 5], expected[:, 1024 + 2 * 32 + 5])
        np.testing.assert_array_equal(images.reshape(len(expected), -1), expected)
        assert labels.tolist() == [label for _, column in batches for label in column]
        assert labels.dtype == np.int64


def test_cifar10_binary(store: Store) -> None:
    assert_is_cifar10(read_binary(store(binary_members())))


def test_cifar10_python(store: Store) -> None:
    assert_is_cifar10(read_python(store(python_members())))


def test_the_hand_made_pickle_is_one_that_numpy_reads() -> None:
    pixels = cifar_pixels(3, seed=0)
    for fortran in (False, True):
        batch = pickle.loads(python2_pickle(pixels, [1, 2, 3], fortran=fortran), encoding="bytes")
        np.testing.assert_array_equal(batch[b"data"], pixels)
        assert batch[b"labels"] == [1, 2, 3]


def test_cifar10_python_in_fortran_order(store: Store) -> None:
    members = {name: python2_pickle(*batch, fortran=True) for name, batch in cifar10_files().items()}
    assert_is_cifar10(read_python(store(members)))


def test_cifar100_takes_the_fine_labels(store: Store) -> None:
    train, test = cifar_pixels(3, 0), cifar_pixels(2, 1)
    members = {
        "train.bin": rows_bytes(train, [19, 0, 1], [99, 0, 50]),
        "test.bin": rows_bytes(test, [2, 3], [7, 8]),
    }
    (images, labels), (test_images, test_labels) = read_binary_100(store(members))
    assert labels.tolist() == [99, 0, 50]
    assert test_labels.tolist() == [7, 8]
    np.testing.assert_array_equal(images.reshape(3, -1), train)
    np.testing.assert_array_equal(test_images.reshape(2, -1), test)


def test_cifar100_python(store: Store) -> None:
    train, test = cifar_pixels(3, 0), cifar_pixels(1, 1)
    members = {
        "train": python2_pickle(train, [99, 0, 50], key=b"fine_labels"),
        "test": python2_pickle(test, [7], key=b"fine_labels"),
    }
    (images, labels), (_, test_labels) = read_python_100(store(members))
    assert labels.tolist() == [99, 0, 50]
    assert test_labels.tolist() == [7]
    np.testing.assert_array_equal(images.reshape(3, -1), train)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (rows_bytes(cifar_pixels(1, 0), [10]), "label 10"),
        (rows_bytes(cifar_pixels(1, 0), [0])[:-1], "3072 bytes"),
        (rows_bytes(cifar_pixels(1, 0), [0]) + b"x", "3074 bytes"),
        (b"", "0 bytes"),
    ],
)
def test_cifar10_binary_refuses(content: bytes, reason: str, store: Store) -> None:
    path = store(binary_members() | {"data_batch_3.bin": content})
    message = refused(read_binary, path)
    assert reason in message
    assert "data_batch_3.bin" in message


@pytest.mark.parametrize(("coarse", "fine", "reason"), [(20, 5, "label 20"), (3, 100, "label 100")])
def test_cifar100_binary_refuses(coarse: int, fine: int, reason: str, store: Store) -> None:
    good, bad = rows_bytes(cifar_pixels(1, 0), [3], [5]), rows_bytes(cifar_pixels(1, 0), [coarse], [fine])
    assert reason in refused(read_binary_100, store({"train.bin": good, "test.bin": bad}))


@pytest.mark.parametrize(("read", "members"), [(read_binary, binary_members), (read_python, python_members)])
def test_cifar_names_the_missing_batch(
    read: Callable[[Path], Any], members: Callable[[], dict[str, bytes]], store: Store
) -> None:
    files = members()
    missing = next(name for name in files if "batch_4" in name)
    del files[missing]
    assert missing in refused(read, store(files))


def test_cifar_knows_ten_and_a_hundred_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="10 or 100"):
        read_binary(tmp_path, classes=20)


def test_cifar_archive_ignores_links_that_bear_the_name_of_a_batch(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret", rows_bytes(cifar_pixels(1, 0), [0]))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in binary_members().items():
            member = tarfile.TarInfo(name)
            if name == "test_batch.bin":
                member.type, member.linkname = tarfile.SYMTYPE, str(secret)
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert "no test_batch.bin" in refused(read_binary, write(tmp_path / "cifar.tar.gz", buffer.getvalue()))


def test_cifar_archive_without_its_last_bytes_is_refused(tmp_path: Path) -> None:
    """A tar padded to whole blocks of the reader, so that only reading on meets gzip's checksum."""
    tar = gzip.decompress(tar_gz(binary_members()))
    tar += bytes(-len(tar) % (1 << 20))
    path = write(tmp_path / "cifar.tar.gz", gzip.compress(tar))
    assert_is_cifar10(read_binary(path))
    refused(read_binary, write(path, gzip.compress(tar)[:-8]))


def test_cifar_archive_leaves_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "cifar.tar.gz", tar_gz(binary_members(), folder=".."))
    read_binary(path)
    assert list(tmp_path.iterdir()) == [path]


def test_cifar_refuses_a_member_larger_than_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_BYTES", 5_000)
    path = write(tmp_path / "cifar.tar.gz", tar_gz(binary_members()))
    assert "5000 bytes allowed" in refused(read_binary, path)


# --- pickles that are not CIFAR --------------------------------------------------------------------------


def calling(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls `module.name(argument)` when an ordinary unpickler loads it."""
    return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    attacks = [
        calling("os", "mkdir", str(trace)),
        calling("posix", "mkdir", str(trace)),
        calling("builtins", "exec", f'import os; os.mkdir("{trace}")'),
        calling("__builtin__", "eval", f'__import__("os").mkdir("{trace}")'),
    ]
    pickle.loads(attacks[0])
    assert trace.exists()  # so the attack is real
    trace.rmdir()
    for attack in attacks:
        body = attack[:-1]
        inside = b"\x80\x02}(U\x04data" + body + b"u."
        for content in (attack, inside, python2_pickle(cifar_pixels(1, 0), [0])[:-1] + b"0" + attack):
            (tmp_path / "folder").mkdir(exist_ok=True)
            for name in CIFAR10_NAMES:
                (tmp_path / "folder" / name).write_bytes(content)
            with pytest.raises(DataError, match="no CIFAR batch does"):
                read_python(tmp_path / "folder")
            assert not trace.exists()


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (pickle.dumps([1, 2]), "not a CIFAR-10 batch"),
        (pickle.dumps({b"data": b"abc"}), "no labels"),
        (pickle.dumps({b"data": b"abc", b"labels": [1]}), "not an array"),
        (b"\x80\x02Pname\n.", "outside object"),
        (python2_pickle(cifar_pixels(2, 0), [1, 2], key=b"fine_labels"), "no labels"),
        (python2_pickle(cifar_pixels(2, 0), [1]), "(2, 3072) for 1 labels"),
        (python2_pickle(cifar_pixels(2, 0), [1, 10]), "label 10"),
        (python2_pickle(cifar_pixels(2, 0), [1, -1]), "label -1"),
        (
            python2_pickle(cifar_pixels(1, 0), [1]).replace(b"](J\x01\x00\x00\x00", b"](G" + struct.pack(">d", 1.5)),
            "whole numbers",
        ),
        (python2_pickle(cifar_pixels(2, 0)[:, :9], [1, 2]), "(2, 9)"),
        (python2_pickle(cifar_pixels(0, 0), []), "(0, 3072)"),
        (python2_pickle(cifar_pixels(1, 0), [1]).replace(b"U\x02u1", b"U\x02O8"), "unsigned bytes"),
        (
            python2_pickle(cifar_pixels(1, 0), [1]).replace(b"J\x00\x0c\x00\x00", b"J\x01\x0c\x00\x00"),
            "reshape",
        ),
        (b"\x80\x02}(U\x04datacnumpy\nndarray\n)RU\x06labels](K\x01eu.", "without content"),
    ],
)
def test_a_pickle_that_is_no_batch_is_refused(batch: bytes, reason: str, store: Store) -> None:
    assert reason in refused(read_python, store(python_members() | {"test_batch": batch}))


def test_a_hostile_pickle_cannot_poison_the_next_one(store: Store) -> None:
    """Attempts to set attributes on the stand-ins for NumPy's classes, then a good file."""
    poison = b"cnumpy\nndarray\n}(U\x08to_numpyNub."
    refused(read_python, store(python_members() | {"test_batch": poison}))
    assert_is_cifar10(read_python(store(python_members())))


# --- USPS ------------------------------------------------------------------------------------------------


def test_usps_by_hand(tmp_path: Path) -> None:
    ramp = [round(i / 128 - 1, 4) for i in range(256)]
    images, labels = read_usps(write(tmp_path / "zip.train.gz", usps_bytes([["6.0000", *ramp], [0, *ramp[::-1]]])))
    assert images.shape == (2, 1, 16, 16)
    assert images.dtype == np.float32
    assert labels.tolist() == [6, 0]
    np.testing.assert_allclose(images[0, 0, 3, 5], ramp[3 * 16 + 5], rtol=1e-6)
    np.testing.assert_allclose(images[1].ravel(), ramp[::-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([3] + [0.0] * 255, "256 numbers instead of 257"),
        ([10] + [0.0] * 256, "0..9"),
        ([-1] + [0.0] * 256, "0..9"),
        ([1.5] + [0.0] * 256, "0..9"),
        ([math.nan] + [0.0] * 256, "0..9"),
        ([3] + [0.0] * 255 + [1.01], "[-1, 1]"),
        ([3] + [0.0] * 255 + [math.nan], "[-1, 1]"),
        ([3] + [0.0] * 255 + ["x"], "x"),
        ([], "no rows"),
    ],
)
def test_usps_refuses(row: list[Any], reason: str, tmp_path: Path) -> None:
    assert reason in refused(read_usps, write(tmp_path / "zip.train.gz", usps_bytes([row])))


def test_usps_refuses_rows_of_different_lengths(tmp_path: Path) -> None:
    rows = [[3] + [0.0] * 256, [3] + [0.0] * 255]
    refused(read_usps, write(tmp_path / "zip.train.gz", usps_bytes(rows)))


def test_usps_refuses_a_bomb(tmp_path: Path) -> None:
    assert "allowed" in refused(read_usps, write(tmp_path / "bomb.gz", gzip.compress(b" " * (1 << 26) + b"1")))


# --- SVHN ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_by_hand(compressed: bool, tmp_path: Path) -> None:
    images, labels = read_svhn(write(tmp_path / "train_32x32.mat", svhn_bytes([1, 10, 9], compressed)))
    np.testing.assert_array_equal(images, svhn_images(3))
    assert labels.tolist() == [1, 0, 9]  # MATLAB counts from one, and has ten for the digit zero
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert images.flags.c_contiguous
    one, label = read_svhn(write(tmp_path / "one.mat", svhn_bytes([3], compressed)))
    assert (one.shape, label.tolist()) == ((1, 3, 32, 32), [3])


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "no variable y"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1))}, "for 3 labels"),
        ({"X": np.zeros((2, 3, 32, 32), np.uint8), "y": np.ones((2, 1))}, "instead of"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))}, "float64 instead of bytes"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [11]])}, "one of 1..10"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [np.nan]])}, "one of 1..10"),
    ],
)
def test_svhn_refuses(variables: dict[str, np.ndarray], reason: str, tmp_path: Path) -> None:
    assert reason in refused(read_svhn, write(tmp_path / "train_32x32.mat", mat_bytes(**variables)))


def test_svhn_looks_at_sizes_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_BYTES", 5_000)
    assert "allowed" in refused(read_svhn, write(tmp_path / "train_32x32.mat", svhn_bytes([1, 2])))


# --- STL-10 ----------------------------------------------------------------------------------------------


def test_stl10_by_hand(store: Store) -> None:
    (train, labels), (test, test_labels) = read_stl10(store(stl10_members()))
    np.testing.assert_array_equal(np.concatenate([train, test]), stl10_images())
    assert (labels.tolist(), test_labels.tolist()) == ([9, 0], [3])
    assert train.flags.c_contiguous
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"train_X.bin": bytes(100)}, "whole number of images"),
        ({"train_X.bin": b""}, "whole number of images"),
        ({"train_y.bin": bytes([1])}, "2 images but 1 labels"),
        ({"test_y.bin": bytes([0])}, "label -1 outside 0..9"),
        ({"test_y.bin": bytes([11])}, "label 10 outside 0..9"),
    ],
)
def test_stl10_refuses(changed: dict[str, bytes], reason: str, store: Store) -> None:
    assert reason in refused(read_stl10, store({**stl10_members(), **changed}))


# --- npz -------------------------------------------------------------------------------------------------

ONE: dict[str, np.ndarray] = {
    "train_inputs": np.zeros((2, 1, 3, 3), np.uint8),
    "train_targets": np.array([0, 1], np.uint8),
    "test_inputs": np.ones((1, 1, 3, 3), np.uint8),
    "test_targets": np.array([1], np.int32),
}


def test_npz_round_trip(tmp_path: Path) -> None:
    (inputs, targets), (test_inputs, test_targets) = read_npz(write(tmp_path / "set.npz", npz_bytes(**ONE)))
    np.testing.assert_array_equal(inputs, ONE["train_inputs"])
    np.testing.assert_array_equal(test_inputs, ONE["test_inputs"])
    assert targets.tolist() == [0, 1]
    assert test_targets.tolist() == [1]
    assert targets.dtype == test_targets.dtype == np.int64


@pytest.mark.parametrize("key", ONE)
def test_npz_names_the_missing_array(key: str, tmp_path: Path) -> None:
    arrays = {k: v for k, v in ONE.items() if k != key}
    assert key in refused(read_npz, write(tmp_path / "set.npz", npz_bytes(**arrays)))


def test_npz_refuses_targets_that_are_not_integers(tmp_path: Path) -> None:
    arrays = ONE | {"train_targets": np.array([0.0, 1.0])}
    assert "float64" in refused(read_npz, write(tmp_path / "set.npz", npz_bytes(**arrays)))


class MakesAFolder:
    """Runs `os.mkdir` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_npz_never_unpickles(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    arrays = ONE | {"train_inputs": np.array([MakesAFolder(trace)], dtype=object)}
    path = write(tmp_path / "set.npz", npz_bytes(**arrays))
    assert "allow_pickle" in refused(read_npz, path)
    assert not trace.exists()
    np.load(path, allow_pickle=True)["train_inputs"]
    assert trace.exists()  # so the attack was real


def test_npz_refuses_a_single_array_and_a_bare_pickle(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", np.zeros(3))
    refused(read_npz, tmp_path / "set.npy")
    refused(read_npz, write(tmp_path / "set.npz", pickle.dumps({"train_inputs": 1})))


# --- the real thing --------------------------------------------------------------------------------------


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("folder", "train_counts", "test_counts"),
    [
        (
            "mnist",
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
        ),
        ("fashion_mnist", [6000] * 10, [1000] * 10),
    ],
)
def test_published_facts_of_mnist_and_fashion(folder: str, train_counts: list[int], test_counts: list[int]) -> None:
    root = Path(os.environ["BPFREE_DATA"]) / folder
    assert read_idx(root / "train-images-idx3-ubyte.gz").shape == (60_000, 28, 28)
    assert read_idx(root / "t10k-images-idx3-ubyte.gz").shape == (10_000, 28, 28)
    assert np.bincount(read_idx(root / "train-labels-idx1-ubyte.gz")).tolist() == train_counts
    assert np.bincount(read_idx(root / "t10k-labels-idx1-ubyte.gz")).tolist() == test_counts


@pytest.mark.data
@needs_data
def test_published_facts_of_cifar10() -> None:
    folder = Path(os.environ["BPFREE_DATA"]) / "cifar-10-batches-bin"
    (images, labels), (test_images, test_labels) = read_binary(folder)
    assert images.shape == (50_000, 3, 32, 32)
    assert test_images.shape == (10_000, 3, 32, 32)
    assert np.bincount(labels).tolist() == [5000] * 10
    assert np.bincount(test_labels).tolist() == [1000] * 10


@pytest.mark.data
@needs_data
def test_published_facts_of_usps() -> None:
    root = Path(os.environ["BPFREE_DATA"]) / "usps"
    for part, counts in (
        ("train", [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644]),
        ("test", [359, 264, 198, 166, 200, 160, 170, 147, 166, 177]),
    ):
        images, labels = read_usps(root / f"zip.{part}.gz")
        assert images.shape == (sum(counts), 1, 16, 16)
        assert np.bincount(labels).tolist() == counts
