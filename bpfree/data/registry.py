"""Data sets by name: where they lie, loading, downloading and checking them.

They lie under one data root (`data_root`), in any of several layouts: bpfree's own, torchvision's, the
official distributions unpacked or as downloaded. `catalog.py` lists them. `folder:PATH` names a folder of image
files that lies anywhere, see `image_folders.py`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shlex
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import torch

from bpfree.data.catalog import DATASETS, PACKAGED, Content, DatasetInfo, Entry, File, GraphInfo, Layout
from bpfree.data.dataset import Dataset, Part
from bpfree.data.graph_readers import RawGraph
from bpfree.data.image_folders import PREFIX, FolderInfo
from bpfree.data.readers import Sets, open_gunzipped
from bpfree.errors import BpfreeError, DataError, UsageError, unknown_name

State = Literal["ok", "missing", "corrupt"]

_TIMEOUT = 30
"""Seconds without a byte after which a host counts as down."""


def names() -> tuple[str, ...]:
    """The names of all data sets and graphs, packaged ones first."""
    return tuple(DATASETS)


def info(name: str) -> DatasetInfo | GraphInfo | FolderInfo:
    """What is known of the data set or graph `name`, or of the image files in `folder:PATH`.

    In names, `-`, `_` and capitals do not matter.

    Raises:
        UsageError: no data set of that name.
    """
    if name.startswith(PREFIX):
        return FolderInfo.of(name)
    for entry in DATASETS.values():
        if _key(name) in map(_key, (entry.name, *entry.aliases)):
            return entry
    raise unknown_name("data set", name, (*DATASETS, f"{PREFIX}PATH"))


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def data_root(root: str | Path | None = None) -> Path:
    """The folder of all data sets: `root`, else what BPFREE_DATA names, else a folder in the user's cache."""
    chosen = root or os.environ.get("BPFREE_DATA")
    if chosen:
        return Path(chosen).expanduser()
    import pooch

    return Path(pooch.os_cache("bpfree"))


def path(name: str, root: str | Path | None = None) -> Path:
    """The folder, or the archive, that `load` reads or that `fetch` would fill.

    Raises:
        UsageError: no data set of that name.
    """
    entry = info(name)
    if isinstance(entry, FolderInfo):
        return entry.path
    base, layout = _meant(entry, root)
    return layout.location(base)


def load(name: str, root: str | Path | None = None, *, download: bool = False) -> Dataset:
    """The data set `name`, in memory; graphs are loaded by `graphs.load_graph`.

    Sizes are checked, checksums only if something is wrong with a file: `verify` checks them.

    Args:
        name: one of `names()` or an alias, or `folder:PATH[@SIZE]`, which is read by `load_image_folder`.
        root: data root; see `data_root`.
        download: first fetch the data set if it is not there.

    Raises:
        UsageError: no data set of that name, or a graph.
        DataError: it is not there, or a file is corrupt; says which file and what to do.
    """
    entry = info(name)
    if isinstance(entry, GraphInfo):
        raise UsageError(f"{entry.name!r} is a graph: load it with bpfree.data.load_graph")
    if isinstance(entry, FolderInfo):
        return entry.load()
    base, layout = _locate(entry, root, download)
    files = list(zip(layout.files, layout.paths(base), strict=True))
    for file, file_path in files:
        problem = _wrong_size(file, file_path)
        if problem:
            raise _corrupt(entry, base, file_path, problem)
    try:
        return _assemble(entry, layout.read(layout.location(base)))
    except DataError as error:
        for file, file_path in files:
            problem = _problem(file, file_path)
            if problem:
                raise _corrupt(entry, base, file_path, problem) from error
        raise  # every file is as published: a defect of bpfree


def load_raw_graph(name: str, root: str | Path | None = None, *, download: bool = True) -> tuple[GraphInfo, RawGraph]:
    """What is known of the graph `name`, and the graph as it is published.

    Every file is checked in full before a reader opens it, as some are pickles: see `graph_readers`.

    Args:
        name: one of `names()` or an alias.
        root: data root; see `data_root`.
        download: first fetch the graph if it is not there.

    Raises:
        UsageError: no data set of that name, no graph, or torch_geometric is needed and not installed.
        DataError: it is not there, or a file is corrupt; says which file and what to do.
    """
    entry = info(name)
    if not isinstance(entry, GraphInfo):
        raise UsageError(f"{entry.name!r} is no graph: load it with bpfree.data.load")
    base, layout = _locate(entry, root, download)
    for file, file_path in zip(layout.files, layout.paths(base), strict=True):
        problem = _problem(file, file_path)
        if problem:
            raise _corrupt(entry, base, file_path, problem)
    try:
        graph = layout.read(layout.location(base))
        found = (*graph.features.shape, graph.edge_index.shape[1], int(graph.labels.max()) + 1)
    except BpfreeError:
        raise
    except Exception as error:  # NumPy and torch_geometric raise nearly all there are on another content
        if all(file.checksum for file in layout.files):
            raise  # every file is as published: a defect of bpfree
        raise _corrupt(
            entry, base, layout.paths(base)[0], " ".join(str(error).split()) or type(error).__name__
        ) from error
    expected = (entry.nodes, entry.features, entry.edges, entry.classes)
    if found != expected:
        what = "(nodes, features, edges, classes)"
        raise _corrupt(entry, base, layout.paths(base)[0], f"it holds {found} {what}, expected {expected}")
    return entry, graph


