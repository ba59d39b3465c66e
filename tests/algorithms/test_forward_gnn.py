"""ForwardGNN: every variant against its NumPy reference, and the rest of the specification's list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bpfree.algorithms import ForwardGNN
from bpfree.algorithms._graph_labels import AppendedLabels, VirtualNodes, VirtualViews, edges_of, positive_and_negatives
from bpfree.algorithms._graph_schedules import LayerByLayer, normalized, wanted_rows
from bpfree.data.graph_batches import GraphBatches
from bpfree.errors import UsageError
from bpfree.experiments import Trainer, TrainingConfig
from bpfree.networks import Edges, Graph, GraphBlock, gnn
from tests.reference import forward_gnn as reference

pytest.importorskip("torch_geometric")

LR = 0.5
CLASSES, FEATURES, NODES = 3, 6, 25
TRAIN, ASKED = np.arange(12), np.arange(12, 20)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def toy(nodes: np.ndarray = TRAIN, seed: int = 0) -> tuple[Graph, np.ndarray, np.ndarray, np.ndarray]:
    """A graph with a self-loop and isolated nodes; its adjacency, features and labels in NumPy."""
    draw = np.random.default_rng(seed)
    half = draw.integers(NODES - 2, size=(2, 40))
    half = np.unique(half[:, half[0] < half[1]], axis=1)
    edges = np.hstack([half, half[::-1], [[3], [3]]])
    X, y = draw.normal(size=(NODES, FEATURES)), draw.integers(CLASSES, size=NODES)
    known = torch.as_tensor(TRAIN)
    graph = Graph.of(
        torch.as_tensor(X), torch.as_tensor(edges), torch.as_tensor(nodes), known, torch.as_tensor(y)[known]
    )
    return graph, reference.adjacency(edges, NODES), X, y


def build(variant: str, depth: int = 2, width: int = 8, kind: str = "gcn", **options: Any) -> ForwardGNN:
    torch.manual_seed(3)
    classes = 2 if variant.startswith("link") else CLASSES
    network = gnn(kind, (FEATURES,), (width,) * depth)
    learner = ForwardGNN(network, classes, variant=variant, **{"optimizer": sgd, **options}).double()
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.1, 0.1, len(parameter)))
    return learner


def weights(learner: ForwardGNN) -> tuple[list[np.ndarray], list[np.ndarray]]:
    blocks = [block for block in learner.blocks() if isinstance(block, GraphBlock)]
    return (
        [block.conv.lin.weight.detach().numpy().T.copy() for block in blocks],
        [block.conv.bias.detach().numpy().copy() for block in blocks],
    )


def assert_same(learner: ForwardGNN, expected: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    for ours, theirs in zip(weights(learner), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def greedy(learner: ForwardGNN, graph: Graph, targets: Tensor, steps: int = 1) -> list[float]:
    losses = []
    for index, stage in enumerate(learner.stages()):
        inputs = stage.prepared(graph)
        losses += [stage.step((inputs, targets))[f"layer {index} loss"].item() for _ in range(steps)]
    return losses


def in_time(learner: ForwardGNN, graph: Graph, targets: Tensor, steps: int) -> list[list[float]]:
    (stage,) = learner.stages()
    inputs = stage.prepared(graph)
    return [[value.item() for value in stage.step((inputs, targets)).values()] for _ in range(steps)]


def log_mean(evidence: np.ndarray) -> np.ndarray:
    return np.log(evidence / evidence.sum(axis=1, keepdims=True))


def virtual(learner: ForwardGNN) -> np.ndarray:
    assert isinstance(learner._labelling, VirtualNodes)
    return learner._labelling.features.double().numpy()


# 1. every variant against the reference


@pytest.mark.parametrize(("tau", "both"), [(1.0, True), (0.7, True), (1.0, False)])
def test_sf_is_the_reference(tau: float, both: bool) -> None:
    graph, A, X, y = toy()
    learner = build("sf", 3, tau=tau, bidirectional=both)
    W, b = weights(learner)
    V = virtual(learner)
    losses = greedy(learner, graph, torch.as_tensor(y[TRAIN]), steps=3)
    expected = reference.sf(A, X, V, TRAIN, y[TRAIN], W, b, tau=tau, lr=LR, steps=3, both=both)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert_same(learner, (W, b))
    evidence = reference.sf_evidence(A, X, V, TRAIN, y[TRAIN], W, b, ASKED, tau=tau, both=both)
    scores = learner.scores(graph.asking(torch.as_tensor(ASKED)))
    np.testing.assert_allclose(scores.numpy(), log_mean(evidence), rtol=1e-9)
    stage = learner.stages()[-1]  # validation of the last stage rates the same sum
    assert stage.prefix is not None
    with torch.no_grad():
        rated = stage.scores(stage.prefix(graph.asking(torch.as_tensor(ASKED))))
    torch.testing.assert_close(rated, scores, rtol=1e-12, atol=1e-12)


def test_reference_gradient_of_sf_is_that_of_finite_differences() -> None:
    _, A, X, y = toy()
    draw = np.random.default_rng(1)
    V, W, b = draw.normal(size=(CLASSES, FEATURES)), draw.normal(size=(FEATURES, 5)), draw.normal(size=5)
    tied, extended = reference.tie(A, X, V, TRAIN, y[TRAIN])

    def loss(W: np.ndarray, b: np.ndarray) -> float:
        H = reference.forward(tied, reference.norm(extended), W, b)
        return reference.prototypes(H, TRAIN, CLASSES, y[TRAIN], 1.3)[0]

    H = reference.forward(tied, reference.norm(extended), W, b)
    _, dH = reference.prototypes(H, TRAIN, CLASSES, y[TRAIN], 1.3)
    dW, db = reference.gradients(tied, reference.norm(extended), W, b, dH)
    for index in np.ndindex(W.shape):
        nudge = np.zeros_like(W)
        nudge[index] = 1e-6
        assert (loss(W + nudge, b) - loss(W - nudge, b)) / 2e-6 == pytest.approx(dW[index], rel=1e-5, abs=1e-8)
    for index in range(len(b)):
        nudge = np.zeros_like(b)
        nudge[index] = 1e-6
        assert (loss(W, b + nudge) - loss(W, b - nudge)) / 2e-6 == pytest.approx(db[index], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("loss", ["ff", "symba"])
def test_ff_la_is_the_reference(loss: str) -> None:
    graph, A, X, y = toy()
    learner = build("ff-la", loss=loss, theta=1.5)
    W, b = weights(learner)
    assert isinstance(learner._labelling, AppendedLabels)
    views = positive_and_negatives(graph.labels, CLASSES, int(learner._labelling.seed)).numpy()

    def appended(nodes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        e = np.full((NODES, CLASSES), 1 / CLASSES)
        e[TRAIN] = np.eye(CLASSES)[y[TRAIN]]
        e[nodes] = np.eye(CLASSES)[labels]
        return np.hstack([X, e])

    inputs = [appended(TRAIN, row) for row in views]
    options: dict[str, Any] = {"theta": 1.5, "symba": loss == "symba", "lr": LR, "shared": False}
    expected = reference.ff([A] * CLASSES, inputs, TRAIN, W, b, **options)
    np.testing.assert_allclose(greedy(learner, graph, graph.labels), expected, rtol=1e-9)
    assert_same(learner, (W, b))
    candidates = [appended(ASKED, np.full(len(ASKED), c)) for c in range(CLASSES)]
    evidence = reference.ff_evidence([A] * CLASSES, candidates, ASKED, W, b, theta=1.5)
    np.testing.assert_allclose(learner.scores(graph.asking(torch.as_tensor(ASKED))).numpy(), evidence, rtol=1e-9)


@pytest.mark.parametrize("loss", ["ff", "symba"])
def test_ff_vn_is_the_reference(loss: str) -> None:
    graph, A, X, y = toy()
    learner = build("ff-vn", loss=loss)
    W, b = weights(learner)
    V = virtual(learner)
    assert isinstance(learner._labelling, VirtualViews)
    views = positive_and_negatives(graph.labels, CLASSES, int(learner._labelling.seed)).numpy()
    graphs, inputs = zip(*(reference.tie(A, X, V, TRAIN, row) for row in views), strict=True)
    options: dict[str, Any] = {"theta": 2.0, "symba": loss == "symba", "lr": LR, "shared": True}
    expected = reference.ff(graphs, inputs, TRAIN, W, b, **options)
    np.testing.assert_allclose(greedy(learner, graph, graph.labels), expected, rtol=1e-9)
    assert_same(learner, (W, b))
    nodes = np.concatenate([TRAIN, ASKED])
    asked = [np.concatenate([y[TRAIN], np.full(len(ASKED), c)]) for c in range(CLASSES)]
    graphs, inputs = zip(*(reference.tie(A, X, V, nodes, labels) for labels in asked), strict=True)
    evidence = reference.ff_evidence(graphs, inputs, ASKED, W, b, theta=2.0)
    np.testing.assert_allclose(learner.scores(graph.asking(torch.as_tensor(ASKED))).numpy(), evidence, rtol=1e-9)


def test_negatives_are_every_wrong_class_once() -> None:
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
    views = positive_and_negatives(labels, 5, seed=7)
    assert torch.equal(views[0], labels)
    assert torch.equal(views.sort(0).values, torch.arange(5)[:, None].expand(5, 200))
    assert len({tuple(column) for column in views[:, labels == 0].T.tolist()}) > 10  # in an order of each node's own
    assert torch.equal(views, positive_and_negatives(labels, 5, seed=7))


@pytest.mark.parametrize("variant", ["link-ce", "link-ff"])
def test_links_are_the_reference(variant: str) -> None:
    graph, A, X, _ = toy()
    draw = np.random.default_rng(2)
    pairs, t = draw.integers(NODES, size=(2, 30)), draw.integers(2, size=30)
    learner = build(variant)
    W, b = weights(learner)
    losses = greedy(learner, graph.asking(torch.as_tensor(pairs)), torch.as_tensor(t))
    theta = 2.0 if variant == "link-ff" else None
    np.testing.assert_allclose(losses, reference.links(A, X, pairs, t, W, b, lr=LR, theta=theta), rtol=1e-9)
    assert_same(learner, (W, b))
    probability, H = 0, X
    for layer in range(2):
        H = reference.forward(A, reference.norm(H), W[layer], b[layer])
        e = H[pairs[0]] * H[pairs[1]]
        probability = probability + reference.sigmoid(e.sum(1) if theta is None else (e**2).sum(1) - theta)
    scores = learner.scores(graph.asking(torch.as_tensor(pairs)))
    np.testing.assert_allclose(scores.softmax(1)[:, 1].numpy(), probability / 2, rtol=1e-9)


def test_top_to_input_is_the_reference() -> None:
    graph, A, X, y = toy()
    learner = build("sf-t2i", 3)
    W, b = weights(learner)
    assert [len(w) for w in W] == [FEATURES + 8, 8 + 8, 8 + CLASSES]
    theirs = reference.TopToInput(A, X, virtual(learner), TRAIN, y[TRAIN], W, b, tau=1.0)
    expected = [theirs.step(LR) for _ in range(3)]
    np.testing.assert_allclose(in_time(learner, graph, graph.labels, 3), expected, rtol=1e-9)
    assert_same(learner, (W, b))
    scores = learner.scores(graph.asking(torch.as_tensor(ASKED)))
    np.testing.assert_allclose(scores.numpy(), log_mean(theirs.evidence(ASKED)), rtol=1e-9)


@pytest.mark.parametrize(("tau", "raw"), [(1.0, False), (1.0, True), (0.01, False)], ids=["usual", "raw", "clipped"])
def test_top_to_loss_is_the_reference(tau: float, raw: bool) -> None:
    graph, A, X, y = toy()
    learner = build("sf-t2l", 3, tau=tau, bottom_up="raw" if raw else "normalized")
    W, b = weights(learner)
    theirs = reference.TopToLoss(A, X, virtual(learner), TRAIN, y[TRAIN], W, b, tau=tau, raw=raw)
    expected = [theirs.step(LR) for _ in range(3)]
    np.testing.assert_allclose(in_time(learner, graph, graph.labels, 3), expected, rtol=1e-9)
    assert_same(learner, (W, b))
    scores = learner.scores(graph.asking(torch.as_tensor(ASKED)))
    np.testing.assert_allclose(scores.numpy(), log_mean(theirs.evidence(ASKED)), rtol=1e-8)


def test_top_to_input_for_links_has_no_labels_on_top() -> None:
    learner = build("link-t2i", 3)
    assert [len(w) for w in weights(learner)[0]] == [FEATURES + 8, 8 + 8, 8]


@pytest.mark.parametrize("kind", ["sage", "gat"])
def test_other_convolutions_learn_the_same_loss(kind: str) -> None:
    """One SF step of a layer against autograd through PyTorch Geometric's own convolution."""
    graph, *_ = toy()
    learner = build("sf", 1, kind=kind)
    (block,) = learner.blocks()
    conv = block.conv
    labelling = learner._labelling
    assert isinstance(labelling, VirtualNodes)
    ties = torch.stack([graph.known, NODES + graph.labels])
    index = torch.cat([edges_of(graph).index, ties, ties.flip(0)], 1)
    index = index if kind == "sage" else Edges(index, NODES + CLASSES).looped
    x = torch.cat([graph.x, labelling.features])
    h = torch.relu(conv(x / (x.norm(dim=1, keepdim=True) + 1e-8), index))
    loss = nn.functional.cross_entropy(h[TRAIN] @ h[NODES:].T, graph.labels)
    parameters = list(conv.parameters())
    expected = [p - LR * g for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)]
    np.testing.assert_allclose(greedy(learner, graph, graph.labels), [loss.item()], rtol=1e-9)
    for ours, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# 2. virtual nodes


