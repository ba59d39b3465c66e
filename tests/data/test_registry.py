"""Named data sets: where they are found, what is said when they are not, downloads from a loopback server."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import logging
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bpfree import data
from bpfree.data import readers
from bpfree.data.catalog import DATASETS, PACKAGED, DatasetInfo, File, Layout
from bpfree.errors import DataError, UsageError
from tests.data import test_readers

pooch = pytest.importorskip("pooch")

needs_data = pytest.mark.skipif(not os.environ.get("BPFREE_DATA"), reason="BPFREE_DATA is not set")

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


# --- names -----------------------------------------------------------------------------------------------


def test_names() -> None:
    assert data.names() == (
        "digits",
        "fashion-mini",
        "cora",
        "mnist",
        "fashion_mnist",
        "cifar10",
        "cifar100",
        "usps",
        "svhn",
        "stl10",
        "citeseer",
        "pubmed",
        "cora_ml",
        "citeseer_full",
        "amazon_photo",
        "github",
    )


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("fashion", "fashion_mnist"),
        ("fashion-mnist", "fashion_mnist"),
        ("FashionMNIST", "fashion_mnist"),
        ("fashion_mini", "fashion-mini"),
        ("CIFAR-10", "cifar10"),
        ("usps", "usps"),
        ("Cora-ML", "cora_ml"),
        ("citation-citeseer", "citeseer_full"),
    ],
)
def test_other_spellings(given: str, name: str) -> None:
    assert data.info(given).name == name


def test_an_unknown_name_suggests_the_nearest() -> None:
    for function in (data.info, data.load, data.path, data.fetch, data.verify):
        with pytest.raises(UsageError, match="unknown data set 'cifar20'; did you mean cifar"):
            function("cifar20")


@pytest.mark.parametrize("name", [name for name in data.names() if isinstance(data.info(name), DatasetInfo)])
def test_what_is_known_of_each_is_consistent(name: str) -> None:
    info = data.info(name)
    assert len(info.mean) == len(info.std) == info.input_shape[0]
    assert len(set(info.class_names)) == info.classes
    assert info.validation == (10_000 if name == "mnist" else info.samples[0] // 10)
    assert info.packaged or info.download_size > 1_000_000
    for layout in info.layouts:
        for file in layout.files:
            for checksum in filter(None, (file.checksum, file.content)):
                algorithm, digest = checksum.split(":")
                assert len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size
            assert all(url.endswith("/" + file.name) for url in file.urls)


# --- the data root ---------------------------------------------------------------------------------------


def test_data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BPFREE_DATA", str(tmp_path / "env"))
    assert data.data_root(tmp_path / "argument") == tmp_path / "argument"
    assert data.data_root() == tmp_path / "env"
    assert data.data_root("~/data") == Path.home() / "data"
    for unset in (functools.partial(monkeypatch.setenv, value=""), functools.partial(monkeypatch.delenv)):
        unset("BPFREE_DATA")
        assert data.data_root() == Path(pooch.os_cache("bpfree"))


def test_importing_is_cheap_and_loading_packaged_sets_needs_no_downloader() -> None:
    heavy = "{'pooch', 'requests', 'sklearn', 'scipy', 'torchvision'}"
    script = f"import sys, bpfree.data as d; d.load('digits'); print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- packaged sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "fashion-mini"])
def test_packaged_sets(name: str, tmp_path: Path) -> None:
    info, dataset = data.info(name), data.load(name, tmp_path / "not there")
    assert (len(dataset.train), len(dataset.test)) == info.samples
    assert dataset.input_shape == info.input_shape
    assert dataset.train.inputs.dtype == torch.uint8
    pixels = dataset.train.inputs.numpy().astype(np.float64) / 255
    assert (round(pixels.mean(), 4), round(pixels.std(), 4)) == (info.mean[0], info.std[0])
    assert data.verify(name) == [(PACKAGED / f"{name}.npz", "ok")]
    assert data.path(name) == data.fetch(name) == PACKAGED / f"{name}.npz"


def test_digits_are_the_published_ones() -> None:
    """Class counts of the UCI page (optdigits.names, test part), 17 grey levels, stratified parts."""
    dataset = data.load("digits")
    counts = [np.bincount(part.targets.numpy()) for part in (dataset.train, dataset.test)]
    assert (counts[0] + counts[1]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.all(np.abs(counts[1] - (counts[0] + counts[1]) / 5) <= 1)
    assert torch.unique(dataset.train.inputs).tolist() == [round(level * 255 / 16) for level in range(17)]


def test_digits_equal_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    published = datasets.load_digits()
    dataset = data.load("digits")

    def rows(images: np.ndarray, labels: np.ndarray) -> list[tuple[int, ...]]:
        table = np.column_stack([labels, images.reshape(len(images), -1)]).astype(int)
        return sorted(map(tuple, table.tolist()))

    ours = torch.cat([dataset.train.inputs, dataset.test.inputs]).numpy()
    labels = torch.cat([dataset.train.targets, dataset.test.targets]).numpy()
    assert rows(np.rint(ours / 255 * 16), labels) == rows(published.images, published.target)


@pytest.mark.data
@needs_data
def test_fashion_mini_is_the_start_of_fashion_mnist() -> None:
    mini, full = data.load("fashion-mini"), data.load("fashion_mnist")
    for part, whole in ((mini.train, full.train), (mini.test, full.test)):
        assert torch.equal(part.inputs, whole.inputs[: len(part)])
        assert torch.equal(part.targets, whole.targets[: len(part)])


# --- layouts ---------------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make_tiny(monkeypatch: pytest.MonkeyPatch, name: str, samples: tuple[int, int] = (10, 2)) -> DatasetInfo:
    """Lets `name` have few samples, in files of any size."""
    info = data.info(name)
    layouts = tuple(
        replace(layout, files=tuple(replace(file, size=None) for file in layout.files)) for layout in info.layouts
    )
    tiny = replace(info, samples=samples, validation=1, layouts=layouts)
    monkeypatch.setitem(DATASETS, info.name, tiny)
    return tiny


def tiny_idx_set() -> dict[str, bytes]:
    train, test = np.arange(10 * 784, dtype=np.uint8), np.arange(2 * 784, dtype=np.uint8)
    arrays = (
        train.reshape(10, 28, 28),
        np.arange(10, dtype=np.uint8),
        test.reshape(2, 28, 28),
        np.array([9, 8], np.uint8),
    )
    return dict(zip(MNIST_FILES, map(idx_bytes, arrays), strict=True))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "fashion_mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_mnist_layouts(name: str, folder: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch, name)
    (tmp_path / folder).mkdir(parents=True)
    for file, content in tiny_idx_set().items():
        (tmp_path / folder / (file + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    assert data.path(name, tmp_path) == tmp_path / folder
    dataset = data.load(name, tmp_path)
    assert dataset.train.inputs.shape == (10, 1, 28, 28)
    assert dataset.train.inputs[1, 0, 0, 0] == 784 % 256
    assert dataset.train.targets.tolist() == list(range(10))
    assert dataset.test.targets.tolist() == [9, 8]


def cifar_rows(rows: int, label_bytes: int) -> bytes:
    return b"".join(bytes([row] * label_bytes) + bytes([row] * 3072) for row in range(rows))


def test_cifar_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch, "cifar10")
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ):
        (folder / f"{name}.bin").write_bytes(cifar_rows(2, label_bytes=1))
    subprocess.run(["tar", "czf", "cifar-10-binary.tar.gz", folder.name], cwd=tmp_path, check=True)

    assert data.path("cifar10", tmp_path) == folder
    unpacked = data.load("cifar10", tmp_path)
    (folder / "test_batch.bin").unlink()
    assert data.path("cifar10", tmp_path) == tmp_path / "cifar-10-binary.tar.gz"
    packed = data.load("cifar10", tmp_path)

    assert unpacked.augmentation == "crop-flip"
    assert unpacked.train.targets.tolist() == [0, 1] * 5
    for ours, theirs in ((unpacked.train, packed.train), (unpacked.test, packed.test)):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)


def test_cifar100_has_its_own_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch, "cifar100")
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "train.bin").write_bytes(cifar_rows(10, label_bytes=2))
    (folder / "test.bin").write_bytes(cifar_rows(2, label_bytes=2))
    dataset = data.load("cifar100", tmp_path)
    assert dataset.train.targets.tolist() == list(range(10))
    assert dataset.classes == 100


def test_svhn_and_stl10_lie_where_torchvision_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, inputs in (("svhn", (3, 32, 32)), ("stl10", (3, 96, 96))):
        with pytest.raises(DataError, match=f"bpfree data fetch {name}"):
            data.load(name, tmp_path)
        assert data.info(name).input_shape == inputs
    make_tiny(monkeypatch, "svhn", (2, 3))
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn" / "train_32x32.mat").write_bytes(test_readers.svhn_bytes([1, 10]))
    (tmp_path / "svhn" / "test_32x32.mat").write_bytes(test_readers.svhn_bytes([4, 5, 6]))
    svhn = data.load("SVHN", tmp_path)
    assert (svhn.train.targets.tolist(), svhn.test.targets.tolist()) == ([1, 0], [4, 5, 6])
    assert svhn.augmentation == "shift"
    assert (svhn.mean, svhn.std) == ((0.5,) * 3, (0.5,) * 3)  # 127.5 of 255

    make_tiny(monkeypatch, "stl10", (2, 1))
    (tmp_path / "stl10_binary.tar.gz").write_bytes(test_readers.tar_gz(test_readers.stl10_members(), "stl10_binary"))
    packed = data.load("stl-10", tmp_path)
    (tmp_path / "stl10_binary").mkdir()
    for file, content in test_readers.stl10_members().items():
        (tmp_path / "stl10_binary" / file).write_bytes(content)
    unpacked = data.load("stl-10", tmp_path)
    assert torch.equal(packed.train.inputs, unpacked.train.inputs)
    assert unpacked.test.targets.tolist() == [3]


def test_a_set_with_the_wrong_number_of_samples_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "mnist", replace(make_tiny(monkeypatch, "mnist"), samples=(11, 2)))
    (tmp_path / "mnist").mkdir()
    for file, content in tiny_idx_set().items():
        (tmp_path / "mnist" / file).write_bytes(content)
    with pytest.raises(DataError, match="train-images-idx3-ubyte is corrupt"):
        data.load("mnist", tmp_path)


# --- a set of our own, for everything that can go wrong ----------------------------------------------------


def npz_bytes(folder: Path) -> bytes:
    targets = np.arange(20) % 2
    parts: dict[str, np.ndarray] = {"inputs": np.zeros((20, 1, 3, 3), np.uint8), "targets": targets}
    arrays = {f"{which}_{key}": array for which in ("train", "test") for key, array in parts.items()}
    np.savez_compressed(folder / "made.npz", **arrays)
    return (folder / "made.npz").read_bytes()


class Server:
    """An HTTP server on the loopback interface that serves a folder and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        requests = self.requests

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                requests.append(self.path)

        handler = functools.partial(Handler, directory=str(folder))
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "hosted").mkdir()
    server = Server(tmp_path / "hosted")
    yield server
    server.close()


