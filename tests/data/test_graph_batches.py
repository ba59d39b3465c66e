"""A graph served whole, and in parts."""

from __future__ import annotations

import pytest
import torch

from bpfree.data.graph_batches import GraphBatches, GraphParts
from bpfree.errors import DataError, UsageError
from bpfree.networks import Graph


def graph(nodes: torch.Tensor) -> Graph:
    return Graph.of(torch.arange(8.0)[:, None], torch.tensor([[0, 1], [1, 0]]), nodes)


def test_every_step_and_the_evaluation_meet_the_whole_question() -> None:
    part = GraphBatches(graph(torch.tensor([1, 5, 6])), torch.tensor([0, 1, 1]), steps=4)
    assert (len(part), part.steps_per_epoch(128), part.step_size(128)) == (3, 4, 3)
    staged = part.stage(4, 128)
    staged.fill(part.draw(0, 0, 0), 0, 4)
    assert staged[0] == staged[3]
    ((seen, targets),) = part.in_order(2)
    assert seen.answers[:, 0].tolist() == [1, 5, 6]
    assert targets is part.targets


def test_mapped_batches_ask_the_same() -> None:
    part = GraphBatches(graph(torch.tensor([1, 5])), torch.tensor([0, 1]), steps=3)
    mapped = part.map(lambda g: g.with_x(2 * g.x), 10)
    assert mapped.graph.answers[:, 0].tolist() == [2, 10]
    assert (mapped.steps, mapped.targets.tolist()) == (3, [0, 1])


def test_hits() -> None:
    scores = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 1.0]])
    nodes = GraphBatches(graph(torch.arange(3)), torch.tensor([1, 1, 1]))
    assert (nodes.metric, nodes.hits(scores, nodes.targets).item()) == ("accuracy", 2)
    pairs = GraphBatches(graph(torch.zeros(2, 3, dtype=torch.int64)), torch.tensor([1, 0, 0]))
    assert (pairs.metric, pairs.hits(scores, pairs.targets).item()) == ("ROC-AUC", 3)


@pytest.mark.parametrize("targets", [torch.zeros(2, dtype=torch.int64), torch.zeros(3)])
def test_targets_that_do_not_fit(targets: torch.Tensor) -> None:
    with pytest.raises(DataError, match="asks about 3 nodes"):
        GraphBatches(graph(torch.arange(3)), targets)


NODES = 30


def cut(parts: int = 4) -> GraphParts:
    """A random graph whose nodes' first feature is their number; asks about 10 nodes, and knows another 9."""
    pytest.importorskip("torch_geometric")
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(NODES, (2, 200), generator=generator)
    x = torch.arange(float(NODES))[:, None]
    known = torch.arange(10, 19)
    whole = Graph.of(x, edges, torch.arange(0, 30, 3), known=known, labels=known % 2)
    return GraphParts(whole, torch.arange(10) % 3, parts=parts, device=torch.device("cpu"), steps=2)


def test_parts_cover_the_question_once_with_the_edges_inside_them() -> None:
    batches = cut()
    whole = batches.graph
    draw = batches.draw(1, 2)
    for first in (0, 4):  # the two passes of an epoch
        found = [batches.part(draw, first + step) for step in range(4)]
        assert sorted(int(v) for part, _ in found for v in part.x[:, 0]) == list(range(NODES))
        for part, targets in found:
            number = part.x[:, 0].long()
            asked = number[part.nodes]
            assert torch.equal(targets, batches.targets[asked // 3])
            assert set(asked.tolist()) == set(whole.nodes.tolist()) & set(number.tolist())
            known = number[part.known]
            assert set(known.tolist()) == set(whole.known.tolist()) & set(number.tolist())
            assert torch.equal(part.labels, known % 2)
            inside = [p for p in whole.edges.index.T.tolist() if set(p) <= set(number.tolist())]
            assert sorted(number[part.edges.index].T.tolist()) == sorted(inside)
            assert 2 <= len(asked) <= 3  # of 10 in 4 parts
            assert len(known) >= 1


def test_parts_are_new_in_each_pass_and_epoch_but_the_same_for_the_same_seed_and_in_evaluation() -> None:
    batches = cut()

    def numbers(part: Graph) -> list[float]:
        return part.x[:, 0].tolist()

    draw = batches.draw(5)
    first = numbers(batches.part(draw, 0)[0])
    assert numbers(batches.part(batches.draw(5), 0)[0]) == first
    assert numbers(batches.part(draw, 4)[0]) != first
    assert numbers(batches.part(batches.draw(6), 0)[0]) != first
    once, again = ([numbers(part) for part, _ in batches.in_order(1)] for _ in range(2))
    assert once == again
    staged = batches.stage(8, 1)
    staged.fill(draw, 3, 2)
    assert numbers(staged[1][0]) == numbers(batches.part(draw, 4)[0])
    assert batches.steps_per_epoch(128) == 8


def test_one_part_is_the_whole_graph() -> None:
    batches = cut(1)
    ((part, targets),) = batches.in_order(1)
    assert torch.equal(part.x, batches.graph.x)
    assert torch.equal(part.nodes, batches.graph.nodes)
    assert torch.equal(targets, batches.targets)
    assert sorted(part.edges.index.T.tolist()) == sorted(batches.graph.edges.index.T.tolist())


def test_a_map_of_parts_is_made_anew_for_each() -> None:
    batches = cut()
    mapped = batches.map(lambda part: part.with_x(2 * part.x), 1).map(lambda part: part.with_x(part.x + 1), 1)
    for (part, targets), (before, expected) in zip(mapped.in_order(1), batches.in_order(1), strict=True):
        assert torch.equal(part.x, 2 * before.x + 1)
        assert torch.equal(targets, expected)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 9"):
        cut(10)
    pairs = graph(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(UsageError, match="pairs"):
        GraphParts(pairs, torch.tensor([1, 0, 0]), parts=1, device=torch.device("cpu"))
