"""Mono-Forward: the twelve tests of its specification, and what its options promise."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bpfree.algorithms import Backprop, MonoForward
from bpfree.algorithms._cross_entropy import encode_targets
from bpfree.algorithms.learner import Trial
from bpfree.algorithms.mono_forward import SCHEDULES, classifier_errors, linear_relu_gradients
from bpfree.errors import UsageError
from bpfree.networks import cnn, dropout_layers, mlp
from tests.reference import mono_forward as reference

LR = 0.05


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def blocks(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU()).to(dtype)


def batch(size: int = 9, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 5, dtype=dtype), torch.randint(3, (size,))


def learner(dtype: torch.dtype = torch.float64, **options: object) -> MonoForward:
    return MonoForward(blocks(dtype), 3, **{"optimizer": sgd, **options}).to(dtype)  # type: ignore[arg-type]


def arrays(model: MonoForward) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    def copies(pattern: str) -> list[np.ndarray]:
        named = dict(model.named_parameters())
        return [named[pattern.format(i)].detach().double().numpy().copy() for i in range(3)]

    return copies("network.{}.0.weight"), copies("network.{}.0.bias"), copies("heads.{}.linear.weight")


def closed_form(x, W, b, M, y):
    """The implementation's own formulas on NumPy arrays: loss, dM, dW, db."""
    x, W, b, M = (torch.as_tensor(v, dtype=torch.float64) for v in (x, W, b, M))
    y = torch.as_tensor(y)
    a = F.relu(x @ W.T + b)
    loss, D = classifier_errors(M, a, encode_targets(y, len(M), torch.float64))
    dW, db, dM = linear_relu_gradients(M, x, a, D)
    return loss.item(), dM.numpy(), dW.numpy(), db.numpy()


# 1. the specification's example, worked out by hand there


def test_example_of_the_specification() -> None:
    x, W, b = [[1.0, 2.0]], [[1.0, 0.0], [0.0, -1.0], [1.0, 1.0]], [0.0, 0.0, 0.0]
    M = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    loss, dM, dW, _ = closed_form(x, W, b, M, [0])
    assert loss == pytest.approx(2.1269280, abs=1e-7)
    np.testing.assert_allclose(dM, [[-0.8807971, 0, -2.6423912], [0.8807971, 0, 2.6423912]], atol=1e-7)
    np.testing.assert_allclose(dW, [[-0.8807971, -1.7615942], [0, 0], [0.8807971, 1.7615942]], atol=1e-7)


# 2. finite differences


@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_finite_differences(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, W, b, M = (generator.normal(size=shape) for shape in ((4, 3), (5, 3), (5,), (3, 5)))
    y = generator.integers(3, size=4)
    assert np.abs(x @ W.T + b).min() > 1e-4, "inputs sit on the kink of ReLU; the test needs another seed"
    _, dM, dW, db = closed_form(x, W, b, M, y)

    def loss() -> float:
        return reference.layer(x, W, b, M, y)[1]

    for values, gradient in ((M, dM), (W, dW), (b, db)):
        numeric = np.zeros_like(values)
        for index in np.ndindex(values.shape):
            kept = values[index]
            values[index] = kept + 1e-6
            up = loss()
            values[index] = kept - 1e-6
            numeric[index] = (up - loss()) / 2e-6
            values[index] = kept
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-9)


