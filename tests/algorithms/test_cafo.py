"""CaFo: the fifteen tests of its specification, and what its options promise."""

from __future__ import annotations

import copy
import hashlib
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bpfree import data
from bpfree.algorithms import Backprop, CaFo
from bpfree.algorithms import _cafo_ridge as ridge_module
from bpfree.algorithms._cafo_predictors import CrossEntropy, Predictor, Predictors, SparsemaxLoss, sparsemax
from bpfree.algorithms._cafo_ridge import RidgeStatistics
from bpfree.algorithms._cafo_training import RIDGES
from bpfree.algorithms._cross_entropy import encode_targets
from bpfree.data import Batches
from bpfree.errors import TrainingError, UsageError
from bpfree.experiments import Trainer, TrainingConfig
from bpfree.experiments.config import presets, resolve
from bpfree.experiments.run import load_batches, run
from bpfree.experiments.stepper import numerics
from bpfree.networks import block_output_shapes, build_network, cnn, mlp
from tests.reference import cafo as reference
from tests.reference import direct_feedback

CPU = torch.device("cpu")


def samples(count: int, features: int, outputs: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(count, features, dtype=torch.float64) + 1, torch.randn(count, outputs, dtype=torch.float64)


def solved(x: Tensor, y: Tensor, ridges: list[float], *, centred: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(R, D, C) weights and (R, C) biases."""
    statistics = RidgeStatistics(x.shape[1], y.shape[1])
    statistics.add(x, y)
    weights, biases = statistics.problem(CPU, centred=centred).solve(ridges)
    return weights.mT.numpy(), biases.numpy()


def batch(size: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5, dtype=dtype), torch.randint(3, (size,))


def blocks() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU()).double()


def learner(**options: Any) -> CaFo:
    torch.manual_seed(0)
    return CaFo(blocks(), 3, **options).double()


def features(model: CaFo, x: Tensor) -> list[np.ndarray]:
    found, signal = [], x
    with torch.no_grad():
        for block in model.blocks():
            signal = block(signal)
            found.append(signal.flatten(1).numpy())
    return found


def predictors(model: CaFo) -> list[tuple[np.ndarray, np.ndarray]]:
    """(D, C) weights and (C,) bias of each predictor."""
    return [
        (each.weight.detach().numpy().T.copy(), each.bias.detach().numpy())
        for group in model._groups
        for each in group.predictors.each
    ]


def images(count: int = 60, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    x = torch.randn(count, 2, size, size, generator=generator) + y[:, None, None, None]
    return x, y


# 1. ridge regression against least squares on the stacked system


@pytest.mark.parametrize(("count", "features"), [(50, 8), (8, 50), (20, 20)], ids=["primal", "dual", "square"])
@pytest.mark.parametrize("centred", [True, False])
def test_ridge_equals_stacked_least_squares(count: int, features: int, centred: bool) -> None:
    x, y = samples(count, features)
    ridges = [1e-4, 0.03, 2.0]
    weights, biases = solved(x, y, ridges, centred=centred)
    for W, b, ridge in zip(weights, biases, ridges, strict=True):
        expected = reference.ridge(x.numpy(), y.numpy(), ridge, centred=centred)
        np.testing.assert_allclose(W, expected[0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(b, expected[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("count", "features"), [(30, 8), (8, 30)], ids=["primal", "dual"])
def test_ridges_beside_zero_are_solved_as_by_themselves(count: int, features: int) -> None:
    """One eigendecomposition serves all of them, where by themselves each is factorised."""
    x, y = samples(count, features)
    ridges = [10.0**exponent for exponent in range(-4, 1)]
    for a, b in zip(solved(x, y, ridges), solved(x, y, [0.0, *ridges]), strict=True):
        np.testing.assert_allclose(a, b[1:], rtol=0, atol=1e-10)


# 2. without a penalty


def test_no_penalty_is_least_squares() -> None:
    x, y = samples(40, 6)
    weights, _ = solved(x, y, [0.0], centred=False)
    np.testing.assert_allclose(weights[0], np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0], atol=1e-10)


@pytest.mark.parametrize("count", [40, 5], ids=["dependent features", "more features than samples"])
def test_no_penalty_on_dependent_features_is_the_solution_of_minimum_norm(count: int) -> None:
    x, y = samples(count, 4)
    x = torch.cat([x, x @ torch.randn(4, 6, dtype=torch.float64)], 1)
    weights, _ = solved(x, y, [0.0], centred=False)
    expected = np.linalg.pinv(x.numpy(), rcond=1e-10) @ y.numpy()
    np.testing.assert_allclose(weights[0], expected, atol=1e-8)


# 3. optimality


@pytest.mark.parametrize(("count", "features"), [(60, 20), (20, 60)])
def test_gradient_is_zero_at_the_solution(count: int, features: int) -> None:
    x, y = samples(count, features)
    (W,), _ = solved(x, y, [0.1])
    Xc, Yc = (part.numpy() - part.numpy().mean(0) for part in (x, y))
    gradient = Xc.T @ (Xc @ W - Yc) + count * 0.1 * W
    assert np.linalg.norm(gradient) <= 1e-9 * np.linalg.norm(Xc.T @ Yc)


# 4. streaming


@pytest.mark.parametrize("sizes", [[70], [1] * 70, [32, 32, 6], [7, 60, 3]])
@pytest.mark.parametrize("panel", [3, 1024])
def test_any_partition_in_any_order_is_the_same_problem(
    sizes: list[int], panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge_module, "PANEL", panel)
    x, y = samples(70, 10)
    expected = reference.ridge(x.numpy(), y.numpy(), 0.01)
    order = torch.randperm(70)
    statistics = RidgeStatistics(10, 3)
    for chosen in order.split(sizes):
        statistics.add(x[chosen], y[chosen])
    weights, biases = statistics.problem(CPU).solve([0.01])
    np.testing.assert_allclose(weights[0].T, expected[0], rtol=0, atol=1e-11)
    np.testing.assert_allclose(biases[0], expected[1], rtol=0, atol=1e-11)


def test_memory_does_not_grow_with_the_data() -> None:
    statistics = RidgeStatistics(10, 3)

    def kept() -> int:
        state = statistics.get_extra_state()
        return sum(x.numel() for rows in state["rows"] for x in rows) + sum(x.numel() for x in state["sums"].values())

    sizes = []
    for _ in range(12):
        statistics.add(*samples(4, 10))
        sizes.append(kept())
    assert sizes[:2] == [4 * 13, 8 * 13]  # rows as they are
    assert set(sizes[2:]) == {10 * 10 + 10 * 3 + 10 + 3}


def test_what_has_been_gathered_survives_a_checkpoint() -> None:
    x, y = samples(30, 10)
    for cut in (6, 20):  # in rows, in sums
        straight, resumed = RidgeStatistics(10, 3), RidgeStatistics(10, 3)
        straight.add(x[:cut], y[:cut])
        file = io.BytesIO()
        torch.save(straight.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for statistics in (straight, resumed):
            statistics.add(x[cut:], y[cut:])
        assert torch.equal(straight.problem(CPU).matrix, resumed.problem(CPU).matrix)


# 5. bias


def test_shifted_features_predict_the_same() -> None:
    x, y = samples(50, 6)
    shift = 10 * torch.randn(6, dtype=torch.float64)
    predictions = []
    for moved in (x, x + shift):
        (W,), (b,) = solved(moved, y, [0.1])
        predictions.append(moved.numpy() @ W + b)
    np.testing.assert_allclose(*predictions, rtol=0, atol=1e-10)


# 6. by hand


@pytest.mark.parametrize("ridge", [0.0, 0.3, 2.0])
def test_scalar(ridge: float) -> None:
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    (W,), _ = solved(x, x, [ridge], centred=False)
    assert W.item() == pytest.approx(5 / (5 + 2 * ridge), rel=1e-12)


# 7. gradients of cross-entropy and sparsemax predictors


@pytest.mark.parametrize("loss", ["ce", "sl"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_steps_equal_the_numpy_reference(loss: str, dtype: torch.dtype, tolerance: float) -> None:
    model = learner(loss=loss, optimizer="gd", lr=0.3).to(dtype)
    x, y = batch(dtype=dtype)
    weights = [(W.astype(np.float64), b.astype(np.float64)) for W, b in predictors(model)]
    stage = model.stages()[0]
    for _ in range(4):
        losses = []
        for index, (X, (W, b)) in enumerate(zip(features(model, x), weights, strict=True)):
            value, *weights[index] = reference.predictor_step(X.astype(np.float64), y.numpy(), W, b, lr=0.3, loss=loss)
            losses.append(value)
        metrics = stage.step((stage.prepared(x), y))
        assert [value.item() for value in metrics.values()] == pytest.approx(losses, abs=tolerance)
    for got, expected in zip(predictors(model), weights, strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_cross_entropy_gradient_equals_autograd() -> None:
    model = learner(loss="ce", optimizer="gd", lr=1.0)
    x, y = batch()
    step(model, x, y)  # away from zero
    (group,) = model._groups
    before = [parameter.detach().clone().requires_grad_() for parameter in group.predictors.parameters()]
    for X, weight, bias in zip(features(model, x), before[::2], before[1::2], strict=True):
        F.cross_entropy(torch.from_numpy(X) @ weight.T + bias, y).backward()
    step(model, x, y)
    for start, parameter in zip(before, group.predictors.parameters(), strict=True):
        torch.testing.assert_close(start.detach() - parameter.detach(), start.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_weights_know_nothing_and_the_first_step_is_known(value: float) -> None:
    """The paper's code starts from ones, bpfree from zeros: no class is preferred, and the step is the same."""
    model = learner(loss="ce", optimizer="gd", lr=0.1, bias=False)
    (group,) = model._groups
    with torch.no_grad():
        for each in group.predictors.each:
            each.weight.fill_(value)
    x, y = batch()
    metrics = step(model, x, y)
    assert [loss.item() for loss in metrics.values()] == pytest.approx([math.log(3)] * 3, rel=1e-12)
    for X, W in zip(features(model, x), group.predictors.parameters(), strict=True):
        first = value - 0.1 * X.T @ (1 / 3 - reference.one_hot(y.numpy(), 3)) / 9
        np.testing.assert_allclose(W.detach().numpy().T, first, atol=1e-14)


# 8. cross-entropy of a predictor is convex


def test_descent_is_monotone_below_the_stability_limit() -> None:
    model = learner(loss="ce", bias=False, schedule="sequential")
    x, y = batch(200)
    X = features(model, x)[0]
    limit = 2 / np.linalg.eigvalsh(0.5 * X.T @ X / len(X)).max()
    model = learner(loss="ce", bias=False, schedule="sequential", optimizer="gd", lr=0.99 * limit)
    stage = model.stages()[0]
    losses = [stage.step((stage.prepared(x), y))["block 0 loss"].item() for _ in range(50)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01


def test_descent_with_decay_ends_where_newton_does() -> None:
    model = learner(loss="ce", bias=False, optimizer="gd", lr=1.0, weight_decay=0.05)
    x, y = batch(60)
    for _ in range(1500):
        step(model, x, y)
    for X, (W, _) in zip(features(model, x), unbiased(model), strict=True):

        def value(flat: np.ndarray, X: np.ndarray = X) -> float:
            P = reference.softmax(X @ flat.reshape(-1, 3))
            return float(-np.log(P[np.arange(60), y.numpy()]).mean() + 0.025 * flat @ flat)

        best = minimize(value, np.zeros(W.size), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}).x
        np.testing.assert_allclose(W.ravel(), best, atol=1e-5)


def unbiased(model: CaFo) -> list[tuple[np.ndarray, None]]:
    (group,) = model._groups
    return [(weight.detach().numpy().T, None) for weight in group.predictors.parameters()]


# 9. sparsemax


def test_sparsemax_example_of_the_specification() -> None:
    z = torch.tensor([[[0.1, 1.1, 0.2]]], dtype=torch.float64)
    p, tau = sparsemax(z)
    np.testing.assert_allclose(p[0, 0], [0, 0.95, 0.05], atol=1e-15)
    assert tau.item() == pytest.approx(0.15, rel=1e-12)
    loss, error = SparsemaxLoss().losses_and_errors(z, encode_targets(torch.tensor([1]), 3, torch.float64))
    assert loss.item() == pytest.approx(0.0025, rel=1e-9)
    np.testing.assert_allclose(error[0, 0], [0, -0.05, 0.05], atol=1e-15)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_sparsemax_is_the_projection_on_the_simplex(scale: float) -> None:
    z = scale * torch.randn(50, 5, dtype=torch.float64)
    z[:10] = z[:10].round()  # ties
    p = sparsemax(z)[0]
    np.testing.assert_allclose(p, [reference.sparsemax(row) for row in z.numpy()], atol=1e-12)
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(sparsemax(z + 7)[0], p)


def test_sparsemax_loss_is_differentiated_right() -> None:
    z, y = torch.randn(2, 30, 4, dtype=torch.float64), torch.randint(4, (30,))
    target_errors = encode_targets(y, 4, torch.float64)

    def losses(scores: np.ndarray) -> np.ndarray:
        return SparsemaxLoss().losses_and_errors(torch.as_tensor(scores), target_errors)[0].numpy()

    expected = [
        np.mean([reference.sparsemax_loss(z, label) for z, label in zip(part, y, strict=True)]) for part in z.numpy()
    ]
    np.testing.assert_allclose(losses(z.numpy()), expected, rtol=1e-12)
    error = SparsemaxLoss().losses_and_errors(z, target_errors)[1]
    for index in [(0, 3, 1), (1, 0, 0), (1, 29, 3)]:
        up, down = z.numpy().copy(), z.numpy().copy()
        up[index] += 1e-6
        down[index] -= 1e-6
        assert error[index].item() == pytest.approx((losses(up) - losses(down))[index[0]] / 2e-6, abs=1e-8)


# 10. shapes


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 28, 28), [6272, 6272, 4608]), ((3, 32, 32), [8192] * 3), ((3, 84, 84), [56448, 56448, 51200])],
)
def test_features_per_block(shape: tuple[int, ...], expected: list[int]) -> None:
    network = build_network("cnn:cafo", shape)
    assert [math.prod(maps) for maps in block_output_shapes(network, shape)] == expected
    if shape[-1] < 84:
        assert CaFo(network, 10, input_shape=shape)._groups[0].predictors.widths == tuple(expected)


