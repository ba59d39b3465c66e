"""Local learning: the tests of MAN's specification (section 7), the hosts' losses, and what the options promise."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms import Backprop, LocalLearning, algorithm
from bpfree.algorithms._auxiliary_losses import (
    AuxiliaryLoss,
    Classification,
    HeadOptions,
    Place,
    Upsampling,
    _Resized,
    auxiliary_loss,
    classifier,
    decoder,
    similarities,
    spatial_deviation,
    supervised_contrast,
)
from bpfree.algorithms._momentum_auxiliary import Momentum, MomentumAuxiliary
from bpfree.algorithms.local_learning import PixelRange, Unit
from bpfree.errors import UsageError
from bpfree.networks import build_network, gnn, mlp
from tests.reference import local_learning as reference

LR = 0.05
IMAGE = (3, 16, 16)
CLASSES = 4


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def linear_host(place: Place, options: HeadOptions) -> AuxiliaryLoss:
    return Classification(nn.Linear(place.shape[0], place.classes, bias=False))


def linear_blocks() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 6, bias=False)).double()


def linear_batch(size: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5, dtype=torch.float64), torch.randint(3, (size,))


def linear_learner(**options: object) -> LocalLearning:
    return LocalLearning(linear_blocks(), 3, **{"host": linear_host, "optimizer": sgd, **options}).double()  # type: ignore[arg-type]


def images(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(size, *IMAGE), torch.arange(size) % CLASSES


def residual(
    k: int = 4, host: str = "dgl", depth: int = 20, image: tuple[int, ...] = IMAGE, **options: object
) -> LocalLearning:
    """ResNet-20 on small images: a stem and nine units."""
    network = build_network(f"resnet:{depth}", image)
    return LocalLearning(network, CLASSES, k=k, host=host, input_shape=image, **options)  # type: ignore[arg-type]


def copies(parameters: object) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]  # type: ignore[attr-defined]


def identical(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


MAN = {"ema": True, "bias": "twin"}
VARIANTS = {"host": {}, "man": MAN, "copy": {"ema": True}, "light": {"ema": True, "bias": "light"}}
VARIANTS["learnable"] = {"bias": "twin"}
VARIANTS["scale"] = {**MAN, "scale": True}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


# 1. the average over time


def test_momentum_copy_equals_its_closed_form() -> None:
    learner = linear_learner(**MAN, momentum=0.9)
    (copied,) = learner.auxiliaries[0].ema.parameters()
    (weight,) = learner.network[1].parameters()
    start, history = copied.detach().numpy().copy(), []
    for _ in range(12):
        history.append(weight.detach().numpy().copy())
        learner.step(linear_batch())
    expected = reference.momentum_average(start, history, 0.9)
    np.testing.assert_allclose(copied.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("momentum", "follows"), [(1.0, False), (0.0, True)])
def test_extreme_momenta_are_exact(momentum: float, follows: bool) -> None:
    learner = residual(**MAN, momentum=momentum, ema_update="after")
    frozen = copies(learner.auxiliaries[0].ema.parameters())
    for _ in range(2):
        learner.step(images())
    followed = copies(learner.network[1][0].parameters())
    assert identical(copies(learner.auxiliaries[0].ema.parameters()), followed if follows else frozen)
    assert not identical(frozen, followed)


def test_copies_begin_as_the_next_blocks_first_unit() -> None:
    learner = residual(**MAN)
    assert len(learner.auxiliaries) == 3
    for index, auxiliary in enumerate(learner.auxiliaries):
        unit = copies(learner.network[index + 1][0].parameters())
        assert identical(copies(auxiliary.ema.parameters()), unit)
        assert identical(copies(auxiliary.twin.parameters()), unit)


def test_copies_may_begin_with_weights_of_their_own() -> None:
    torch.manual_seed(0)
    learner = residual(**MAN, start="draw")
    for index, auxiliary in enumerate(learner.auxiliaries):
        units = [
            dict(unit.named_parameters()) for unit in (learner.network[index + 1][0], auxiliary.ema, auxiliary.twin)
        ]
        for name, weight in units[0].items():
            if weight.ndim == 1:  # scale and shift of a normalisation
                assert all(torch.equal(weight, other[name]) for other in units)
                continue
            spread = (2 / weight[:, 0].numel()) ** 0.5
            drawn = torch.stack([unit[name].detach().flatten() for unit in units])
            assert drawn.std(1).numpy() == pytest.approx(spread, rel=5 / (2 * weight.numel()) ** 0.5)
            others = torch.corrcoef(drawn) - torch.eye(3)
            assert others.abs().max() < 5 / weight.numel() ** 0.5
    assert not any(parameter.requires_grad for parameter in learner.auxiliaries[0].ema.parameters())


def test_buffers_do_not_follow() -> None:
    torch.manual_seed(0)
    auxiliary = MomentumAuxiliary(unit := nn.BatchNorm1d(3), (3,), ema=True, bias="none", scale=False)
    unit(torch.randn(20, 3) + 5)
    with torch.no_grad():
        unit.bias.add_(1)
    Momentum([(auxiliary, unit)], 0.0).update()
    assert auxiliary.ema is not None
    assert torch.equal(auxiliary.ema.bias, unit.bias)
    assert not torch.equal(auxiliary.ema.running_mean, unit.running_mean)


# 2. when it reads


@pytest.mark.parametrize("update", ["before", "after"])
def test_momentum_copy_reads_weights_from_before_or_after_the_step(update: str) -> None:
    learner = linear_learner(**MAN, momentum=0.0, ema_update=update)
    (copied,) = learner.auxiliaries[0].ema.parameters()
    (weight,) = learner.network[1].parameters()
    learner.step(linear_batch())
    before = weight.detach().clone()
    learner.step(linear_batch())
    assert torch.equal(copied, before if update == "before" else weight)
    assert not torch.equal(before, weight)


# 3. no gradient crosses (test_conformance.py has more): what goes backwards are parameters, one step late


@variants
@pytest.mark.parametrize("host", ["greedy", "dgl", "predsim", "infopro", "infopro-contrast"])
def test_no_block_can_be_differentiated_by_another_ones_loss(host: str, options: dict[str, object]) -> None:
    learner = residual(3, host, **options)
    x, y = images()
    signal = x
    for number, unit in enumerate(learner._units):
        activations = unit.block(signal.detach())
        loss = unit.loss(unit.auxiliary(activations), x, y)
        for other, block in enumerate(learner.blocks()):
            reached = torch.autograd.grad(loss, tuple(block.parameters()), allow_unused=True, retain_graph=True)
            assert all((gradient is not None) == (number == other) for gradient in reached)
        signal = activations


@pytest.mark.parametrize(("momentum", "arrives"), [(0.9, True), (1.0, False)])
def test_a_change_of_a_block_reaches_the_one_before_it_by_its_copy_and_no_other(momentum: float, arrives: bool) -> None:
    """With 3 blocks: block 2's weights are read into block 1's copy at the end of step 1, and used in step 2."""
    plain = residual(3, **MAN, momentum=momentum)
    changed = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in changed.network[2].parameters():
            parameter.add_(torch.randn_like(parameter))
    alike = []
    for _ in range(4):
        x, y = images()
        plain.step((x, y))
        changed.step((x, y))
        pairs = zip(plain.blocks(), changed.blocks(), strict=True)
        alike.append([identical(copies(a.parameters()), copies(b.parameters())) for a, b in pairs])
    assert alike[0] == [True, True, False]
    assert alike[1] == alike[2] == [True, not arrives, False]
    # block 1's weights, which differ after step 2, are in block 0's copy after step 3
    assert alike[3] == [not arrives, not arrives, False]


@variants
def test_a_louder_later_loss_does_not_reach_earlier_blocks(options: dict[str, object]) -> None:
    """Specification 7.3: scale the last block's loss by 10; updates 1 and 2 of the block before are bit-identical."""
    plain = residual(2, **options, optimizer=sgd)
    loud = copy.deepcopy(plain)
    last = loud._units[1]
    loud._units = (loud._units[0], Unit.of("block 1", last.block, last.auxiliary, Louder(last.loss)))
    agree = []
    for _ in range(3):
        x, y = images()
        plain.step((x, y))
        loud.step((x, y))
        agree.append(identical(copies(plain.network[0].parameters()), copies(loud.network[0].parameters())))
    assert agree[:2] == [True, True]
    assert agree[2] == (not options.get("ema", False))
    assert not identical(copies(plain.network[1].parameters()), copies(loud.network[1].parameters()))


