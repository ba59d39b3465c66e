"""Forward-Forward: its NumPy reference, and the tests of its specification."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.goodness import draw, goodness_courses
from bpfree.algorithms import ForwardForward
from bpfree.algorithms._ff_goodness import GOODNESS, NORMALIZERS, PEER_START, Activity, PeerNormalization, UnitLength
from bpfree.algorithms._ff_layers import Layer, Parts
from bpfree.algorithms._ff_losses import LossOptions, SymbaLoss, ThresholdLoss, contrastive_loss
from bpfree.algorithms._ff_negatives import HybridViews, LabelledViews, LikelyLabels, UniformLabels, blur_matrix
from bpfree.algorithms.forward_forward import (
    HARD_NEGATIVES,
    ContrastiveLoss,
    Goodness,
    Inference,
    LabelGoodness,
    Normalizer,
    SoftmaxReadout,
    SquaredGoodness,
    Views,
    WrongLabels,
)
from bpfree.errors import CheckpointError, UsageError
from bpfree.experiments import Trainer, TrainingConfig
from bpfree.experiments.records import RunFolder
from bpfree.networks import cnn, mlp
from bpfree.networks.streams import Stream
from tests.algorithms.test_conformance import AnyChoice, data
from tests.reference import forward_forward as reference

F64 = torch.float64
LR = 0.05


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def network(widths: tuple[int, ...] = (8, 7, 6), features: int = 5) -> nn.Sequential:
    return mlp((features,), widths).double()


def learner(widths: tuple[int, ...] = (8, 7, 6), classes: int = 2, **options: Any) -> ForwardForward:
    return ForwardForward(network(widths), classes, **{"optimizer": sgd, "noise_seed": 0, **options}).double()


def batch(size: int = 9, classes: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5, dtype=F64), torch.randint(classes, (size,))


def arrays(model: ForwardForward) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    named = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    weights = [value for name, value in named.items() if name.startswith("network") and name.endswith("weight")]
    biases = [value for name, value in named.items() if name.startswith("network") and name.endswith("bias")]
    return weights, biases, [value for name, value in named.items() if name.startswith("heads")]


def views(
    classes: int, *, hard: bool = False, label: str = "overlay", features: int = 120, strength: float = 1.0
) -> LabelledViews:
    wrong = LikelyLabels() if hard else UniformLabels()
    return LabelledViews(features, classes, label, strength, wrong, Stream(0)).double()


# numerics


def rows(width: int = 6, count: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, weights and biases of a layer with a unit that is silent on all rows, and its activities."""
    generator = np.random.default_rng(seed)
    z, W, b = generator.normal(size=(count, 4)), generator.normal(size=(width, 4)), generator.normal(size=width)
    b[2] = -100
    return z, W, b, np.maximum(z @ W.T + b, 0)


def closed_form(loss: nn.Module, goodness: Goodness, z: np.ndarray, W: np.ndarray, b: np.ndarray) -> Any:
    """The implementation's loss and gradients of one layer."""
    linear = nn.Linear(W.shape[1], W.shape[0]).double()
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(W))
        linear.bias.copy_(torch.from_numpy(b))
        layer = Layer("layer", linear, goodness, PeerNormalization(len(b), 0.0), None)
        activity = layer.activate(torch.from_numpy(z))
        losses, slopes = loss(goodness.value(activity.hidden)[None])
        layer.learn(activity, slopes[0])
    assert linear.weight.grad is not None
    assert linear.bias.grad is not None
    return losses[0].item(), linear.weight.grad.numpy(), linear.bias.grad.numpy()


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_threshold_gradient_equals_numpy(mean: bool, temperature: float) -> None:
    z, W, b, h = rows()
    goodness = GOODNESS["mean" if mean else "sum"]
    loss = contrastive_loss("original", goodness, [6], LossOptions(temperature=temperature)).double()
    expected = reference.threshold_layer(z, h, mean=mean, theta=1 if mean else 6, temperature=temperature)
    got = closed_form(loss, goodness, z, W, b)
    for a, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-15)
    assert not got[1][2].any()  # the silent unit's row
    assert np.abs(got[1]).max() > 1e-4


def test_threshold_gradient_equals_finite_differences() -> None:
    z, W, b, h = rows()
    assert np.abs(z @ W.T + b).min() > 1e-4

    def loss() -> float:
        h = np.maximum(z @ W.T + b, 0)
        return float(reference.threshold_layer(z, h, mean=False, theta=6, temperature=3)[0])

    _, dW, _ = reference.threshold_layer(z, h, mean=False, theta=6, temperature=3)
    for index in np.ndindex(W.shape):
        kept = W[index]
        W[index] = kept + 1e-6
        up = loss()
        W[index] = kept - 1e-6
        assert (up - loss()) / 2e-6 == pytest.approx(dW[index], rel=1e-6, abs=1e-9)
        W[index] = kept


@pytest.mark.parametrize("mean", [False, True])
def test_symba_gradient_equals_numpy(mean: bool) -> None:
    z, W, b, h = rows()
    got = closed_form(SymbaLoss(4.0), GOODNESS["mean" if mean else "sum"], z, W, b)
    for a, e in zip(got, reference.symba_layer(z, h, mean=mean, alpha=4.0), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-15)


def test_symba_is_zero_for_equal_rows_and_antisymmetric_at_no_difference() -> None:
    z, W, b, _ = rows()
    twice = np.concatenate([z, z])
    _, dW, db = closed_form(SymbaLoss(4.0), GOODNESS["mean"], twice, W, b)
    np.testing.assert_allclose(dW, 0, atol=1e-14)
    np.testing.assert_allclose(db, 0, atol=1e-14)
    _, slopes = SymbaLoss(4.0)(torch.full((1, 6), 3.0, dtype=F64))
    assert torch.equal(slopes[:, :3], -slopes[:, 3:])
    assert slopes[0, 0].item() == pytest.approx(-4.0 / 2 / 3)