@pytest.fixture
def toy(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetInfo:
    """A data set of two files on the loopback server; another layout of it is one file in `elsewhere`."""
    contents = {"toy.npz": npz_bytes(tmp_path), "terms.txt.gz": gzip.compress(b"terms", mtime=0)}
    for name, content in contents.items():
        (server.folder / name).write_bytes(content)
    hosted = tuple(
        File(
            name,
            "sha256:" + hashlib.sha256(content).hexdigest(),
            content="md5:" + hashlib.md5(b"terms").hexdigest() if name.endswith(".gz") else "",
            size=len(content),
            urls=(server.url + name,),
        )
        for name, content in contents.items()
    )

    def read(folder: Path) -> readers.Sets:
        return readers.read_npz(folder / "toy.npz")

    toy = replace(
        data.info("digits"),
        name="toy",
        input_shape=(1, 3, 3),
        samples=(20, 20),
        class_names=("a", "b"),
        validation=2,
        layouts=(Layout("elsewhere", (replace(hosted[0], urls=()),), read), Layout("toy", hosted, read)),
        packaged=False,
    )
    monkeypatch.setitem(DATASETS, "toy", toy)
    return toy


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def with_urls(monkeypatch: pytest.MonkeyPatch, toy: DatasetInfo, *urls: str) -> None:
    """Hosts the first file at `urls`."""
    elsewhere, hosted = toy.layouts
    files = (replace(hosted.files[0], urls=urls), hosted.files[1])
    monkeypatch.setitem(DATASETS, "toy", replace(toy, layouts=(elsewhere, replace(hosted, files=files))))


def states(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): state for path, state in data.verify("toy", root)}


