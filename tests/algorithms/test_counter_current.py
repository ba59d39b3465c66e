"""Counter-current learning: the tests of its specification, and what its options promise."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counter_current import courses, draw_courses, draw_features, features
from bpfree.algorithms import Backprop, CounterCurrent, _ccl_updates
from bpfree.algorithms._ccl_layers import Layer, weighted
from bpfree.algorithms._ccl_objectives import Asked, CosineObjective, DotObjective
from bpfree.algorithms.audit import audit
from bpfree.data import Batches
from bpfree.errors import CheckpointError, UsageError
from bpfree.experiments import Trainer, TrainingConfig
from bpfree.experiments.config import resolve
from bpfree.experiments.run import run, trained
from bpfree.metrics import linear_cka
from bpfree.networks import build_network, mlp
from bpfree.networks.normalization import VectorNorm
from tests.reference import counter_current as reference

CLASSES = 3
WIDTHS = (6, 8, 7)
COMPARE = {
    "dot": partial(reference.dot_loss, s=0.7),
    "cosine": partial(reference.cosine_loss, s=0.7, r=0.4),
}
OPTIONS: dict[str, dict[str, object]] = {
    "dot": {"similarity": "dot", "scale": 0.7},
    "cosine": {"similarity": "cosine", "scale": 0.7, "decorrelation": 0.4},
}
both = pytest.mark.parametrize("similarity", ["dot", "cosine"])


def batch(size: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, WIDTHS[0], dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def learner(similarity: str = "dot", seed: int = 0, **options: object) -> CounterCurrent:
    torch.manual_seed(seed)
    blocks = mlp(WIDTHS[:1], WIDTHS[1:], elu=True)
    settings = {"lr": 0.3, "clip": 0.0, **OPTIONS[similarity], **options}
    return CounterCurrent(blocks, CLASSES, **settings).double()  # type: ignore[arg-type]


def matrices(model: CounterCurrent) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """U_1..U_L and V_1..V_L."""
    forward, feedback = ([*model.network, model.readout], model.feedback)
    return [next(m.parameters()) for m in forward], [next(m.parameters()) for m in feedback]


def arrays(model: CounterCurrent) -> tuple[list[np.ndarray], list[np.ndarray]]:
    U, V = matrices(model)
    return [p.detach().numpy().copy() for p in U], [p.detach().numpy().copy() for p in V]


def expected(model: CounterCurrent, similarity: str, x: Tensor, y: Tensor):
    return reference.gradients(x.numpy(), y.numpy(), *arrays(model), COMPARE[similarity])


# 1., 2. the NumPy reference, itself against finite differences


@both
def test_reference_equals_finite_differences(similarity: str) -> None:
    x, y = (part.numpy() for part in batch())
    U, V = arrays(learner())
    _, dU, dV = reference.gradients(x, y, U, V, COMPARE[similarity])
    M = reference.indicator(y, CLASSES)
    inputs, templates = reference.forward(x, U)[0], reference.feedback(CLASSES, V)[0]

    def level_loss(level: int) -> float:
        """Loss of a level with what enters its two layers held constant."""
        if level == len(U):
            return reference.cross_entropy(inputs[-2] @ U[-1].T, M)[0]
        a = reference.elu(inputs[level - 1] @ U[level - 1].T) if level else x
        q = templates[level + 1] @ V[level].T
        return COMPARE[similarity](a, reference.elu(q) if level else q, M)[0]

    for layer in range(len(U)):
        for matrix, gradient, level in ((U[layer], dU[layer], layer + 1), (V[layer], dV[layer], layer)):
            for index in list(np.ndindex(matrix.shape))[::5]:
                kept = matrix[index]
                matrix[index] = kept + 1e-6
                up = level_loss(level)
                matrix[index] = kept - 1e-6
                slope = (up - level_loss(level)) / 2e-6
                matrix[index] = kept
                assert gradient[index] == pytest.approx(slope, rel=1e-5, abs=1e-8)


@both
def test_gradients_and_a_step_equal_the_numpy_reference(similarity: str) -> None:
    model = learner(similarity)
    x, y = batch()
    U, V = arrays(model)
    losses, dU, dV = expected(model, similarity, x, y)
    metrics = model.step((x, y))
    assert [value.item() for value in metrics.values()] == pytest.approx(losses, abs=1e-12)
    for parameters, before, gradients in zip(matrices(model), (U, V), (dU, dV), strict=True):
        for parameter, old, gradient in zip(parameters, before, gradients, strict=True):
            assert parameter.grad is not None
            np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=0, atol=1e-10)
            np.testing.assert_allclose(parameter.detach().numpy(), old - 0.3 * gradient, rtol=0, atol=1e-10)


@both
def test_closed_form_equals_autograd(similarity: str) -> None:
    closed, automatic = learner(similarity), learner(similarity)
    for name in ("_forward", "_feedback"):
        layers = {layer: Layer(layer.module, layer.parameters, None) for layer in getattr(automatic, name)}
        automatic._optimizers |= {new: automatic._optimizers[old] for old, new in layers.items()}
        setattr(automatic, name, tuple(layers.values()))
    x, y = batch()
    for model in (closed, automatic):
        model.step((x, y))
    for a, b in zip(closed.parameters(), automatic.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def similarity_of(a: Tensor, b: Tensor, y: Tensor, objective: str) -> Tensor:
    """The same losses by autograd."""
    M = F.one_hot(y, len(b)).to(a.dtype)
    if objective == "dot":
        return 256 * 0.7 / a[0].numel() * (a.flatten(1) @ b.flatten(1).T - M).square().mean()
    p, q = (F.normalize(values.flatten(1), dim=1) for values in (a, b))
    selves = sum((v @ v.T - torch.eye(len(v), dtype=v.dtype)).square().mean() for v in (p, q))
    return 0.7 * (p @ q.T - M).square().mean() + 0.4 * selves


@both
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_derivatives_by_maps_equal_autograd_in_both_layouts(similarity: str, layout: torch.memory_format) -> None:
    y = torch.tensor([0, 2, 1, 2, 0])
    a = torch.randn(5, 4, 3, 2, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    b = torch.randn(CLASSES, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    loss = similarity_of(a, b, y, similarity)
    by_a, by_b = torch.autograd.grad(loss, (a, b))
    objective = learner(similarity).objective
    asked = objective.asked(y)
    rating = objective.rate(a.detach(), b.detach(), asked, at_input=False)
    torch.testing.assert_close(rating.loss, loss.detach())
    torch.testing.assert_close(rating.by_forward, by_a)
    torch.testing.assert_close(rating.by_feedback, by_b)


def test_cosine_derivatives_are_orthogonal_to_their_rows() -> None:
    objective = CosineObjective(CLASSES, 0.0, 1.0, 0.5)
    a, b = torch.randn(6, 9, dtype=torch.float64), torch.randn(CLASSES, 9, dtype=torch.float64)
    rating = objective.rate(a, b, Asked(F.one_hot(torch.arange(6) % 3).double()), at_input=False)
    assert rating.by_forward is not None
    assert rating.by_feedback is not None
    for rows, derivative in ((a, rating.by_forward), (b, rating.by_feedback)):
        assert (rows * derivative).sum(1).abs().max() < 1e-12
        assert derivative.abs().max() > 1e-3


def test_a_row_of_zeros_gives_no_gradient() -> None:
    objective = CosineObjective(2, 0.0, 1.0, 0.5)
    a = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    rating = objective.rate(a, torch.eye(2), Asked(torch.eye(2)), at_input=False)
    assert rating.by_forward is not None
    assert torch.equal(rating.by_forward[0], torch.zeros(2))
    assert rating.by_forward[1].abs().max() > 0


# 3., 4. locality: what each level changes


def changed_by(model: CounterCurrent, level: int, x: Tensor, y: Tensor) -> tuple[list[int], list[int]]:
    """Which U and V have another gradient when the loss of one level weighs ten times as much."""

    class Louder(type(model.objective)):  # type: ignore[misc]
        def rate(self, forward: Tensor, feedback: Tensor, asked: Asked, *, at_input: bool):
            rating = super().rate(forward, feedback, asked, at_input=at_input)
            self.level += 1
            return louder(rating) if self.level == level else rating

        def rate_output(self, output: Tensor, asked: Asked):
            rating = super().rate_output(output, asked)
            return louder(rating) if level == depth else rating

    def louder(rating):
        parts = (None if part is None else 10 * part for part in vars(rating).values())
        return type(rating)(*parts)

    depth = len(model.feedback)
    loud = copy.deepcopy(model)
    loud.objective.__class__ = Louder
    loud.objective.level = -1
    for each in (model, loud):
        each.step((x, y))
    found: list[list[int]] = []
    for plain, other in zip(matrices(model), matrices(loud), strict=True):
        found.append([])
        for number, (a, b) in enumerate(zip(plain, other, strict=True), start=1):
            if not torch.equal(a.grad, b.grad):  # type: ignore[arg-type]
                torch.testing.assert_close(10 * a.grad, b.grad)  # type: ignore[operator]
                found[-1].append(number)
    return found[0], found[1]


@both
@pytest.mark.parametrize(("level", "forward", "feedback"), [(0, [], [1]), (1, [1], [2]), (2, [2], [3]), (3, [3], [])])
def test_a_level_changes_one_layer_of_each_network(
    similarity: str, level: int, forward: list[int], feedback: list[int]
) -> None:
    assert changed_by(learner(similarity), level, *batch()) == (forward, feedback)


@both
def test_a_layer_learns_the_same_whatever_the_layers_that_it_does_not_hear(similarity: str) -> None:
    """Forward layer l hears U_k, k < l, and V_k, k > l; feedback layer l + 1 the same."""
    x, y = batch()
    plain = learner(similarity)
    plain.step((x, y))
    depth = len(plain.feedback)
    for which, changed in itertools.product((0, 1), range(depth)):
        other = learner(similarity)
        with torch.no_grad():
            matrices(other)[which][changed].mul_(1.5)
        other.step((x, y))
        for network, layer in itertools.product((0, 1), range(depth)):
            level = layer + 1 - network
            own = (network, layer) == (which, changed)
            # U_l is below levels l.. (and hears itself); V_l is above levels ..l-1, of which level L hears none
            hears = level > changed if which == 0 else level <= changed and level < depth
            same = torch.equal(matrices(plain)[network][layer].grad, matrices(other)[network][layer].grad)  # type: ignore[arg-type]
            assert same != (hears or own), (which, changed, network, layer)


def test_clipping_a_network_as_one_is_a_channel_and_the_library_says_so() -> None:
    x, y = batch()
    first = []
    for factor, scope in itertools.product((1.0, 1.5), ("layer", "network")):
        model = learner(clip=1e-3, clip_scope=scope)
        with torch.no_grad():
            model.readout[1].weight.mul_(factor)  # type: ignore[operator]
        model.step((x, y))
        first.append(matrices(model)[0][0].grad)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[1], first[3])
    assert learner(clip=1.0, clip_scope="network").variant == "dot, clipped by network"


# gradients that are never written out


WIDE = (80, 96, 72)  # at least ten times as wide as the batch of 7 is long
MOVES: list[dict[str, object]] = [
    {},
    {"clip": 0.02},
    {"clip": 0.02, "clip_scope": "network"},
    {"clip": 100.0},
    {"weight_decay": 0.1},
    {"centralize": True, "clip": 0.02},
    {"warmup_steps": 4, "clip": 0.02},
]


def wide(bias: bool = False, **options: object) -> tuple[CounterCurrent, Tensor, Tensor]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(below, above, bias=bias), nn.ELU()) for below, above in itertools.pairwise(WIDE)]
    settings = {"lr": 0.3, "clip": 0.0, **OPTIONS["dot"], **options}
    model = CounterCurrent(blocks, CLASSES, **settings).double()  # type: ignore[arg-type]
    return model, torch.randn(7, WIDE[0], dtype=torch.float64), torch.arange(7) % CLASSES


@pytest.mark.parametrize("options", MOVES)
def test_thin_gradients_move_weights_as_the_numpy_reference_does(options: dict[str, object]) -> None:
    model, x, y = wide(**options)
    before = arrays(model)
    _, *gradients = expected(model, "dot", x, y)
    for _ in range(1, 3 if "warmup_steps" in options else 2):
        before = arrays(model)
        _, *gradients = expected(model, "dot", x, y)
        model.step((x, y))
    share = 0.5 if "warmup_steps" in options else 1.0
    for old, new, network in zip(before, arrays(model), gradients, strict=True):
        steps = [share * g - (share * g).mean(1, keepdims=True) * bool(options.get("centralize")) for g in network]
        if options.get("clip_scope") == "network":
            steps = reference.clipped(steps, options["clip"])
        elif "clip" in options:
            steps = [reference.clipped([g], options["clip"])[0] for g in steps]
        for weight, moved, step in zip(old, new, steps, strict=True):
            decay = options.get("weight_decay", 0.0) * weight
            np.testing.assert_allclose(moved, weight - 0.3 * (step + decay), rtol=0, atol=1e-10)
    unwritten = [[p.grad is None for p in network] for network in matrices(model)]
    assert unwritten == [[True, True, False], [True, True, False]]  # the two with a side of 3 classes are not wide


@pytest.mark.parametrize("options", MOVES)
@pytest.mark.parametrize("bias", [False, True])
def test_thin_gradients_do_what_written_ones_and_an_optimiser_do(
    bias: bool, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for rate in (None, 0.3, torch.tensor(0.3, dtype=torch.float64)):  # a number, or as in a CUDA graph on the device
        model, x, y = wide(bias, **options)
        for optimizer in model.optimizers():
            if rate is None:
                monkeypatch.setattr(_ccl_updates, "THIN", 10**6)
            else:
                monkeypatch.undo()
                optimizer.param_groups[0]["lr"] = rate
        for _ in range(3):
            model.step((x, y))
        assert (next(model.network.parameters()).grad is None) == (rate is not None)
        ends.append([parameter.detach() for parameter in model.parameters()])
    for others in ends[1:]:
        for a, b in zip(ends[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_whoever_listens_to_the_optimisers_gets_gradients() -> None:
    quiet, x, y = wide(clip=0.02)
    heard, _, _ = wide(clip=0.02)
    given: list[Tensor | None] = []

    def listen(optimizer: Optimizer, *_: object) -> None:
        given.extend(parameter.grad for parameter in optimizer.param_groups[0]["params"])

    for optimizer in heard.optimizers():
        optimizer.register_step_pre_hook(listen)
    for model in (quiet, heard):
        model.step((x, y))
    assert len(given) == 6
    assert all(gradient is not None and gradient.norm() > 0 for gradient in given)
    for a, b in zip(quiet.parameters(), heard.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_layer_whose_gradient_is_not_written_out_is_audited_like_others() -> None:
    model, x, _ = wide(clip=0.02)
    found = audit(model, [(x + index, torch.arange(7) % CLASSES) for index in range(6)])
    assert found.locality == found.measured == "layer"
    assert found.agrees


def test_rows_that_cancel_are_a_gradient_of_no_length() -> None:
    linear = nn.Linear(50, 40, bias=False)
    before = linear.weight.detach().clone()
    errors, inputs = torch.randn(1, 40), torch.randn(1, 50)
    update = _ccl_updates.ThinUpdate(
        linear, torch.cat([errors, -errors, errors, -errors]), inputs.expand(4, -1), SGD(linear.parameters(), lr=0.1)
    )
    assert update.measure().abs() < 1e-2
    update.squared_length = torch.tensor(-1e-3)  # what rounding may make of it
    (factor,) = _ccl_updates.clipping([[update]], 0.5)
    assert factor == 1
    with torch.no_grad():
        update.take(factor)
    torch.testing.assert_close(linear.weight.detach(), before, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["layer", "network"])
def test_thin_gradients_are_the_same_in_a_graph(scope: str) -> None:
    ends = []
    for graph in (False, True):
        model, x, y = wide(clip=0.02, clip_scope=scope)
        part = Batches(x.float().repeat(3, 1), y.repeat(3), device="cuda")
        config = TrainingConfig(batch_size=7, epochs=3, graph=graph, precision="fp32", lr_schedule="cosine")
        Trainer(model.float().cuda(), part, part, config).run()
        assert next(model.network.parameters()).grad is None
        ends.append([parameter.detach() for parameter in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


# 5.-8. what the losses mean


def test_perfect_similarity_is_a_fixed_point() -> None:
    b = torch.linalg.qr(torch.randn(9, CLASSES, dtype=torch.float64))[0].T
    y = torch.tensor([0, 1, 2, 2, 0])
    asked = Asked(F.one_hot(y).double())
    for objective in (DotObjective(CLASSES, 0.0, 0.5), CosineObjective(CLASSES, 0.0, 1.0, 0.0)):
        rating = objective.rate(b[y], b, asked, at_input=False)
        for value in (rating.loss, rating.by_forward, rating.by_feedback):
            assert value is not None
            assert value.abs().max() < 1e-12


@both
def test_names_of_classes_do_not_matter(similarity: str) -> None:
    order = torch.tensor([2, 0, 1])
    plain, renamed = learner(similarity), learner(similarity)
    x, y = batch()
    with torch.no_grad():
        U, V = matrices(renamed)
        U[-1].copy_(U[-1][order].clone())
        V[-1].copy_(V[-1][:, order].clone())
    a, b = plain.step((x, y)), renamed.step((x, order.argsort()[y]))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-12, atol=1e-12)


@both
def test_templates_equal_labels_of_the_batch_when_each_class_occurs_once(similarity: str) -> None:
    y = torch.tensor([1, 2, 0])
    a, b = torch.randn(3, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    objective = learner(similarity).objective
    by_template = objective.rate(a, b, Asked(F.one_hot(y).double()), at_input=False).loss
    by_label = objective.rate(a, b[y], Asked(torch.eye(3, dtype=torch.float64)), at_input=False).loss
    torch.testing.assert_close(by_template, by_label)


@pytest.mark.parametrize(
    ("options", "same"),
    [(OPTIONS["dot"], True), ({"similarity": "cosine", "decorrelation": 0.0}, True), (OPTIONS["cosine"], False)],
)
def test_doubling_the_batch_changes_the_self_term_alone(options: dict[str, object], same: bool) -> None:
    """And of that the loss alone: a sample pushes its own copy along its own direction, which has no effect."""
    x, y = batch()
    losses, gradients = [], []
    for repeats in (1, 2):
        model = learner(**options)  # type: ignore[arg-type]
        metrics = model.step((x.repeat(repeats, 1), y.repeat(repeats)))
        losses.append(torch.stack(list(metrics.values())))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*losses, rtol=1e-10, atol=1e-12) == same
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


# 9.-13. options and inference


def test_a_feedback_rate_of_zero_leaves_the_feedback_network_as_it_was_drawn() -> None:
    model = learner(feedback_lr=0.0, lr=0.1, clip=1.0)
    before = copy.deepcopy(model.state_dict())
    x, y = batch(64)
    x[torch.arange(64), y] += 3
    losses = [model.step((x, y))["level 3 loss"].item() for _ in range(30)]
    after = model.state_dict()
    for name in before:
        if name.startswith(("feedback", "network", "readout")):
            assert torch.equal(before[name], after[name]) == name.startswith("feedback")
    assert losses[-1] < 0.7 * losses[0]


def test_with_cross_entropy_alone_the_readout_learns_as_in_backprop() -> None:
    model = learner()
    x, y = batch()
    model.step((x, y))
    plain = Backprop(mlp(WIDTHS[:1], WIDTHS[1:], elu=True), CLASSES, readout="goodness").double()
    torch.manual_seed(0)
    start = learner()
    plain.network.load_state_dict(start.network.state_dict())
    plain.readout.linear.weight.data.copy_(start.readout[1].weight)  # type: ignore[union-attr,operator]
    loss = F.cross_entropy(plain(x), y)
    (expected_gradient,) = torch.autograd.grad(loss, [plain.readout.linear.weight])  # type: ignore[union-attr]
    torch.testing.assert_close(matrices(model)[0][-1].grad, expected_gradient, rtol=1e-10, atol=1e-12)


def test_networks_are_clipped_apart() -> None:
    x, y = batch()
    plain, clipped = learner(), learner(clip=0.05, clip_scope="network")
    for model in (plain, clipped):
        model.step((x, y))
    for free, short in zip(matrices(plain), matrices(clipped), strict=True):
        wanted = reference.clipped([p.grad.numpy() for p in free], 0.05)  # type: ignore[union-attr]
        for parameter, gradient in zip(short, wanted, strict=True):
            np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=1e-10)  # type: ignore[union-attr]


def test_layers_are_clipped_apart_by_default() -> None:
    model = learner(clip=0.01)
    model.step(batch())
    lengths = [p.grad.norm().item() for network in matrices(model) for p in network]  # type: ignore[union-attr]
    assert lengths == pytest.approx([0.01] * 6, rel=1e-3)


def test_centralised_gradients_have_mean_zero_per_unit_and_biases_keep_theirs() -> None:
    blocks = nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)))
    model = CounterCurrent(blocks, CLASSES, centralize=True, clip=0.0, input_shape=(2, 8, 8)).double()
    model.step((torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.arange(6) % 3))
    for parameter in model.parameters():
        assert parameter.grad is not None
        if parameter.ndim > 1:
            assert parameter.grad.mean(tuple(range(1, parameter.ndim))).abs().max() < 1e-12
        else:
            assert parameter.grad.abs().max() > 0


@both
def test_samples_that_the_output_is_sure_of_teach_hidden_levels_nothing(similarity: str) -> None:
    model = learner(similarity, flood=0.1)
    y = batch()[1]
    sure = torch.full((len(y), CLASSES), -50.0, dtype=torch.float64).scatter(1, y[:, None], 50.0)
    asked = model.objective.flooded(model.objective.asked(y), sure)
    a, b = torch.randn(7, 9, dtype=torch.float64), torch.randn(CLASSES, 9, dtype=torch.float64)
    rating = model.objective.rate(a, b, asked, at_input=False)
    assert torch.equal(rating.by_forward, torch.zeros_like(a))
    unsure = sure.clone()
    unsure[3] = 0
    rating = model.objective.rate(a, b, model.objective.flooded(asked, unsure), at_input=False)
    assert rating.by_forward is not None
    assert rating.by_forward.abs().amax(1).nonzero().flatten().tolist() == [3]
    output = model.objective.rate_output(unsure, asked)
    assert output.by_forward is not None
    assert output.by_forward[3].abs().max() > 0.05


def test_losses_grow_to_their_full_weight() -> None:
    x, y = batch()
    plain, warming = learner(lr=1e-12), learner(lr=1e-12, warmup_steps=4)
    plain.step((x, y))
    for factor in (0.25, 0.5, 0.75, 1.0, 1.0):
        warming.step((x, y))
        for a, b in zip(plain.parameters(), warming.parameters(), strict=True):
            torch.testing.assert_close(factor * a.grad, b.grad, rtol=1e-6, atol=1e-9)  # type: ignore[operator]


def test_inference_needs_no_feedback_network() -> None:
    model = learner()
    x, y = batch()
    model.step((x, y))
    scores = model.scores(x)
    model.feedback = nn.ModuleList()
    assert torch.equal(model.scores(x), scores)


# 14. floating-point operations, against the paper's table 2 (MFLOPs per sample at a batch of 32)


@pytest.mark.parametrize(
    ("network", "shape", "bp", "ccl"),
    [("mlp-elu:5x256", (784,), 2.39, 2.55), ("mlp-elu:3x1024", (3072,), 25.23, 27.89)],
)
def test_operations_equal_the_papers(network: str, shape: tuple[int, ...], bp: float, ccl: float) -> None:
    inputs, targets = torch.randn(32, *shape), torch.arange(32) % 10
    make: dict[float, Callable[[nn.Sequential], Backprop | CounterCurrent]] = {
        bp: lambda blocks: Backprop(blocks, 10, readout="goodness"),
        ccl: lambda blocks: CounterCurrent(blocks, 10, similarity="dot", clip=0.0),
    }
    for published, build in make.items():
        model = build(build_network(network, shape))
        with FlopCounterMode(display=False) as counter:
            model.step((inputs, targets))
        assert counter.get_total_flops() / 32 / 1e6 == pytest.approx(published, abs=0.005)


# the feedback network


@pytest.mark.parametrize(
    ("block", "given", "made"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), (3, 4, 4), (5,)),
        (nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)), (3, 8, 8), (6, 4, 4)),
        (nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), (3, 7, 7), (6, 4, 4)),
        (nn.Conv2d(4, 6, (5, 3), stride=(2, 1), padding=(2, 1), groups=2), (4, 9, 6), (6, 5, 6)),
        (nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(6, 3, 3, padding=1)), (6, 4, 4), (3, 8, 8)),
        (nn.Sequential(nn.Upsample(size=(7, 7)), nn.Conv2d(6, 3, 3, padding=1)), (6, 4, 4), (3, 7, 7)),
        (nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()), (3, 8, 8), (6, 8, 8)),
    ],
)
def test_feedback_layers_map_outputs_to_inputs(block: nn.Module, given: tuple[int, ...], made: tuple[int, ...]) -> None:
    model = CounterCurrent([block], CLASSES, input_shape=given)
    assert block(torch.zeros(2, *given)).shape[1:] == made
    below, top = model.feedback
    assert below(torch.zeros(2, *made)).shape[1:] == given
    assert top(torch.eye(CLASSES)).shape[1:] == made
    assert weighted(below).weight.numel() == weighted(block).weight.numel()
    biased = any(m.bias is not None for m in block.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    assert any(m.bias is not None for m in below.modules() if isinstance(m, (nn.Linear, nn.Conv2d))) == biased


def test_feedback_layers_end_as_the_forward_layer_of_their_level_does() -> None:
    hidden = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.3), nn.MaxPool2d(2))
    model = CounterCurrent([hidden, nn.Sequential(nn.Conv2d(4, 5, 3), nn.Tanh())], CLASSES, input_shape=(2, 8, 8))
    kinds = [[type(part).__name__ for part in layer] for layer in model.feedback]
    assert kinds == [
        ["Upsample", "Conv2d"],  # to the input: no activation
        ["Upsample", "Conv2d", "BatchNorm2d", "LeakyReLU"],
        ["Flatten", "Linear", "Unflatten", "Tanh"],
    ]
    assert model.feedback[1][3].negative_slope == 0.3  # type: ignore[index]
    assert not any(parameter.requires_grad for parameter in hidden[1].parameters())


def test_normalisation_that_rectifies_is_mirrored_in_two() -> None:
    hidden = nn.Sequential(nn.Linear(3, 4), VectorNorm(4, rectified=True))
    model = CounterCurrent([hidden, nn.Sequential(nn.Linear(4, 5), nn.Tanh())], CLASSES, input_shape=(3,))
    assert [type(part) for part in model.feedback[1]][-2:] == [nn.BatchNorm1d, nn.ReLU]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "Linear has no counterpart"),
        (nn.Sequential(nn.ConvTranspose2d(2, 2, 2)), "ConvTranspose2d has no counterpart"),
        (nn.LSTM(3, 4), "LSTM has no counterpart there. What belongs to one block goes into an nn.Sequential"),
    ],
)
def test_networks_that_cannot_be_mirrored_are_refused_with_a_reason(block: nn.Module, message: str) -> None:
    support = CounterCurrent.supports([block])
    assert not support.ok
    assert message in support.reason


def test_maps_that_are_flattened_too_early_are_refused() -> None:
    blocks = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(UsageError, match="Flatten"):
        CounterCurrent(blocks, CLASSES, input_shape=(2, 8, 8))


@pytest.mark.parametrize(
    "options",
    [
        {"similarity": "euclidean"},
        {"clip_scope": "block"},
        {"similarity": "dot", "decorrelation": 0.5},
        {"flood": 1.0},
        {"clip": -1.0},
        {"clip": 0.0, "clip_scope": "network"},
        {"scale": 0.0},
        {"momentum": 0.5},
        {"lr": 0.0},
        {"warmup_steps": -1},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        CounterCurrent(mlp((4,), (5,)), CLASSES, **options)  # type: ignore[arg-type]


# the autoencoder


def autoencoder(**options: object) -> CounterCurrent:
    torch.manual_seed(0)
    network = build_network("autoencoder:4x6", (2, 8, 8))
    return CounterCurrent(network, 0, input_shape=(2, 8, 8), **{"clip": 0.0, **options}).double()  # type: ignore[arg-type]


def test_a_level_of_the_autoencoder_is_the_papers_loss_and_its_derivatives() -> None:
    a, b = (torch.randn(5, 4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    forms = [F.normalize((v - v.mean((2, 3), keepdim=True)).flatten(2), dim=2) for v in (a, b)]
    loss = 3 * F.mse_loss(a, b) + 3 * F.mse_loss(*forms)
    by_a, by_b = torch.autograd.grad(loss, (a, b))
    assert autoencoder(clip=0.0).variant == "reconstruction"
    objective = autoencoder().objective
    x, made = torch.rand(5, 2, 8, 8, dtype=torch.float64), torch.rand(5, 2, 8, 8, dtype=torch.float64)
    rating = objective.rate(a.detach(), b.detach(), objective.asked(x), at_input=False)
    torch.testing.assert_close(rating.loss, loss.detach())
    torch.testing.assert_close(rating.by_forward, by_a)
    torch.testing.assert_close(rating.by_feedback, by_b)
    asked = objective.asked(x)
    for image_level, by in (
        (objective.rate(x, made, asked, at_input=True), "by_feedback"),
        (objective.rate_output(made, asked), "by_forward"),
    ):
        torch.testing.assert_close(image_level.loss, 8 * F.mse_loss(made, x))
        torch.testing.assert_close(getattr(image_level, by), 16 * (made - x) / x.numel())
        assert {name for name, value in vars(image_level).items() if value is not None} == {"loss", by}


def test_a_level_of_the_autoencoder_changes_one_layer_of_each_network() -> None:
    x = torch.rand(6, 2, 8, 8, dtype=torch.float64)
    depth = 4

    def gradients(changed: tuple[int, int] | None) -> list[list[Tensor]]:
        model = autoencoder()
        modules = [[*model.network], [*model.feedback]]
        with torch.no_grad():
            for layer in (layer for network in modules for layer in network):  # no layer is zero or small
                for parameter in layer.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            if changed is not None:
                weighted(modules[changed[0]][changed[1]]).weight.mul_(1.5)
                weighted(modules[changed[0]][changed[1]]).weight[0].mul_(-1)
        model.step((x, x))
        return [[weighted(layer).weight.grad for layer in network] for network in modules]  # type: ignore[misc]

    plain = gradients(None)
    for which, changed in itertools.product((0, 1), range(depth)):
        other = gradients((which, changed))
        for network, layer in itertools.product((0, 1), range(depth)):
            level = layer + 1 - network
            hears = level > changed if which == 0 else level <= changed and level < depth
            same = torch.equal(plain[network][layer], other[network][layer])
            assert same != (hears or (network, layer) == (which, changed)), (which, changed, network, layer)


def test_the_feedback_network_of_an_autoencoder_starts_as_its_forward_network_does() -> None:
    kernels = [weighted(layer).weight.flatten(1) for layer in reversed(autoencoder().feedback)]
    assert not kernels[-1].any()
    assert kernels[2].norm() < 1e-2 * kernels[1].norm()


@pytest.mark.parametrize("option", [{"similarity": "dot"}, {"scale": 0.5}, {"decorrelation": 0.1}, {"flood": 0.1}])
def test_options_for_classes_are_refused_by_the_autoencoder(option: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="for classes"):
        autoencoder(**option)


# diagnostics


def test_alignment_is_one_for_transposed_weights() -> None:
    shape = (2, 8, 8)
    blocks = [
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ELU()),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 6, bias=False), nn.ELU()),
    ]
    model = CounterCurrent(blocks, CLASSES, input_shape=shape).double()
    x, y = torch.randn(5, *shape, dtype=torch.float64), torch.arange(5) % CLASSES
    assert all(abs(v.item()) < 0.6 for k, v in model.diagnostics((x, y)).items() if k.endswith("alignment"))
    for forward, feedback in zip([*model.network, model.readout], model.feedback, strict=True):
        U, V = weighted(forward).weight, weighted(feedback).weight
        # the transpose of the linear map that a layer computes, which autograd knows without being told of kernels
        probe = torch.zeros(1, *(shape if U.ndim == 4 else (U.shape[1],)), dtype=torch.float64, requires_grad=True)
        bare = (lambda z, W=U: F.conv2d(z, W, padding=1)) if U.ndim == 4 else (lambda z, W=U: F.linear(z, W))
        towards = torch.randn_like(bare(probe))
        (transposed,) = torch.autograd.grad(bare(probe), probe, towards)
        with torch.no_grad():
            V.copy_(U.transpose(0, 1).flip(2, 3) if U.ndim == 4 else U.T)
        again = F.conv2d(towards, V, padding=1) if U.ndim == 4 else F.linear(towards, V)
        torch.testing.assert_close(again, transposed)
    report = model.diagnostics((x, y))
    assert [report[f"layer {n} alignment"].item() for n in (1, 2, 3)] == pytest.approx([1, 1, 1])


def test_cka_is_the_papers_and_ignores_rotations() -> None:
    a = torch.randn(20, 5, dtype=torch.float64)
    turned = 3 * a @ torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert linear_cka(a, turned + 1).item() == pytest.approx(1)
    b = a[:, :2] + torch.randn(20, 2, dtype=torch.float64)
    centred = [values - values.mean(0) for values in (a, b)]

    def product(x: Tensor, y: Tensor) -> float:
        return (x.T @ y).norm().item()

    by_features = product(*centred) ** 2 / (product(centred[0], centred[0]) * product(centred[1], centred[1]))
    assert linear_cka(a, b).item() == pytest.approx(by_features)


def test_learns_digits_in_a_few_epochs() -> None:
    from bpfree.data import load

    data = load("digits")
    train, _, test = data.split()
    torch.manual_seed(0)
    model = CounterCurrent(mlp(data.input_shape, (64, 64), elu=True), 10, similarity="dot", scale=0.5, lr=1.0)
    for _ in range(15):
        for index in torch.randperm(len(train)).split(64):
            model.step((train.inputs[index] / 255, train.targets[index]))
    scores = model.scores(test.inputs / 255)
    assert (scores.argmax(1) == test.targets).float().mean() > 0.9


# figures


def test_figures_come_from_a_recorded_run(tmp_path: Path) -> None:
    config = resolve("ccl", "digits", "mlp-elu:2x16", preset="none", training={"passes": 2, "diagnose": True})
    path = Path(run(replace(config, energy="none"), tmp_path)["run_dir"])
    found = courses(path)
    assert list(found["alignment"]) == ["layer 1", "layer 2", "layer 3"]
    assert list(found["CKA"]) == ["level 0", "level 1", "level 2"]
    assert all(len(values) == 2 for kind in found.values() for values in kind.values())
    _, model, (_, _, test) = trained(path, torch.device("cpu"))
    assert isinstance(model, CounterCurrent)
    inputs, targets = next(iter(test.in_order(100)))
    assert isinstance(inputs, Tensor)
    planes, maps = features(model, inputs, targets)
    paired = [linear_cka(a, b) for a, b in model.paired_activations(inputs, targets)]
    torch.testing.assert_close(maps.diagonal(), torch.stack(paired))
    for samples, templates in planes:
        assert samples.shape == templates.shape == (100, 2)
        assert torch.equal(templates[targets == 3][0], templates[targets == 3][-1])
    pytest.importorskip("matplotlib")
    draw_courses(found, tmp_path / "courses.png")
    draw_features(planes, maps, targets, tmp_path / "features.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("courses", "features"))


def test_a_run_without_diagnostics_has_no_courses(tmp_path: Path) -> None:
    config = resolve("ccl", "digits", "mlp-elu:2x16", preset="none", training={"passes": 1})
    path = Path(run(replace(config, energy="none"), tmp_path)["run_dir"])
    with pytest.raises(CheckpointError, match="--diagnose"):
        courses(path)