# 11. frozen blocks


def fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("options", [{}, {"loss": "ce"}, {"loss": "sl", "schedule": "sequential"}])
def test_predictors_leave_the_blocks_alone(options: dict[str, Any]) -> None:
    x, y = images()
    model = CaFo(cnn((2, 8, 8), (4, 6), pool="max", batch_norm=True), 3, input_shape=(2, 8, 8), **options)
    train = Batches(x, y)
    model.prepare(train.in_order(32))
    before = fingerprint(model.network)
    model.prepare = lambda batches: None  # type: ignore[method-assign]
    Trainer(model, train, train, TrainingConfig(batch_size=16, epochs=2)).run()
    assert fingerprint(model.network) == before
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.network.parameters())
    assert all(W.any() for W, _ in predictors(model))


# 12. aggregation


def test_one_block_is_its_predictor() -> None:
    x, y = batch()
    for how in ("sum_prob", "sum_logit", "mean", "last"):
        torch.manual_seed(0)
        model = CaFo(nn.Sequential(nn.Linear(5, 8), nn.ReLU()), 3, ridge=0.1, aggregate=how).double()
        model.step((x, y))
        model.finish()
        ((W, b),) = predictors(model)
        z = features(model, x)[0] @ W + b
        expected = np.log(reference.softmax(z)) if how == "sum_prob" else z
        np.testing.assert_allclose(model.scores(x), expected, atol=1e-12)


