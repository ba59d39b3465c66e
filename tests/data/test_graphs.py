"""Graphs against published counts, scikit-learn, torch_geometric and the authors' splits, and against hostile files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bpfree import data
from bpfree.data.catalog import DATASETS, PACKAGED, GraphInfo, Layout
from bpfree.data.graph_readers import RawGraph, read_github, read_planetoid
from bpfree.data.graphs import EdgeSplit, GraphDataset, NodeSplit, load_graph
from bpfree.errors import DataError, UsageError
from tests.data.test_registry import Server

GRAPHS = [name for name in data.names() if isinstance(data.info(name), GraphInfo)]

CORA_SHA256 = {  # of the files in kimiyoung/planetoid
    "x": "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
    "tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
    "allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
    "y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
    "ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
    "ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
    "graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
    "test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
}


@pytest.fixture(scope="module")
def cora() -> GraphDataset:
    return load_graph("cora", "not there", download=False)


def data_folder() -> Path:
    return Path(os.environ["BPFREE_DATA"])


def bare_graph(nodes: int, edges: list[tuple[int, int]] | None = None, **changes: Any) -> GraphDataset:
    """A graph of `nodes` nodes with one feature each and the undirected `edges`."""
    pairs = torch.tensor([*(edges or []), *((v, u) for u, v in edges or [])], dtype=torch.int64).reshape(-1, 2)
    graph = {"edge_index": pairs.t(), "features": torch.ones(nodes, 1), "labels": torch.zeros(nodes, dtype=torch.int64)}
    return GraphDataset("bare", **{"classes": 2, **graph, **changes})


def path_graph(nodes: int) -> GraphDataset:
    return bare_graph(nodes, [(node, node + 1) for node in range(nodes - 1)])


def parts(split: NodeSplit) -> list[set[int]]:
    return [set(part.tolist()) for part in (split.train, split.validation, split.test)]


# --- what they hold ----------------------------------------------------------------------------------------


def test_packaged_cora(cora: GraphDataset) -> None:
    """Counts of Planetoid's paper and torch_geometric's table; classes as Sen et al. (2008) count them."""
    assert cora.features.shape == (2708, 1433)
    assert cora.features.dtype == torch.float32
    assert cora.edge_index.shape == (2, 10556)
    assert cora.labels.bincount().tolist() == [351, 217, 418, 818, 426, 298, 180]
    assert cora.classes == 7
    assert data.verify("cora") == [(PACKAGED / "cora.npz", "ok")]
    assert (PACKAGED / "cora.npz").stat().st_size < 300_000


def test_coras_public_split(cora: GraphDataset) -> None:
    split = cora.public_split()
    assert cora.labels[split.train].bincount().tolist() == [20] * 7
    assert (len(split.train), len(split.validation), len(split.test)) == (140, 500, 1000)
    assert len(set.union(*parts(split))) == 1640


def test_features_are_normalised_by_row_or_as_published(cora: GraphDataset) -> None:
    torch.testing.assert_close(cora.features.sum(1), torch.ones(2708))
    published = load_graph("cora", normalise=False).features
    assert published.unique().tolist() == [0, 1]
    torch.testing.assert_close(cora.features, published / published.sum(1, keepdim=True))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "nodes", "edges", "features", "classes"),
    [  # torch_geometric's tables
        ("cora", 2_708, 10_556, 1_433, 7),
        ("citeseer", 3_327, 9_104, 3_703, 6),
        ("pubmed", 19_717, 88_648, 500, 3),
        ("cora_ml", 2_995, 16_316, 2_879, 7),
        ("citeseer_full", 4_230, 10_674, 602, 6),
        ("amazon_photo", 7_650, 238_162, 745, 8),
    ],
)
def test_sizes(name: str, nodes: int, edges: int, features: int, classes: int) -> None:
    if name != "cora":
        pytest.importorskip("torch_geometric")
    graph = load_graph(name, download=False)
    assert graph.name == name
    assert graph.features.shape == (nodes, features)
    assert graph.edge_index.shape == (2, edges)
    assert graph.classes == classes
    assert graph.labels.unique().tolist() == list(range(classes))
    assert {state for _, state in data.verify(name)} == {"ok"}
    entry = data.info(name)
    assert isinstance(entry, GraphInfo)
    assert entry.public == (graph.public is not None)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "kind", "folder", "arguments"),
    [
        ("cora", "Planetoid", "planetoid/Cora", ("Cora",)),
        ("citeseer", "Planetoid", "planetoid/CiteSeer", ("CiteSeer",)),
        ("pubmed", "Planetoid", "planetoid/PubMed", ("PubMed",)),
        ("cora_ml", "CitationFull", "citation_full/cora_ml", ("cora_ml",)),
        ("citeseer_full", "CitationFull", "citation_full/citeseer", ("citeseer",)),
        ("amazon_photo", "Amazon", "amazon/Photo", ("Photo",)),
    ],
)
def test_as_torch_geometrics_classes_give_them(
    name: str, kind: str, folder: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """To the order of edges and the last bit of a feature; their classes see copies, as they write beside the files."""
    datasets = pytest.importorskip("torch_geometric.datasets")
    transforms = pytest.importorskip("torch_geometric.transforms")
    shutil.copytree(data_folder() / folder / "raw", tmp_path / folder / "raw")
    root = str((tmp_path / folder).parent)
    theirs = getattr(datasets, kind)(root, *arguments, transform=transforms.NormalizeFeatures())[0]
    ours = load_graph(name, download=False)
    assert torch.equal(ours.features, theirs.x)
    assert torch.equal(ours.edge_index, theirs.edge_index)
    assert torch.equal(ours.labels, theirs.y)
    if kind == "Planetoid":
        masks = (theirs.train_mask, theirs.val_mask, theirs.test_mask)
        public = ours.public_split()
        for part, mask in zip((public.train, public.validation, public.test), masks, strict=True):
            assert torch.equal(part, mask.nonzero().flatten())
    else:
        assert ours.public is None


@pytest.mark.data
def test_packaged_cora_is_the_published_one() -> None:
    pytest.importorskip("torch_geometric")
    folder = data_folder() / "planetoid" / "Cora" / "raw"
    for suffix, digest in CORA_SHA256.items():
        assert hashlib.sha256((folder / f"ind.cora.{suffix}").read_bytes()).hexdigest() == digest
    raw, packaged = read_planetoid(folder, "Cora"), load_graph("cora", normalise=False)
    assert raw.public is not None
    assert packaged.public is not None
    for theirs, ours in (
        *zip(raw.public, vars(packaged.public).values(), strict=True),
        (raw.features, packaged.features),
        (raw.edge_index, packaged.edge_index),
        (raw.labels, packaged.labels),
    ):
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)


@pytest.mark.data
def test_isolated_nodes_are_kept() -> None:
    """CiteSeer has 48 nodes without edges, and 15 others without features, which Kipf & Welling's reader adds."""
    pytest.importorskip("torch_geometric")
    citeseer = load_graph("citeseer", download=False)
    degrees = citeseer.edge_index[0].bincount(minlength=citeseer.nodes)
    assert len(degrees) == 3327
    assert int((degrees == 0).sum()) == 48
    featureless = citeseer.features.sum(1) == 0
    assert int(featureless.sum()) == 15
    assert (degrees[featureless] > 0).all()


