"""Train ForwardGNN on parts of a graph at a time, for graphs that do not fit the device.

Every part is a graph of its own, with virtual nodes for its training nodes; the layers are shared. Random parts need
PyTorch Geometric alone. Where `pyg-lib` is installed, `NeighborLoader(whole, [10, 10], input_nodes=whole.train_mask)`
can take the place of `RandomNodeLoader`; its first `part.batch_size` nodes are then the ones to ask about.

python examples/large_graph.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import bpfree


def main(parts: int = 4, epochs: int = 30) -> float:
    """Train on the packaged Cora, a quarter at a time; returns the test accuracy, from 0 to 1."""
    from torch_geometric.data import Data
    from torch_geometric.loader import RandomNodeLoader

    torch.manual_seed(0)
    cora = bpfree.data.load_graph("cora")
    split = cora.node_split(0)
    train_mask = torch.zeros(cora.nodes, dtype=torch.bool)
    train_mask[split.train] = True
    whole = Data(x=cora.features, edge_index=cora.edge_index, y=cora.labels, train_mask=train_mask)
    loader = RandomNodeLoader(whole, num_parts=parts, shuffle=True)

    def batch(part: Data) -> tuple[bpfree.Graph, Tensor]:
        train = part.train_mask.nonzero()[:, 0]
        return bpfree.Graph.of(part.x, part.edge_index, train, known=train, labels=part.y[train]), part.y[train]

    learner = bpfree.ForwardGNN(bpfree.build_network("gcn:2x64", (whole.num_features,)), cora.classes, lr=1e-2)
    for stage in learner.stages():
        for _ in range(epochs):
            for part in loader:
                graph, y = batch(part)
                stage.step((stage.prepared(graph), y))  # nothing is kept: every part is new

    known = {"known": split.train, "labels": cora.labels[split.train]}
    question = bpfree.Graph.of(cora.features, cora.edge_index, split.test, **known)
    accuracy = (learner.scores(question).argmax(1) == cora.labels[split.test]).float().mean()
    print(f"test accuracy {100 * accuracy:.2f} %")
    return accuracy.item()


if __name__ == "__main__":
    main()