class Louder(AuxiliaryLoss):
    """Ten times another loss."""

    def __init__(self, inner: AuxiliaryLoss) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Tensor, images: Tensor | None, targets: Tensor) -> Tensor:
        return 10 * self.inner(features, images, targets)

    def scores(self, features: Tensor) -> Tensor | None:
        return self.inner.scores(features)


# 4. the copy has no gradient and passes one on


def test_momentum_copy_has_no_gradient_but_passes_one() -> None:
    learner = residual(**MAN)
    auxiliary = learner.auxiliaries[0]
    learner.step(images())
    assert all(p.grad is None and not p.requires_grad for p in auxiliary.ema.parameters())
    trained = {id(p) for group in learner.optimizers()[0].param_groups for p in group["params"]}
    assert not trained & {id(p) for p in auxiliary.ema.parameters()}
    features = torch.randn(4, 16, 16, 16, requires_grad=True)
    (through_copy,) = torch.autograd.grad(auxiliary.ema(features).square().sum(), features)
    assert through_copy.abs().max() > 0
    with torch.no_grad():
        for parameter in auxiliary.twin.parameters():
            parameter.zero_()
    (through_both,) = torch.autograd.grad(auxiliary(features).square().sum(), features)
    assert through_both.abs().max() > 0  # by the copy alone: the twin passes nothing