def test_fetch_load_verify(toy: DatasetInfo, root: Path, server: Server) -> None:
    assert states(root) == {"toy/toy.npz": "missing", "toy/terms.txt.gz": "missing"}
    assert data.path("toy", root) == data.fetch("toy", root, progress=False) == root / "toy"
    assert states(root) == {"toy/toy.npz": "ok", "toy/terms.txt.gz": "ok"}
    dataset = data.load("toy", root)
    assert (dataset.name, len(dataset.train), dataset.class_names) == ("toy", 20, ("a", "b"))
    assert sorted(path.name for path in (root / "toy").iterdir()) == ["terms.txt.gz", "toy.npz"]
    assert server.requests == ["/toy.npz", "/terms.txt.gz"]


def test_fetch_keeps_what_is_whole(toy: DatasetInfo, root: Path, server: Server) -> None:
    data.fetch("toy", root, progress=False)
    server.requests.clear()
    data.fetch("toy", root, progress=False)
    assert server.requests == []
    (root / "toy" / "toy.npz").unlink()
    data.fetch("toy", root, progress=False)
    assert server.requests == ["/toy.npz"]


def test_fetch_replaces_what_is_corrupt(toy: DatasetInfo, root: Path, server: Server) -> None:
    data.fetch("toy", root, progress=False)
    (root / "toy" / "toy.npz").write_bytes(b"cut off")
    assert states(root)["toy/toy.npz"] == "corrupt"
    data.fetch("toy", root, progress=False)
    assert states(root)["toy/toy.npz"] == "ok"