@pytest.mark.parametrize("both", [True, False])
def test_virtual_edges(both: bool) -> None:
    graph, *_ = toy(ASKED)
    layout = VirtualNodes(CLASSES, FEATURES, both=both).to_learn(graph)
    old, new = edges_of(graph), edges_of(layout)
    assert new.nodes == NODES + CLASSES
    assert len(layout.x) == NODES + CLASSES
    added = new.index[:, old.index.shape[1] :]
    assert added.shape[1] == len(TRAIN) * (2 if both else 1)
    to_virtual = {(int(s), int(t)) for s, t in added.T if t >= NODES}
    assert to_virtual == {(int(i), NODES + int(c)) for i, c in zip(graph.known, graph.labels, strict=True)}
    from_virtual = {(int(t), int(s)) for s, t in added.T if s >= NODES}
    assert from_virtual == (to_virtual if both else set())
    sizes = torch.bincount(added[1][added[1] >= NODES] - NODES, minlength=CLASSES)
    assert torch.equal(sizes, torch.bincount(graph.labels, minlength=CLASSES))


def test_virtual_features_do_not_depend_on_depth() -> None:
    assert np.array_equal(virtual(build("sf", 1)), virtual(build("sf", 4)))


# 3. labels


def test_no_label_of_a_node_that_is_asked_about_is_reachable() -> None:
    """Nothing in the graph that scores are a function of holds one: other labels, the same graph."""
    for variant in ("sf", "sf-t2i", "sf-t2l", "ff-la", "ff-vn"):
        graph, _, _, y = toy()
        learner = build(variant)
        for stage in learner.stages():
            stage.step((stage.prepared(graph), torch.as_tensor(y[TRAIN])))
        question = graph.asking(torch.as_tensor(ASKED))
        held = [question.labels, *(v for v in learner.state_dict().values() if isinstance(v, Tensor))]
        assert all(t.dtype.is_floating_point or t.ndim == 0 or t is question.labels for t in held)
        assert not set(question.known.tolist()) & set(ASKED.tolist())
        scores = learner.scores(question)
        y[ASKED] = -999  # what is left of them: no learner can have seen it
        assert torch.equal(scores, learner.scores(question))