# 5. NumPy


@pytest.mark.parametrize("update", ["before", "after", None])
def test_steps_equal_the_numpy_reference(update: str | None) -> None:
    options = {"ema": True, "ema_update": update, "momentum": 0.8} if update else {}
    learner = linear_learner(bias="twin", **options)
    auxiliary = learner.auxiliaries[0]
    copied = auxiliary.ema.weight if update else torch.zeros(6, 4)
    parts = [*(block.weight for block in learner.network), copied, auxiliary.twin.weight]
    parts += [learner.losses[0].head.weight, learner.readout.linear.weight, learner.readout.linear.bias]
    x, y = linear_batch()
    with torch.no_grad():
        auxiliary.twin.weight.normal_()  # a draw of its own, so that no sum is twice the same
    expected, losses = reference.train(
        x.numpy(), y.numpy(), *(part.detach().double().numpy() for part in parts), lr=LR, momentum=0.8, steps=6,
        update=update,
    )  # fmt: skip
    for step_losses in losses:
        metrics = learner.step((x, y))
        assert [value.item() for value in metrics.values()] == pytest.approx(step_losses, abs=1e-10)
    for got, wanted in zip(parts, expected, strict=True):
        np.testing.assert_allclose(got.detach().double().numpy(), wanted, rtol=1e-10, atol=1e-12)


# 6. degenerate cases


def test_one_block_is_back_propagation() -> None:
    torch.manual_seed(3)
    local = LocalLearning(build_network("resnet:20", IMAGE), CLASSES, k=1, lr=0.1, input_shape=IMAGE)
    torch.manual_seed(3)
    network = build_network("resnet:20", IMAGE)
    globally = Backprop(network, CLASSES, optimizer="sgd", lr=0.1, head_pool="gap", input_shape=IMAGE)
    for _ in range(5):
        x, y = images()
        local.step((x, y))
        globally.step((x, y))
    assert identical(copies(local.parameters()), copies(globally.parameters()))


def test_the_learnable_part_alone_is_a_host_with_one_more_unit() -> None:
    """The control: a deeper auxiliary network, and no channel between blocks."""
    control = residual(2, bias="twin", optimizer=sgd)
    unit = copy.deepcopy(control.network[1][0])

    def deeper(place: Place, options: HeadOptions) -> AuxiliaryLoss:
        return Classification(nn.Sequential(unit, copy.deepcopy(control.losses[0].head)))

    twin = LocalLearning(copy.deepcopy(control.network), CLASSES, host=deeper, optimizer=sgd, input_shape=IMAGE)
    twin.readout.load_state_dict(control.readout.state_dict())
    for _ in range(3):
        x, y = images()
        control.step((x, y))
        twin.step((x, y))
    assert identical(copies(control.network.parameters()), copies(twin.network.parameters()))


def test_without_copy_nothing_follows() -> None:
    assert not residual(bias="twin")._momentum._pairs
    assert all(isinstance(auxiliary, nn.Identity) for auxiliary in residual().auxiliaries)