def test_a_gzip_wrapper_does_not_matter_but_its_content_does(toy: DatasetInfo, root: Path) -> None:
    data.fetch("toy", root, progress=False)
    terms = root / "toy" / "terms.txt.gz"
    terms.write_bytes(gzip.compress(b"terms", compresslevel=1, mtime=1))
    assert states(root)["toy/terms.txt.gz"] == "ok"
    for damaged in (
        gzip.compress(b"other"),
        gzip.compress(b"terms")[:-3],
        gzip.compress(b"terms") + b"x",
        b"terms ",
    ):
        terms.write_bytes(damaged)
        assert states(root)["toy/terms.txt.gz"] == "corrupt"
    terms.rename(root / "toy" / "terms.txt").write_bytes(b"terms")
    assert states(root) == {"toy/toy.npz": "ok", "toy/terms.txt": "ok"}


def test_fetch_tries_the_next_host(
    toy: DatasetInfo, root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "wrong").write_bytes(b"something else")
    first = ("http://127.0.0.1:1/toy.npz", server.url + "absent", server.url + "wrong")
    with_urls(monkeypatch, toy, *first, server.url + "toy.npz")
    data.fetch("toy", root, progress=False)
    assert states(root)["toy/toy.npz"] == "ok"
    assert server.requests[-2:] == ["/toy.npz", "/terms.txt.gz"]