def fetch(name: str, root: str | Path | None = None, *, progress: bool = True) -> Path:
    """Downloads what is missing of the data set `name`, checks it, and returns where it is.

    Files that are there and whole are kept, so an interrupted download goes on with the next file. A file
    appears under its name only when it is complete and its checksum is right.

    Args:
        name: one of `names()` or an alias. Packaged sets need no download; `folder:PATH` is only looked for.
        root: data root; see `data_root`.
        progress: show a progress bar on standard error.

    Raises:
        UsageError: no data set of that name.
        DataError: no host delivers a file, or a file that bpfree did not put there is corrupt; a folder of image files
            is not as it should be.
    """
    entry = info(name)
    if isinstance(entry, FolderInfo):
        entry.check()
        return entry.path
    base, layout = _meant(entry, root)
    for file, file_path in zip(layout.files, layout.paths(base), strict=True):
        problem = _problem(file, file_path)
        if problem is None:
            continue
        if entry.packaged or layout is not entry.source:
            raise _corrupt(entry, base, file_path, problem)
        _download(file, base / layout.folder, progress)
    return layout.location(base)


def verify(name: str, root: str | Path | None = None) -> list[tuple[Path, State]]:
    """The files of the data set `name`, each with its state by full checksum.

    These are the files that `load` reads, or if it would find none, those that `fetch` would put there. Image files in
    `folder:PATH` have no checksums: those that cannot be decoded are corrupt.

    Raises:
        UsageError: no data set of that name.
        DataError: the system does not let a file be read, or a folder of image files is not as it should be.
    """
    entry = info(name)
    if isinstance(entry, FolderInfo):
        return [(file, "ok" if readable else "corrupt") for file, readable in entry.verify()]
    base, layout = _meant(entry, root)
    states: list[tuple[Path, State]] = []
    for file, file_path in zip(layout.files, layout.paths(base), strict=True):
        problem = _problem(file, file_path)
        states.append((file_path, "ok" if problem is None else "corrupt" if file_path.exists() else "missing"))
    return states


def _base(entry: Entry[Any], root: str | Path | None) -> Path:
    return PACKAGED if entry.packaged else data_root(root)


def _locate(entry: Entry[Content], root: str | Path | None, download: bool) -> tuple[Path, Layout[Content]]:
    """The folder that its paths are relative to, and the layout that is there, once it is."""
    base = _base(entry, root)
    layout = _present(entry, base)
    if layout is None and download:
        fetch(entry.name, root)
        layout = _present(entry, base)
    if layout is None:
        raise _missing(entry, base)
    return base, layout


def _meant(entry: Entry[Any], root: str | Path | None) -> tuple[Path, Layout[Any]]:
    """The folder that its paths are relative to, and the layout that is there, or that a download would fill."""
    base = _base(entry, root)
    return base, _present(entry, base) or entry.source


def _present(entry: Entry[Content], base: Path) -> Layout[Content] | None:
    """The first layout of which every file is there."""
    return next((layout for layout in entry.layouts if layout.is_complete(base)), None)


def _assemble(entry: DatasetInfo, sets: Sets) -> Dataset:
    parts = []
    for which, expected, (inputs, targets) in zip(("training", "test"), entry.samples, sets, strict=True):
        if inputs.shape != (expected, *entry.input_shape):
            raise DataError(
                f"data set {entry.name!r}: the {which} inputs have shape {inputs.shape} "
                f"instead of {(expected, *entry.input_shape)}"
            )
        parts.append(Part(torch.from_numpy(inputs), torch.from_numpy(targets)))
    return Dataset(
        name=entry.name,
        train=parts[0],
        test=parts[1],
        classes=entry.classes,
        mean=entry.mean,
        std=entry.std,
        class_names=entry.class_names,
        validation=entry.validation,
        augmentation=entry.augmentation,
    )