def test_scale_weighs_both_parts() -> None:
    unit = nn.Linear(3, 3, bias=False)
    auxiliary = MomentumAuxiliary(unit, (3,), ema=True, bias="twin", scale=True)
    with torch.no_grad():
        auxiliary.twin.weight.normal_()
        auxiliary.scale.fill_(0.5)
    h = torch.randn(2, 3)
    torch.testing.assert_close(auxiliary(h), 0.5 * h @ auxiliary.twin.weight.T + 1.5 * h @ unit.weight.T)


def test_a_light_bias_is_one_value_per_channel() -> None:
    learner = residual(4, ema=True, bias="light")
    assert [auxiliary.bias.shape for auxiliary in learner.auxiliaries] == [(16, 1, 1), (32, 1, 1), (64, 1, 1)]
    features = torch.randn(2, 16, 16, 16)
    auxiliary = learner.auxiliaries[0]
    with torch.no_grad():
        auxiliary.bias.normal_()
    torch.testing.assert_close(auxiliary(features), auxiliary.ema(features) + auxiliary.bias)


# 7, 8. parts: sizes, and what predicts


def test_inference_uses_the_backbone_alone() -> None:
    learner = residual(**MAN)
    learner.step(images())
    x, _ = images()
    plain = nn.Sequential(build_network("resnet:20", IMAGE), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))
    state = learner.state_dict()
    kept = [value for name, value in state.items() if name.startswith(("network.", "readout."))]
    plain.load_state_dict(dict(zip(plain.state_dict(), kept, strict=True)))
    torch.testing.assert_close(learner.scores(x), plain.eval()(x))
    with torch.no_grad():
        for part in (*learner.auxiliaries.parameters(), *learner.losses.parameters()):
            part.fill_(float("nan"))
    torch.testing.assert_close(learner.scores(x), plain(x))


def test_man_adds_the_parameters_that_the_specification_counts() -> None:
    network = build_network("resnet:32", (3, 32, 32))
    learner = algorithm("man").build(network, 10, (3, 32, 32), k=16)
    assert sum(p.numel() for p in (*learner.network.parameters(), *learner.readout.parameters())) == 466_906
    # all units but the first: 461,120 trainable in the twins and as many frozen in the copies
    assert sum(p.numel() for a in learner.auxiliaries for p in a.twin.parameters()) == 461_120
    assert sum(p.numel() for a in learner.auxiliaries for p in a.ema.parameters()) == 461_120


def test_stand_ins_have_the_shape_of_the_next_blocks_first_unit() -> None:
    learner = residual(9, **MAN)
    signal, _ = images(2)
    with torch.no_grad():
        for index, auxiliary in enumerate(learner.auxiliaries):
            signal = learner.network[index](signal)
            assert auxiliary(signal).shape == learner.network[index + 1](signal).shape


@pytest.mark.parametrize(("depth", "k", "host"), [(50, 4, "dgl"), (101, 2, "infopro"), (152, 4, "infopro")])
def test_large_networks_can_be_built(depth: int, k: int, host: str) -> None:
    shape, head = (3, 224, 224), "bottleneck" if host.startswith("infopro") else ""
    with torch.device("meta"):
        network = build_network(f"resnet:{depth}", shape)
        learner = LocalLearning(network, 1000, k=k, host=host, head=head, optimizer=sgd, input_shape=shape, **MAN)
    assert len(learner.blocks()) == k
    assert learner.readout.weight.shape == (1000, 2048)


def test_bottlenecks_learn() -> None:
    learner = residual(2, "infopro", depth=50, image=(3, 32, 32), head="bottleneck", **MAN)
    metrics = learner.step((torch.rand(2, 3, 32, 32), torch.tensor([1, 3])))
    assert all(value.isfinite() for value in metrics.values())


# 10. memory: a block's graph is gone before the next block begins


class Kept:
    """Counts what autograd keeps for the backward pass, in bytes; the storage of a tensor once."""

    alive = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Kept.alive += tensor.nbytes
        Kept.most = max(Kept.most, Kept.alive)

    def __del__(self) -> None:
        Kept.alive -= self.tensor.nbytes


def most_kept(learner: LocalLearning | Backprop) -> int:
    Kept.alive = Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        learner.step((torch.randn(32, 16), torch.randint(3, (32,))))
    return Kept.most