def test_goodness_answers_change_with_labels_that_are_revealed() -> None:
    """The authors' protocol, in which validation labels are known at test, is another one."""
    for variant in ("ff-la", "ff-vn"):
        graph, _, _, y = toy()
        learner = build(variant)
        question = graph.asking(torch.as_tensor(ASKED[4:]))
        revealed = torch.as_tensor(np.concatenate([TRAIN, ASKED[:4]]))
        more = replace(question, known=revealed, labels=torch.as_tensor(y)[revealed])
        assert not torch.equal(learner.scores(question), learner.scores(more))


# 4. isolation


@pytest.mark.parametrize("kind", ["gcn", "gat"])
def test_training_a_layer_leaves_the_others_alone(kind: str) -> None:
    graph, *_ = toy()
    learner = build("sf", 3, kind=kind)
    optimized = [{id(p) for g in stage.optimizers[0].param_groups for p in g["params"]} for stage in learner.stages()]
    assert sum(map(len, optimized)) == len(set().union(*optimized)) == len(list(learner.parameters()))
    for index, stage in enumerate(learner.stages()):
        before = [[p.clone() for p in block.parameters()] for block in learner.blocks()]
        inputs = stage.prepared(graph)
        assert not inputs.requires_grad
        stage.step((inputs, graph.labels))
        for other, (block, old) in enumerate(zip(learner.blocks(), before, strict=True)):
            same = [torch.equal(p, q) for p, q in zip(block.parameters(), old, strict=True)]
            assert not any(same) if other == index else all(same)