def test_fetch_says_why_and_what_to_do_when_no_host_delivers(
    toy: DatasetInfo, root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "wrong").write_bytes(b"something else")
    with_urls(monkeypatch, toy, "http://127.0.0.1:1/toy.npz", server.url + "absent", server.url + "wrong")
    with pytest.raises(DataError) as caught:
        data.fetch("toy", root, progress=False)
    message = str(caught.value)
    assert "cannot download toy.npz" in message
    assert "http://127.0.0.1:1/toy.npz: no connection" in message
    assert f"{server.url}absent: HTTP status 404" in message
    assert toy.source.files[0].checksum.removeprefix("sha256:") in message  # expected
    assert hashlib.sha256(b"something else").hexdigest() in message  # actual
    assert str(root / "toy") in message
    assert "\n" not in message
    assert not list((root / "toy").iterdir())


def test_fetch_shows_progress_only_if_asked(toy: DatasetInfo, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger, log = pooch.get_logger(), io.StringIO()
    level, handler = logger.level, logging.StreamHandler(log)
    logger.addHandler(handler)
    data.fetch("toy", root, progress=False)
    logger.removeHandler(handler)
    quiet = capfd.readouterr()
    assert (quiet.out, quiet.err, log.getvalue()) == ("", "", "")
    assert logger.level == level
    (root / "toy" / "toy.npz").unlink()
    data.fetch("toy", root)
    loud = capfd.readouterr()
    assert loud.out == ""
    assert "toy.npz" in loud.err


def test_fetch_leaves_files_of_others_alone(toy: DatasetInfo, root: Path, server: Server) -> None:
    (root / "elsewhere").mkdir(parents=True)
    (root / "elsewhere" / "toy.npz").write_bytes(b"cut off")
    with pytest.raises(DataError, match=r"elsewhere.toy\.npz is corrupt .* delete it and run `bpfree data fetch toy "):
        data.fetch("toy", root, progress=False)
    assert (root / "elsewhere" / "toy.npz").read_bytes() == b"cut off"
    assert server.requests == []


def test_fetch_is_content_with_another_layout(toy: DatasetInfo, root: Path, server: Server) -> None:
    (root / "elsewhere").mkdir(parents=True)
    (root / "elsewhere" / "toy.npz").write_bytes((server.folder / "toy.npz").read_bytes())
    assert data.fetch("toy", root, progress=False) == root / "elsewhere"
    assert server.requests == []
    assert len(data.load("toy", root).train) == 20


def test_load_downloads_only_if_told(toy: DatasetInfo, root: Path, server: Server) -> None:
    with pytest.raises(DataError) as caught:
        data.load("toy", root)
    for part in ("'toy'", str(root), "no toy/toy.npz", f"`bpfree data fetch toy --data {root}`", "BPFREE_DATA"):
        assert part in str(caught.value)
    assert server.requests == []
    assert len(data.load("toy", root, download=True).train) == 20


def test_a_half_empty_folder_names_what_is_missing(toy: DatasetInfo, root: Path) -> None:
    data.fetch("toy", root, progress=False)
    (root / "toy" / "terms.txt.gz").unlink()
    with pytest.raises(DataError, match=r"no toy/terms\.txt\.gz"):
        data.load("toy", root)


def test_load_of_a_file_of_another_size(toy: DatasetInfo, root: Path) -> None:
    data.fetch("toy", root, progress=False)
    file = root / "toy" / "toy.npz"
    size = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError) as caught:
        data.load("toy", root)
    assert f"{file} is corrupt (it has {size + 1} bytes, expected {size})" in str(caught.value)
    assert f"delete it and run `bpfree data fetch toy --data {root}`" in str(caught.value)