@pytest.mark.parametrize("options", [{}, MAN], ids=["dgl", "man"])
def test_what_autograd_keeps_does_not_grow_with_depth(options: dict[str, object]) -> None:
    def network(depth: int) -> nn.Sequential:
        return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(depth)))

    local = [most_kept(LocalLearning(network(depth), 3, **options)) for depth in (4, 8, 16)]  # type: ignore[arg-type]
    assert local[0] == local[1] == local[2] > 0
    assert most_kept(Backprop(network(16), 3)) > 3 * most_kept(Backprop(network(4), 3))


@pytest.mark.parametrize("host", ["greedy", "dgl", "predsim", "infopro", "infopro-contrast"])
def test_a_graph_is_freed_before_the_next_block(host: str) -> None:
    learner = residual(4, host, **MAN)
    graphs: list[weakref.ref[object]] = []
    seen: list[bool] = []

    def entered(module: nn.Module, inputs: object) -> None:
        seen.append(any(graph() is not None for graph in graphs))

    def left(module: nn.Module, inputs: object, outputs: Tensor) -> None:
        graphs.append(weakref.ref(outputs))  # the tensor that holds the block's graph

    for block in learner.blocks():
        block.register_forward_pre_hook(entered)
        block.register_forward_hook(left)
    learner.step(images())
    assert seen == [False] * 4


# 11. the hosts' losses


def test_supervised_contrast_equals_the_double_loop() -> None:
    z, y = torch.randn(12, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 0, 3, 1, 2, 0, 0, 4])
    assert supervised_contrast(z, y).item() == pytest.approx(
        reference.supervised_contrast(z.numpy(), y.numpy(), 0.07), rel=1e-12
    )
    alone = torch.randn(1, 6, requires_grad=True)
    supervised_contrast(alone, y[:1]).backward()
    assert alone.grad is not None
    assert not alone.grad.any()


def test_similarities_equal_correlations() -> None:
    x = torch.randn(7, 5, dtype=torch.float64)
    np.testing.assert_allclose(similarities(x).numpy(), np.corrcoef(x.numpy()), atol=1e-12)


def test_maps_are_compared_by_their_spatial_deviation() -> None:
    maps = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    expected = maps.numpy().reshape(3, 4, -1).std(axis=2, ddof=1)
    np.testing.assert_allclose(spatial_deviation(maps).numpy(), expected, rtol=1e-6)
    constant = torch.zeros(2, 4, 3, 3, requires_grad=True)
    spatial_deviation(constant).sum().backward()
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


def test_predsim_is_the_weighted_sum_of_both_losses() -> None:
    loss = auxiliary_loss("predsim", HeadOptions())(Place((4, 6, 6), CLASSES, IMAGE, 0.0)).double()
    h, y = torch.randn(6, 4, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    onehot = np.eye(CLASSES)[y.numpy()]
    deviations = loss.project(h).detach().numpy().reshape(6, 4, -1).std(axis=2, ddof=1)
    alike = ((np.corrcoef(deviations) - np.corrcoef(onehot)) ** 2).mean()
    scores = loss.head.linear(h.mean((2, 3)))
    expected = 0.01 * F.cross_entropy(scores, y).item() + 0.99 * alike
    assert loss(h, None, y).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("size", "larger"), [((8, 8), (32, 32)), ((3, 5), (7, 11)), ((2, 2), (9, 4))])
def test_upsampling_is_bilinear(size: tuple[int, int], larger: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *size, dtype=torch.float64)
    got = Upsampling(size, larger).double()(maps)
    assert got.shape == (2, 3, *larger)
    np.testing.assert_allclose(
        got[1, 2].numpy(), reference.bilinear(maps[1, 2].numpy(), *larger), atol=1e-5
    )  # weights in float32