# 5. kept neighbourhood sums


@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize("variant", ["sf", "ff-la", "ff-vn", "link-ce"])
def test_kept_sums_train_like_the_whole_convolution(kind: str, variant: str) -> None:
    graph, *_ = toy()
    targets = graph.labels
    if variant == "link-ce":
        graph, targets = graph.asking(torch.randint(NODES, (2, 12))), torch.arange(12) % 2
    kept, whole = build(variant, 1, kind=kind), build(variant, 1, kind=kind)
    (stage,) = kept.stages()
    inputs = stage.prepared(graph)
    assert inputs.edges is None
    layout = normalized(whole._labelling.to_learn(graph))
    assert isinstance(whole._schedule, LayerByLayer)
    for _ in range(5):
        torch.testing.assert_close(
            stage.step((inputs, targets)), whole._schedule.update(0, (layout, targets)), rtol=1e-9, atol=1e-9
        )
    changed = stage.prepared(graph.with_x(2 * graph.x + 1))
    assert not torch.allclose(changed.x, inputs.x)


def test_only_wanted_rows_are_kept() -> None:
    graph, *_ = toy(ASKED)
    stage = build("sf", 2).stages()[1]
    assert stage.prefix is not None
    inputs = stage.prefix(graph)
    assert inputs.x.shape == (len(ASKED) + CLASSES, 8)
    assert len(wanted_rows(inputs)) == len(ASKED) + CLASSES


