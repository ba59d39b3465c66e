"""3 x 3 convolutions of few channels: which layers they are, and the kernels against PyTorch in 64 bits.

Values are multiples of an eighth and few enough that every sum is exact in 32 bits, so that only the result is rounded.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import build_network
from bpfree.networks.flops import FlopCounter
from bpfree.networks.narrow import NarrowConvolution, convolution

# images, channels, height, width
CASES = [(3, 16, 8, 8), (2, 16, 5, 7), (2, 16, 3, 3), (1, 16, 1, 1), (70, 16, 32, 32), (3, 32, 5, 7), (150, 32, 16, 16)]
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
# fan-in, channels, padding
IMAGES = [(3, 32, 0), (1, 32, 0), (3, 16, 1), (1, 64, 1), (4, 128, 0)]
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def eighths(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape) / 8


def case(images: int, channels: int, height: int, width: int) -> tuple[NarrowConvolution, Tensor, Tensor]:
    """A layer, inputs and a derivative by the outputs, channels-last."""
    torch.manual_seed(images)
    layer = NarrowConvolution(channels, channels)
    layer.weight.data = eighths(*layer.weight.shape)
    maps = eighths(2, images, channels, height, width)
    x, gradient = (values.contiguous(memory_format=torch.channels_last) for values in maps)
    return layer, x, gradient


def images(fan_in: int, channels: int, padding: int, layout: torch.memory_format) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """The same for a convolution of images, of any layout."""
    torch.manual_seed(fan_in)
    layer = nn.Conv2d(fan_in, channels, 3, padding=padding)
    layer.weight.data = eighths(*layer.weight.shape)
    x = eighths(5, fan_in, 9, 12).contiguous(memory_format=layout)
    return layer, x, eighths(5, channels, 7 + 2 * padding, 10 + 2 * padding)


def exact(layer: nn.Conv2d, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Outputs and derivatives by input and weight, in 64 bits; without a bias."""
    weight, inputs = layer.weight.detach().double().requires_grad_(), x.double().requires_grad_()
    outputs = F.conv2d(inputs, weight, padding=layer.padding)
    return [outputs.detach(), *torch.autograd.grad(outputs, (inputs, weight), gradient.double())]