# --- node splits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [5, 11, 2995, 4230])
def test_node_splits_are_those_of_scikit_learn(nodes: int) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    folds = selection.KFold(5, shuffle=True, random_state=101).split(np.arange(nodes))
    for split, (rest, test) in enumerate(folds):
        train, validation = selection.train_test_split(rest, test_size=0.2, random_state=127 * split)
        ours = bare_graph(nodes).node_split(split)
        for part, theirs in ((ours.train, train), (ours.validation, validation), (ours.test, test)):
            assert part.tolist() == sorted(theirs.tolist())


@pytest.mark.data
@pytest.mark.parametrize("key", ["citeseer_full", "cora_ml", "pubmed_full", "amazon_photo", "github_musae"])
def test_node_splits_are_those_of_the_authors(key: str) -> None:
    with np.load(data_folder() / "forwardgnn_node_splits.npz", allow_pickle=False) as archive:
        published = archive[key]
    graph = bare_graph(published.shape[1])
    for split in range(5):
        ours = np.full(graph.nodes, 9)
        for part, indices in enumerate(vars(graph.node_split(split)).values()):
            ours[indices.numpy()] = part
        assert np.array_equal(ours, published[split])


def test_cora_mls_first_training_part() -> None:
    """2,995 nodes with 3,832 virtual edges, two for each training node, in a re-run of the official code."""
    assert len(bare_graph(2995).node_split(0).train) == 3832 // 2


