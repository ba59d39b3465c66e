"""Random numbers as a function of a key and a position, the same on every device.

PyTorch's generators are shared by everything that draws from them: what a module gets depends on what drew before it,
and a CPU and a GPU draw different numbers. Here a number is a hash (SplitMix64; Steele, Lea and Flood 2014) of a key,
of how often its stream has been asked, and of its place in the answer. So modules that own streams can be trained in
any order or apart with the same bits; the state is one integer buffer, which a checkpoint holds, a CUDA graph advances
on the device, and a rehearsal puts back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bpfree.errors import UsageError
from bpfree.networks.kernels import triton_kernels

WORD: Final = 1 << 64
GOLDEN: Final = 0x9E3779B97F4A7C15  # odd and close to 2^64 / golden ratio: consecutive multiples are far apart
FIRST: Final = 0xBF58476D1CE4E5B9
SECOND: Final = 0x94D049BB133111EB
LANES: Final = 4  # 16-bit numbers in a 64-bit hash
KERNELS: Final = "bpfree.networks._stream_kernels"


def _signed(word: int) -> int:
    """The 64 bits of `word` as PyTorch's int64 has them."""
    word %= WORD
    return word - WORD if word >= WORD // 2 else word


CONSTANTS: Final = {name: _signed(word) for name, word in (("golden", GOLDEN), ("first", FIRST), ("second", SECOND))}


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; PyTorch's repeats the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of int64 whose output bits each depend on all input bits."""
    x = (x ^ _shifted(x, 30)).mul_(_signed(FIRST))
    x = x.bitwise_xor_(_shifted(x, 27)).mul_(_signed(SECOND))
    return x.bitwise_xor_(_shifted(x, 31))


def derive(*words: int) -> int:
    """One int64 key from several integers: other integers, or the same in another order, give another key."""
    key = 0
    for word in words:
        key = int(mix(torch.tensor(_signed(key + GOLDEN * (1 + word % WORD)))))
    return key


def sequence(key: Tensor, count: int) -> Tensor:
    """(...) int64 keys -> (..., count) hashes of each key and a position."""
    positions = torch.arange(1, count + 1, device=key.device).mul_(_signed(GOLDEN))
    return mix(key[..., None] + positions)


def uniform(bits: Tensor) -> Tensor:
    """Hashes as float64 in the open interval (0, 1)."""
    return _shifted(bits, 12).double().add_(0.5).mul_(2.0**-52)


def normal(bits: Tensor) -> Tensor:
    """Hashes as float64 of the standard normal distribution, by the inverse of its distribution function."""
    return uniform(bits).mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))


DISTRIBUTIONS: Final = {"uniform": uniform, "normal": normal}


def _kernels(x: Tensor) -> ModuleType | None:
    """The CUDA kernels, if `x` lies where they work."""
    return triton_kernels(KERNELS) if x.is_cuda else None


def _numbers(keys: Tensor, count: Tensor, width: int, distribution: str | None, dtype: torch.dtype) -> Tensor:
    """Hashes, or what a distribution makes of them, by a kernel where there is one."""
    kernels = _kernels(keys)
    if kernels is not None:
        numbers: Tensor = kernels.numbers(keys, count, width, distribution, dtype, CONSTANTS)
        return numbers
    bits = sequence(mix(keys + count * _signed(FIRST)), width)
    return bits if distribution is None else DISTRIBUTIONS[distribution](bits).to(dtype)


def hashes(keys: Tensor, count: Tensor, width: int) -> Tensor:
    """(...) int64 keys -> (..., width) hashes of each key, a 0-d int64 count and a position."""
    return _numbers(keys, count, width, None, torch.int64)