def test_advice_for_the_usual_folder_names_none(toy: DatasetInfo, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BPFREE_DATA", str(root))
    with pytest.raises(DataError, match="run `bpfree data fetch toy`,"):
        data.load("toy")


def test_load_of_a_damaged_file_gives_both_checksums(toy: DatasetInfo, root: Path) -> None:
    data.fetch("toy", root, progress=False)
    file = root / "toy" / "toy.npz"
    damaged = bytes(len(file.read_bytes()))
    file.write_bytes(damaged)
    with pytest.raises(DataError) as caught:
        data.load("toy", root)
    expected = toy.source.files[0].checksum.removeprefix("sha256:")
    found = hashlib.sha256(damaged).hexdigest()
    assert f"sha256 of the file is {found}, expected {expected}" in str(caught.value)


def test_a_file_that_may_not_be_read_is_not_called_corrupt(toy: DatasetInfo, root: Path) -> None:
    data.fetch("toy", root, progress=False)
    (root / "toy" / "toy.npz").chmod(0)
    if os.access(root / "toy" / "toy.npz", os.R_OK):
        pytest.skip("this user may read everything")
    for function in (data.load, data.verify):
        with pytest.raises(DataError, match=r"cannot read .*toy\.npz: Permission denied"):
            function("toy", root)


def test_a_data_root_that_cannot_be_written(toy: DatasetInfo, root: Path) -> None:
    root.write_bytes(b"a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot make the folder .*; name another with BPFREE_DATA"):
        data.fetch("toy", root, progress=False)


# --- the real thing --------------------------------------------------------------------------------------


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("mnist", [0.1307], [0.3081]),
        ("fashion_mnist", [0.2860], [0.3530]),
        ("cifar10", [0.49140, 0.48216, 0.44653], [0.24703, 0.24349, 0.26159]),
        ("usps", None, None),  # nobody has published these
    ],
)
def test_full_sets(name: str, mean: list[float] | None, std: list[float] | None) -> None:
    info, dataset = data.info(name), data.load(name)
    assert {state for _, state in data.verify(name)} == {"ok"}
    assert (len(dataset.train), len(dataset.test)) == info.samples
    assert dataset.input_shape == info.input_shape
    scale = 255 if dataset.train.inputs.dtype == torch.uint8 else 1
    found = [torch.std_mean(channel.float() / scale) for channel in dataset.train.inputs.unbind(1)]
    stds, means = zip(*[(std.item(), mean.item()) for std, mean in found], strict=True)
    np.testing.assert_allclose(means, mean or info.mean, atol=6e-5)
    np.testing.assert_allclose(stds, std or info.std, atol=6e-5)
    np.testing.assert_allclose(info.mean, means, atol=6e-5)
    np.testing.assert_allclose(info.std, stds, atol=6e-5)
    train, validation, test = dataset.split()
    assert len(train) + len(validation) == info.samples[0]
    assert len(validation) == info.validation
    assert test is dataset.test


@pytest.mark.data
@needs_data
def test_unzipped_files_in_torchvisions_layout_are_whole(tmp_path: Path) -> None:
    source, folder = Path(os.environ["BPFREE_DATA"]) / "mnist", tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in MNIST_FILES:
        (folder / name).write_bytes(gzip.decompress((source / f"{name}.gz").read_bytes()))
    assert data.verify("mnist", tmp_path) == [(folder / name, "ok") for name in MNIST_FILES]
    images = folder / MNIST_FILES[0]
    content = bytearray(images.read_bytes())
    content[1_000_000] ^= 1
    images.write_bytes(content)
    assert data.verify("mnist", tmp_path)[0] == (images, "corrupt")