def test_node_splits_are_disjoint_cover_and_have_the_right_size(cora: GraphDataset) -> None:
    tested: list[int] = []
    for split in range(5):
        found = cora.node_split(split)
        assert sum(map(len, parts(found))) == cora.nodes
        assert set.union(*parts(found)) == set(range(cora.nodes))
        for part, share in ((found.train, 0.64), (found.validation, 0.16), (found.test, 0.2)):
            assert abs(len(part) - share * cora.nodes) < 2  # it is rounded twice
            assert part.dtype == torch.int64
            assert (part.diff() > 0).all()
        again = cora.node_split(split)
        assert parts(again) == parts(found)
        tested += found.test.tolist()
    assert sorted(tested) == list(range(cora.nodes))


def test_node_splits_leave_the_generators_alone() -> None:
    np.random.seed(3)  # noqa: NPY002 -- the global generator is what must not be touched
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]  # noqa: NPY002
    bare_graph(50).node_split(1)
    bare_graph(50).random_split(1)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]  # noqa: NPY002


def test_random_splits() -> None:
    graph = bare_graph(1001)
    split = graph.random_split(7)
    assert list(map(len, parts(split))) == [601, 200, 200]
    assert set.union(*parts(split)) == set(range(1001))
    assert parts(graph.random_split(7)) == parts(split)
    assert parts(graph.random_split(8)) != parts(split)
    assert list(map(len, parts(graph.random_split(0, train=0.1, validation=0.3)))) == [100, 300, 601]


# --- edge splits -------------------------------------------------------------------------------------------


def undirected(pairs: torch.Tensor) -> list[tuple[int, int]]:
    return [(min(pair), max(pair)) for pair in pairs.t().tolist()]


@pytest.fixture(scope="module")
def edge_split(cora: GraphDataset) -> EdgeSplit:
    pytest.importorskip("torch_geometric")
    return cora.edge_split(1)


def test_edge_split_sizes(edge_split: EdgeSplit) -> None:
    """16 % and 20 % of 5,278 edges, rounded down; the rest is for training; as many negatives as edges."""
    for part, edges in ((edge_split.train, 3379), (edge_split.validation, 844), (edge_split.test, 1055)):
        assert part.pairs.shape == (2, 2 * edges)
        assert part.pairs.dtype == torch.int64
        assert part.labels.tolist() == [1] * edges + [0] * edges
        assert part.labels.dtype == torch.float32


def test_edge_split_keeps_held_out_edges_from_the_network(cora: GraphDataset, edge_split: EdgeSplit) -> None:
    positives = {
        name: undirected(part.pairs[:, part.labels == 1])
        for name, part in vars(edge_split).items()
        if not name.endswith("message_edges")
    }
    together = [edge for edges in positives.values() for edge in edges]
    assert len(together) == len(set(together))
    assert set(together) == set(undirected(cora.edge_index))
    seen = set(undirected(edge_split.message_edges))
    assert seen == set(positives["train"])
    assert seen.isdisjoint(positives["validation"] + positives["test"])
    assert set(undirected(edge_split.test_message_edges)) == seen | set(positives["validation"])
    for edges in (edge_split.message_edges, edge_split.test_message_edges):
        directed = set(map(tuple, edges.t().tolist()))
        assert len(directed) == edges.shape[1]
        assert directed == {(v, u) for u, v in directed}


def test_negatives_of_an_edge_split_are_no_edges(cora: GraphDataset, edge_split: EdgeSplit) -> None:
    known = set(undirected(cora.edge_index))
    negatives = [
        tuple(pair)
        for part in (edge_split.train, edge_split.validation, edge_split.test)
        for pair in part.pairs[:, part.labels == 0].t().tolist()
    ]
    assert len(negatives) == len(set(negatives)) == 5278
    for u, v in negatives:
        assert u != v
        assert (min(u, v), max(u, v)) not in known