def test_aggregates_differ_where_they_should() -> None:
    """One predictor that is very sure against two that lean the other way."""
    z = torch.tensor([[[9.0, 0.0]], [[0.0, 1.5]], [[0.0, 1.5]]])
    x = torch.zeros(1, 5, dtype=torch.float64)
    answers = {}
    for how in ("sum_prob", "sum_logit", "mean", "last"):
        model = learner(aggregate=how)
        for each, (scores,) in zip(model._groups[0].predictors.each, z, strict=True):
            each.bias.data.copy_(torch.tensor([*scores, -100]))
        answers[how] = model.scores(x)[0]
    assert {how: int(scores.argmax()) for how, scores in answers.items()} == {
        "sum_prob": 1,
        "sum_logit": 0,
        "mean": 0,
        "last": 1,
    }
    torch.testing.assert_close(answers["mean"] * 3, answers["sum_logit"])
    p = [1 / (1 + math.exp(9)), *[1 / (1 + math.exp(-1.5))] * 2]
    assert answers["sum_prob"][1].item() == pytest.approx(math.log(sum(p) / 3), rel=1e-9)


def test_sparsemax_predictors_are_summed_as_sparsemax() -> None:
    model = learner(loss="sl")
    bias = torch.tensor([[0.1, 1.1, 0.2], [2.0, 0.0, 0.0], [0.0, 0.3, 0.0]], dtype=torch.float64)
    for each, row in zip(model._groups[0].predictors.each, bias, strict=True):
        each.bias.data.copy_(row)
    expected = np.mean([reference.sparsemax(row) for row in bias.numpy()], axis=0)
    np.testing.assert_allclose(model.scores(torch.zeros(1, 5, dtype=torch.float64)).exp()[0], expected, atol=1e-12)