def ends(layer: NarrowConvolution, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The same by the layer on the GPU, in x's precision."""
    x = x.detach().cuda().requires_grad_()
    with torch.autocast("cuda", x.dtype):
        outputs = layer(x)
    return [outputs.detach(), *torch.autograd.grad(outputs, (x, layer.weight), gradient.to(outputs))]


def test_the_first_stages_of_a_residual_network_are_narrow() -> None:
    network = build_network("resnet:20", (3, 32, 32))
    narrow = [layer.in_channels for layer in network.modules() if isinstance(layer, NarrowConvolution)]
    # the stem, and two in each of three units, but for the one that halves the maps and doubles the channels
    assert narrow == [3] + 6 * [16] + 5 * [32]


@pytest.mark.parametrize("sizes", [CASES[1], CASES[5]])
def test_on_a_cpu_it_is_pytorchs(sizes: tuple[int, ...]) -> None:
    layer, x, gradient = case(*sizes)
    torch.testing.assert_close(layer(x).double(), exact(layer, x, gradient)[0], rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("sizes", CASES)
def test_kernels_round_what_is_exact(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, x, gradient = case(*sizes)
    wanted = exact(layer, x, gradient)
    there = layer.cuda().to(memory_format=torch.channels_last)
    found = ends(there, x.to(dtype), gradient)
    assert [values.dtype for values in found] == [dtype, dtype, torch.float32]
    assert all(values.is_contiguous(memory_format=torch.channels_last) for values in found)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine.cpu(), theirs.to(mine.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [CASES[4], CASES[6]])
def test_the_same_inputs_give_the_same_bits(sizes: tuple[int, ...]) -> None:
    layer, x, gradient = case(*sizes)
    nn.init.normal_(layer.weight)
    there = layer.cuda()
    values = torch.randn_like(x).bfloat16(), torch.randn_like(gradient)
    for first, second in zip(ends(there, *values), ends(there, *values), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_layers_in_16_bits_need_no_autocast() -> None:
    layer, x, gradient = case(*CASES[0])
    wanted = [values.bfloat16() for values in exact(layer, x, gradient)]
    there = layer.cuda().bfloat16()
    x = x.bfloat16().cuda().requires_grad_()
    outputs = there(x)
    found = [outputs, *torch.autograd.grad(outputs, (x, there.weight), gradient.to(outputs))]
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("left", ["evaluation", "32 bits", "layout"])
def test_what_the_kernels_do_not_take_is_left_to_pytorch(left: str) -> None:
    layer, x, gradient = case(*CASES[0])
    wanted = exact(layer, x, gradient)
    there = layer.cuda().train(left != "evaluation")
    x = x.cuda().to(torch.float32 if left == "32 bits" else torch.bfloat16)
    if left == "layout":
        x = x.contiguous()
    with torch.autocast("cuda", torch.bfloat16, enabled=left != "32 bits"):
        outputs = there(x)
    assert not outputs.grad_fn.name().startswith("_Narrow")
    torch.testing.assert_close(outputs.double().cpu(), wanted[0], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [CASES[1], CASES[5]])
def test_a_frozen_layer_hands_derivatives_on(sizes: tuple[int, ...]) -> None:
    layer, x, gradient = case(*sizes)
    there = copy.deepcopy(layer).cuda().requires_grad_(False)
    x = x.bfloat16()
    inputs = x.cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        outputs = there(inputs)
    (found,) = torch.autograd.grad(outputs, inputs, gradient.to(outputs))
    assert torch.equal(found.cpu(), exact(layer, x, gradient)[1].bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*CASES[:3], CASES[5]])
def test_operations_are_counted(sizes: tuple[int, ...]) -> None:
    layer, x, gradient = case(*sizes)
    there = layer.cuda()
    counts = []
    for dtype in (torch.bfloat16, torch.float32):  # by the kernels, by PyTorch
        inputs = x.to("cuda", dtype).requires_grad_()
        with FlopCounter() as counter, torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
            outputs = there(inputs)
            outputs.backward(gradient.to(outputs))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", IMAGES)
def test_kernels_of_images_round_what_is_exact(
    sizes: tuple[int, int, int], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    layer, x, gradient = images(*sizes, layout)
    wanted = exact(layer, x, gradient)
    there, inputs = layer.cuda(), x.cuda().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
        outputs = convolution(inputs, there)
    assert "_Narrow" in outputs.grad_fn.name()
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    found = [outputs, *torch.autograd.grad(outputs, (inputs, there.weight), gradient.to(outputs))]
    assert [values.dtype for values in found] == [dtype, torch.float32, torch.float32]
    for index, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        rounded = theirs.to(torch.float32 if index == 2 else dtype).float()  # x was rounded on its way in
        assert torch.equal(mine.detach().cpu().float(), rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("left", ["32 bits", "stride", "size", "channels", "inputs", "padding"])
def test_other_convolutions_of_images_are_left_to_pytorch(left: str) -> None:
    options = {
        "stride": {"stride": 2}, "size": {"kernel_size": 5}, "channels": {"out_channels": 24},
        "inputs": {"in_channels": 5}, "padding": {"padding": 2},
    }.get(left, {})  # fmt: skip
    layer = nn.Conv2d(**{"in_channels": 3, "out_channels": 32, "kernel_size": 3, **options}).cuda()
    x = torch.randn(4, layer.in_channels, 8, 8, device="cuda")
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = left != "32 bits"
        outputs = convolution(x, layer)
        expected = layer(x) - layer.bias[:, None, None]
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert "_Narrow" not in outputs.grad_fn.name()
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", IMAGES)
def test_operations_on_images_are_counted(sizes: tuple[int, int, int]) -> None:
    layer, x, gradient = images(*sizes, torch.contiguous_format)
    there, x, gradient = layer.cuda(), x.cuda(), gradient.cuda()
    counts = []
    for convolve in (lambda: convolution(x, there), lambda: F.conv2d(x, there.weight, None, 1, sizes[2])):
        with FlopCounter() as counter:
            torch.autograd.grad(convolve(), there.weight, gradient)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