@pytest.mark.parametrize("split", [0, 3])
def test_edge_splits_are_made_as_the_authors_make_them(cora: GraphDataset, split: int) -> None:
    geometric = pytest.importorskip("torch_geometric")
    transforms = pytest.importorskip("torch_geometric.transforms")
    geometric.seed_everything(101 * split)
    transform = transforms.RandomLinkSplit(is_undirected=True, num_val=0.16, num_test=0.2, neg_sampling_ratio=1.0)
    theirs = transform(geometric.data.Data(x=cora.features, edge_index=cora.edge_index, y=cora.labels))
    ours = cora.edge_split(split)
    for part, their_part in zip((ours.train, ours.validation, ours.test), theirs, strict=True):
        assert torch.equal(part.pairs, their_part.edge_label_index)
        assert torch.equal(part.labels, their_part.edge_label)
    assert torch.equal(ours.message_edges, theirs[0].edge_index)
    assert torch.equal(ours.message_edges, theirs[1].edge_index)
    assert torch.equal(ours.test_message_edges, theirs[2].edge_index)


def test_edge_splits_depend_on_no_generator_and_leave_them_as_they_were(
    cora: GraphDataset, edge_split: EdgeSplit
) -> None:
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    again = cora.edge_split(1)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(again.train.pairs, edge_split.train.pairs)
    assert torch.equal(again.test.pairs, edge_split.test.pairs)
    assert not torch.equal(cora.edge_split(2).test.pairs, edge_split.test.pairs)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"features": torch.ones(4)}, r"features must be floating point of shape \(n, F\)"),
        ({"features": torch.ones(4, 1, dtype=torch.int64)}, "features must be floating point"),
        ({"features": torch.full((4, 1), torch.nan)}, "NaN"),
        ({"features": torch.ones(0, 1), "labels": torch.ones(0, dtype=torch.int64)}, "no nodes"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be int64 of shape \(4,\)"),
        ({"labels": torch.zeros(4)}, "labels must be int64"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, r"labels span 0\.\.2, outside 0\.\.1"),
        ({"edge_index": torch.tensor([[0, 1]])}, r"edge_index must be int64 of shape \(2, E\)"),
        ({"edge_index": torch.tensor([[0.0], [1.0]])}, "edge_index must be int64"),
        ({"edge_index": torch.tensor([[0, 4], [4, 0]])}, r"edges span nodes 0\.\.4, outside 0\.\.3"),
        ({"edge_index": torch.tensor([[1], [1]])}, "self-loops"),
        ({"edge_index": torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])}, "an edge occurs twice"),
        ({"edge_index": torch.tensor([[0, 1, 1], [1, 0, 2]])}, "in one direction only"),
    ],
)
def test_graphs_that_are_none(changes: dict[str, torch.Tensor], problem: str) -> None:
    with pytest.raises(DataError, match=f"graph 'bare': .*{problem}"):
        bare_graph(4, [(0, 1)], **changes)


def test_splits_that_are_none() -> None:
    graph = path_graph(9)
    for make in (graph.node_split, graph.edge_split):
        for split in (-1, 5):
            with pytest.raises(UsageError, match=rf"there are the splits 0\.\.4, not {split}"):
                make(split)
    with pytest.raises(UsageError, match="no public split: use node_split or random_split"):
        graph.public_split()
    with pytest.raises(UsageError, match=r"below 1 together, not 0\.6 and 0\.4"):
        graph.random_split(0, validation=0.4)
    with pytest.raises(UsageError, match="must be 0 or more, not -1"):
        graph.random_split(-1)
    with pytest.raises(DataError, match="cannot make 5 folds of 4 nodes"):
        path_graph(4).node_split(0)
    with pytest.raises(DataError, match="at least 7 edges"):
        path_graph(7).edge_split(0)


def test_an_edge_split_of_a_graph_with_nearly_all_edges() -> None:
    pytest.importorskip("torch_geometric")
    complete = bare_graph(6, [(u, v) for u in range(6) for v in range(u)])
    nearly = bare_graph(6, [(u, v) for u in range(6) for v in range(u) if (u, v) != (5, 0)])
    for graph in (complete, nearly):
        with (
            pytest.warns(UserWarning, match="not enough negative edges"),
            pytest.raises(DataError, match="fewer pairs that are no edges than edges"),
        ):
            graph.edge_split(0)