# 13. direct feedback alignment


def gd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)  # the change is the gradient


def test_alignment_equals_the_numpy_reference() -> None:
    model = learner(block_training="dfa", loss="ce", optimizer=gd)
    assert model.alignment is not None
    x, y = batch()
    before = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    layers = [f"network.{index}.0." for index in range(3)]
    _, expected, readout = direct_feedback.gradients(
        x.numpy(),
        y.numpy(),
        [before[f"{layer}weight"] for layer in layers],
        [before[f"{layer}bias"] for layer in layers],
        [
            model.alignment.feedback_0.numpy(),
            model.alignment.feedback_1.numpy(),
            before["alignment.readout.linear.weight"],
        ],
        before["alignment.readout.linear.weight"],
        before["alignment.readout.linear.bias"],
    )
    model.stages()[0].step((x, y))
    after = dict(model.named_parameters())
    for layer, gradients in zip([*layers, "alignment.readout.linear."], [*expected, readout], strict=True):
        for name, gradient in zip(("weight", "bias"), gradients, strict=True):
            change = before[layer + name] - after[layer + name].detach().numpy()
            np.testing.assert_allclose(change, gradient, rtol=1e-9, atol=1e-13)


def test_one_block_learns_as_by_back_propagation() -> None:
    """The last block has no feedback of its own: its B is the read-out's weight."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
    aligned = CaFo(copy.deepcopy(network), 3, block_training="dfa", loss="ce", optimizer=gd).double()
    globally = Backprop(network, 3, optimizer=gd).double()
    assert aligned.alignment is not None
    globally.readout.load_state_dict(aligned.alignment.readout.state_dict())
    x, y = batch()
    aligned.stages()[0].step((x, y))
    globally.step((x, y))
    for a, b in zip(aligned.network.parameters(), globally.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_feedback_is_the_only_way_into_a_block() -> None:
    """Without it lower blocks do not move, and what enters a block has no history."""
    model = learner(block_training="dfa", loss="ce", optimizer=gd)
    assert model.alignment is not None
    for feedback in (model.alignment.feedback_0, model.alignment.feedback_1):
        feedback.zero_()
    entered = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0].requires_grad))
    before = copy.deepcopy(model.network)
    model.stages()[0].step(batch())
    moved = [
        any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
        for old, new in zip(before, model.network, strict=True)
    ]
    assert moved == [False, False, True]
    assert not any(entered)


def test_aligned_blocks_are_trained_first_and_then_frozen() -> None:
    x, y = images()
    network = cnn((2, 8, 8), (4, 6), pool="max", batch_norm=True)
    model = CaFo(network, 3, block_training="dfa", loss="ce", input_shape=(2, 8, 8))
    states: dict[str, list[str]] = {}

    def note(record: dict[str, Any]) -> None:
        states.setdefault(record["stage"], []).append(fingerprint(model.network))

    before = fingerprint(model.network)
    part = Batches(x, y)
    Trainer(model, part, part, TrainingConfig(batch_size=16, epochs=2), on_epoch=note).run()
    assert list(states) == ["blocks", "predictors 0 to 1"]
    assert len({before, *states["blocks"]}) == 3
    assert set(states["predictors 0 to 1"]) == {states["blocks"][-1]}  # the best state, which was the last


# 14. batch normalisation


@pytest.mark.parametrize("mode", ["train_stats", "batch"])
def test_an_answer_depends_on_its_neighbours_in_batch_mode_only(mode: str) -> None:
    x, y = images()
    network = cnn((2, 8, 8), (4, 6), pool="max", batch_norm=True)
    model = CaFo(network, 3, bn_mode=mode, ridge=0.01, input_shape=(2, 8, 8))  # type: ignore[arg-type]
    model.prepare([(x, y)])
    model.step((x, y))
    model.finish()
    alone, together = model.scores(x[:10]), model.scores(x)[:10]
    assert torch.allclose(alone, together, atol=1e-5) == (mode == "train_stats")


def test_statistics_are_those_of_the_training_set() -> None:
    x, y = images(60)
    model = CaFo(cnn((2, 8, 8), (4, 6), pool="max", batch_norm=True), 3, input_shape=(2, 8, 8))
    model.eval()
    model.prepare([(x, y)])  # which normalises by the biased variance: n / (n - 1) is 1.001 here
    assert not any(module.training for module in model.modules())
    signal = x
    for block in model.blocks():
        pooled = block[:3](signal)
        norm = block[3]
        torch.testing.assert_close(norm.running_mean, pooled.mean((0, 2, 3)), rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(norm.running_var, pooled.var((0, 2, 3)), rtol=2e-3, atol=1e-3)
        signal = block(signal)
        torch.testing.assert_close(signal.mean((0, 2, 3)), torch.zeros(len(norm.weight)), rtol=0, atol=1e-3)


# 15. TF32


class Products(TorchDispatchMode):
    """Notes how float32 matrix products may be computed while they are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in (torch.ops.aten.mm.default, torch.ops.aten.baddbmm.default, torch.ops.aten.bmm.default):
            self.seen.append((args[-1].dtype, torch.get_float32_matmul_precision()))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("gram", ["float64", "float32"])
