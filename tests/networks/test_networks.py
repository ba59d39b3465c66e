"""Networks by name, and how a user's network is cut into blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.networks import Head, as_blocks, block_output_shapes, build_network, infer_input_shape, set_dropout
from bpfree.networks.blocks import linear_relu
from bpfree.networks.streams import StreamDropout


def widths(network: nn.Sequential) -> list[int]:
    return [m.out_features for m in network.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp:2x1000", [1000, 1000]),
        ("mlp:3x20", [20, 20, 20]),
        ("mlp:500x300", [500, 300]),
        ("mlp:40x30x20", [40, 30, 20]),
        ("mlp:64", [64]),
        ("mlp", [1000, 1000]),
    ],
)
def test_mlp_sizes(name: str, expected: list[int]) -> None:
    assert widths(build_network(name, (1, 8, 8))) == expected


def test_mlp_starts_with_zero_biases_and_kaiming_bounds() -> None:
    first = next(m for m in build_network("mlp:2x300", (1, 20, 20)).modules() if isinstance(m, nn.Linear))
    assert not first.bias.any()
    bound = 1 / 400**0.5  # Kaiming uniform with a = sqrt(5): gain sqrt(1/3), bound = gain * sqrt(3 / fan_in)
    assert first.weight.abs().max() <= bound
    assert first.weight.abs().max() > 0.99 * bound


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("cnn:mf", [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
        ("cnn:cafo", [(32, 16, 16), (128, 8, 8), (512, 4, 4)]),
        ("cnn:5x7", [(5, 16, 16), (7, 8, 8)]),
    ],
)
def test_cnn_shapes(name: str, shapes: list[tuple[int, ...]]) -> None:
    assert block_output_shapes(build_network(name, (3, 32, 32)), (3, 32, 32)) == shapes


@pytest.mark.parametrize(
    ("name", "image", "shapes"),
    [
        ("cnn-elu", (3, 32, 32), [(128, 16, 16), (128, 8, 8), (256, 4, 4), (256, 2, 2), (512, 1, 1)]),
        ("cnn-strided", (1, 28, 28), [(128, 14, 14), (128, 7, 7), (256, 4, 4), (256, 2, 2), (512, 1, 1)]),
    ],
)
def test_networks_of_counter_current_learning(name: str, image: tuple[int, ...], shapes: list[tuple[int, ...]]) -> None:
    network = build_network(name, image)
    assert block_output_shapes(network, image) == shapes
    kinds = [nn.Conv2d, nn.ELU, nn.MaxPool2d] if name == "cnn-elu" else [nn.Conv2d, nn.ELU]
    assert all([type(layer) for layer in block] == kinds for block in network)
    assert all((block[0].bias is not None) == (name == "cnn-strided") for block in network)  # type: ignore[index]


def test_a_block_that_returns_more_than_one_tensor_is_named() -> None:
    with pytest.raises(UsageError, match="block 1 returns a tuple, and a block hands on one tensor"):
        block_output_shapes([nn.Linear(6, 5), nn.LSTM(5, 4)], (3, 6))


@pytest.mark.parametrize("image", [(3, 32, 32), (1, 28, 28), (2, 7, 9)])
def test_an_autoencoder_goes_back_through_its_shapes(image: tuple[int, ...]) -> None:
    network = build_network("autoencoder:4x6", image)
    shapes = [image, *block_output_shapes(network, image)]
    assert shapes == shapes[::-1]
    assert [len(block) for block in network] == [3, 3, 4, 2]  # type: ignore[arg-type]


def test_an_autoencoder_starts_orthogonal_and_small_towards_the_image() -> None:
    first, second, third, last = (
        next(m for m in block.modules() if isinstance(m, nn.Conv2d)).weight.flatten(1)
        for block in build_network("autoencoder:8x16", (3, 8, 8))
    )
    assert not last.any()
    for weight, scale in ((first, 1.0), (second, 1.0), (third, 1e-6)):
        torch.testing.assert_close(weight @ weight.T, scale * torch.eye(len(weight)), rtol=1e-4, atol=1e-5 * scale)


def test_elu_networks_have_no_biases() -> None:
    layers = [m for m in build_network("mlp-elu:5x256", (1, 28, 28)).modules() if isinstance(m, nn.Linear)]
    assert [(layer.out_features, layer.bias) for layer in layers] == [(256, None)] * 5


def test_dropout_is_at_the_entry_of_every_block_but_the_first() -> None:
    network = build_network("mlp-dropout:3x16", (1, 4, 4))
    assert [type(block[0]) for block in network] == [nn.Flatten, StreamDropout, StreamDropout]
    set_dropout(network, 0.25)
    x = torch.rand(64, 16) + 1
    block = network[1].train()
    kept = block[0](x) / x
    assert 0.6 < (kept > 0).float().mean() < 0.9
    torch.testing.assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 4 / 3))
    assert torch.equal(network.eval()[1][0](x), x)


def test_cafo_block_is_conv_relu_pool_norm() -> None:
    block = build_network("cnn:cafo", (3, 32, 32))[0]
    assert [type(layer) for layer in block] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.BatchNorm2d]


def test_deeper_has_seventeen_layers_in_pairs() -> None:
    network = build_network("deeper", (3, 32, 32))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [100] * 5 + [200] * 4 + [400] * 4 + [800] * 4
    assert not any(c.bias is not None for c in convolutions)
    shapes = block_output_shapes(network, (3, 32, 32))
    channels_and_sizes = [(shape[0], shape[1]) for shape in shapes]
    assert channels_and_sizes == [
        *((100, 32), (100, 32), (200, 32)),
        *((200, 16), (400, 16)),
        *((400, 8), (800, 8)),
        *((800, 4), (800, 4)),
    ]


def test_deeper_fits_odd_images() -> None:
    assert block_output_shapes(build_network("deeper:10x20x40", (1, 28, 28)), (1, 28, 28))[-1] == (40, 7, 7)
    assert block_output_shapes(build_network("deeper:4x8", (1, 7, 7)), (1, 7, 7))[-1] == (8, 4, 4)


def test_resnet_has_the_published_number_of_parameters() -> None:
    # ResNet-18 for CIFAR-10 has 11,173,962 with its read-out of 512 x 10 weights and 10 biases
    network = build_network("resnet:18", (3, 32, 32))
    assert sum(p.numel() for p in network.parameters()) == 11_173_962 - 5_130
    assert block_output_shapes(network, (3, 32, 32))[-1] == (512, 4, 4)


def normalized(x: Tensor, norm: nn.Module) -> Tensor:
    """By the batch's own mean and variance."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    scale, offset = (values[:, None, None] for values in norm.parameters())
    return (x - mean) / (variance + 1e-5).sqrt() * scale + offset