@pytest.mark.parametrize("name", ["original", "symba", "collaboration", "collaboration-preceding"])
def test_slopes_are_the_derivatives_of_each_layers_own_loss(name: str) -> None:
    """By autograd, with the other layers' goodness a constant."""
    loss = contrastive_loss(name, GOODNESS["sum"], [3, 4, 5], LossOptions()).double()
    goodness = 3 * torch.rand(3, 8, dtype=F64)
    losses, slopes = loss(goodness)
    for layer in range(3):
        mine = goodness[layer].clone().requires_grad_()
        varied = [mine if index == layer else goodness[index] for index in range(3)]
        (expected,) = torch.autograd.grad(loss(torch.stack(varied))[0][layer], mine)
        torch.testing.assert_close(slopes[layer], expected, rtol=1e-12, atol=1e-15)
    assert losses.shape == (3,)


def test_at_the_threshold_half_of_the_gradient_is_left() -> None:
    _, slopes = ThresholdLoss([2.0], 1.0, "none").double()(torch.full((1, 4), 2.0, dtype=F64))
    assert slopes.tolist() == [[-0.125, -0.125, 0.125, 0.125]]


@pytest.mark.parametrize("name", ["original", "symba"])
def test_extreme_goodness_stays_finite(name: str) -> None:
    loss = contrastive_loss(name, GOODNESS["sum"], [1], LossOptions())
    losses, slopes = loss(torch.tensor([[1e4, 0.0, 0.0, 1e4]]))
    assert losses.isfinite().all()
    assert slopes.isfinite().all()


def test_mean_goodness_is_the_sum_at_another_temperature() -> None:
    z, W, b, _ = rows()
    summed = closed_form(ThresholdLoss([9.0], 2.0, "none").double(), GOODNESS["sum"], z, W, b)
    mean = closed_form(ThresholdLoss([9.0 / 6], 2.0 / 6, "none").double(), GOODNESS["mean"], z, W, b)
    for a, e in zip(mean, summed, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12)


def test_minus_goodness_turns_positive_and_negative_round() -> None:
    z, W, b, _ = rows()
    loss = contrastive_loss("original", GOODNESS["minus_sum"], [6], LossOptions()).double()
    plain = contrastive_loss("original", GOODNESS["sum"], [6], LossOptions()).double()
    minus = closed_form(loss, GOODNESS["minus_sum"], z, W, b)
    turned = closed_form(plain, GOODNESS["sum"], np.concatenate([z[5:], z[:5]]), W, b)
    for a, e in zip(minus, turned, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12)


def test_collaboration_weighs_the_gradient_and_adds_nothing_else() -> None:
    goodness = 5 * torch.rand(3, 6, dtype=F64)
    theta = torch.tensor([2.0, 3.0, 4.0], dtype=F64)[:, None]
    s = torch.tensor([1.0] * 3 + [-1.0] * 3, dtype=F64)
    for gamma, heard in (
        ("preceding", torch.stack([0 * goodness[0], goodness[0], goodness[0] + goodness[1]])),
        ("others", goodness.sum(0) - goodness),
    ):
        _, alone = ThresholdLoss([2.0, 3.0, 4.0], 1.0, "none").double()(goodness)
        _, together = ThresholdLoss([2.0, 3.0, 4.0], 1.0, gamma).double()(goodness)
        ratio = torch.sigmoid(-s * (goodness + heard - theta)) / torch.sigmoid(-s * (goodness - theta))
        torch.testing.assert_close(together, alone * ratio, rtol=1e-9, atol=0)


def test_collaborating_thresholds_grow_with_what_they_count() -> None:
    def thresholds(name: str) -> list[float]:
        loss = contrastive_loss(name, GOODNESS["sum"], [3, 4, 5], LossOptions())
        assert isinstance(loss, ThresholdLoss)
        return loss.theta.flatten().tolist()

    assert thresholds("original") == [3, 4, 5]
    assert thresholds("collaboration") == [12, 12, 12]
    assert thresholds("collaboration-preceding") == [3, 7, 12]


def test_what_a_loss_is_given_is_what_it_has() -> None:
    assert contrastive_loss("original", GOODNESS["sum"], [3, 4], LossOptions(theta=2.5)).theta.tolist() == [
        [2.5],
        [2.5],
    ]
    assert contrastive_loss("symba", GOODNESS["mean"], [3, 4], LossOptions()).alpha == 4  # of the paper's public codes
    given = learner(theta=1.5, temperature=3.0).contrast
    assert (given.theta.flatten().tolist(), given.temperature) == ([1.5] * 3, 3.0)
    assert learner(loss="symba", alpha=2.0).contrast.alpha == 2


def test_weights_start_with_the_variance_of_the_fan_in() -> None:
    model = ForwardForward(mlp((400,), (100, 900)), 10, init="normal")
    weights, biases, _ = arrays(model)
    for weight, bias, fan_in in zip(weights, biases, (400, 100), strict=True):
        assert weight.std() == pytest.approx(fan_in**-0.5, rel=0.03)
        assert weight.mean() == pytest.approx(0, abs=0.03 * fan_in**-0.5)
        assert not bias.any()


@pytest.mark.parametrize("negatives", ["hard", "random"])
def test_training_equals_the_matlab_procedure(negatives: str) -> None:
    """Smoothed gradients at 0.01 are momentum 0.9 at 0.001; with two classes both kinds of negatives are the same."""
    model = learner(
        optimizer="momentum", lr=1e-2, head_lr=2e-2, weight_decay=0.0, head_weight_decay=0.0, negatives=negatives
    )
    x, y = batch(12)
    expected = reference.matlab_training(
        x.numpy(), y.numpy(), *arrays(model), epsilon=0.1, head_epsilon=0.2, peer=0.03, steps=6
    )
    before = arrays(model)
    for _ in range(6):
        model.step((x, y))
    for got, values, start in zip(arrays(model), expected, before, strict=True):
        for a, e, s in zip(got, values, start, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-9)
            assert np.abs(a - s).max() > 1e-5