def test_products_of_the_closed_form_are_exact(gram: str) -> None:
    model = learner(ridge=0.1, gram=gram).float()
    x, y = batch(40, torch.float32)
    with numerics("tf32"), Products() as spy:
        model.step((x, y))
        assert {dtype for dtype, _ in spy.seen} == {getattr(torch, gram)}
        assert {precision for dtype, precision in spy.seen if dtype == torch.float32} <= {"highest"}
        model.finish()
        model.scores(x)
        assert torch.get_float32_matmul_precision() == "high"
    assert spy.seen[-1] == (torch.float32, "highest")  # the scores


@pytest.mark.parametrize("trained_here", [True, False])
def test_predictors_that_learn_in_steps_answer_in_the_precision_of_the_run(trained_here: bool) -> None:
    """Also those that another process has trained, whose weights want no gradient where they are put together."""
    model = learner(loss="ce").float()
    model.predictors.requires_grad_(trained_here)
    x, _ = batch(40, torch.float32)
    with numerics("tf32"), Products() as spy:
        model.scores(x)
    assert len(spy.seen) == 3
    assert set(spy.seen) == {(torch.float32, "high")}


@pytest.mark.gpu
def test_tf32_would_spoil_the_gram_matrix_and_is_kept_out() -> None:
    x, y = torch.rand(4000, 256, device="cuda"), torch.rand(4000, 3, device="cuda")
    exact = x.double().T @ x.double()
    with numerics("tf32"):
        rounded = x.T @ x
        statistics = RidgeStatistics(256, 3, "float32")
        statistics.add(x, y)
        gram = statistics.problem(x.device, centred=False).matrix

    def worst(found: Tensor) -> float:
        return ((found - exact).abs() / exact).max().item()

    assert worst(rounded) > 1e-5
    assert worst(gram) < 1e-6


def test_float32_products_are_summed_in_float64() -> None:
    x, y = (part.float() for part in samples(5000, 20))
    matrices = []
    for precision in ("float64", "float32"):
        statistics = RidgeStatistics(20, 3, precision)
        for chosen in torch.arange(5000).split(100):
            statistics.add(x[chosen], y[chosen])
        matrices.append(statistics.problem(CPU, centred=False).matrix)
    assert matrices[1].dtype == torch.float64
    torch.testing.assert_close(*matrices, rtol=2e-7, atol=1e-3)
    assert not torch.equal(*matrices)


# predictors side by side


