"""Readers of the formats that graphs are published in: a path in, a `RawGraph` out.

Those of torch_geometric are used, so that node and edge order are what its users see, but not its data set classes:
these keep a processed copy which they load with `torch.load(weights_only=False)` if the safe way fails, and GitHub's
reads its file with pickles allowed. No file can make a reader run code: `.npz` files are read without pickles, and
Planetoid's pickles reach `read_planetoid` from `registry.load_raw_graph` only if they are the published ones, bit
for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bpfree.errors import UsageError


class RawGraph(NamedTuple):
    """A graph as it is published, in torch_geometric's order of nodes and edges.

    Attributes:
        features: (n, F) float32.
        edge_index: (2, E) int64, every edge in both directions.
        labels: (n,) int64.
        public: node indices of the published training, validation and test part, if there are such.
    """

    features: Tensor
    edge_index: Tensor
    labels: Tensor
    public: tuple[Tensor, Tensor, Tensor] | None = None


@contextmanager
def graph_extra() -> Iterator[None]:
    """Around whatever imports torch_geometric, at once or later.

    Raises:
        UsageError: it, or a library that it imports late, is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise UsageError(f'{error.name} is needed for this: pip install "bpfree[graph]"') from error


def read_packaged_graph(path: Path) -> RawGraph:
    """A packaged graph: binary features, an undirected graph and its public split in one `.npz`, without pickles.

    Arrays: `shape` (n, F); `indptr` (n + 1,) and `indices`, the features that are 1, as rows of a CSR matrix; `edges`
    (2, E / 2), the lower node first; `labels` (n,); `train`, `validation`, `test`, node indices.
    """
    with np.load(path, allow_pickle=False) as archive:
        nodes, width = archive["shape"].tolist()
        features = torch.zeros(nodes, width)
        rows = np.repeat(np.arange(nodes), np.diff(archive["indptr"].astype(np.int64)))
        features[torch.from_numpy(rows), _int64(archive["indices"])] = 1
        edges = _int64(archive["edges"])
        train, validation, test = (_int64(archive[key]) for key in ("train", "validation", "test"))
        labels = _int64(archive["labels"])
    edge_index = torch.cat([edges, edges.flip(0)], dim=1)
    # Planetoid's order in torch_geometric: by the second node, then by the first.
    order = torch.argsort(edge_index[1] * nodes + edge_index[0])
    return RawGraph(features, edge_index[:, order], labels, (train, validation, test))


def read_planetoid(folder: Path, name: str) -> RawGraph:
    """A raw folder of Planetoid: `ind.NAME.{x,tx,allx,y,ty,ally,graph,test.index}`, with the public split.

    All but one of these are pickles: verify their checksums first.

    Args:
        folder: where the files are.
        name: "Cora", "CiteSeer" or "PubMed". 15 nodes of CiteSeer's graph have neither features nor labels there; they
            get features of 0 and label 0.

    Raises:
        UsageError: torch_geometric is not installed.
    """
    # its reader sets a filter of warnings, for good
    with graph_extra(), warnings.catch_warnings():
        from torch_geometric.io import read_planetoid_data

        graph = read_planetoid_data(str(folder), name)
    masks = (graph.train_mask, graph.val_mask, graph.test_mask)
    train, validation, test = (mask.nonzero().flatten() for mask in masks)
    return RawGraph(graph.x, graph.edge_index, graph.y, (train, validation, test))


def read_citation_npz(folder: Path, name: str) -> RawGraph:
    """The file `name` of CitationFull or Amazon, made undirected and binary as torch_geometric does.

    Raises:
        UsageError: torch_geometric is not installed.
    """
    with graph_extra():
        from torch_geometric.io import read_npz

        graph = read_npz(str(folder / name))  # without pickles: NumPy's default, which a test holds it to
    return RawGraph(graph.x, graph.edge_index, graph.y)


def read_github(folder: Path) -> RawGraph:
    """MUSAE's GitHub graph as torch_geometric hosts it, `github.npz`: `features`, `target`, `edges` (E, 2)."""
    with np.load(folder / "github.npz", allow_pickle=False) as archive:
        features = torch.from_numpy(archive["features"].astype(np.float32))
        edge_index = _int64(archive["edges"]).t().contiguous()
        return RawGraph(features, edge_index, _int64(archive["target"]))


def _int64(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