def _problem(file: File, file_path: Path) -> str | None:
    """What is wrong with a file, by size and full checksum; None if nothing is.

    Raises:
        DataError: the system does not let it be read.
    """
    if not file_path.is_file():
        return "it is missing"
    problem = _wrong_size(file, file_path)
    if problem:
        return problem
    expected = file.content or file.checksum
    if not expected:
        return _archive_problem(file_path)
    algorithm, _, expected_digest = expected.partition(":")
    try:
        digest = _digest(file_path, algorithm, gunzip=bool(file.content))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return str(error)
    except OSError as error:
        raise DataError(f"cannot read {file_path}: {error.strerror}") from error
    if digest == expected_digest:
        return None
    what = "content" if file.content else "file"
    return f"{algorithm} of the {what} is {digest}, expected {expected_digest}"


def _archive_problem(file_path: Path) -> str | None:
    """Compares the arrays of an .npz with the sums that it holds of them; none of them is unpickled."""
    try:
        with zipfile.ZipFile(file_path) as archive:
            damaged = archive.testzip()
    except PermissionError as error:
        raise DataError(f"cannot read {file_path}: {error.strerror}") from error
    # Not a list of types: zipfile, zlib and struct together raise nearly all there are on hostile bytes.
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return f"CRC-32 of {damaged} is not the one recorded" if damaged else None


def _wrong_size(file: File, file_path: Path) -> str | None:
    """Compares sizes where they are fixed: a gzip wrapper's is not."""
    size = file_path.stat().st_size
    if file.content or file.size in (None, size):
        return None
    return f"it has {size} bytes, expected {file.size}"


def _digest(file_path: Path, algorithm: str, gunzip: bool) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open_gunzipped(file_path) if gunzip else file_path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _missing(entry: Entry[Any], base: Path) -> DataError:
    # The layout of which most files are there is the one that the user meant.
    layout = max((entry.source, *entry.layouts), key=lambda layout: sum(path.is_file() for path in layout.paths(base)))
    file_path = next(path for path in layout.paths(base) if not path.is_file())
    if entry.packaged:
        return DataError(f"{file_path} is missing from the installation: install bpfree again")
    return DataError(
        f"data set {entry.name!r} is not in {base}: no {file_path.relative_to(base)}; "
        f"run `{_fetch(entry, base)}`, or point BPFREE_DATA to a folder that has it"
    )


def _corrupt(entry: Entry[Any], base: Path, file_path: Path, problem: str) -> DataError:
    remedy = "install bpfree again" if entry.packaged else f"delete it and run `{_fetch(entry, base)}`"
    return DataError(f"{file_path} is corrupt ({problem}): {remedy}")


def _fetch(entry: Entry[Any], base: Path) -> str:
    """The command that fills this folder, which may be another than the usual."""
    elsewhere = "" if base == data_root() else f" --data {shlex.quote(str(base))}"
    return f"bpfree data fetch {entry.name}{elsewhere}"


def _download(file: File, folder: Path, progress: bool) -> None:
    """One file from the first host that delivers it whole."""
    import pooch
    from tqdm import tqdm

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # pooch would say so once for every host, as if that host were the reason
        raise DataError(f"cannot make the folder {folder}: {error.strerror}; name another with BPFREE_DATA") from error
    reasons = []
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # the progress bar says it already
    try:
        for url in file.urls:
            if not file.checksum:  # pooch would keep what is there, and that is damaged
                (folder / file.name).unlink(missing_ok=True)
            size = file.size or 1  # pooch puts the server's word in its place, but fails where it is None
            bar = tqdm(total=size, desc=file.name, unit="B", unit_scale=True, disable=not progress)
            downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=_TIMEOUT)
            try:
                pooch.retrieve(url, file.checksum or None, fname=file.name, path=folder, downloader=downloader)
                problem = None if file.checksum else _archive_problem(folder / file.name)
                if problem:
                    (folder / file.name).unlink()
                    raise ValueError(problem)
                return
            except (OSError, ValueError) as error:  # all of requests' are OSErrors, a wrong sum a ValueError
                reasons.append(f"{url}: {_reason(error)}")
            finally:
                bar.close()
    finally:
        logger.setLevel(level)
    raise DataError(f"cannot download {file.name} ({'; '.join(reasons)}): try again, or put it into {folder} by hand")


def _reason(error: Exception) -> str:
    """One short line out of what requests and pooch have to say."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, (requests.ConnectionError, requests.Timeout)):
        return "no connection"
    return " ".join(str(error).split())