def step(model: CaFo, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    metrics = {}
    for stage in model.stages():
        metrics.update(stage.step((stage.prepared(x), y)))
    return metrics


@pytest.mark.parametrize("loss", ["mse", "ce", "sl"])
@pytest.mark.parametrize("bias", [True, False])
def test_together_equals_one_by_one(loss: str, bias: bool) -> None:
    rate = {} if loss == "mse" else {"lr": 0.01, "weight_decay": 0.01}
    together = learner(loss=loss, bias=bias, **rate)
    alone = learner(loss=loss, bias=bias, schedule="sequential", **rate)
    data = [batch(20) for _ in range(30)]
    for x, y in data:
        for model in (together, alone):
            step(model, x, y)
    for model in (together, alone):
        for stage in model.stages():
            if stage.finish is not None:
                stage.finish(data[:3])
    x, _ = batch(50)
    assert len(alone.stages()) == 3
    torch.testing.assert_close(together.scores(x), alone.scores(x), rtol=0, atol=1e-12)
    assert not torch.equal(together.scores(x), learner(loss=loss, bias=bias).scores(x))


def test_packed_features_come_back_as_they_were() -> None:
    predictors = Predictors((5, 16, 17), 3, bias=True, exact=False).double()
    parts = [torch.randn(4, width, dtype=torch.float64) for width in (5, 16, 17)]
    for members in (range(3), range(1, 3), range(1)):
        packed = predictors.pack([parts[number] for number in members])
        assert packed.shape == (4, predictors.packed_width(members))
        found = predictors.unpack(packed, members)
        assert all(torch.equal(part, parts[number]) for number, part in zip(members, found, strict=True))


# the ridge that is chosen


def test_ridge_is_the_best_on_validation_data() -> None:
    model = learner()
    train, validation = [batch(20) for _ in range(4)], [batch(30), batch(11)]
    for x, y in train:
        model.step((x, y))
    report = model.finish(iter(validation))
    x, y = (torch.cat(parts) for parts in zip(*train, strict=True))
    xv, yv = (torch.cat(parts) for parts in zip(*validation, strict=True))
    for index, (X, V) in enumerate(zip(features(model, x), features(model, xv), strict=True)):
        unit = X.var(axis=0).mean()
        errors = []
        for ridge in RIDGES:
            W, b = reference.ridge(X, reference.one_hot(y.numpy(), 3), ridge * unit)
            errors.append(((V @ W + b - reference.one_hot(yv.numpy(), 3)) ** 2).sum() / 41)
        best = int(np.argmin(errors))
        assert report[f"block {index} ridge"].item() == pytest.approx(RIDGES[best] * unit, rel=1e-6)
        assert report[f"block {index} validation squared error"].item() == pytest.approx(errors[best], rel=1e-9)
        W, _ = reference.ridge(X, reference.one_hot(y.numpy(), 3), RIDGES[best] * unit)
        np.testing.assert_allclose(predictors(model)[index][0], W, atol=1e-9)


def test_finishing_forgets_what_was_collected() -> None:
    model = learner(ridge=0.1)
    model.step(batch())
    model.finish()
    with pytest.raises(UsageError, match="nothing to solve"):
        model.finish()


def test_there_is_no_answer_before_the_solution() -> None:
    model, data = learner(ridge=0.1), batch()
    model.step(data)
    with pytest.raises(UsageError, match=r"call finish\(\) after the pass"):
        model.scores(data[0])
    model.finish()
    loaded = learner(ridge=0.1)
    loaded.step(data)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.scores(data[0]), model.scores(data[0]))


# in the fit loop


def test_closed_form_takes_one_pass_and_every_sample() -> None:
    """Neither epochs nor an incomplete last batch matter; the oracle is least squares on everything."""
    x, y = torch.randn(53, 5), torch.randint(3, (53,))
    model = CaFo(mlp((5,), (8, 6)), 3, ridge=0.02, input_shape=(5,))
    records: list[dict[str, Any]] = []
    part = Batches(x, y)
    progress = Trainer(model, part, part, TrainingConfig(batch_size=10, epochs=7), on_epoch=records.append).run()
    for (W, b), X in zip(predictors(model), features(model, x), strict=True):
        expected = reference.ridge(X.astype(np.float64), reference.one_hot(y.numpy(), 3), 0.02)
        np.testing.assert_allclose(W, expected[0], atol=1e-5)
        np.testing.assert_allclose(b, expected[1], atol=1e-5)
    assert len(records) == 1
    assert (progress.steps, progress.finished[0]["epochs"], progress.finished[0]["updates"]) == (6, 1, 6)
    right = (model.scores(x).argmax(1) == y).float().mean().item()
    assert records[0]["validation_accuracy"] == pytest.approx(100 * right)
    assert records[0]["block 1 ridge"] == pytest.approx(0.02)


def test_products_of_a_pass_are_counted() -> None:
    """Two forward passes (none settles statistics here), the upper half of each Gram matrix and the cross products; at
    the end the biases, mean(Y) - W mean(X)."""
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    part = Batches(x, y)
    model = CaFo(mlp((5,), (8, 6)), 3, ridge=0.02, input_shape=(5,))
    progress = Trainer(model, part, part, TrainingConfig(batch_size=10)).run()
    forward = 2 * (5 * 8 + 8 * 6)
    sums = 2 * (8 * 8 + 6 * 6 + 3 * (8 + 6))
    assert progress.flops == 40 * (forward + sums) + 2 * 3 * (8 + 6)


def test_augmented_images_add_up_over_the_epochs() -> None:
    x, y = images(40)
    model = CaFo(cnn((2, 8, 8), (4,)), 3, ridge=0.01, input_shape=(2, 8, 8))
    train = Batches(x, y, augmentation="crop-flip")
    progress = Trainer(model, train, Batches(x, y), TrainingConfig(batch_size=16, epochs=3), seed=5).run()
    seen = [train.epoch(train.draw(5, 0, epoch), 40) for epoch in range(3)]
    inputs, targets = (torch.cat(parts) for parts in zip(*(next(epoch) for epoch in seen), strict=True))
    assert not torch.equal(inputs[:40].sort(0).values, inputs[40:80].sort(0).values)
    W, _ = reference.ridge(features(model, inputs)[0].astype(np.float64), reference.one_hot(targets.numpy(), 3), 0.01)
    np.testing.assert_allclose(predictors(model)[0][0], W, atol=1e-4)
    assert progress.steps == 9