def test_graphs_and_data_sets_are_not_confused() -> None:
    with pytest.raises(UsageError, match=r"'cora' is a graph: load it with bpfree\.data\.load_graph"):
        data.load("cora")
    with pytest.raises(UsageError, match=r"'digits' is no graph: load it with bpfree\.data\.load"):
        load_graph("digits")
    with pytest.raises(UsageError, match="unknown data set 'coraml2'; did you mean cora_ml"):
        load_graph("coraml2")


def test_the_command_line_knows_graphs(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "bpfree", *words], capture_output=True, text=True, check=True)
        return done.stdout

    rows = {row["name"]: row for row in json.loads(run("list", "datasets", "--format", "json"))["datasets"]}
    assert rows.keys() == set(data.names())
    assert (rows["cora"]["samples"], rows["cora"]["shape"]) == ("2708 nodes, 10556 edges", "1433")
    assert run("data", "path", "cora-ml", "--data", str(tmp_path)).strip() == str(
        tmp_path / "citation_full/cora_ml/raw"
    )
    states = json.loads(run("data", "verify", "cora", "--format", "json"))
    assert [(row["dataset"], row["state"]) for row in states] == [("cora", "ok")]


def test_a_graph_that_is_not_there(tmp_path: Path) -> None:
    for name in GRAPHS[1:]:
        with pytest.raises(DataError, match=f"{name!r} is not in .*; run `bpfree data fetch {name} --data "):
            load_graph(name, tmp_path, download=False)


# --- files -------------------------------------------------------------------------------------------------


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def citation_arrays(**changes: Any) -> dict[str, Any]:
    """Four nodes, edges 0 -> 1 and 1 -> 2 and a self-loop, as graph2gauss writes them; node 3 has nothing."""
    arrays = {
        "adj_data": np.array([2, 1, 1], np.float32),
        "adj_indices": np.array([1, 1, 2], np.int32),
        "adj_indptr": np.array([0, 1, 3, 3, 3], np.int32),
        "adj_shape": np.array([4, 4]),
        "attr_data": np.array([3, 1, 1], np.float32),
        "attr_indices": np.array([0, 1, 1], np.int32),
        "attr_indptr": np.array([0, 2, 3, 3, 3], np.int32),
        "attr_shape": np.array([4, 2]),
        "labels": np.array([0, 1, 1, 0]),
    }
    return {**arrays, **changes}


