"""What a run on a graph is: its split, what each part sees, and which settings have no meaning there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bpfree.algorithms import Learner
from bpfree.data.graph_batches import GraphBatches, GraphParts
from bpfree.data.graphs import FOLDS, GraphDataset
from bpfree.errors import UsageError
from bpfree.experiments.train import TrainingConfig
from bpfree.networks.graph import Graph

LINK_CLASSES = 2


def task_classes(dataset: GraphDataset, training: TrainingConfig) -> int:
    """Classes of the task that the split sets: those of the nodes, or edge and no edge."""
    return LINK_CLASSES if training.split == "edges" else dataset.classes


def own_split(public: bool) -> str:
    """The split of a graph when none is asked for: the published one, if there is one."""
    return "public" if public else "folds"


def check_rates_pairs(learner: Learner) -> None:
    """Ask a learner about one pair of two nodes, so that one without a read-out for links says so before it trains.

    Raises:
        UsageError: it rates single nodes only.
    """
    both_ways = torch.tensor([[0, 1], [1, 0]])
    learner.scores(Graph.of(torch.zeros(2, *learner.input_shape), both_ways, both_ways[:, :1]))


def graph_parts(
    dataset: GraphDataset, training: TrainingConfig, seed: int, device: torch.device
) -> tuple[GraphBatches, GraphBatches, GraphBatches]:
    """Training, validation and test part of a graph on the device.

    All three see the whole graph, or random parts of it (`graph_parts`), and know the labels of the training nodes;
    none holds a label of another node, except in the targets that scores are compared with. Link prediction knows no
    labels; messages go along the training edges, and at test along the validation edges too, as ForwardGNN has it.

    Raises:
        UsageError: a setting that has no meaning for a graph, or a split that the graph does not have.
    """
    _refuse(training)
    place = device if training.graph_parts == 1 else torch.device("cpu")
    x, labels = dataset.features.to(place), dataset.labels.to(place)

    def serve(graph: Graph, targets: Tensor) -> GraphBatches:
        steps = training.validate_every
        if training.graph_parts == 1:
            return GraphBatches(graph, targets, steps=steps)
        return GraphParts(graph, targets, parts=training.graph_parts, device=device, steps=steps)

    if training.split == "edges":
        split = dataset.edge_split(seed % FOLDS)
        messages = (split.message_edges, split.message_edges, split.test_message_edges)
        parts = (split.train, split.validation, split.test)
        train, validation, test = (
            serve(Graph.of(x, edges.to(place), part.pairs.to(place)), part.labels.long())
            for edges, part in zip(messages, parts, strict=True)
        )
        return train, validation, test
    name = training.split or own_split(dataset.public is not None)
    nodes = (
        dataset.public_split()
        if name == "public"
        else dataset.random_split(seed)
        if name == "random"
        else dataset.node_split(seed % FOLDS)
    )
    train_nodes, validation_nodes, test_nodes = (part.to(place) for part in (nodes.train, nodes.validation, nodes.test))
    edge_index = dataset.edge_index.to(place)
    known = {"known": train_nodes, "labels": labels[train_nodes]}
    if training.reveal_validation:
        revealed = torch.cat([train_nodes, validation_nodes])
        tested = Graph.of(x, edge_index, test_nodes, known=revealed, labels=labels[revealed])
    else:
        tested = Graph.of(x, edge_index, test_nodes, **known)
    return (
        serve(Graph.of(x, edge_index, train_nodes, **known), labels[train_nodes]),
        serve(Graph.of(x, edge_index, validation_nodes, **known), labels[validation_nodes]),
        serve(tested, labels[test_nodes]),
    )


def revealed_test(
    dataset: GraphDataset, training: TrainingConfig, seed: int, device: torch.device
) -> GraphBatches | None:
    """The test part of a graph that shows the labels of validation nodes too, as ForwardGNN's authors have it.

    None where there are no such labels to show (links), or where `graph_parts` shows them already.
    """
    if training.split == "edges" or training.reveal_validation:
        return None
    return graph_parts(dataset, replace(training, reveal_validation=True), seed, device)[2]


def _refuse(training: TrainingConfig) -> None:
    """Settings of samples in batches: a graph is one batch, with a validation part of its split."""
    for name in ("batch_size", "augmentation", "standardize", "mean", "std", "validation", "cache"):
        if getattr(training, name) != getattr(TrainingConfig, name):
            raise UsageError(f"a graph is trained whole, with the parts of its split; leave out {name}")


def refuse_graph_settings(training: TrainingConfig) -> None:
    """Settings of graphs, on a data set that is none.

    Raises:
        UsageError: one of them is set.
    """
    for name in ("split", "validate_every", "graph_parts", "reveal_validation"):
        if getattr(training, name) != getattr(TrainingConfig, name):
            raise UsageError(f"{name} is a setting for graphs, and this data set is none; leave it out")