def unit_by_hand(unit: nn.Module, x: Tensor, strides: tuple[int, ...], shortcut: int) -> Tensor:
    """He et al., figures 2 and 5: convolutions with normalisation and ReLU between them, the sum before the last ReLU.

    `shortcut` is the stride of its 1x1 convolution, 0 for none.
    """
    weights = [layer.weight for layer in unit.body if isinstance(layer, nn.Conv2d)]
    norms = [*(layer for layer in unit.body if not isinstance(layer, nn.Conv2d)), unit.norm]
    h = x
    for weight, norm, stride in zip(weights, norms, strides, strict=True):
        h = normalized(F.conv2d(h, weight, stride=stride, padding=weight.shape[2] // 2), norm)
        if norm is not unit.norm:
            h = h.clamp(min=0)
    if shortcut:
        convolution, norm = unit.shortcut
        x = normalized(F.conv2d(x, convolution.weight, stride=shortcut), norm)
    return (h + x).clamp(min=0)


def random_norms(network: nn.Module) -> nn.Module:
    """Scales and offsets that tell a normalisation and what follows it from others."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network.double()


def test_a_residual_network_is_what_its_paper_says() -> None:
    torch.manual_seed(0)
    network = random_norms(build_network("resnet:20", (3, 8, 8)))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    stem, *units = network
    h = normalized(F.conv2d(x, stem[0].weight, padding=1), stem[1]).clamp(min=0)
    for index, unit in enumerate(units):
        halves = index in (3, 6)
        h = unit_by_hand(unit, h, (2 if halves else 1, 1), 2 if halves else 0)
    torch.testing.assert_close(network(x), h, rtol=1e-9, atol=1e-9)
    assert network.training


@pytest.mark.parametrize(("number", "stride"), [(1, 1), (2, 0), (4, 2)])
def test_bottlenecks_stride_in_the_middle(number: int, stride: int) -> None:
    torch.manual_seed(0)
    network = build_network("resnet:50", (3, 32, 32))
    unit = random_norms(network[number])
    x = torch.randn(3, unit.body[0].in_channels, 8, 8, dtype=torch.float64)
    by_hand = unit_by_hand(unit, x, (1, max(1, stride), 1), stride)
    torch.testing.assert_close(unit(x), by_hand, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("deeper:tiny", [(100, 16, 16), (200, 8, 8), (400, 8, 8), (400, 8, 8)]),
        ("cwcomp", [(20, 32, 32), (80, 16, 16), (240, 16, 16), (480, 8, 8)]),
        ("cwcomp:10x20", [(10, 32, 32), (20, 16, 16)]),
        (
            "mobilenet:small",
            [(16, 32, 32)] * 2 + [(24, 16, 16)] * 2 + [(40, 8, 8)] * 3 + [(48, 8, 8)] * 2 + [(96, 4, 4)] * 3,
        ),
    ],
)
def test_shapes_of_networks_for_competition(name: str, shapes: list[tuple[int, ...]]) -> None:
    assert block_output_shapes(build_network(name, (3, 32, 32)), (3, 32, 32)) == shapes


def test_every_second_convolution_of_cwcomp_has_ten_groups() -> None:
    convolutions = [m for m in build_network("cwcomp", (3, 32, 32)).modules() if isinstance(m, nn.Conv2d)]
    assert [c.groups for c in convolutions] == [1, 10, 1, 10]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet:51", "unknown size of network"),
        ("resnet:50", "at least 32x32"),
        ("deeper:10x30", "twice the one before"),
        ("deeper:8x16x32x64x128", "at least 16x16"),
        ("cwcomp:10x25", "multiples of 10"),
        ("mpl:2x10", "did you mean mlp"),
        ("mlp:2x", "cannot read the layer sizes"),
        ("mlp:0x5", "cannot read the layer sizes"),
        ("mlp:2x-5", "cannot read the layer sizes"),
        ("cnn:8x8x8x8", "too small for 4 pooled blocks"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_network(name, (1, 8, 8))


def test_cnn_needs_images() -> None:
    with pytest.raises(UsageError, match="use an mlp"):
        build_network("cnn:mf", (30,))


def test_layers_without_parameters_join_their_neighbours() -> None:
    layers = [nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Dropout()]
    blocks = as_blocks(nn.Sequential(*layers))
    assert [[type(layer) for layer in block] for block in blocks] == [
        [nn.Flatten, nn.Linear, nn.ReLU],
        [nn.Linear, nn.ReLU, nn.Dropout],
    ]


def test_cuts_of_the_user_are_kept_and_modules_shared() -> None:
    first, second = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2)
    blocks = as_blocks([first, second])
    assert list(blocks) == [first, second]


@pytest.mark.parametrize("network", [nn.Linear(3, 3), [nn.ReLU()], [], ["Linear"]])
def test_what_is_no_network(network: object) -> None:
    with pytest.raises(UsageError):
        as_blocks(network)  # type: ignore[arg-type]


def test_input_shape_is_told_by_a_linear_layer_only() -> None:
    assert infer_input_shape(as_blocks(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))) == (12,)
    with pytest.raises(UsageError, match="input_shape"):
        infer_input_shape(as_blocks(nn.Sequential(nn.Conv2d(3, 4, 3))))


def test_blocks_that_do_not_fit_name_themselves() -> None:
    with pytest.raises(UsageError, match="block 1 does not accept inputs of shape \\(4,\\)"):
        block_output_shapes([nn.Linear(3, 4), nn.Linear(5, 6)], (3,))


def test_finding_shapes_leaves_the_network_as_it_was() -> None:
    network = build_network("cnn:cafo", (1, 16, 16))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    block_output_shapes(network, (1, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())


def test_linear_relu_is_recognised_exactly() -> None:
    linear = nn.Linear(4, 3)
    assert linear_relu(nn.Sequential(linear, nn.ReLU())) is linear
    assert linear_relu(nn.Sequential(nn.Flatten(), linear, nn.ReLU())) is linear
    for other in (
        linear,
        nn.Sequential(linear),
        nn.Sequential(linear, nn.Tanh()),
        nn.Sequential(nn.Flatten(2), linear, nn.ReLU()),
        nn.Sequential(linear, nn.ReLU(), nn.Dropout()),
    ):
        assert linear_relu(other) is None
    hooked = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    hooked[1].register_forward_hook(lambda *arguments: None)
    assert linear_relu(hooked) is None


def test_head_pools() -> None:
    maps = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    assert torch.equal(Head((3, 4, 4), 2).features(maps), maps.flatten(1))
    torch.testing.assert_close(Head((3, 4, 4), 2, pool="gap").features(maps), maps.mean((2, 3)))
    quadrants = maps.view(2, 3, 2, 2, 2, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(Head((3, 4, 4), 2, pool="adaptive").features(maps), quadrants)
    assert torch.equal(Head((5,), 2, pool="gap").features(torch.ones(1, 5)), torch.ones(1, 5))
    with pytest.raises(UsageError, match="head pool"):
        Head((3, 4, 4), 2, pool="max")
    with pytest.raises(UsageError, match="at least 2 classes"):
        Head((5,), 1)