@pytest.mark.parametrize("question", [1, 3, 4, 5])
def test_an_interrupted_pass_goes_on_bit_for_bit(question: int) -> None:
    from bpfree.experiments.train import InterruptedRunError

    x, y = images(70)
    train, validation = Batches(x, y), Batches(*images(20, seed=1))

    def make() -> CaFo:
        torch.manual_seed(0)
        return CaFo(cnn((2, 8, 8), (4, 6), pool="max", batch_norm=True), 3, input_shape=(2, 8, 8))

    straight = make()
    whole = Trainer(straight, train, validation, TrainingConfig(batch_size=16)).run()
    questions = iter(range(1, 100))
    saved = io.BytesIO()
    with pytest.raises(InterruptedRunError, match="stopped in predictors 0 to 1"):
        Trainer(
            make(),
            train,
            validation,
            TrainingConfig(batch_size=16),
            save=lambda state: torch.save(state, saved),
            interrupted=lambda: next(questions) >= question,
        ).run()
    saved.seek(0)
    resumed = make()
    trainer = Trainer(resumed, train, validation, TrainingConfig(batch_size=16))
    trainer.load_state_dict(torch.load(saved, weights_only=True))
    assert trainer.progress.steps == question
    again = trainer.run()
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.history == whole.history


def test_full_batches_are_served_without_a_copy() -> None:
    x, y = torch.randn(30, 5), torch.randint(3, (30,))
    model = CaFo(mlp((5,), (8, 6)), 3, loss="ce", optimizer="gd", lr=0.5, input_shape=(5,))
    plain = copy.deepcopy(model)
    part = Batches(x, y)
    kept = part.map(model.stages()[0].prefix, 7)  # type: ignore[arg-type]
    assert kept.bytes_per_step(30) == 0
    assert kept.bytes_per_step(29) > 0
    assert kept.stage(1, 30)[0][0] is kept.inputs
    Trainer(model, part, part, TrainingConfig(batch_size=30, passes=20)).run()
    for _ in range(20):
        step(plain, x, y)
    torch.testing.assert_close(model.scores(x), plain.scores(x), rtol=0, atol=1e-6)


# what does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "msee"}, "did you mean mse"),
        ({"block_training": "bp"}, "known: dfa, random"),
        ({"aggregate": "sum_probs"}, "did you mean sum_prob"),
        ({"bn_mode": "eval"}, "bn_mode"),
        ({"gram": "float16"}, "gram"),
        ({"loss": "ce", "ridge": 0.1}, "ridge would have no effect with loss=ce"),
        ({"loss": "sl", "gram": "float64"}, "gram would have no effect with loss=sl"),
        ({"block_lr": 0.1}, "block_lr would have no effect with .*block_training=random;"),
        ({"loss": "ce", "block_weight_decay": 0.0}, "block_weight_decay would have no effect"),
        ({"lr": 1e-3, "optimizer": "adam", "weight_decay": 0.0}, "lr and optimizer and weight_decay would have no"),
        ({"block_training": "dfa", "weight_decay": 0.1}, "weight_decay would have no effect with loss=mse"),
        ({"block_training": "dfa", "lr": 0.1, "block_lr": 0.1}, "lr would have no effect with .* and block_lr=0.1"),
        ({"block_training": "dfa", "optimizer": "adamm"}, "did you mean adam"),
        ({"ridge": -1.0}, "ridge must be"),
        ({"ridge": "much"}, "ridge must be"),
        ({"ridge": math.nan}, "ridge must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        learner(**options)


def test_choosing_without_validation_data_is_refused_and_nothing_is_lost() -> None:
    model = learner()
    data = batch(30)
    model.step(data)
    with pytest.raises(UsageError, match="validation data"):
        model.finish()
    model.finish([data])
    assert predictors(model)[0][0].any()


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_features_that_are_not_finite_are_named(ridge: float) -> None:
    model = learner(ridge=ridge)
    x, y = batch(30)
    x[3, 2] = math.nan
    model.step((x, y))
    with pytest.raises(TrainingError, match=r"not finite"):
        model.finish()


def test_finish_does_nothing_for_rules_that_learn_by_steps() -> None:
    model = learner(loss="ce")
    before = fingerprint(model.predictors)
    assert model.finish() == {}
    assert fingerprint(model.predictors) == before


def test_cross_entropy_of_predictors_has_the_errors_of_the_shared_encoding() -> None:
    z, y = torch.randn(2, 6, 3, dtype=torch.float64), torch.randint(3, (6,))
    losses, errors = CrossEntropy().losses_and_errors(z, encode_targets(y, 3, torch.float64))
    for part, loss, error in zip(z.numpy(), losses, errors, strict=True):
        P = reference.softmax(part)
        assert loss.item() == pytest.approx(-np.log(P[np.arange(6), y]).mean(), rel=1e-12)
        np.testing.assert_allclose(error, (P - reference.one_hot(y.numpy(), 3)) / 6, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        *((f"cifar10{loss}", 0.5, 0.5) for loss in ("", "-ce", "-sl")),
        *((f"mnist{loss}", 0.1307, 0.3081) for loss in ("-ce", "-sl")),
    ],
)
def test_official_presets_standardise_as_the_code_does(name: str, mean: float, std: float) -> None:
    """Constants of the authors' repository, the same for every channel."""
    config = resolve(preset=f"cafo-{name}-official")
    name = config.dataset
    images = torch.randint(256, (20, *data.info(name).input_shape), dtype=torch.uint8)
    part, info = data.Part(images, torch.arange(20) % 10), data.info(name)
    known = data.Dataset(name, part, part, 10, info.mean, info.std, info.class_names, validation=5)
    config = replace(config, training=replace(config.training, validation=5))
    _, _, test = load_batches(config, known, torch.device("cpu"), torch.contiguous_format)
    (served, _), *_ = test.in_order(20)
    torch.testing.assert_close(served, (images / 255 - mean) / std)


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_official_presets_take_the_whole_training_set_at_once(name: str) -> None:
    train, _, _ = data.load(name).split()
    for loss in ("ce", "sl"):
        assert presets()[f"cafo-{name}-{loss}-official"].training["batch_size"] == len(train.targets)