@pytest.mark.parametrize("contrast", [False, True])
def test_infopro_weights_run_from_the_first_to_the_last_loss(contrast: bool) -> None:
    host = "infopro-contrast" if contrast else "infopro"
    learner = residual(5, host, reconstruct_first=4.0, reconstruct_last=1.0, classify_last=0.8)
    assert [loss.reconstruct for loss in learner.losses] == pytest.approx([4, 3, 2, 1])
    assert [loss.classify for loss in learner.losses] == pytest.approx([0.05, 0.3, 0.55, 0.8])
    x, y = images()
    loss = learner.losses[1]
    features = learner.network[1](learner.network[0](x)).detach()
    pixels, said = loss.decoder(features).sigmoid(), loss.head(features)
    kept = -(x * pixels.log() + (1 - x) * (1 - pixels).log()).mean()
    told = supervised_contrast(said, y) if contrast else F.cross_entropy(said, y)
    torch.testing.assert_close(loss(features, x, y), 3 * kept + 0.3 * told)
    assert (loss.scores(features) is None) == contrast


def test_images_to_reconstruct_lie_in_the_unit_interval() -> None:
    pixels = torch.randint(256, (40, 3, 4, 4)).float()
    pixels[0, :, 0, 0], pixels[1, :, 0, 0] = 0, 255
    mean, std = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1), torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1)
    seen = PixelRange((3, 4, 4))
    seen.observe([((pixels - mean) / std)[:25], ((pixels - mean) / std)[25:]])
    torch.testing.assert_close(seen((pixels - mean) / std), pixels / 255)
    assert seen(torch.full((1, 3, 4, 4), 99.0)).max() == 1
    flat = PixelRange((6,))
    flat.observe([torch.tensor([[-1.0, 0, 3, 1, 1, 1]])])
    torch.testing.assert_close(flat(torch.tensor([[-1.0, 0, 3, 1, 1, 1]]))[0, 1].item(), 0.25)


def test_infopro_looks_at_the_training_set_and_others_need_not() -> None:
    learner = residual(2, "infopro")
    learner.prepare([(2 * images()[0] - 1, images()[1])])
    assert learner.pixels is not None
    assert learner.pixels.low.max() < -0.9
    residual(2).prepare(iter([]))


# heads


@pytest.mark.parametrize(
    ("name", "shape", "layers"),
    [
        ("0c1f", (16, 32, 32), [(10, 16)]),
        ("1c2f", (16, 32, 32), [(32, 16, 3, 3), (128, 32), (10, 128)]),
        ("2c2f", (16, 32, 32), [(32, 16, 3, 3), (32, 32, 3, 3), (128, 32), (10, 128)]),
        ("2c2f", (32, 16, 16), [(64, 32, 3, 3), (64, 64, 3, 3), (128, 64), (10, 128)]),
        ("1c2f", (64, 8, 8), [(64, 64, 3, 3), (128, 64), (10, 128)]),
        ("shrink", (16, 32, 32), [(16, 16, 1, 1)] * 3 + [(64, 64)] * 2 + [(10, 64)]),
        ("wide", (16, 32, 32), [(128, 16, 1, 1), (128, 128, 1, 1), (128, 128, 1, 1), (512, 128)] + [(512, 512)] * 2
         + [(10, 512)]),
        ("bottleneck", (512, 28, 28), [(128, 512, 1, 1), (256, 128, 3, 3), (512, 256, 3, 3), (2048, 512, 1, 1),
                                       (10, 2048)]),
        ("shrink", (24,), [(24, 24)] * 2 + [(10, 24)]),
        ("1c2f", (24,), [(128, 24), (10, 128)]),
    ],
)  # fmt: skip
def test_heads_have_the_published_layers(name: str, shape: tuple[int, ...], layers: list[tuple[int, ...]]) -> None:
    head = classifier(name, shape, 10)
    assert [tuple(p.shape) for p in head.parameters() if p.ndim > 1] == layers
    assert head(torch.randn(2, *shape)).shape == (2, 10)