# 6. prefixes and reductions


def test_a_deeper_run_begins_with_the_shallower_one() -> None:
    graph, _, _, y = toy()
    question = graph.asking(torch.as_tensor(ASKED))
    results = {}
    for depth in (2, 4):
        learner = build("sf", depth, optimizer="adam", lr=0.01)
        validation = GraphBatches(question, torch.as_tensor(y[ASKED]))
        config = TrainingConfig(epochs=10, monitor="metric")
        Trainer(learner, GraphBatches(graph, graph.labels), validation, config).run()
        evidence = learner._schedule.evidence(question)
        results[depth] = (torch.stack(evidence[:2]), learner.diagnostics((question, torch.as_tensor(y[ASKED]))))
    assert torch.equal(results[2][0], results[4][0])
    assert results[2][1]["depth 2 accuracy"] == results[4][1]["depth 2 accuracy"]


def test_temperature_divides_the_logits() -> None:
    graph, *_ = toy()
    losses = []
    for tau, scale in ((1.0, 0.5**0.5), (2.0, 1.0)):  # h / sqrt(2) on both sides of the product, or tau = 2
        learner = build("sf", 1, tau=tau)
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.mul_(scale)
        losses.append(greedy(learner, graph, graph.labels)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_one_layer_of_top_to_loss_is_sf() -> None:
    graph, *_ = toy()
    question = graph.asking(torch.as_tensor(ASKED))
    sf, t2l = build("sf", 1, tau=10.0), build("sf-t2l", 1, tau=10.0)  # a gradient too small to be clipped
    greedy(sf, graph, graph.labels)
    in_time(t2l, graph, graph.labels, 1)
    torch.testing.assert_close(sf.scores(question), t2l.scores(question), rtol=1e-12, atol=1e-12)


def test_classes_with_the_same_virtual_features_are_told_apart_by_their_nodes_only() -> None:
    """Two classes whose virtual nodes and training nodes are the same get the same scores."""
    x = torch.rand(5, FEATURES, dtype=torch.float64)
    x[1] = x[0]
    known, labels = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])
    ring = torch.tensor([[0, 3, 1, 3, 2, 4], [3, 0, 3, 1, 4, 2]])
    learner = build("sf", 2)
    assert isinstance(learner._labelling, VirtualNodes)
    learner._labelling.features[1] = learner._labelling.features[0]
    scores = learner.scores(Graph.of(x, ring, torch.tensor([3, 4]), known, labels))
    torch.testing.assert_close(scores[:, 0], scores[:, 1])
    assert not torch.allclose(scores[:, 0], scores[:, 2])