def test_weight_decay_goes_through_momentum_and_leaves_biases_alone() -> None:
    model = learner(optimizer="momentum", lr=0.1, weight_decay=0.5, head_lr=0.2, head_weight_decay=0.25)
    decays = {
        id(p): group["weight_decay"] for o in model.optimizers() for group in o.param_groups for p in group["params"]
    }
    rates = {id(p): group["lr"] for o in model.optimizers() for group in o.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        wanted = (0.25, 0.2) if name.startswith("heads") else (0.0, 0.1) if name.endswith("bias") else (0.5, 0.1)
        assert (decays[id(parameter)], rates[id(parameter)]) == wanted


@pytest.mark.parametrize("loss", ["original", "symba", "collaboration", "collaboration-preceding"])
def test_steps_equal_autograd(loss: str) -> None:
    """The whole step against autograd on each layer's loss, inputs detached."""
    model = learner(loss=loss, classes=2, peer_normalization=0.0, goodness="mean")
    x, y = batch()
    weights = [layer[-2].weight.detach().clone() for layer in model.network]  # type: ignore[index]
    twin = copy.deepcopy(model)
    expected = []
    z = reference.rms_normalized(
        np.concatenate([reference.labelled(x.numpy(), y.numpy(), 2), reference.labelled(x.numpy(), 1 - y.numpy(), 2)])
    )
    signal, hidden = torch.from_numpy(z), []
    for layer in twin.network:
        h = torch.relu(layer[-2](signal.detach()))  # type: ignore[index]
        hidden.append(h)
        signal = h / h.square().mean(1, keepdim=True).sqrt()
    goodness = [h.square().mean(1) for h in hidden]
    for index, layer in enumerate(twin.network):
        others = [g.detach() for g in goodness]
        others[index] = goodness[index]
        value = twin.contrast(torch.stack(others))[0][index]
        expected.append(torch.autograd.grad(value, layer[-2].weight)[0])  # type: ignore[index]
    model.step((x, y))
    for layer, before, gradient in zip(model.network, weights, expected, strict=True):
        torch.testing.assert_close(layer[-2].weight, before - LR * gradient, rtol=0, atol=1e-12)  # type: ignore[index]
        assert gradient.abs().max() > 1e-6


# peer normalisation


def test_peer_term_reaches_every_unit_and_sums_to_zero() -> None:
    h = torch.rand(7, 5, dtype=F64)
    h[:, 3] = 0  # a silent unit
    peer = PeerNormalization(5, 0.03).double()
    term = peer(h)
    mean = 0.9 * PEER_START + 0.1 * h.mean(0)
    torch.testing.assert_close(peer.mean, mean)
    torch.testing.assert_close(term, -0.03 * (mean.mean() - mean) / 7)
    assert term.sum().abs() < 1e-15
    assert term[3] < 0  # descent lifts it
    even = PeerNormalization(5, 0.03).double()
    assert not even(torch.full((7, 5), 0.2, dtype=F64)).abs().max() > 1e-17


@pytest.mark.gpu
@pytest.mark.parametrize("strength", [0.0, 0.03])
@pytest.mark.parametrize("name", ["sum", "minus_mean"])
@pytest.mark.parametrize(("size", "width"), [(3, 7), (100, 2000), (65, 1030)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_layers_learn_on_a_gpu_what_they_learn_in_double_precision(
    dtype: torch.dtype, tolerance: float, size: int, width: int, name: str, strength: float
) -> None:
    h = torch.randn(2 * size, width).relu().to(dtype)
    z, mean = torch.randn(2 * size, 5).to(dtype), torch.rand(width)
    slope = torch.randn(2 * size, 2)[:, 0] / size  # with holes, as a loss of one's own may return it
    ends = []
    for device, precision in (("cpu", F64), ("cuda", torch.float32), ("cuda", torch.float32)):
        peer = PeerNormalization(width, strength).to(device, precision)
        peer.mean.copy_(mean)
        layer = Layer("layer", nn.Linear(5, width).to(device, precision), GOODNESS[name], peer, None)
        inputs, hidden = (rows.to(device, F64 if device == "cpu" else dtype) for rows in (z, h))
        layer.learn(Activity(inputs, hidden), slope.to(device).to(precision))
        ends.append([peer.mean, *(parameter.grad for parameter in layer.linear.parameters())])
    for exact, found, again in zip(*ends, strict=True):
        assert exact is not None
        assert found is not None
        assert again is not None
        scale = exact.abs().max().item()
        torch.testing.assert_close(found.double().cpu(), exact, rtol=tolerance, atol=tolerance * scale)
        assert torch.equal(found, again)


def test_peer_normalization_leaves_negative_rows_alone_and_wakes_the_silent() -> None:
    with_peers, without = learner(peer_normalization=0.5), learner(peer_normalization=0.0)
    without.load_state_dict(with_peers.state_dict())
    for model in (with_peers, without):
        with torch.no_grad():
            model.network[0][-2].bias[1] = -50  # type: ignore[index]
    x, y = batch()
    bias = with_peers.network[0][-2].bias.detach().clone()  # type: ignore[index]
    with_peers.step((x, y))
    without.step((x, y))
    assert without.network[0][-2].bias[1] == bias[1]  # type: ignore[index]
    assert with_peers.network[0][-2].bias[1] > bias[1]  # type: ignore[index]


# invariances


def test_normalized_rows_have_one_length_whatever_their_scale() -> None:
    h = torch.rand(4, 10, dtype=F64)
    for name, squared in (("rms", 10), ("unit", 1)):
        z = NORMALIZERS[name].of(h)
        torch.testing.assert_close(z.square().sum(1), torch.full((4,), float(squared), dtype=F64), rtol=1e-7, atol=0)
        torch.testing.assert_close(z, NORMALIZERS[name].of(3 * h), rtol=1e-7, atol=0)
    silent = torch.zeros(2, 10)
    assert not NORMALIZERS["rms"].of(silent).any()


def test_scaling_a_layer_scales_its_goodness_only() -> None:
    model = learner()
    x, _ = batch()
    before = model.label_goodness(x)
    with torch.no_grad():
        for parameter in model.network[1].parameters():
            parameter.mul_(3)
    after = model.label_goodness(x)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], 9 * before[1])
    torch.testing.assert_close(after[2], before[2], rtol=1e-6, atol=1e-9)


def test_a_single_positive_sample_keeps_its_direction() -> None:
    z, W, _, _ = rows(count=1)
    h = np.maximum(z @ W.T, 0)
    both = np.concatenate([z, np.zeros_like(z)])  # a silent negative row
    _, dW, _ = closed_form(ThresholdLoss([6.0], 1.0, "none").double(), GOODNESS["sum"], both, W, np.zeros(6))
    moved = np.maximum(z @ (W - 0.1 * dW).T, 0)
    np.testing.assert_allclose(moved / np.linalg.norm(moved), h / np.linalg.norm(h), rtol=1e-13)
    assert np.linalg.norm(moved) > 1.001 * np.linalg.norm(h)


def test_order_of_units_does_not_matter() -> None:
    model = learner()
    twin = copy.deepcopy(model)
    order = torch.randperm(8)
    with torch.no_grad():
        first, second = twin.network[0][-2], twin.network[1][-2]  # type: ignore[index]
        first.weight.copy_(first.weight[order])
        first.bias.copy_(first.bias[order])
        second.weight.copy_(second.weight[:, order])
    x, y = batch()
    model.step((x, y))
    twin.step((x, y))
    torch.testing.assert_close(model.label_goodness(x), twin.label_goodness(x))


# inference


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("strength", [1.0, 2.5])
@pytest.mark.parametrize("normalizer", ["rms", "unit"])
def test_goodness_inference_equals_one_forward_pass_per_label(
    dtype: torch.dtype, tolerance: float, strength: float, normalizer: str
) -> None:
    model = learner(classes=4, label_strength=strength, normalizer=normalizer).to(dtype)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, _ = batch()
    weights, biases, _ = arrays(model.double())
    model.to(dtype)
    expected = reference.label_goodness(x.numpy(), weights, biases, 4, strength, unit=normalizer == "unit")
    np.testing.assert_allclose(model.label_goodness(x.to(dtype)).numpy(), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(model.scores(x.to(dtype)).numpy(), expected[1:].sum(0), rtol=tolerance, atol=tolerance)


def test_concatenated_labels_are_columns_of_their_own() -> None:
    model = learner(classes=3, label="concat")
    assert model.network[0][-2].in_features == 5 + 3  # type: ignore[index]
    x, _ = batch()
    padded = np.concatenate([np.zeros((9, 3)), x.numpy()], axis=1)
    weights, biases, _ = arrays(model)
    np.testing.assert_allclose(
        model.label_goodness(x).numpy(), reference.label_goodness(padded, weights, biases, 3), rtol=1e-12
    )
    plain = network()
    image = plain[0][-2].weight.detach().clone()  # type: ignore[index]
    assert torch.equal(ForwardForward(plain, 3, label="concat").network[0][-2].weight[:, 3:], image)  # type: ignore[index]


def test_softmax_inference_reads_the_neutral_label_with_layers_from_the_second() -> None:
    model = learner(inference="softmax")
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_()
    x, _ = batch()
    weights, biases, heads = arrays(model)
    hidden = reference.activities(reference.neutral(x.numpy(), 2), weights, biases)
    expected = sum(reference.rms_normalized(h) @ U.T for (_, h), U in zip(hidden[1:], heads, strict=True))
    np.testing.assert_allclose(model.scores(x).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_untrained_readout_is_uniform_and_untrained_goodness_guesses() -> None:
    """Over several networks: labels that have to do with the input are guessed no better than by chance, and not by one
    class for all."""
    x = torch.rand(500, 50)
    y = x[:, :10].argmax(1)
    accuracies = []
    for _ in range(20):
        model = ForwardForward(mlp((50,), (64,) * 3), 10, init="normal")
        assert not model.readout(x).any()
        chosen = model.scores(x).argmax(1)
        assert len(chosen.unique()) > 1
        accuracies.append((chosen == y).float().mean().item())
    assert np.mean(accuracies) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(("depth", "first"), [(1, 0), (2, 0), (3, 1), (4, 1)])
def test_the_first_layer_is_left_out_from_three_layers_on(depth: int, first: int) -> None:
    model = learner((6,) * depth)
    assert model.first == first
    assert len(model.heads) == depth - first


@pytest.mark.parametrize("loss", ["collaboration", "collaboration-preceding"])
def test_layers_that_learn_a_sum_answer_by_the_whole_sum(loss: str) -> None:
    model = learner(loss=loss)
    x, _ = batch()
    assert model.first == 0
    torch.testing.assert_close(model.scores(x), model.label_goodness(x).sum(0))
    assert learner(loss=loss, skip_first=True).first == 1


def test_nothing_is_left_of_one_layer_without_the_first() -> None:
    with pytest.raises(UsageError, match="nothing left to read"):
        learner((6,), skip_first=True)
    assert learner((6, 6), skip_first=True).first == 1


def test_a_stage_is_never_rated_by_a_readout_that_reads_nothing() -> None:
    model = learner(schedule="greedy", inference="softmax")
    x, y = batch()
    model.stages()[0].step((x, y))
    assert model.first == 0
    assert model.stages()[0].scores(x).any()
    with pytest.raises(UsageError, match="leave out skip_first"):
        learner(schedule="greedy", inference="softmax", skip_first=True)


def test_what_the_user_froze_stays_as_it_is() -> None:
    layers = network()
    layers[0][-2].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    model = ForwardForward(layers, 2, lr=0.1).double()
    before = copy.deepcopy(model)
    model.step(batch())
    named = zip(model.named_parameters(), before.parameters(), strict=True)
    changed = {name for (name, a), b in named if not torch.equal(a, b)}
    assert changed == {name for name, _ in model.named_parameters()} - {"network.0.1.weight"}


# locality


def test_a_step_of_one_stage_moves_that_layer_only() -> None:
    model = learner(schedule="greedy", classes=2)
    x, y = batch()
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    model.stages()[1].step((x, y))
    changed = {
        name
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not torch.equal(value, before[name])
    }
    assert changed == {"network.1.0.weight", "network.1.0.bias", "heads.0.weight", "peers.1.mean", "views.stream.count"}


def test_the_readout_sends_nothing_to_the_layers() -> None:
    slow, fast = learner(head_lr=0.0001, optimizer="momentum", negatives="random"), None
    fast = learner(head_lr=1.0, optimizer="momentum", negatives="random")
    fast.load_state_dict(slow.state_dict() | {"_extra_state": fast.state_dict()["_extra_state"]})
    for _ in range(3):
        x, y = batch()
        slow.step((x, y))
        fast.step((x, y))
    for a, b in zip(slow.network.parameters(), fast.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(slow.heads[0].weight, fast.heads[0].weight)


def test_greedy_stages_hear_preceding_layers_only() -> None:
    with pytest.raises(UsageError, match="collaboration-preceding"):
        learner(loss="collaboration", schedule="greedy")
    model = learner(loss="collaboration-preceding", schedule="greedy")
    x, y = batch()
    for stage in model.stages():
        assert all(value.isfinite() for value in stage.step((x, y)).values())
    assert [stage.name for stage in model.stages()] == ["layer 0", "layer 1", "layer 2"]


def test_validation_of_a_stage_knows_no_later_layer() -> None:
    model = learner(schedule="greedy")
    x, _ = batch()
    goodness = model.label_goodness(x)
    stages = model.stages()
    torch.testing.assert_close(stages[0].scores(x), goodness[0])
    torch.testing.assert_close(stages[1].scores(x), goodness[1])
    torch.testing.assert_close(stages[2].scores(x), goodness[1:].sum(0))


# negatives and labels


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("hard", [False, True])
def test_a_negative_label_is_never_the_true_one(classes: int, hard: bool) -> None:
    draws = 10**5 if hard else 10**6
    sampler = views(classes, hard=hard)
    targets = torch.randint(classes, (draws,))
    logits = 5 * torch.randn(classes, dtype=F64).expand(draws, classes)
    wrong = sampler.wrong.choose(targets, sampler.candidates, logits, sampler.draw(draws))
    assert not (wrong == targets).any()
    assert wrong.min() >= 0
    assert wrong.max() < classes


def test_random_negatives_are_uniform() -> None:
    sampler = views(5)
    drawn = sampler.wrong.choose(torch.full((40_000,), 2), sampler.candidates, None, sampler.draw(40_000))
    counts = torch.bincount(drawn, minlength=5).tolist()
    assert counts[2] == 0
    chi_square = sum((count - 10_000) ** 2 / 10_000 for count in (*counts[:2], *counts[3:]))
    assert chi_square < 16.27  # 0.1 % point of 3 degrees of freedom


def test_hard_negatives_follow_the_masked_softmax() -> None:
    logits = torch.tensor([1.0, 3.0, 0.0, 1.5], dtype=F64)
    sampler = views(4, hard=True)
    targets, noise = torch.full((40_000,), 1), sampler.draw(40_000)
    drawn = sampler.wrong.choose(targets, sampler.candidates, logits.expand(40_000, 4), noise)
    counts = torch.bincount(drawn, minlength=4)
    masked = logits.clone()
    masked[1] = -torch.inf
    expected = 40_000 * masked.softmax(0)
    chi_square = ((counts - expected).square() / expected)[[0, 2, 3]].sum()
    assert counts[1] == 0
    assert chi_square < 13.82  # 0.1 % point of 2 degrees of freedom


def test_labels_are_written_over_the_first_values_and_nowhere_else() -> None:
    x = torch.rand(3, 6, dtype=F64)
    before = x.clone()
    sampler = views(4, features=6)
    made = sampler.contrast(x, torch.tensor([0, 3, 1]), None, sampler.draw(3))
    assert torch.equal(x, before)
    assert torch.equal(made[:, 4:], x[:, 4:].repeat(2, 1))
    assert made[:3, :4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert torch.equal(made[3:, :4].sum(1), torch.ones(3, dtype=F64))
    assert not (made[3:, :4] * made[:3, :4]).any()
    neutral = views(4, features=6).plain(x)
    assert torch.equal(neutral[:, :4], torch.full((3, 4), 0.25, dtype=F64))
    assert torch.equal(neutral[:, 4:], x[:, 4:])
    appended = views(4, features=6, label="concat").plain(x)
    assert torch.equal(appended[:, 4:], x)
    louder = views(4, features=6, strength=3.0)
    assert louder.contrast(x, torch.tensor([0, 3, 1]), None, louder.draw(3))[:, :4].sum(1).tolist() == 6 * [3]
    assert louder.plain(x)[:, :4].tolist() == 3 * [4 * [0.75]]
    assert louder.every(x)[:, :4].tolist() == 3 * (3 * torch.eye(4)).tolist()


def test_labels_of_images_go_over_the_first_channel() -> None:
    model = ForwardForward(mlp((3, 4, 4), (8, 8)), 10, input_shape=(3, 4, 4))
    assert isinstance(model.views, LabelledViews)
    rows = model.views.plain(torch.rand(2, 48))
    assert torch.equal(rows[:, :10], torch.full((2, 10), 0.1))


def test_hybrids_are_patches_of_two_images() -> None:
    made = HybridViews((2, 16, 16), Stream(3))
    masks = made.draw(200)
    assert set(masks.unique().tolist()) == {False, True}
    assert masks.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(masks[0], masks[1])
    neighbours = (masks[:, :, 1:] == masks[:, :, :-1]).float().mean()
    assert neighbours > 0.85  # of independent bits: 0.5
    x = torch.rand(4, 512)
    rows = made.contrast(x, torch.zeros(4, dtype=torch.int64), None, masks[:4])
    assert torch.equal(rows[:4], x)
    chosen = masks[:4].expand(-1, 2, -1, -1).flatten(1)
    assert torch.equal(rows[4:], torch.where(chosen, x, x[[3, 0, 1, 2]]))


def test_blur_repeats_a_quarter_a_half_a_quarter() -> None:
    signal = np.random.default_rng(0).random(9)
    expected = signal.copy()
    for _ in range(10):
        padded = np.pad(expected, 1, mode="edge")
        expected = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
    np.testing.assert_allclose(blur_matrix(9).numpy() @ signal, expected, rtol=1e-12)


# behaviour


def two_clouds(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (size,), generator=generator)
    return 0.5 * torch.randn(size, 12, generator=generator) + 1.5 * (2 * y[:, None] - 1), y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negatives": "random"},
        {"goodness": "mean", "loss": "symba"},
        {"goodness": "minus_sum"},
        {"loss": "collaboration"},
        {"loss": "collaboration-preceding", "schedule": "greedy"},
        {"inference": "softmax"},
        {"label": "concat", "normalizer": "unit", "theta": 1.0},
        {"schedule": "greedy"},
    ],
    ids=str,
)
def test_every_mode_learns_two_clouds(options: dict[str, Any]) -> None:
    model = ForwardForward(mlp((12,), (32, 32)), 2, optimizer="adam", **{"lr": 0.01, "noise_seed": 0, **options})
    for stage in model.stages():
        for step in range(150):
            stage.step(two_clouds(50, step))
    x, y = two_clouds(1000, 10_000)
    assert (model.scores(x).argmax(1) == y).float().mean() > 0.95


def test_without_labels_the_readout_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (400,), generator=generator)
    x = 0.2 * torch.rand(400, 1, 8, 8, generator=generator)
    x[y == 0, :, 2:4] += 1
    x[y == 1, :, :, 2:4] += 1
    model = ForwardForward(
        mlp((1, 8, 8), (32, 32, 32)),
        2,
        negatives="hybrid",
        inference="softmax",
        input_shape=(1, 8, 8),
        lr=0.003,
        head_lr=0.05,
    )
    for step in range(120):
        chosen = torch.arange(50 * step, 50 * step + 50) % 350
        metrics = model.step((x[chosen], y[chosen]))
    assert (model.scores(x[350:]).argmax(1) == y[350:]).float().mean() > 0.95
    assert metrics["layer 0 positive goodness"] > metrics["layer 0 negative goodness"]
    with pytest.raises(UsageError, match="no goodness of a label"):
        model.label_goodness(x)


@pytest.mark.parametrize("loss", ["original", "collaboration"])  # with and without the chain of separate layers
def test_without_labels_the_readout_sees_images_and_no_hybrids(loss: str) -> None:
    views = {"negatives": "hybrid", "inference": "softmax", "input_shape": (1, 4, 4), "noise_seed": 0}
    model = ForwardForward(mlp((1, 4, 4), (7, 6, 5)), 3, optimizer=sgd, loss=loss, **views).double()
    x, y = torch.rand(8, 1, 4, 4, dtype=F64), torch.randint(3, (8,))
    weights, biases, _ = arrays(model)
    hidden = reference.activities(x.flatten(1).numpy(), weights, biases)
    model.step((x, y))
    answer = np.full((8, 3), 1 / 3)  # it starts with zeros
    for (_, h), head in zip(hidden[model.first :], model.heads, strict=True):
        slope = (answer - np.eye(3)[y.numpy()]).T @ reference.rms_normalized(h) / 8
        np.testing.assert_allclose(head.weight.detach().numpy(), -LR * slope, rtol=1e-6, atol=1e-9)


def test_goodness_of_positive_and_negative_data_part() -> None:
    model = ForwardForward(mlp((12,), (32, 32, 32)), 2, lr=0.01, noise_seed=0)
    gaps = []
    for step in range(200):
        metrics = model.step(two_clouds(100, step))
        gaps.append(
            [
                (metrics[f"layer {i} positive goodness"] - metrics[f"layer {i} negative goodness"]).item()
                for i in range(3)
            ]
        )
    early, late = np.mean(gaps[:20], axis=0), np.mean(gaps[-20:], axis=0)
    assert (late > early + 1).all()


def test_greedy_stages_in_the_fit_loop() -> None:
    x, y = torch.rand(60, 1, 8, 8), torch.randint(3, (60,))
    model = ForwardForward(mlp((1, 8, 8), (16, 16, 16)), 3, schedule="greedy", input_shape=(1, 8, 8))
    part = data(x, y, "cpu")
    progress = Trainer(model, part, part, TrainingConfig(batch_size=20, epochs=2, lr_schedule="cooldown")).run()
    assert [stage["stage"] for stage in progress.finished] == ["layer 0", "layer 1", "layer 2"]
    assert {"layer 1 positive goodness", "layer 1 loss", "read-out loss"} <= set(progress.history[2])


def test_courses_of_goodness_come_from_a_record(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, dataset="digits", algorithm="ff", network="mlp", seed=0)
    for epoch in (1, 2):
        course = {"layer 0 positive goodness": 3.0 * epoch, "layer 0 negative goodness": 1.0, "validation_loss": 9.0}
        folder.append_metrics({"epoch": epoch, **course})
    expected = {"layer 0": {"epoch": [1, 2], "positive": [3.0, 6.0], "negative": [1.0, 1.0]}}
    assert goodness_courses(folder.path) == expected
    with pytest.raises(CheckpointError, match="no epochs of a Forward-Forward run"):
        goodness_courses(tmp_path)
    pytest.importorskip("matplotlib")
    draw(expected, tmp_path / "goodness.png")
    assert (tmp_path / "goodness.png").stat().st_size > 1000


@pytest.mark.parametrize("classes", [2, 10])
def test_small_and_ragged_batches(classes: int) -> None:
    model = ForwardForward(mlp((12,), (16, 16, 16)), classes)
    for size in (1, 7, 3):
        with torch.autocast("cpu", torch.bfloat16):
            metrics = model.step((torch.randn(size, 12), torch.randint(classes, (size,))))
        assert all(math.isfinite(value) for value in metrics.values())


def test_linear_layers_without_bias() -> None:
    model = ForwardForward([nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU())], 2, noise_seed=0).double()
    x, y = batch()
    before = model.network[0][0].weight.detach().clone()
    model.step((x, y))
    assert not torch.equal(before, model.network[0][0].weight)
    zero = [np.zeros(8)]
    expected = reference.label_goodness(x.numpy(), [model.network[0][0].weight.detach().numpy()], zero, 2)
    np.testing.assert_allclose(model.label_goodness(x).numpy(), expected, rtol=1e-12)


# options that are the user's own


class TotalActivity(Goodness):
    """g = sum_j h_j: its derivative, 1, says nothing of units that are silent."""

    def value(self, hidden: Tensor) -> Tensor:
        return hidden.sum(1)

    def errors(self, hidden: Tensor, slope: Tensor) -> Tensor:
        return slope[:, None].expand_as(hidden)

    def at_unit_activity(self, width: int) -> float:
        return float(width)


class NextLabel(WrongLabels):
    """The class after the true one."""

    def draw(self, size: int, classes: int, stream: Stream) -> Tensor:
        return torch.empty(0)

    def choose(self, targets: Tensor, labels: Tensor, logits: Tensor | None, noise: Tensor) -> Tensor:
        return (targets + 1) % len(labels)


class ByEveryRow(Normalizer):
    """What "rms" does, without saying that it is a division by a function of the length."""

    def of(self, rows: Tensor) -> Tensor:
        return NORMALIZERS["rms"].of(rows)

    def divisor(self, length: Tensor, width: int) -> None:
        return None


class HalfOfOthers(Views):
    """Negatives whose second half is that of another sample."""

    def plain(self, inputs: Tensor) -> Tensor:
        return inputs

    def draw(self, size: int) -> Tensor:
        return torch.empty(0)

    def contrast(self, inputs: Tensor, targets: Tensor, logits: Tensor | None, noise: Tensor) -> Tensor:
        half = inputs.shape[1] // 2
        return torch.cat([inputs, torch.cat([inputs[:, :half], inputs.roll(1, 0)[:, half:]], 1)])


class WithAnotherColumn(HalfOfOthers):
    """Rows that are wider than they say."""

    def contrast(self, inputs: Tensor, targets: Tensor, logits: Tensor | None, noise: Tensor) -> Tensor:
        rows = super().contrast(inputs, targets, logits, noise)
        return torch.cat([rows, rows[:, :1]], 1)


class LastLayer(Inference):
    """The goodness of the last layer alone."""

    of_labels = True

    def enter(self, parts: Parts, inputs: Tensor) -> Activity:
        return LabelGoodness().enter(parts, inputs)

    def hear(self, parts: Parts, layer: Layer, activity: Activity, passed: Tensor) -> tuple[Tensor, ...]:
        return (parts.goodness.value(activity.hidden),)

    def scores(self, parts: Parts, heard: Sequence[Tensor], size: int) -> Tensor:
        return heard[-1].unflatten(0, (size, -1))


@pytest.mark.parametrize("negatives", ["hard", "random"])  # with and without the chain of separate layers
def test_an_own_goodness_learns_down_its_gradient(negatives: str) -> None:
    """Against autograd through the ReLU, on the rows that the learner made."""
    model = learner(goodness=TotalActivity(), peer_normalization=0.0, negatives=negatives, temperature=2.0)
    x, y = batch()
    rows = np.concatenate([reference.labelled(x.numpy(), label.numpy(), 2) for label in (y, 1 - y)])
    signal = torch.from_numpy(reference.rms_normalized(rows))
    side = torch.tensor([1.0] * len(x) + [-1.0] * len(x), dtype=F64)
    expected, silent = [], 0
    for layer in model.network:
        weight = layer[-2].weight.detach().clone().requires_grad_()  # type: ignore[index]
        h = torch.relu(signal @ weight.T + layer[-2].bias.detach())  # type: ignore[index]
        silent += int((h == 0).sum())
        loss = torch.nn.functional.softplus(-side * (h.sum(1) - len(weight)) / 2.0).mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        expected.append(weight.detach() - LR * gradient)
        signal = (h / h.square().mean(1, keepdim=True).sqrt()).detach()
    assert silent > 0
    model.step((x, y))
    for layer, weight in zip(model.network, expected, strict=True):
        torch.testing.assert_close(layer[-2].weight.detach(), weight, rtol=0, atol=1e-12)  # type: ignore[index]


class WeighedActivity(Goodness, nn.Module):
    """g = sum_j w h_j, w a buffer."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(2.0))

    def value(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden.sum(1)

    def errors(self, hidden: Tensor, slope: Tensor) -> Tensor:
        return (self.weight * slope)[:, None].expand_as(hidden)

    def at_unit_activity(self, width: int) -> float:
        return 2.0 * width


def test_tensors_of_an_own_goodness_are_the_learners() -> None:
    model = learner(goodness=WeighedActivity())
    assert model.state_dict()["goodness.weight"].dtype == F64  # converted with the learner
    twin = copy.deepcopy(model)
    x, y = batch()
    model.step((x, y))
    with torch.no_grad():
        twin.goodness.weight.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.scores(x), model.scores(x))


def test_an_own_goodness_rates_labels() -> None:
    model = learner(goodness=TotalActivity(), skip_first=False)
    x, _ = batch(4)
    scores = torch.zeros(4, 2, dtype=F64)
    for label in range(2):
        signal = torch.from_numpy(reference.rms_normalized(reference.labelled(x.numpy(), np.full(4, label), 2)))
        for layer in model.network:
            h = torch.relu(layer[-2](signal))  # type: ignore[index]
            scores[:, label] += h.sum(1).detach()
            signal = h / h.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(model.scores(x), scores)


@pytest.mark.parametrize("name", GOODNESS)
def test_derivatives_of_goodness_are_those_of_autograd(name: str) -> None:
    h = torch.randn(6, 5, dtype=F64).relu().requires_grad_()
    slope = torch.randn(6, dtype=F64)
    (expected,) = torch.autograd.grad(GOODNESS[name].value(h), h, slope)
    torch.testing.assert_close(GOODNESS[name].errors(h.detach(), slope), expected)
    rows = torch.randn(1, 7, dtype=F64)
    unit = rows / rows.square().mean().sqrt()
    assert GOODNESS[name].at_unit_activity(7) == pytest.approx(GOODNESS[name].value(unit).item())


def test_objects_are_what_their_names_stand_for() -> None:
    options = {"goodness": "mean", "normalizer": "unit", "negatives": "random", "inference": "softmax"}
    objects = {
        "goodness": SquaredGoodness(average=True),
        "normalizer": UnitLength(),
        "negatives": UniformLabels(),
        "inference": SoftmaxReadout(),
    }
    named = learner(**options)
    own = learner(**objects)
    own.load_state_dict(named.state_dict())
    x, y = batch()
    for _ in range(3):
        named.step((x, y))
        own.step((x, y))
    for a, b in zip(named.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(named.scores(x), own.scores(x))
    assert own.variant == "original, UniformLabels, SoftmaxReadout"


def test_own_wrong_labels_are_shown_and_are_no_channel() -> None:
    model = learner(classes=3, negatives=NextLabel())
    x, y = batch(7, 3)
    positive, negative = model.views.contrast(x, y, None, model.views.draw(7)).chunk(2)
    assert torch.equal(positive[:, :3].argmax(1), y)
    assert torch.equal(negative[:, :3].argmax(1), (y + 1) % 3)
    assert model.channels == ()
    assert learner().channels == (HARD_NEGATIVES,)
    assert len(model.local_units().units) == 4


def test_an_own_normaliser_need_not_divide_by_a_length() -> None:
    plain, own = learner(classes=3), learner(classes=3, normalizer=ByEveryRow())
    own.load_state_dict(plain.state_dict())
    x, y = batch(6, 3)
    torch.testing.assert_close(own.label_goodness(x), plain.label_goodness(x), rtol=1e-10, atol=1e-12)
    own.step((x, y))
    plain.step((x, y))
    torch.testing.assert_close(own.scores(x), plain.scores(x), rtol=1e-10, atol=1e-12)


def test_own_negatives_without_labels_learn() -> None:
    model = learner(negatives=HalfOfOthers(), noise_seed=None, inference="softmax", peer_normalization=0.0)
    x, y = batch(16)
    first = model.step((x, y))["layer 0 loss"]
    for _ in range(40):
        last = model.step((x, y))["layer 0 loss"]
    assert last < first
    with pytest.raises(UsageError, match="carry no label"):
        model.label_goodness(x)


def test_own_inference_and_loss() -> None:
    model = learner(inference=LastLayer(), loss=SymbaLoss(2.0), negatives="random")
    symba = learner(loss="symba", alpha=2.0, negatives="random")
    symba.load_state_dict(model.state_dict())
    x, y = batch()
    model.step((x, y))
    symba.step((x, y))
    assert torch.equal(model.scores(x), symba.label_goodness(x)[-1])
    assert "temperature" not in ForwardForward.search_space(AnyChoice(0), {"loss": SymbaLoss(2.0)})


class HalfMade(ContrastiveLoss):
    """A loss that lacks all that makes one."""


class Eavesdropper(SymbaLoss):
    """A loss that hears of nobody there is."""

    hears = "neighbours"


def test_parts_that_lack_a_method_are_refused_when_they_are_made() -> None:
    for kind in (HalfMade, Views, Goodness, Normalizer, Inference, WrongLabels):
        with pytest.raises(TypeError, match="abstract"):
            kind()


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "simba"}, "did you mean symba"),
        ({"goodness": "means"}, "did you mean mean"),
        ({"normalizer": "root"}, "unknown normalizer"),
        ({"negatives": "soft"}, "unknown negatives"),
        ({"label": "append"}, "unknown label"),
        ({"schedule": "jont"}, "did you mean joint"),
        ({"inference": "energy"}, "unknown inference"),
        ({"init": "normale"}, "did you mean normal"),
        ({"loss": "symba", "theta": 3.0}, "symba has no theta"),
        ({"loss": "symba", "temperature": 3.0}, "symba has no temperature"),
        ({"alpha": 3.0}, "original has no alpha"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"loss": "symba", "alpha": 0.0}, "alpha must be positive"),
        ({"label_strength": 0.0}, "label_strength must be positive"),
        ({"peer_normalization": -1.0}, "must not be negative"),
        ({"negatives": "hybrid"}, "need inference=softmax"),
        ({"negatives": "hybrid", "inference": "softmax"}, "made of images"),
        ({"negatives": "hybrid", "inference": "softmax", "label": "concat"}, "leave out label"),
        ({"goodness": 2}, "goodness must be one of sum, mean, minus_sum, minus_mean, or a Goodness; got int"),
        ({"goodness": TotalActivity}, "or a Goodness; got the class TotalActivity itself"),
        ({"loss": Eavesdropper(1.0)}, "unknown value of hears 'neighbours'"),
        ({"negatives": views(3)}, "LabelledViews negatives carry one of 3 labels, and there are 2"),
        ({"negatives": None}, "one of hard, random, hybrid, or a WrongLabels or a Views; got NoneType"),
        ({"loss": SymbaLoss(4.0), "alpha": 2.0}, "the loss SymbaLoss has no alpha"),
        ({"negatives": HalfOfOthers()}, "HalfOfOthers negatives carry no label: they need inference=softmax"),
        ({"negatives": HalfOfOthers(), "inference": "softmax", "noise_seed": 1}, "noise_seed would have no effect"),
        (
            {"negatives": HybridViews((1, 3, 3), Stream(0)), "inference": "softmax"},
            r"HybridViews negatives cannot be made of inputs of shape \(5,\)",
        ),
        (
            {"negatives": WithAnotherColumn(), "inference": "softmax"},
            r"negatives of 2 inputs have shape \(4, 6\), and should have \(4, 5\)",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ForwardForward(network(), 2, **options)


def test_networks_and_classes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="Linear-ReLU"):
        ForwardForward(cnn((1, 8, 8), (4,)), 2, input_shape=(1, 8, 8))
    with pytest.raises(UsageError, match="label=concat"):
        ForwardForward(network(), 6)