# 3. closed form, NumPy and autograd agree, over whole steps of all layers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_steps_equal_the_numpy_reference(dtype: torch.dtype, tolerance: float) -> None:
    model = learner(dtype)
    x, y = batch(dtype=dtype)
    weights, biases, projections, losses = reference.train(
        x.double().numpy(), y.numpy(), *arrays(model), lr=LR, steps=5
    )
    for expected in losses:
        metrics = model.step((x, y))
        assert [value.item() for value in metrics.values()] == pytest.approx(expected, abs=tolerance)
    for got, expected in zip(arrays(model), (weights, biases, projections), strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


class Opaque(nn.Module):
    """Hides a block's structure, so that it has to learn by autograd."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_closed_form_equals_autograd() -> None:
    model = learner()
    hidden = copy.deepcopy(model)
    twin = MonoForward([Opaque(block) for block in hidden.blocks()], 3, optimizer=sgd, input_shape=(5,)).double()
    twin.heads.load_state_dict(model.heads.state_dict())
    x, y = batch()
    for _ in range(3):
        model.step((x, y))
        twin.step((x, y))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "pass_on"), [("simultaneous", "pre"), ("simultaneous", "post"), ("sequential", None)]
)
def test_closed_form_equals_autograd_behind_dropout(schedule: str, pass_on: str | None) -> None:
    """Both draw the same masks, and inference draws none."""
    network = mlp((5,), (8, 8, 8), dropout=0.5)
    options: dict[str, Any] = {"optimizer": sgd, "schedule": schedule, "pass_on": pass_on, "input_shape": (5,)}
    model = MonoForward(network, 3, **options).double()
    twin = MonoForward([Opaque(block) for block in copy.deepcopy(network)], 3, **options).double()
    twin.heads.load_state_dict(model.heads.state_dict())
    before = [p.clone() for p in model.parameters()]
    x, y = batch()
    for _ in range(3):
        for ours, theirs in zip(model.stages(), twin.stages(), strict=True):
            ours.step((ours.prepared(x), y))
            theirs.step((theirs.prepared(x), y))
    for a, b, c in zip(model.parameters(), twin.parameters(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert not torch.equal(a, c)
    assert all(layer.stream.count for layer in dropout_layers(model))
    assert torch.equal(model.scores(x), model.scores(x))


# 4. locality: of parameters and of labels (isolation for all rules is in test_conformance.py)


def test_later_labels_do_not_reach_earlier_layers() -> None:
    model = learner(schedule="sequential")
    first, second, _ = model.stages()
    x, y = batch()
    reference_model = copy.deepcopy(model)
    reference_model.stages()[0].step((x, y))
    first.step((x, y))
    second.step((second.prefix(x), (y + 1) % 3))  # type: ignore[misc]
    for a, b in zip(model.network[0].parameters(), reference_model.network[0].parameters(), strict=True):
        assert torch.equal(a, b)


# 5. no graph: what autograd keeps does not grow with depth


@pytest.mark.parametrize("opaque", [False, True], ids=["closed form", "autograd"])
def test_saved_tensors_do_not_grow_with_depth(opaque: bool) -> None:
    def peak(depth: int) -> int:
        layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(depth)]
        model = MonoForward([Opaque(b) if opaque else b for b in layers], 3, input_shape=(16,))
        alive, most = 0, 0

        class Kept:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal alive, most
                self.tensor, self.size = tensor, tensor.nbytes
                alive += self.size
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            model.step((torch.randn(32, 16), torch.randint(3, (32,))))
        return most

    shallow, deep = peak(2), peak(8)
    assert shallow == deep
    assert (shallow > 0) == opaque


# 6. one hidden layer is back-propagation with a bias-free output layer


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_one_layer_equals_backprop(optimizer: str) -> None:
    torch.manual_seed(1)
    local = MonoForward(nn.Sequential(nn.Linear(5, 8), nn.ReLU()), 3, optimizer=optimizer, lr=1e-2).double()
    globally = Backprop(
        nn.Sequential(nn.Linear(5, 8), nn.ReLU()), 3, optimizer=optimizer, lr=1e-2, readout="goodness"
    ).double()
    globally.network.load_state_dict(local.network.state_dict())
    globally.readout.load_state_dict(local.heads[0].state_dict())
    for _ in range(20):
        x, y = batch()
        local.step((x, y))
        globally.step((x, y))
    x, _ = batch()
    torch.testing.assert_close(local.scores(x), globally.scores(x), rtol=0, atol=1e-10)


# 7. a small step lowers every loss


def test_every_loss_falls() -> None:
    model = learner(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    x, y = batch(64)
    before = model.step((x, y))
    after = model.step((x, y))
    # later layers see inputs that moved too, but by a step this small the losses fall all the same
    assert all(after[name] < before[name] for name in before)


# 8. with M = 0 nothing is known yet


def test_loss_at_zero_projection_is_log_of_classes() -> None:
    generator = np.random.default_rng(0)
    x, W, b = generator.normal(size=(6, 4)), generator.normal(size=(5, 4)), generator.normal(size=5)
    loss, dM, dW, db = closed_form(x, W, b, np.zeros((10, 5)), generator.integers(10, size=6))
    assert loss == pytest.approx(math.log(10), rel=1e-12)
    assert not dW.any()
    assert not db.any()
    assert np.abs(dM).max() > 0


# 9. mean reduction


def test_doubling_the_batch_changes_nothing() -> None:
    once, twice = learner(), None
    twice = copy.deepcopy(once)
    x, y = batch()
    once.step((x, y))
    twice.step((torch.cat([x, x]), torch.cat([y, y])))
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


# 10. sequential schedule


def test_sequential_stages_leave_the_others_alone() -> None:
    model = learner(schedule="sequential", optimizer="adam")
    stages = model.stages()
    x, y = batch()
    stages[0].step((x, y))
    first = copy.deepcopy((model.network[0].state_dict(), stages[0].optimizers[0].state_dict()["state"]))
    for stage in stages[1:]:
        stage.step((stage.prefix(x), y))  # type: ignore[misc]
    state = stages[0].optimizers[0].state_dict()["state"]
    for name, value in model.network[0].state_dict().items():
        assert torch.equal(value, first[0][name])
    for index, entries in first[1].items():
        assert all(torch.equal(state[index][key], value) for key, value in entries.items())


def test_prefix_is_frozen_and_in_evaluation_mode() -> None:
    model = MonoForward(cnn((1, 8, 8), (4, 4), batch_norm=True), 3, schedule="sequential", input_shape=(1, 8, 8))
    prefix = model.stages()[1].prefix
    assert prefix is not None
    x = torch.randn(6, 1, 8, 8)
    statistics = model.network[0][3].running_mean.clone()
    alone, together = prefix(x[:1]), prefix(x)
    assert not together.requires_grad
    assert torch.equal(statistics, model.network[0][3].running_mean)
    torch.testing.assert_close(alone, together[:1])  # batch statistics would make them differ


def test_sequential_refuses_the_plain_step() -> None:
    with pytest.raises(UsageError, match=r"learner\.stages\(\)"):
        learner(schedule="sequential").step(batch())


# 11. inference


def test_sums_over_one_layer_equal_last() -> None:
    models = [
        MonoForward(nn.Sequential(nn.Linear(5, 8), nn.ReLU()), 3, inference=mode).double()
        for mode in ("last", "sum_logits", "sum_probs")
    ]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    x, _ = batch(50)
    last, logits, probabilities = (model.scores(x) for model in models)
    assert torch.equal(last, logits)
    torch.testing.assert_close(probabilities, last.log_softmax(1))


def test_scaling_one_goodness_matters_to_the_sum_only() -> None:
    x, _ = batch(400)
    changed = {}
    for mode in ("last", "sum_logits", "sum_probs"):
        model = learner(inference=mode)
        before = model.scores(x).argmax(1)
        with torch.no_grad():
            model.heads[-1].linear.weight.mul_(30)
        changed[mode] = not torch.equal(before, model.scores(x).argmax(1))
    assert changed == {"last": False, "sum_logits": True, "sum_probs": True}


def test_sum_is_the_sum_of_what_the_layers_say() -> None:
    model = learner(inference="sum_logits")
    x, _ = batch()
    weights, biases, projections = arrays(model)
    a, total = x.numpy(), 0.0
    for W, b, M in zip(weights, biases, projections, strict=True):
        a = np.maximum(a @ W.T + b, 0)
        total = total + a @ M.T
    np.testing.assert_allclose(model.scores(x).numpy(), total, atol=1e-12)


# 12. with the activations fixed, M solves a convex problem


def test_projection_reaches_the_convex_optimum() -> None:
    x, y = torch.randn(200, 4, dtype=torch.float64), torch.randint(3, (200,))
    # parameters come as W, b, M: this optimiser leaves W and b alone
    model = MonoForward(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU()).double(), 3, optimizer=lambda ps: torch.optim.Adam(ps[2:], lr=0.05)
    ).double()
    a = model.network[0](x).detach()
    M = nn.Parameter(torch.zeros(3, 6, dtype=torch.float64))
    solver = torch.optim.LBFGS([M], max_iter=1000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(a @ M.T, y)
        loss.backward()
        return loss

    solver.step(closure)
    for _ in range(3000):
        loss = model.step((x, y))["block 0 loss"]
    assert loss.item() == pytest.approx(closure().item(), abs=1e-4)


# options


def test_post_passes_on_what_the_updated_block_computes() -> None:
    pre, post = learner(pass_on="pre"), None
    post = MonoForward(copy.deepcopy(pre.network), 3, optimizer=sgd, pass_on="post").double()
    post.heads.load_state_dict(pre.heads.state_dict())
    x, y = batch()
    weights, biases, projections = arrays(pre)
    losses = []
    a = x.numpy()
    for W, b, M in zip(weights, biases, projections, strict=True):
        _, loss, _, dW, db = reference.layer(a, W, b, M, y.numpy())
        losses.append(loss)
        a = np.maximum(a @ (W - LR * dW).T + b - LR * db, 0)
    assert [v.item() for v in post.step((x, y)).values()] == pytest.approx(losses, abs=1e-9)
    assert pre.step((x, y))["block 2 loss"].item() != pytest.approx(losses[2], abs=1e-9)


def test_input_projection_is_a_logistic_regression_on_the_input() -> None:
    model = learner(input_projection=True, inference="sum_logits")
    x, y = batch()
    M = model.heads[0].linear.weight.detach().numpy().copy()
    P = reference.softmax(x.numpy() @ M.T)
    P[np.arange(9), y.numpy()] -= 1
    plain = learner()
    plain.load_state_dict(
        {
            k.replace("heads.0", "x")
            .replace("heads.1", "heads.0")
            .replace("heads.2", "heads.1")
            .replace("heads.3", "heads.2"): v
            for k, v in model.state_dict().items()
            if not k.startswith("heads.0") and k != "_extra_state"
        },
        strict=False,
    )
    model.step((x, y))
    plain.step((x, y))
    np.testing.assert_allclose(
        model.heads[0].linear.weight.detach().numpy(), M - LR * (P / 9).T @ x.numpy(), atol=1e-12
    )
    for a, b in zip(model.network.parameters(), plain.network.parameters(), strict=True):
        assert torch.equal(a, b)  # M_0 touches nothing else
    assert [stage.name for stage in learner(input_projection=True, schedule="sequential").stages()] == [
        "input",
        "block 0",
        "block 1",
        "block 2",
    ]


def test_linear_layers_without_bias() -> None:
    model = MonoForward([nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU())], 3, optimizer=sgd).double()
    W = model.network[0][0].weight.detach().numpy().copy()
    M = model.heads[0].linear.weight.detach().numpy().copy()
    x, y = batch()
    model.step((x, y))
    _, _, dM, dW, _ = reference.layer(x.numpy(), W, 0.0, M, y.numpy())
    np.testing.assert_allclose(model.network[0][0].weight.detach().numpy(), W - LR * dW, atol=1e-12)
    np.testing.assert_allclose(model.heads[0].linear.weight.detach().numpy(), M - LR * dM, atol=1e-12)


def test_what_the_user_froze_stays_as_it_is() -> None:
    network = blocks()
    network[0].weight.requires_grad_(False)
    model = MonoForward(network, 3, lr=0.1).double()
    before = copy.deepcopy(model)
    model.step(batch())
    changed = {
        name
        for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {name for name, _ in model.named_parameters()} - {"network.0.0.weight"}


@pytest.mark.parametrize(("pool", "features"), [("flatten", 4 * 4 * 4), ("gap", 4), ("adaptive", 4 * 4)])
def test_head_sizes_on_feature_maps(pool: str, features: int) -> None:
    model = MonoForward(cnn((1, 8, 8), (4,)), 3, head_pool=pool, input_shape=(1, 8, 8))
    assert model.heads[0].weight.shape == (3, features)
    assert model.scores(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_flattened_heads_of_the_papers_cnn_have_the_published_sizes() -> None:
    model = MonoForward(cnn((3, 32, 32)), 10, input_shape=(3, 32, 32))
    assert [head.weight.shape[1] for head in model.heads] == [16384, 8192, 4096, 2048]


def test_parameter_count_equals_the_published_one() -> None:
    # 3 x 2000 on CIFAR-10: hidden 14,150,000; all projections incl. M_0 90,720 (specification, section 9)
    model = MonoForward(mlp((3, 32, 32), (2000,) * 3), 10, input_projection=True, input_shape=(3, 32, 32))
    assert sum(p.numel() for p in model.network.parameters()) == 14_150_000
    assert sum(p.numel() for p in model.heads.parameters()) == 90_720


@pytest.mark.parametrize(("option", "value"), [("schedule", "serial"), ("pass_on", "pro"), ("inference", "lst")])
def test_unknown_options_are_refused(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"unknown {option}"):
        learner(**{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sequential", "pass_on": "post"}, "pass_on would have no effect with schedule=sequential"),
        ({"schedule": "sequential", "pass_on": "pre"}, "pass_on would have no effect with schedule=sequential"),
        ({"head_pool": "gap"}, "head_pool would have no effect where there are no feature maps"),
        ({"head_pool": "gap", "input_projection": True}, "head_pool would have no effect"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        learner(**options)


def test_vectors_are_flat_and_images_are_maps_to_their_projection() -> None:
    learner(head_pool="flatten")
    network = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.ReLU())
    model = MonoForward(network, 3, head_pool="gap", input_projection=True, input_shape=(2, 4, 4))
    assert [head.weight.shape for head in model.heads] == [(3, 2), (3, 8)]


@pytest.mark.parametrize(("fixed", "schedules"), [({}, SCHEDULES), ({"pass_on": "post"}, ("simultaneous",))])
def test_nothing_is_searched_that_would_be_refused(fixed: dict[str, Any], schedules: tuple[str, ...]) -> None:
    trial = create_autospec(Trial, instance=True)
    MonoForward.search_space(trial, fixed)
    trial.suggest_categorical.assert_called_once_with("schedule", schedules)