def test_heads_are_what_their_papers_say() -> None:
    def normalized(x: Tensor, norm: nn.Module) -> Tensor:
        scale, offset = norm.parameters()
        return F.relu(F.batch_norm(x, None, None, scale, offset, training=True))

    def parts(head: nn.Module) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        """Convolutions, linear layers, normalisations; the last two kinds begin with random scales and offsets."""
        kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
        found = tuple([part for part in head.modules() if isinstance(part, kind)] for kind in kinds)
        for norm in found[2]:
            for values in norm.parameters():
                nn.init.normal_(values)
        return found[0], found[1], found[2]

    torch.manual_seed(0)
    maps, h = torch.randn(6, 16, 32, 32), None

    head = classifier("shrink", (16, 32, 32), 10)
    convolutions, linear, norms = parts(head)
    h = F.avg_pool2d(maps, 4)  # to a quarter of the side
    for convolution, norm in zip(convolutions, norms[:3], strict=True):
        h = normalized(F.conv2d(h, convolution.weight), norm)
    h = F.avg_pool2d(h, 4).flatten(1)  # to 2 x 2
    for layer, norm in zip(linear[:2], norms[3:], strict=True):
        h = normalized(h @ layer.weight.T, norm)
    torch.testing.assert_close(head(maps), F.linear(h, linear[2].weight, linear[2].bias), rtol=1e-4, atol=1e-4)

    head = classifier("wide", (16, 32, 32), 10)
    convolutions, linear, norms = parts(head)
    h = F.avg_pool2d(maps, 4)  # to 8 x 8
    for convolution, norm in zip(convolutions, norms[:3], strict=True):
        h = normalized(F.conv2d(h, convolution.weight), norm)
    h = h.mean((2, 3))
    for layer, norm in zip(linear[:3], norms[3:], strict=True):
        h = normalized(h @ layer.weight.T, norm)
    torch.testing.assert_close(head(maps), F.linear(h, linear[3].weight, linear[3].bias), rtol=1e-4, atol=1e-4)

    head = classifier("2c2f", (16, 32, 32), 10)
    convolutions, linear, norms = parts(head)
    h = maps
    for convolution, norm, stride in zip(convolutions, norms, (2, 1), strict=True):
        h = normalized(F.conv2d(h, convolution.weight, stride=stride, padding=1), norm)
    h = F.relu(F.linear(h.mean((2, 3)), linear[0].weight, linear[0].bias))
    torch.testing.assert_close(head(maps), F.linear(h, linear[1].weight, linear[1].bias), rtol=1e-4, atol=1e-4)

    head = classifier("bottleneck", (16, 32, 32), 10)
    convolutions, linear, norms = parts(head)
    h = maps
    for convolution, norm, (stride, padding) in zip(convolutions, norms, ((1, 0), (2, 1), (2, 1), (1, 0)), strict=True):
        h = normalized(F.conv2d(h, convolution.weight, stride=stride, padding=padding), norm)
    out = F.linear(h.mean((2, 3)), linear[0].weight, linear[0].bias)
    torch.testing.assert_close(head(maps), out, rtol=1e-4, atol=1e-4)

    net = decoder((16, 32, 32), (3, 64, 64))
    convolutions, _, norms = parts(net)
    assert [layer.weight.shape[:2] for layer in convolutions] == [(12, 16), (3, 12)]
    h = F.interpolate(maps, (64, 64), mode="bilinear", align_corners=True)
    h = normalized(F.conv2d(h, convolutions[0].weight, padding=1), norms[0])
    out = F.conv2d(h, convolutions[1].weight, convolutions[1].bias, padding=1)
    torch.testing.assert_close(net(maps), out, rtol=1e-4, atol=1e-4)


def test_defaults_are_those_of_the_papers() -> None:
    def head_layers(learner: LocalLearning) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for p in learner.losses[0].head.parameters() if p.ndim > 1]

    assert head_layers(residual(3)) == [(16, 16, 1, 1)] * 3 + [(64, 64)] * 2 + [(CLASSES, 64)]  # DGL's own
    infopro = residual(3, "infopro")
    assert head_layers(infopro) == [(32, 16, 3, 3), (128, 32), (CLASSES, 128)]  # 1c2f
    assert [loss.reconstruct for loss in infopro.losses] == pytest.approx([5, 0.2])
    assert head_layers(residual(3, "infopro-contrast"))[-1][0] == 128
    learner = residual(3, **MAN, weight_decay=0.25)
    assert {group["weight_decay"] for each in learner.optimizers() for group in each.param_groups} == {0.25}
    assert inspect.signature(LocalLearning).parameters["momentum"].default == 0.995
    assert residual(3, **MAN, scale=True).auxiliaries[0].scale == 1
    assert not residual(3, ema=True, bias="light").auxiliaries[0].bias.any()