@pytest.mark.data
def test_closed_form_on_mnist_is_a_good_classifier() -> None:
    """1,000 images, one pass; a linear classifier on the pixels of as many, solved the same way, is far behind."""
    train, _, test = data.load("mnist").split()
    seen, asked = (
        Batches(part.inputs[:1000], part.targets[:1000], mean=(0.1307,), std=(0.3081,)) for part in (train, test)
    )
    model = CaFo(cnn((1, 28, 28), (4, 8), pool="max", batch_norm=True), 10, ridge=0.1, input_shape=(1, 28, 28))
    Trainer(model, seen, asked, TrainingConfig(batch_size=250, precision="fp32")).run()
    x, v = (next(iter(side.in_order(1000)))[0].flatten(1).numpy().astype(np.float64) for side in (seen, asked))
    center, y = x.mean(0), reference.one_hot(seen.targets.numpy(), 10)
    W = np.linalg.solve((x - center).T @ (x - center) + 100 * np.eye(784), (x - center).T @ (y - y.mean(0)))
    pixels = float(np.mean(((v - center) @ W + y.mean(0)).argmax(1) == asked.targets.numpy()))
    scores = model.scores(next(iter(asked.in_order(1000)))[0])
    assert (scores.argmax(1) == asked.targets).float().mean().item() > pixels + 0.05


@pytest.mark.parametrize("loss", ["mse", "ce", "sl"])
def test_runs_on_digits_from_its_preset(loss: str, tmp_path: Path) -> None:
    preset = "cafo-digits" if loss == "mse" else f"cafo-digits-{loss}"
    config = resolve(preset=preset, training={} if loss == "mse" else {"epochs": 3}, energy="simulated", device="cpu")
    assert config.parameters["loss"] == loss
    summary = run(config, tmp_path)
    assert summary["test_accuracy"] > 95
    assert summary["passes"] == (1 if loss == "mse" else 3)
    assert summary["energy"]["gross_j"] > 0
    weights = Path(summary["run_dir"]) / "model.pt"
    assert weights.stat().st_size < 5 * 2**20  # no Gram matrix: those of 512 features would add 6 MiB


@pytest.mark.parametrize("filling", [0, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_a_predictor_with_and_without_columns_of_zeros(
    filling: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predictor, "_filling", filling)
    predictor = Predictor(5, 10, bias=bias, exact=False).double()
    for parameter in predictor.parameters():
        nn.init.normal_(parameter)
    features = torch.randn(7, 5, dtype=torch.float64)
    errors = torch.randn(7, 10, dtype=torch.float64)
    scores = predictor.scores(features)
    weight, *biases = predictor.gradients(features, errors)
    x, w, e = features.numpy(), predictor.weight.detach().numpy(), errors.numpy()
    b = predictor.bias.detach().numpy() if predictor.bias is not None else 0
    np.testing.assert_allclose(scores.detach().numpy(), x @ w.T + b, atol=1e-12)
    np.testing.assert_allclose(weight.numpy(), e.T @ x, atol=1e-12)
    assert weight.is_contiguous()  # as its parameter is: a fused optimiser reads both as they lie in memory
    for gradient in biases:
        np.testing.assert_allclose(gradient.numpy(), e.sum(0), atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("gram", ["float64", "float32"])
@pytest.mark.parametrize("samples", [400, 40], ids=["primal", "dual"])
def test_minimum_norm_is_not_made_of_rounding_errors(samples: int, gram: str, offset: float) -> None:
    """Features of rank 10 among 60, rounded to float32: the rounding has full rank, and no part in the solution."""
    torch.manual_seed(0)
    x = torch.randn(samples, 10, dtype=torch.float64) @ torch.randn(10, 60, dtype=torch.float64) + offset
    y = torch.randn(samples, 3, dtype=torch.float64)
    statistics = RidgeStatistics(60, 3, gram)
    for part in torch.arange(samples).chunk(4):
        statistics.add(x[part].float(), y[part].float())
    (weights,), _ = statistics.problem(torch.device("cpu")).solve([0.0])
    expected = np.linalg.pinv((x - x.mean(0)).numpy(), rcond=1e-9) @ (y - y.mean(0)).numpy()
    np.testing.assert_allclose(weights.T.numpy(), expected, atol=1e-3 * np.abs(expected).max())
