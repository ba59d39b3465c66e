"""Networks by name: what a `--network` string means."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

from torch import nn

from bpfree.errors import UsageError, unknown_name
from bpfree.networks.autoencoder import AUTOENCODER_CHANNELS, autoencoder
from bpfree.networks.cnn import CAFO_CHANNELS, ELU_CHANNELS, MF_CHANNELS, cnn, elu_cnn
from bpfree.networks.gnn import gnn
from bpfree.networks.mlp import DROPOUT, mlp
from bpfree.networks.noprop import Kind, image_branch
from bpfree.networks.residual import CWCOMP_CHANNELS, DEEPER_WIDTHS, cwcomp, deeper, deeper_tiny, mobilenet
from bpfree.networks.resnet import DEPTHS, resnet

Shape = tuple[int, ...]
MAX_DEPTH: Final = 32  # mlp:2x1000 is depth x width; mlp:300x100 can only be two widths


@dataclass(frozen=True)
class Family:
    """A kind of network and how its name is written."""

    pattern: str
    description: str
    build: Callable[[Shape, str], nn.Sequential]


def _widths(text: str) -> tuple[int, ...]:
    """`1000x500x100` -> (1000, 500, 100)."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise UsageError(f"cannot read the layer sizes {text!r}; write them like 2x1000 or 1000x500x100")
    return tuple(int(part) for part in text.split("x"))


def _depth_and_width(sizes: str) -> tuple[int, ...]:
    """`2x1000` -> (1000, 1000), `1000x500` -> (1000, 500)."""
    widths = _widths(sizes)
    if len(widths) == 2 and widths[0] <= MAX_DEPTH:
        return (widths[1],) * widths[0]
    return widths


def _mlp(elu: bool, dropout: float | None, input_shape: Shape, sizes: str) -> nn.Sequential:
    return mlp(input_shape, _depth_and_width(sizes or "2x1000"), elu=elu, dropout=dropout)


def _gnn(kind: str, input_shape: Shape, sizes: str) -> nn.Sequential:
    return gnn(kind, input_shape, _depth_and_width(sizes or "2x128"))


def _cnn(input_shape: Shape, sizes: str) -> nn.Sequential:
    if sizes in {"", "mf"}:
        return cnn(input_shape, MF_CHANNELS)
    if sizes == "cafo":
        return cnn(input_shape, CAFO_CHANNELS, pool="max", batch_norm=True)
    return cnn(input_shape, _widths(sizes))


def _elu_cnn(strided: bool, input_shape: Shape, sizes: str) -> nn.Sequential:
    return elu_cnn(input_shape, _widths(sizes) if sizes else ELU_CHANNELS, strided=strided)


def _autoencoder(input_shape: Shape, sizes: str) -> nn.Sequential:
    return autoencoder(input_shape, _widths(sizes) if sizes else AUTOENCODER_CHANNELS)


def _noprop(input_shape: Shape, kind: str) -> nn.Sequential:
    return image_branch(input_shape, cast(Kind, kind or "dt"))


def _deeper(input_shape: Shape, sizes: str) -> nn.Sequential:
    if sizes == "tiny":
        return deeper_tiny(input_shape)
    return deeper(input_shape, _widths(sizes) if sizes else DEEPER_WIDTHS)


def _cwcomp(input_shape: Shape, sizes: str) -> nn.Sequential:
    return cwcomp(input_shape, _widths(sizes) if sizes else CWCOMP_CHANNELS)


def _resnet(input_shape: Shape, depth: str) -> nn.Sequential:
    if depth and depth not in map(str, DEPTHS):
        raise unknown_name("size of network", depth, map(str, DEPTHS))
    return resnet(input_shape, int(depth or 18))


def _only(build: Callable[[Shape], nn.Sequential], size: str, input_shape: Shape, sizes: str) -> nn.Sequential:
    if sizes not in {"", size}:
        raise unknown_name("size of network", sizes, [size])
    return build(input_shape)