# 7. bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sff"}, "did you mean sf"),
        ({"variant": "sf", "theta": 3.0}, "sf has no theta"),
        ({"variant": "ff-la", "tau": 2.0}, "ff-la has no tau"),
        ({"variant": "ff-la", "bidirectional": False}, "has no bidirectional"),
        ({"variant": "sf-t2i", "bottom_up": "raw"}, "has no bottom_up"),
        ({"variant": "ff-vn", "loss": "sym"}, "did you mean symba"),
        ({"variant": "sf", "tau": 0.0}, "tau must be positive"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("sf", lambda g: g.asking(torch.zeros(2, 3, dtype=torch.int64)), "use a link variant"),
        ("link-ce", lambda g: g, "use a variant for nodes"),
        ("ff-la", lambda g: replace(g, known=g.known[:0], labels=g.labels[:0]), "no label is known"),
        ("sf", lambda g: g.with_x(g.x[:, :2]), "expected"),
        ("sf", lambda g: replace(g, edges=None), "no edges left"),
    ],
)
def test_graphs_that_do_not_fit(variant: str, change: Callable[[Graph], Graph], message: str) -> None:
    graph, *_ = toy()
    with pytest.raises(UsageError, match=message):
        build(variant).scores(change(graph))


def test_blocks_must_be_graph_convolutions() -> None:
    with pytest.raises(UsageError, match="graph convolutions"):
        ForwardGNN(nn.Sequential(nn.Linear(4, 4)), 2)