def test_momentum_copies_normalise_by_the_batch() -> None:
    # their running statistics follow nothing
    learner = residual(3, **MAN)
    h = torch.randn(4, *learner.auxiliaries[0].ema.body[0].weight.shape[1:2], 8, 8)
    before = learner.auxiliaries[0](h)
    for name, values in learner.auxiliaries[0].named_buffers():
        if name.endswith(("mean", "var")):
            values.fill_(3)
    torch.testing.assert_close(learner.auxiliaries[0](h), before)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 8, 12])
@pytest.mark.parametrize("name", ["0c1f", "2c2f", "shrink", "wide"])
def test_heads_fit_maps_of_any_size(name: str, side: int) -> None:
    assert classifier(name, (6, side, side), 3)(torch.randn(2, 6, side, side)).shape == (2, 3)


# diagnostics, options


@pytest.mark.parametrize(("size", "side"), [((8, 8), 2), ((8, 12), 4), ((9, 7), 2), ((4, 4), 4)])
def test_maps_are_averaged_to_a_square(size: tuple[int, int], side: int) -> None:
    maps = torch.randn(3, 5, *size, dtype=torch.float64)
    torch.testing.assert_close(_Resized(side)(maps), F.adaptive_avg_pool2d(maps, side), rtol=1e-12, atol=1e-12)


def test_diagnostics_are_the_accuracy_of_each_classifier() -> None:
    learner = residual(3).eval()
    x, y = images()
    h = learner.network[0](x)
    expected = (learner.losses[0].head(h).argmax(1) == y).float().mean()
    report = learner.diagnostics((x, y))
    assert list(report) == ["block 0 accuracy", "block 1 accuracy", "block 2 accuracy"]
    torch.testing.assert_close(report["block 0 accuracy"], expected)
    torch.testing.assert_close(report["block 2 accuracy"], (learner(x).argmax(1) == y).float().mean())
    assert list(residual(3, "infopro-contrast").diagnostics((x, y))) == ["block 2 accuracy"]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: residual(4), "4 blocks, dgl"),
        (lambda: residual(4, "infopro", **MAN, scale=True), "4 blocks, infopro, EMA + twin + scale"),
        (lambda: residual(0, ends="3,9", ema=True, bias="light"), "2 blocks, dgl, EMA + light"),
        (lambda: linear_learner(), "2 blocks, linear_host"),
    ],
)
def test_variants_tell_rows_apart(build: Callable[[], LocalLearning], expected: str) -> None:
    assert build().variant == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "dgll"}, "did you mean dgl"),
        ({"head": "3c"}, "unknown head"),
        ({"host": "predsim", "head": "1c2f"}, "leave out head"),
        ({"reconstruct_first": 1.0}, "weights of infopro"),
        ({"host": "infopro", "classify_first": -1.0}, "from 0 on"),
        ({"host": "infopro", "classify_first": "much"}, "classify_first must be a number"),
        ({"bias": "heavy"}, "unknown bias"),
        ({"bias": "light"}, "needs ema=true"),
        ({"ema": True, "scale": True}, "bias=twin"),
        ({"ema": True, "start": "new"}, "unknown start"),
        ({"start": "draw"}, "needs ema=true or bias=twin"),
        ({"momentum": 0.9}, "need ema=true"),
        ({"ema_update": "after"}, "need ema=true"),
        ({"ema": True, "ema_update": "during"}, "unknown ema_update"),
        ({"ema": True, "momentum": 1.5}, r"\[0, 1\]"),
        ({"lanes": 0}, "lanes must be at least 1, got 0"),
        ({"ends": "3,9"}, "give one of them"),
        ({"k": 0, "ends": "3;9"}, "such as 3,7,15"),
        ({"k": 0, "ends": "3,8"}, "the last is 9"),
        ({"k": 0, "stem": True}, "give k or ends"),
        ({"k": 11}, "11 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        residual(**{"k": 2, **options})  # type: ignore[arg-type]


def test_graph_networks_are_refused() -> None:
    assert not LocalLearning.supports(gnn("gcn", (5,), (4, 4))).ok


def test_nothing_is_pooled_of_vectors() -> None:
    for pool in (None, "flatten"):
        learner = LocalLearning(mlp((5,), (6, 4)), CLASSES, head_pool=pool)
        assert learner.readout.weight.shape == (CLASSES, 4)
    with pytest.raises(UsageError, match="head_pool would have no effect where there are no feature maps"):
        LocalLearning(mlp((5,), (6, 4)), CLASSES, head_pool="gap")