FAMILIES: Final[dict[str, Family]] = {
    "mlp": Family(
        "mlp:DEPTHxWIDTH | mlp:WxWxW..",
        "hidden layers Linear-ReLU; mlp:2x1000 is two of 1000 units, mlp:500x300 or mlp:800x400x200 names each width",
        partial(_mlp, False, None),
    ),
    "mlp-dropout": Family(
        "mlp-dropout:DEPTHxWIDTH | mlp-dropout:WxWxW..",
        f"the same with dropout ({DROPOUT:g} unless --dropout is given) at the entry of every block but the first",
        partial(_mlp, False, DROPOUT),
    ),
    "mlp-elu": Family(
        "mlp-elu:DEPTHxWIDTH | mlp-elu:WxWxW..", "hidden layers Linear-ELU without biases", partial(_mlp, True, None)
    ),
    "cnn": Family(
        "cnn:mf | cnn:cafo | cnn:CxCxC..",
        "cnn:mf is Conv3x3-ReLU-AvgPool with 64-128-256-512 maps, cnn:cafo is Conv3x3-ReLU-MaxPool-BatchNorm with "
        "32-128-512; cnn:32x64 names the maps (average pooling)",
        _cnn,
    ),
    "cnn-elu": Family(
        "cnn-elu | cnn-elu:CxCxC..",
        "Conv3x3-ELU-MaxPool without biases; the default is counter-current learning's 128x128x256x256x512",
        partial(_elu_cnn, False),
    ),
    "cnn-strided": Family(
        "cnn-strided | cnn-strided:CxCxC..",
        "Conv3x3 of stride 2, ELU, with the same default; for images of any size",
        partial(_elu_cnn, True),
    ),
    "autoencoder": Family(
        "autoencoder | autoencoder:CxCxC..",
        "for --task autoencode: strided convolutions with batch normalisation and ReLU, and back by upsampling; the "
        "default is counter-current learning's 128x256x1024x2048",
        _autoencoder,
    ),
    "noprop": Family(
        "noprop:dt | noprop:ct",
        "image branch of NoProp's blocks: three convolutions without padding and a linear layer to 256 units, with "
        "batch normalisation behind it (dt) or ReLU (ct); other rules train it as one block",
        _noprop,
    ),
    "deeper": Family(
        "deeper | deeper:CxCxC.. | deeper:tiny",
        "DeeperForward's residual network, shortcuts without parameters: a stem and four layers per width, 17 for the "
        "default 100x200x400x800; widths double. deeper:tiny is its CNN of four layers",
        _deeper,
    ),
    "cwcomp": Family(
        "cwcomp | cwcomp:CxCxC..",
        "CwComp's pairs of an ordinary and a grouped (10 groups) convolution with batch normalisation; 20x80x240x480",
        _cwcomp,
    ),
    "resnet": Family(
        "resnet:18 | resnet:32 | resnet:110 | resnet:50 | ..",
        "ResNet, a stem and a block per residual unit: 18, 20, 32, 44, 56 and 110 for small images, 50, 101 and 152 "
        "for large ones",
        _resnet,
    ),
    "mobilenet": Family(
        "mobilenet:small",
        "MobileNetV3-Small for small images: a stem and eleven inverted residuals",
        partial(_only, mobilenet, "small"),
    ),
    "gcn": Family("gcn:DEPTHxWIDTH", "graph convolutions GCN-ReLU, for graphs; gcn is gcn:2x128", partial(_gnn, "gcn")),
    "sage": Family("sage:DEPTHxWIDTH", "GraphSAGE (mean)-ReLU, for graphs", partial(_gnn, "sage")),
    "gat": Family("gat:DEPTHxWIDTH", "GAT (4 heads)-ReLU, for graphs", partial(_gnn, "gat")),
}


def build_network(name: str, input_shape: Shape) -> nn.Sequential:
    """The backbone called `name` for inputs of `input_shape`, freshly initialised from torch's global generator.

    Args:
        name: a family and its sizes, such as "mlp:2x1000" or "cnn:mf" (see `describe_networks`).
        input_shape: shape of one input sample, without the batch axis.

    Raises:
        UsageError: unknown family, unreadable sizes, or a network that does not fit the inputs.
    """
    family, _, sizes = canonical_name(name).partition(":")
    if family not in FAMILIES:
        raise unknown_name("network", family, FAMILIES)
    return FAMILIES[family].build(input_shape, sizes)


def canonical_name(name: str) -> str:
    """A network's name with the colon that is often left out: `resnet32` is `resnet:32`."""
    family, size = re.fullmatch(r"([a-z]*)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{family}:{size}" if family in FAMILIES and size and size[0].isdigit() else name


def describe_networks() -> list[dict[str, str]]:
    """One row per family: how the name is written and what it builds."""
    return [{"network": family.pattern, "description": family.description} for family in FAMILIES.values()]
