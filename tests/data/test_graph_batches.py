"""A graph served whole."""

from __future__ import annotations

import pytest
import torch

from bpfree.data.graph_batches import GraphBatches
from bpfree.errors import DataError
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
