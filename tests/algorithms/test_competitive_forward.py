"""DeeperForward, CwComp and Scalable Forward-Forward: NumPy reference, and what each of them promises."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms import CompetitiveForward, algorithm
from bpfree.algorithms._ff_classes import (
    LOSSES,
    AuxiliaryGoodness,
    ClassGoodness,
    GroupGoodness,
    normalize_channels,
    normalize_groups,
)
from bpfree.data.batches import Batches
from bpfree.errors import UsageError
from bpfree.experiments import Trainer, TrainingConfig
from bpfree.networks import build_network, mlp, set_dropout
from bpfree.networks.residual import ShortcutBlock
from tests.algorithms.test_conformance import images
from tests.reference import competitive_forward as reference

F64 = torch.float64
LR = 0.05
CLASSES = 4
SHAPE = (2, 8, 8)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def learner(widths: tuple[int, ...] = (12, 10), **options: Any) -> CompetitiveForward:
    network = mlp((5,), widths)
    return CompetitiveForward(network, CLASSES, **{"optimizer": sgd, "normalize_input": False, **options}).double()


def batch(size: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5, dtype=F64), torch.randint(CLASSES, (size,))


def arrays(model: nn.Module, name: str) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for key, p in model.named_parameters() if key.endswith(name)]


# the reference; ten channels of the second layer are shared unevenly by four classes


@pytest.mark.parametrize("goodness", ["mean", "squares"])
def test_steps_of_group_goodness_equal_numpy(goodness: str) -> None:
    model = learner(goodness=goodness)
    x, y = batch()
    weights, biases = arrays(model, "weight"), arrays(model, "bias")
    for _ in range(3):
        z, losses = x.numpy(), []
        for index, (W, b) in enumerate(zip(weights, biases, strict=True)):
            h, loss, dW, db = reference.layer(z, W, b, y.numpy(), CLASSES, squared=goodness == "squares")
            losses.append(loss)
            z = reference.normalized_groups(h, CLASSES)
            weights[index], biases[index] = W - LR * dW, b - LR * db
        metrics = model.step((x, y))
        assert [value.item() for value in metrics.values()] == pytest.approx(losses, abs=1e-9)
    for got, expected in ((arrays(model, "weight"), weights), (arrays(model, "bias"), biases)):
        for a, e in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-9)


def test_steps_of_auxiliary_goodness_equal_numpy() -> None:
    model = learner(goodness="auxiliary", normalizer="channels")
    x, y = batch()
    biases, maps = arrays(model, "bias"), arrays(model, "auxiliary.weight")
    weights = [w for w in arrays(model, "weight") if w.shape[0] != CLASSES]
    z = x.numpy()
    expected = []
    for W, b, M in zip(weights, biases, maps, strict=True):
        h, _, dW, db, dM = reference.auxiliary_layer(z, W, b, M, y.numpy())
        z = reference.normalized(h)
        expected.append((W - LR * dW, b - LR * db, M - LR * dM))
        assert np.abs(dM).max() > 0
    model.step((x, y))
    moved = [w for w in arrays(model, "weight") if w.shape[0] != CLASSES]
    found = zip(moved, arrays(model, "bias"), arrays(model, "auxiliary.weight"), strict=True)
    for triple, got in zip(expected, found, strict=True):
        for a, e in zip(got, triple, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [8, 10])
def test_goodness_of_feature_maps_equals_numpy(channels: int) -> None:
    h = torch.randn(3, channels, 5, 6, dtype=F64)
    for squared in (False, True):
        got = GroupGoodness((channels, 5, 6), CLASSES, squared=squared)(h)
        np.testing.assert_allclose(got.numpy(), reference.class_goodness(h.numpy(), CLASSES, squared), rtol=1e-12)
    made = AuxiliaryGoodness((channels, 5, 6), CLASSES).double()
    M = made.auxiliary.weight.detach().numpy()[:, :, 0, 0]  # type: ignore[operator,union-attr]
    np.testing.assert_allclose(
        made(h).detach().numpy(), reference.auxiliary_goodness(h.flatten(2).numpy(), M), rtol=1e-12
    )


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 3, 4)])
def test_the_derivative_of_goodness_is_its_own(shape: tuple[int, ...]) -> None:
    for squared in (False, True):
        goodness = GroupGoodness(shape[1:], CLASSES, squared=squared)
        assert torch.autograd.gradcheck(goodness, torch.randn(shape, dtype=F64, requires_grad=True))


def test_maps_stay_as_they_lie_in_memory() -> None:
    """Every convolution reads channels-last maps, and learns from derivatives that lie like them."""
    last = torch.channels_last
    ends, kept = [], []
    for layout in (torch.contiguous_format, last):
        torch.manual_seed(0)
        network = build_network("deeper:20x40", (3, 8, 8))
        set_dropout(network, 0.0)  # a mask is drawn as a map lies in memory
        model = CompetitiveForward(network, 10, input_shape=(3, 8, 8)).double().to(memory_format=layout)

        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept.append(inputs[0].is_contiguous(memory_format=last))
            output.register_hook(lambda gradient: kept.append(gradient.is_contiguous(memory_format=last)))

        x, y = torch.randn(4, 3, 8, 8, dtype=F64).to(memory_format=layout), torch.arange(4)
        if layout == last:
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(watch)
        model.step((x, y))
        ends.append([parameter.detach() for parameter in model.parameters()])
    assert kept == [True] * 2 * 9
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_cross_entropy_of_goodness_pulls_by_softmax_minus_target() -> None:
    G, y = torch.randn(6, CLASSES, dtype=F64, requires_grad=True), torch.randint(CLASSES, (6,))
    (gradient,) = torch.autograd.grad(LOSSES["cross-entropy"](G, y), G)
    torch.testing.assert_close(gradient, (G.softmax(1) - F.one_hot(y, CLASSES)).detach() / 6)


def test_pvn_and_cwg_follow_their_formulas() -> None:
    G, y = np.random.default_rng(0).normal(size=(6, CLASSES)), np.array([0, 1, 2, 3, 0, 1])
    pvn = 0.0
    for row, label in zip(G, y, strict=True):
        others = np.delete(row, label).mean()
        pvn += (np.log1p(np.exp(2 - row[label])) + np.log1p(np.exp(others - 2))) / 6
    entropy = -np.log(reference.softmax(G)[np.arange(6), y]).mean()
    inputs = torch.from_numpy(G), torch.from_numpy(y)
    assert LOSSES["pvn"](*inputs).item() == pytest.approx(pvn, rel=1e-12)
    assert LOSSES["cwg"](*inputs).item() == pytest.approx(0.28 * entropy + 0.72 * pvn, rel=1e-12)


# what is passed on


@pytest.mark.parametrize("channels", [8, 10])
def test_groups_pass_on_no_goodness(channels: int) -> None:
    h = torch.rand(5, channels, 4, 4, dtype=F64) * torch.arange(1, channels + 1)[:, None, None]
    z = normalize_groups(h, CLASSES)
    np.testing.assert_allclose(z.numpy(), reference.normalized_groups(h.numpy(), CLASSES), rtol=1e-9)
    assert GroupGoodness((channels, 4, 4), CLASSES, squared=False)(z).abs().max() < 1e-12
    whole = F.layer_norm(h, h.shape[1:])  # normalising the whole map is not enough
    assert GroupGoodness((channels, 4, 4), CLASSES, squared=False)(whole).abs().max() > 0.1


def test_channels_are_normalised_at_every_position() -> None:
    h = torch.rand(5, 6, 3, 4, dtype=F64)
    z = normalize_channels(h, CLASSES)
    expected = reference.normalized(h.movedim(1, 3).reshape(-1, 6).numpy())
    np.testing.assert_allclose(z.movedim(1, 3).reshape(-1, 6).numpy(), expected, rtol=1e-9)


def test_scale_of_a_layer_does_not_reach_the_next() -> None:
    model = learner()
    x, _ = batch()
    before, _ = model.layer_goodness(x)
    with torch.no_grad():
        for parameter in model.network[0].parameters():
            parameter.mul_(100)
    after, _ = model.layer_goodness(x)
    torch.testing.assert_close(after[0], 100 * before[0])
    torch.testing.assert_close(after[1], before[1], rtol=1e-2, atol=1e-3)  # but for the epsilon of the normalisation


# shortcuts


def deeper(**options: Any) -> CompetitiveForward:
    torch.manual_seed(0)
    network = build_network("deeper:8x16", SHAPE)
    return CompetitiveForward(network, CLASSES, input_shape=SHAPE, **{"lr": 1e-2, **options})


def test_layers_of_a_shortcut_block_learn_one_by_one() -> None:
    """Perturbing the second layer of a pair leaves the first one's update as it is."""
    model = deeper()
    twin = copy.deepcopy(model)
    pair = model.network[1]
    assert isinstance(pair, ShortcutBlock)
    with torch.no_grad():
        for parameter in pair.layers[1].parameters():
            parameter.add_(torch.randn_like(parameter))
    x, y = images(16, 0)
    assert len(model.step((x, y))) == 9
    twin.step((x, y))
    other = twin.network[1]
    assert isinstance(other, ShortcutBlock)
    for a, b in zip(pair.layers[0].parameters(), other.layers[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(pair.layers[1].parameters()), next(other.layers[1].parameters()))
    assert not torch.equal(next(model.network[2].parameters()), next(twin.network[2].parameters()))


def test_shortcuts_carry_what_the_block_was_given() -> None:
    x = torch.rand(2, 8, 6, 6)
    block = ShortcutBlock([nn.Conv2d(8, 8, 3, 2, 1)], stride=2)
    h = torch.rand(2, 8, 3, 3)
    torch.testing.assert_close(block.join(h, x), h + F.avg_pool2d(x, 2))
    joined = ShortcutBlock([nn.Conv2d(8, 8, 3, padding=1)], concatenate=True).join(x + 1, x)
    assert torch.equal(joined, torch.cat([x + 1, x], 1))


def test_deeper_forward_adds_normalised_activities_to_the_shortcut() -> None:
    """A pair by hand: z of the second layer plus what the pair was given."""
    model = deeper().eval()
    x, _ = images(4, 0)
    seen: list[Tensor] = []
    first = model.network[2].layers[0]  # type: ignore[union-attr,index]
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    model.scores(x)
    with torch.no_grad():
        entered = normalize_groups(model.network[0](F.layer_norm(x, x.shape[1:])), CLASSES)
        signal = entered
        for layer in model.network[1].layers:  # type: ignore[union-attr]
            signal = normalize_groups(layer(signal), CLASSES)
    torch.testing.assert_close(seen[0], signal + entered)


# inference


def test_sum_last_and_first_layer() -> None:
    x, _ = batch()
    model = learner((12, 12, 12), first_layer=1)
    goodness, _ = model.layer_goodness(x)
    torch.testing.assert_close(model.scores(x), goodness[1:].sum(0))
    last = learner((12, 12, 12), inference="last")
    last.load_state_dict({**model.state_dict(), "counted": last.counted})
    torch.testing.assert_close(last.scores(x), goodness[2])


def test_readout_learns_from_the_last_layer_and_teaches_none() -> None:
    with_readout, without = learner(inference="readout"), learner()
    without.network.load_state_dict(with_readout.network.state_dict())
    x, y = batch()
    assert "read-out loss" in with_readout.step((x, y))
    without.step((x, y))
    for a, b in zip(with_readout.network.parameters(), without.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_selected_layers_are_the_best_by_brute_force() -> None:
    model = learner((16, 16, 16), inference="selected")
    for _ in range(20):
        model.step(batch(50))
    x, y = batch(300)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    goodness, _ = model.layer_goodness(x)
    accuracies = {
        (first, last): (goodness[first : last + 1].sum(0).argmax(1) == y).sum().item()
        for first in range(3)
        for last in range(first, 3)
    }
    first, last = model.select_layers([(x[:100], y[:100]), (x[100:], y[100:])])
    assert accuracies[first, last] == max(accuracies.values())
    torch.testing.assert_close(model.scores(x), goodness[first : last + 1].sum(0))
    counting = model.diagnostics((x, y))
    assert (counting["first layer that counts"], counting["last layer that counts"]) == (first, last)
    again = learner((16, 16, 16), inference="selected")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.scores(x), model.scores(x))
    with pytest.raises(UsageError, match="reads the last layer only"):
        learner(inference="last").select_layers([(x, y)])


def test_a_run_selects_layers_on_validation_data_before_it_rates_a_state() -> None:
    model = learner((8, 8, 8), inference="selected", lr=0.3).float()
    train, validation = (Batches(x.float(), y) for x, y in (batch(60), batch(40)))
    chosen: list[Tensor] = []

    def on_epoch(record: dict[str, Any]) -> None:
        x, y = validation.inputs, validation.targets
        twin = copy.deepcopy(model)
        twin.select_layers([(x, y)])
        assert torch.equal(twin.counted, model.counted)
        rating = 100 * (model.scores(x).argmax(1) == y).float().mean().item()
        assert record["validation_accuracy"] == pytest.approx(rating)
        chosen.append(model.counted.clone())

    config = TrainingConfig(epochs=8, patience=8, batch_size=20, monitor="metric")
    Trainer(model, train, validation, config, on_epoch=on_epoch).run()
    assert len({tuple(counted.tolist()) for counted in chosen}) > 1  # else it would not matter when it selects
    twin = copy.deepcopy(model)
    twin.select_layers([(validation.inputs, validation.targets)])
    assert torch.equal(twin.counted, model.counted)  # of the best state, which is restored


# networks that the papers use


@pytest.mark.parametrize(
    ("rule", "network", "layers"),
    [
        ("dff", "deeper:10x20", 9),
        ("dff", "deeper:tiny", 4),
        ("cwc", "cwcomp:20x80", 2),
        ("sff", "resnet:18", 9),
        ("sff", "mobilenet", 12),
    ],
)
def test_each_rule_steps_its_papers_network(rule: str, network: str, layers: int) -> None:
    shape = (3, 16, 16)
    model = algorithm(rule).build(build_network(network, shape), 10, shape)
    x, y = torch.rand(4, *shape), torch.arange(4)
    metrics = model.step((x, y))
    assert len(metrics) == layers
    assert all(value.isfinite() for value in metrics.values())
    assert model.scores(x).shape == (4, 10)


def test_gradients_exist_inside_a_residual_block_and_not_across() -> None:
    model = algorithm("sff").build(build_network("resnet:18", (3, 8, 8)), CLASSES, (3, 8, 8))
    twin = copy.deepcopy(model)
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % CLASSES
    inside = [p for p in twin.network[1].parameters() if p.ndim == 4]
    with torch.no_grad():  # the second convolution of block 1: the first one's update follows, block 0's does not
        inside[1].add_(torch.randn_like(inside[1]))
    model.step((x, y))
    twin.step((x, y))
    for a, b in zip(model.network[0].parameters(), twin.network[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(iter(model.network[1].parameters())), inside[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goodness": "means"}, "did you mean mean"),
        ({"loss": "ce"}, "unknown loss"),
        ({"normalizer": "group"}, "did you mean groups"),
        ({"inference": "lst"}, "did you mean last"),
        ({"first_layer": 2}, r"\[0, 2\)"),
        ({"inference": "last", "first_layer": 1}, "first_layer is of inference=sum, not of last"),
        ({"head_pool": "gap"}, "needs inference=readout"),
        ({"lanes": 0}, "lanes must be at least 1, got 0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        learner(**options)


def test_layers_too_narrow_for_the_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="3 channels cannot be shared by 4 classes"):
        learner((12, 3))
    assert learner((12, 3), goodness="auxiliary").scores(batch()[0]).shape == (9, CLASSES)


class FirstChannels(ClassGoodness):
    """The activity of the unit of each class's number; the others are of no class."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, : self.classes]


def hinge(goodness: Tensor, targets: Tensor) -> Tensor:
    return F.multi_margin_loss(goodness, targets)


def halved(hidden: Tensor, classes: int) -> Tensor:
    return hidden / 2


def test_own_goodness_loss_and_normaliser() -> None:
    """Against autograd on each layer's own loss."""
    model = learner(goodness=FirstChannels, loss=hinge, normalizer=halved)
    assert model.variant == "FirstChannels, hinge, halved, sum"
    x, y = torch.randn(9, 5, dtype=F64), torch.randint(CLASSES, (9,))
    expected, signal, scores = [], x, torch.zeros(9, CLASSES, dtype=F64)
    for block in copy.deepcopy(model).network:
        h = block(signal)
        weight = next(block.parameters())
        (gradient,) = torch.autograd.grad(F.multi_margin_loss(h[:, :CLASSES], y), weight)
        expected.append(weight.detach() - LR * gradient)
        scores += h[:, :CLASSES].detach()
        signal = h.detach() / 2
    torch.testing.assert_close(model.scores(x), scores)
    model.step((x, y))
    for block, weight in zip(model.network, expected, strict=True):
        torch.testing.assert_close(next(block.parameters()).detach(), weight)


def test_options_that_are_neither_name_nor_function_are_refused() -> None:
    with pytest.raises(UsageError, match="loss must be one of cross-entropy, pvn, cwg, or a function; got float"):
        learner(loss=0.5)
    with pytest.raises(UsageError, match=r"a goodness of its own: pass a function that makes it, .* FirstChannels"):
        learner(goodness=FirstChannels((6,), 3))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (2, 100, 32, 32), (2, 800, 4, 4)])
def test_maps_are_normalised_on_a_gpu_as_they_lie_in_memory(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    h = (torch.randn(*shape) + 1).relu().to(memory_format=torch.channels_last)
    for normalize in (normalize_groups, normalize_channels):
        there = normalize(h.to("cuda", dtype), CLASSES)
        assert there.dtype == dtype
        assert there.stride() == h.stride()
        expected = normalize(h.to(dtype).double(), CLASSES)
        torch.testing.assert_close(there.double().cpu(), expected, rtol=tolerance, atol=tolerance)