def uniform_numbers(keys: Tensor, count: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(...) int64 keys -> (..., width) numbers of [0, 1], `hashes` made `uniform` and rounded to `dtype`."""
    return _numbers(keys, count, width, "uniform", dtype)


def normal_numbers(keys: Tensor, count: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(...) int64 keys -> (..., width) numbers, `hashes` made `normal` and rounded to `dtype`."""
    return _numbers(keys, count, width, "normal", dtype)


def content_keys(inputs: Tensor) -> Tensor:
    """(B, ...) -> (B,) int64 hashes of each sample's values in float32.

    What a sample draws with such a key does not depend on the batch that it is in.
    """
    # + 0.0 makes one zero of the two
    values = (inputs.flatten(1).float() + 0.0).contiguous().view(torch.int32).long()
    weights = sequence(torch.zeros((), dtype=torch.int64, device=inputs.device), values.shape[1])
    return mix((values * weights).sum(1))


class Stream(nn.Module):
    """A source of random numbers that nothing else draws from.

    Args:
        key: what it draws is a function of the key and of how often it was asked before; None draws a key from
            PyTorch's global generator.

    Attributes:
        share: the number of this process among those that draw for parts of the same batch, and how many they are:
            each draws numbers of its own, and the state stays the same in all.
    """

    key: Tensor
    count: Tensor

    def __init__(self, key: int | None = None) -> None:
        super().__init__()
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.share = (0, 1)
        self.draw_key() if key is None else self.rekey(key)

    def draw_key(self) -> None:
        """Start anew with a key from PyTorch's global generator."""
        self.rekey(int(torch.randint(1 << 62, ())))

    def rekey(self, key: int) -> None:
        """Start anew with `key`."""
        self.key.fill_(_signed(key))
        self.count.zero_()

    @torch.no_grad()
    def draw(self) -> Tensor:
        """The 0-d number of a draw, which with the key makes the hashes of that draw; the next call gives another."""
        rank, ranks = self.share
        kernels = _kernels(self.count)
        if kernels is not None:
            advanced: Tensor = kernels.advanced(self.count, rank, ranks)
            return advanced
        number = self.count.clone() if ranks == 1 else self.count * ranks + rank
        self.count.add_(1)
        return number

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Standard normal numbers."""
        return normal_numbers(self.key, self.draw(), math.prod(shape), dtype).view(*shape)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uniform numbers of [0, 1]: rounding to `dtype` may reach the ends."""
        return uniform_numbers(self.key, self.draw(), math.prod(shape), dtype).view(*shape)


def checked_dropout(p: float) -> float:
    """`p`, if it is a probability of dropout.

    Raises:
        UsageError: it is not in [0, 1).
    """
    if not 0 <= p < 1:
        raise UsageError(f"dropout must lie in [0, 1), got {p}")
    return p


class Mask(NamedTuple):
    """Which values a dropout layer keeps: those whose 16 bits of draw `number`, from 0 to 2^16 - 1, reach `threshold`.

    They are multiplied by `scale`.
    """

    number: Tensor
    threshold: int
    scale: float


class _Dropped(torch.autograd.Function):
    """Dropout in one kernel, whose mask is drawn again for the derivative instead of being kept in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, mask: Mask) -> Tensor:
        kernels = triton_kernels(KERNELS)
        assert kernels is not None
        number, threshold, scale = mask
        ctx.layout = _layout(x)
        ctx.drop = partial(
            kernels.dropped, key=key, count=number, threshold=threshold, scale=scale, lanes=LANES, constants=CONSTANTS
        )
        dropped: Tensor = ctx.drop(x)
        return dropped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_dropped: Tensor) -> tuple[Tensor, None, None]:
        return ctx.drop(by_dropped.contiguous(memory_format=ctx.layout)), None, None


def _layout(x: Tensor) -> torch.memory_format:
    """How maps lie in memory, or other values should."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class StreamDropout(nn.Module):
    """Dropout from a stream of its own.

    Args:
        p: probability with which a value becomes zero, in steps of 2^-16.

    Raises:
        UsageError: `p` is not in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = checked_dropout(p)
        self.stream = Stream()

    def draw(self) -> Mask:
        """The next mask."""
        return Mask(self.stream.draw(), round(self.p * 2**16), 1 / (1 - self.p))

    def forward(self, x: Tensor) -> Tensor:
        """Values of any shape, those that are kept divided by 1 - p."""
        if not self.training or not self.p:
            return x
        mask, layout = self.draw(), _layout(x)
        if x.dtype.itemsize <= 4 and _kernels(x) is not None:
            dropped: Tensor = _Dropped.apply(x.contiguous(memory_format=layout), self.stream.key, mask)
            return dropped
        words = hashes(self.stream.key, mask.number, -(-x.numel() // LANES))
        kept = words.view(torch.int16)[: x.numel()] >= mask.threshold - 2**15
        if layout is torch.channels_last:  # a mask as x lies in memory
            batch, channels, height, width = x.shape
            kept = kept.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return x * mask.scale * kept.view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropout_layers(network: nn.Module) -> list[StreamDropout]:
    """The dropout layers of a network."""
    return [module for module in network.modules() if isinstance(module, StreamDropout)]


def set_dropout(network: nn.Module, p: float) -> None:
    """Give every dropout layer of a network the probability `p`.

    Raises:
        UsageError: `p` is not in [0, 1), or the network has no dropout.
    """
    layers = dropout_layers(network)
    if not layers:
        raise UsageError("this network has no dropout layer; leave out dropout")
    for layer in layers:
        layer.p = checked_dropout(p)
