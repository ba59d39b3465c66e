"""Graph convolutions against PyTorch Geometric's own forward passes and a graph worked out by hand."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.networks import Edges, Graph, GraphBlock, build_network, gnn
from bpfree.networks.gnn import SeparableBlock
from bpfree.networks.graph import SparseMatrix

geometric = pytest.importorskip("torch_geometric.nn")

# node 3 has a self-loop, node 4 no edge at all, and the edge 0 -> 1 is there twice
AWKWARD = torch.tensor([[0, 1, 0, 1, 2, 3, 3, 2], [1, 0, 1, 2, 1, 3, 2, 3]])


def random_graph(nodes: int, features: int, edges: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Graph:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(nodes, (2, edges), generator=generator)
    x = torch.randn(nodes, features, generator=generator, dtype=dtype)
    return Graph.of(x, torch.cat([half, half.flip(0)], 1), torch.arange(nodes))


def block(kind: str, features: int, width: int, dtype: torch.dtype = torch.float64) -> GraphBlock:
    torch.manual_seed(1)
    (made,) = gnn(kind, (features,), (width,)).to(dtype)
    assert isinstance(made, GraphBlock)
    with torch.no_grad():
        for parameter in made.parameters():  # biases are zero at first, which would hide them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def in_geometric(made: GraphBlock, graph: Graph, index: Tensor) -> Tensor:
    """What PyTorch Geometric's convolution, with its own handling of self-loops, makes of the graph."""
    conv = made.conv
    if isinstance(conv, geometric.GATConv):
        theirs = geometric.GATConv(conv.in_channels, conv.out_channels, heads=conv.heads).to(graph.x.dtype)
        theirs.load_state_dict(conv.state_dict())
        conv = theirs
    return torch.relu(conv(graph.x, index))


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat"])
@pytest.mark.parametrize("awkward", [False, True], ids=["random", "awkward"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_blocks_equal_geometrics_convolutions(kind: str, awkward: bool, dtype: torch.dtype, tolerance: float) -> None:
    graph = random_graph(60, 7, 200, dtype=dtype)
    if awkward:
        graph = Graph.of(graph.x[:5], AWKWARD, torch.arange(5))
    made = block(kind, 7, 8, dtype)
    assert graph.edges is not None
    expected = in_geometric(made, graph, graph.edges.index)
    ours = made(graph).x
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(out.square().sum(), list(made.conv.parameters())) for out in (ours,)]
    again = torch.autograd.grad(in_sum(made, graph), list(made.conv.parameters()))
    for a, b in zip(grads[0], again, strict=True):
        torch.testing.assert_close(a, b, rtol=100 * tolerance, atol=100 * tolerance)


def in_sum(made: GraphBlock, graph: Graph) -> Tensor:
    """The same loss through PyTorch Geometric, on the block's own parameters."""
    assert graph.edges is not None
    conv = made.conv
    index = graph.edges.looped if isinstance(conv, geometric.GATConv) else graph.edges.index
    loss: Tensor = torch.relu(conv(graph.x, index)).square().sum()
    return loss


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_transform_of_aggregate_is_the_convolution(kind: str) -> None:
    graph = random_graph(60, 7, 200)
    made = block(kind, 7, 8)
    assert isinstance(made, SeparableBlock)
    assert graph.edges is not None
    sums = made.aggregate(graph.x, graph.edges)
    kept = Graph(sums, None, graph.nodes, graph.known, graph.labels)
    torch.testing.assert_close(made(kept).x, made(graph).x, rtol=1e-12, atol=1e-12)


def test_normalized_adjacency_by_hand() -> None:
    """A path 0 - 1 - 2: degrees with self-loops 2, 3, 2."""
    edges = Edges(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), 3, torch.float64)
    a, b = 1 / 2, 1 / np.sqrt(6)
    expected = torch.tensor([[a, b, 0], [b, 1 / 3, b], [0, b, a]])
    torch.testing.assert_close(edges.normalized @ torch.eye(3, dtype=torch.float64), expected.double())
    mean = torch.tensor([[0, 1, 0], [0.5, 0, 0.5], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(edges.mean @ torch.eye(3, dtype=torch.float64), mean)


@pytest.mark.parametrize("longest", [None, 1, 7, 1000])
def test_sparse_products_and_their_gradients_equal_dense_ones(
    longest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether long rows are added up whole, as on CPUs, or in parts, as on GPUs."""
    monkeypatch.setattr("bpfree.networks.graph._longest_bag", lambda device: longest)
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randint(9, (2, 500), generator=generator)  # long rows, empty ones, repeated entries
    values = torch.randn(500, generator=generator, dtype=torch.float64)
    dense = torch.zeros(12, 9, dtype=torch.float64).index_put((rows, columns), values, accumulate=True)
    sparse = SparseMatrix(rows, columns, values, (12, 9))
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(sparse @ x, dense @ x)
    assert torch.autograd.gradcheck(lambda x: sparse @ x, (x,))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gcn", "sage", "gat"])
def test_blocks_on_a_gpu_equal_those_on_the_cpu(kind: str) -> None:
    """With a hub, whose row is added up in parts."""
    graph = random_graph(300, 7, 500)
    assert graph.edges is not None
    hub = torch.stack([torch.arange(300), torch.zeros(300, dtype=torch.int64)])
    graph = Graph(graph.x, graph.edges.extended(torch.cat([hub, hub.flip(0)], 1), 300), *([graph.nodes] * 3))
    made = block(kind, 7, 8)
    expected = made(graph).x
    torch.testing.assert_close(made.cuda()(graph.to("cuda")).x.cpu(), expected, rtol=1e-10, atol=1e-10)


def test_union_keeps_graphs_apart() -> None:
    first, second = random_graph(9, 3, 12), random_graph(7, 3, 9, seed=1)
    made = block("gcn", 3, 4)
    assert first.edges is not None
    assert second.edges is not None
    edges = Edges.union([first.edges, second.edges])
    both = made(Graph(torch.cat([first.x, second.x]), edges, first.nodes, first.known, first.labels)).x
    torch.testing.assert_close(both, torch.cat([made(first).x, made(second).x]))


def test_gradients_of_pairs_add_up_in_a_fixed_order() -> None:
    """Every node is in many pairs, and two threads add them up; with `x[nodes]` the bits differ each time."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(500, (2, 8000), generator=generator)
    x = torch.randn(500, 64, generator=generator, requires_grad=True)
    graph = Graph.of(x, pairs[:, :1], pairs)
    weights = torch.randn(8000, 64, generator=generator)

    def gradient() -> Tensor:
        first, second = graph.ends
        assert torch.equal(first, x[pairs[0]])
        assert torch.equal(second, x[pairs[1]])
        return torch.autograd.grad((first * weights + second).sum(), x)[0]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = gradient()
        assert all(torch.equal(expected, gradient()) for _ in range(10))
    finally:
        torch.set_num_threads(threads)


def test_networks_by_name() -> None:
    network = build_network("gcn:3x16", (5,))
    assert [(block.in_features, block.width) for block in network] == [(5, 16), (16, 16), (16, 16)]
    assert [block.width for block in build_network("gat", (5,))] == [128, 128]
    assert [block.width for block in build_network("sage:64x32", (5,))] == [64, 32]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("gcn:2x8", (3, 8, 8), "feature vectors"), ("gat:1x6", (5,), "multiple of 4"), ("gcm:2x8", (5,), "mean gcn")],
)
def test_networks_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_network(name, shape)


def test_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("torch_geometric"):
            raise ImportError("No module named 'torch_geometric'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"pip install 'bpfree\[graph\]'"):
        build_network("gcn:1x8", (5,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, "features must be"),
        ({"x": torch.zeros(4, 2, dtype=torch.int64)}, "features must be"),
        ({"nodes": torch.zeros(3, 2, dtype=torch.int64)}, "nodes must be"),
        ({"known": torch.zeros(2, dtype=torch.int64)}, "known nodes and labels"),
        ({"nodes": torch.zeros(2)}, "int64"),
    ],
)
def test_malformed_graphs_are_refused(change: dict[str, Tensor], message: str) -> None:
    good: dict[str, Any] = {"x": torch.zeros(4, 2), "edge_index": AWKWARD[:, :2], "nodes": torch.arange(3)}
    Graph.of(**good)
    with pytest.raises(UsageError, match=message):
        Graph.of(
            **{
                "known": torch.empty(0, dtype=torch.int64),
                "labels": torch.empty(0, dtype=torch.int64),
                **good,
                **change,
            }
        )
    with pytest.raises(UsageError, match="edges must be"):
        Graph.of(torch.zeros(4, 2), AWKWARD.float(), torch.arange(3))