def github_arrays(**changes: Any) -> dict[str, Any]:
    arrays = {
        "features": np.array([[-1.0, 1.0], [0.0, 0.0], [2.0, 1.0], [3.0, 0.0]]),
        "target": np.array([0, 1, 1, 0]),
        "edges": np.array([[0, 1], [1, 0], [1, 2], [2, 1]]),
    }
    return {**arrays, **changes}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the graphs in one .npz have the sizes of the above."""
    for name in ("citeseer_full", "github"):
        info = replace(data.info(name), nodes=4, edges=4, features=2, classes=2)
        monkeypatch.setitem(DATASETS, name, info)


def put(root: Path, name: str, arrays: dict[str, Any]) -> Path:
    """Writes the only file of a graph."""
    layout = data.info(name).source
    file = layout.paths(root)[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)
    return file


@pytest.mark.usefixtures("tiny")
def test_a_citation_graph_is_made_undirected_and_binary(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    put(tmp_path, "citeseer_full", citation_arrays())
    graph = load_graph("citeseer_full", tmp_path, download=False, normalise=False)
    assert graph.features.tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.labels.tolist() == [0, 1, 1, 0]
    normalised = load_graph("citeseer_full", tmp_path, download=False).features
    assert normalised.tolist() == [[0.5, 0.5], [0, 1], [0, 0], [0, 0]]


@pytest.mark.usefixtures("tiny")
def test_github_is_read_without_torch_geometric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    put(tmp_path, "github", github_arrays())
    graph = load_graph("github", tmp_path, download=False)
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.labels.tolist() == [0, 1, 1, 0]
    shifted = torch.tensor([[0.0, 2.0], [1.0, 1.0], [3.0, 2.0], [4.0, 1.0]])
    torch.testing.assert_close(graph.features, shifted / shifted.sum(1, keepdim=True))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("values", ["negative", "small"])
def test_normalising_is_torch_geometrics(values: str, tmp_path: Path) -> None:
    transforms = pytest.importorskip("torch_geometric.transforms")
    geometric = pytest.importorskip("torch_geometric.data")
    features = torch.randn(4, 2) if values == "negative" else torch.rand(4, 2) / 100
    put(tmp_path, "github", github_arrays(features=features.numpy()))
    theirs = transforms.NormalizeFeatures()(geometric.Data(x=features.clone())).x
    assert torch.equal(load_graph("github", tmp_path, download=False).features, theirs)


@pytest.mark.parametrize("same_size", [True, False])
def test_nothing_is_unpickled_from_a_file_that_is_not_the_published_one(same_size: bool, tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    bomb = pickle.dumps(Bomb(mark))
    layout = data.info("citeseer").source
    for file, path in zip(layout.files, layout.paths(tmp_path), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert file.size is not None
        path.write_bytes(bomb.ljust(file.size, b".") if same_size else bomb)
    with pytest.raises(DataError) as caught:
        load_graph("citeseer", tmp_path, download=False)
    assert str(layout.paths(tmp_path)[0]) in str(caught.value)
    assert f"delete it and run `bpfree data fetch citeseer --data {tmp_path}`" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {state for _, state in data.verify("citeseer", tmp_path)} == {"corrupt"}
    assert not mark.exists()
    pickle.loads(layout.paths(tmp_path)[0].read_bytes())
    assert mark.exists()  # so that this test could fail


@pytest.mark.data
@pytest.mark.parametrize("suffix", ["x", "graph"])
def test_one_foreign_file_among_the_published_ones_is_enough(suffix: str, tmp_path: Path) -> None:
    layout = data.info("citeseer").source
    shutil.copytree(data_folder() / layout.folder, tmp_path / layout.folder)
    path = tmp_path / layout.folder / f"ind.citeseer.{suffix}"
    mark = tmp_path / "unpickled"
    path.write_bytes(pickle.dumps(Bomb(mark)).ljust(path.stat().st_size, b"."))
    with pytest.raises(DataError, match=rf"ind\.citeseer\.{suffix} is corrupt \(sha256 of the file is"):
        load_graph("citeseer", tmp_path, download=False)
    assert not mark.exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "array"), [("citeseer_full", "labels"), ("github", "features")])
def test_arrays_that_need_a_pickle_are_refused(name: str, array: str, tmp_path: Path) -> None:
    if name != "github":
        pytest.importorskip("torch_geometric")
    mark = tmp_path / "unpickled"
    arrays = {"citeseer_full": citation_arrays, "github": github_arrays}[name]
    file = put(tmp_path, name, arrays(**{array: np.array([Bomb(mark)], object)}))
    with pytest.raises(DataError, match=r"\.npz is corrupt \(Object arrays cannot be loaded"):
        load_graph(name, tmp_path, download=False)
    assert not mark.exists()
    with np.load(file, allow_pickle=True) as archive:
        _ = archive[array]
    assert mark.exists()  # so that this test could fail


@pytest.mark.usefixtures("tiny")
def test_a_pickle_in_the_place_of_an_npz_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    for name in ("citeseer_full", "github"):
        put(tmp_path, name, {}).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(DataError, match=rf"\.npz is corrupt .* `bpfree data fetch {name} "):
            load_graph(name, tmp_path, download=False)
    assert not mark.exists()


@pytest.mark.usefixtures("tiny")
def test_torch_geometrics_processed_files_are_not_opened(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    mark = tmp_path / "unpickled"
    raw = put(tmp_path, "citeseer_full", citation_arrays()).parent
    processed = raw.parent / "processed"
    processed.mkdir()
    for name in ("data.pt", "data_undirected.pt", "pre_transform.pt", "pre_filter.pt"):
        torch.save(Bomb(mark), processed / name)
    load_graph("citeseer_full", tmp_path, download=False)
    assert not mark.exists()
    assert sorted(path.name for path in raw.iterdir()) == ["citeseer.npz"]
    torch.load(processed / "data.pt", weights_only=False)
    assert mark.exists()  # so that this test could fail


@pytest.mark.usefixtures("tiny")
def test_a_damaged_npz_is_noticed(tmp_path: Path) -> None:
    file = put(tmp_path, "github", github_arrays())
    assert data.verify("github", tmp_path) == [(file, "ok")]
    content = bytearray(file.read_bytes())
    content[content.index(np.float64(3.0).tobytes()) + 7] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"CRC-32 of features\.npy is not the one recorded"):
        load_graph("github", tmp_path, download=False)
    assert data.verify("github", tmp_path) == [(file, "corrupt")]


@pytest.mark.usefixtures("tiny")
def test_another_graph_under_the_same_name_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "github", github_arrays(edges=np.array([[0, 1], [1, 0]])))
    with pytest.raises(DataError, match=r"holds \(4, 2, 2, 2\) \(nodes, features, edges, classes\), expected"):
        load_graph("github", tmp_path, download=False)
    put(tmp_path, "github", {"something": np.zeros(3)})
    with pytest.raises(DataError, match="features"):
        load_graph("github", tmp_path, download=False)


def test_a_defect_is_not_called_corruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> RawGraph:
        raise AttributeError("no such function in this version")

    info = data.info("cora")
    monkeypatch.setitem(DATASETS, "cora", replace(info, layouts=(Layout("", info.source.files, broken),)))
    with pytest.raises(AttributeError):
        load_graph("cora")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Hosts the tiny GitHub."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "hosted"
    folder.mkdir()
    np.savez(folder / "github.npz", **github_arrays())
    server = Server(folder)
    info = data.info("github")
    hosted = replace(info.source.files[0], urls=(server.url + "github.npz",))
    layout = Layout(info.source.folder, (hosted,), read_github)
    tiny = replace(info, nodes=4, edges=4, features=2, classes=2, layouts=(layout,))
    monkeypatch.setitem(DATASETS, "github", tiny)
    yield server
    server.close()


def test_files_without_a_published_sum_are_fetched_and_checked(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert load_graph("github", root).nodes == 4
    file = root / "github" / "raw" / "github.npz"
    load_graph("github", root)
    assert server.requests == ["/github.npz"]
    file.write_bytes(file.read_bytes()[:-9])
    data.fetch("github", root, progress=False)
    assert data.verify("github", root) == [(file, "ok")]
    assert server.requests == ["/github.npz"] * 2


def test_a_download_that_is_no_archive_is_not_kept(server: Server, tmp_path: Path) -> None:
    (server.folder / "github.npz").write_bytes(b"<html>sign in</html>")
    with pytest.raises(DataError, match=r"cannot download github\.npz .*not a zip file.* by hand"):
        data.fetch("github", tmp_path / "root", progress=False)
    assert not list((tmp_path / "root" / "github" / "raw").iterdir())


# --- without the extra -------------------------------------------------------------------------------------


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch_geometric", "torch_geometric.io", "torch_geometric.data", "torch_geometric.transforms"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.usefixtures("tiny", "without_extra")
def test_without_torch_geometric_one_line_says_what_to_install(tmp_path: Path, cora: GraphDataset) -> None:
    put(tmp_path, "citeseer_full", citation_arrays())
    for needing in (lambda: load_graph("citeseer_full", tmp_path, download=False), lambda: cora.edge_split(0)):
        with pytest.raises(UsageError, match=r'^torch_geometric.* is needed for this: pip install "bpfree\[graph\]"$'):
            needing()


@pytest.mark.usefixtures("tiny")
def test_without_scipy_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_geometric needs it to read files, but does not install it."""
    pytest.importorskip("torch_geometric")
    for module in ("scipy", "scipy.sparse"):
        monkeypatch.setitem(sys.modules, module, None)
    put(tmp_path, "citeseer_full", citation_arrays())
    with pytest.raises(UsageError, match=r'^scipy.* is needed for this: pip install "bpfree\[graph\]"$'):
        load_graph("citeseer_full", tmp_path, download=False)


@pytest.mark.usefixtures("without_extra")
def test_cora_and_its_node_splits_need_no_extra(tmp_path: Path) -> None:
    graph = load_graph("cora", tmp_path, download=False)
    assert len(graph.node_split(4).test) == 541
    assert not list(tmp_path.iterdir())
