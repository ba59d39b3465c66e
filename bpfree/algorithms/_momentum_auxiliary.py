"""MAN's stand-in for the first unit of the next block: a copy that follows it by momentum, and something learnable.

    y = E(h) + b              b (channels,), the paper's light bias
    y = E(h) + T(h)           T a trainable unit of the same kind, as in the paper's code
    y = (2 - s) E(h) + s T(h) with a learnt scale s, 1 at the start: MAN++
    E <- m E + (1 - m) u      u the first unit of the next block: parameters only, never a gradient

What a gradient reaches is h, through both parts, and b, T and s; E's own weights have none.
"""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape

BIASES: Final = ("none", "light", "twin")
STARTS: Final = ("copy", "draw")


class MomentumAuxiliary(nn.Module):
    """Stands between a block and its auxiliary loss.

    Args:
        unit: u, the first unit of the next block, which is copied.
        shape: of one sample of u's output.
        ema: have E.
        bias: "none", "light" (b) or "twin" (T).
        scale: learn s.
        start: E and T begin as a "copy" of u, or with weights that they "draw" of their own.

    Raises:
        UsageError: unknown bias or start, or parts that need another that is not there.
    """

    def __init__(
        self, unit: nn.Module, shape: Shape, *, ema: bool, bias: str, scale: bool, start: str = "copy"
    ) -> None:
        super().__init__()
        check_parts(ema=ema, bias=bias, scale=scale, start=start)
        make = copy.deepcopy if start == "copy" else drawn_anew
        self.ema = make(unit).requires_grad_(False) if ema else None
        self.twin = make(unit) if bias == "twin" else None
        like = next(unit.parameters())
        light = torch.zeros(shape[0], *(1 for _ in shape[1:]), dtype=like.dtype, device=like.device)
        self.bias = nn.Parameter(light) if bias == "light" else None
        self.scale = nn.Parameter(torch.ones((), dtype=like.dtype, device=like.device)) if scale else None

    def forward(self, features: Tensor) -> Tensor:
        """h -> y, of the shape of u's output."""
        parts = [] if self.ema is None else [self.ema(features)]
        if self.twin is not None:
            parts.append(self.twin(features))
        elif self.bias is not None:
            parts.append(self.bias.to(parts[0].dtype))
        if len(parts) == 1:
            only: Tensor = parts[0]
            return only
        if self.scale is None:
            return parts[0] + parts[1]
        return (2 - self.scale) * parts[0] + self.scale * parts[1]


@torch.no_grad()
def drawn_anew(unit: nn.Module) -> nn.Module:
    """A unit of the same shape with initial weights of its own: of convolutions from N(0, 2 / (kernel^2 width)), of
    other modules as PyTorch draws them."""
    other = copy.deepcopy(unit)
    for module in other.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return other


def check_parts(*, ema: bool, bias: str, scale: bool, start: str) -> None:
    """Refuse parts that make no sense together.

    Raises:
        UsageError: unknown bias or start, a light bias with nothing to add it to, a scale with nothing to weigh, or a
            start of nothing.
    """
    if bias not in BIASES:
        raise unknown_name("bias", bias, BIASES)
    if start not in STARTS:
        raise unknown_name("start", start, STARTS)
    if start != "copy" and not ema and bias != "twin":
        raise UsageError("start is of the momentum copy and of the trainable unit; it needs ema=true or bias=twin")
    if bias == "light" and not ema:
        raise UsageError("a light bias is added to the momentum copy: it needs ema=true")
    if scale and not (ema and bias == "twin"):
        raise UsageError("scale weighs the momentum copy against the trainable one: it needs ema=true and bias=twin")


class Momentum:
    """E <- m E + (1 - m) u for all pairs at once.

    Args:
        pairs: auxiliaries that have E, each with its u.
        momentum: m.

    Raises:
        UsageError: m is outside [0, 1].
    """

    def __init__(self, pairs: list[tuple[MomentumAuxiliary, nn.Module]], momentum: float) -> None:
        if not 0 <= momentum <= 1:
            raise UsageError(f"momentum must lie in [0, 1], got {momentum}")
        self._momentum = momentum
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        for auxiliary, unit in pairs:
            assert auxiliary.ema is not None
            self._pairs.append((list(auxiliary.ema.parameters()), list(unit.parameters())))

    @torch.no_grad()
    def update(self, members: range | None = None) -> None:
        """Move every E towards its u.

        Args:
            members: numbers of the pairs that are moved, which may reach beyond the last; None: all.
        """
        every = range(len(self._pairs))
        chosen = [self._pairs[number] for number in (every if members is None else members) if number in every]
        copies = [parameter for pair in chosen for parameter in pair[0]]
        if copies:
            originals = [parameter for pair in chosen for parameter in pair[1]]
            get_ema_multi_avg_fn(self._momentum)(copies, originals, None)
