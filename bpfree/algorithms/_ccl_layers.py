"""Layers of two networks that run in opposite directions, and the second network derived from the first.

A layer is what one weight matrix or kernel does, with the normalisation, activation and pooling behind it. The feedback
layer of forward layer l maps what has the shape of its output a_l to what has the shape of its input a_{l-1}:

    Linear d_{l-1} -> d_l                      Linear d_l -> d_{l-1}, in the shape of a_{l-1}
    Conv2d, strided or pooled                  nearest upsampling to the size of a_{l-1}, Conv2d of the same kernel size
    Upsample, Conv2d                           Conv2d with a stride

and then normalises and activates as the forward layer that made a_{l-1} does; the one that makes b_0 does neither.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._optim import trained
from bpfree.errors import UsageError
from bpfree.networks.blocks import Shape
from bpfree.networks.normalization import MapNorm, VectorNorm

ACTIVATIONS: Final = (nn.ELU, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus)
NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d)
POOLS: Final = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
BEFORE: Final = (nn.Flatten, nn.Upsample)
BEHIND: Final = (*ACTIVATIONS, *NORMS, *POOLS, nn.Identity)


class Trace(ABC):
    """What a layer made of a batch, and what it needs to learn from it.

    Attributes:
        output: (n, ...) without gradient.
    """

    output: Tensor

    @abstractmethod
    def gradients(self, towards: Tensor) -> list[Tensor]:
        """Gradients of the layer's parameters: the vector-Jacobian product with `towards`, as large as `output`."""


class DenseTrace(Trace):
    """A linear layer and its activation, in closed form.

    Args:
        dense: the layer.
        inputs: (n, ...).
    """

    def __init__(self, dense: Dense, inputs: Tensor) -> None:
        self.dense, self._inputs = dense, inputs.flatten(1)
        self._activated = dense.activate(F.linear(self._inputs, dense.linear.weight, dense.linear.bias))
        self.output = self._activated if dense.shape is None else self._activated.unflatten(1, dense.shape)

    def factors(self, towards: Tensor) -> tuple[Tensor, Tensor]:
        """dz (n, d_out) and the inputs (n, d_in): dW is the transpose of the former times the latter."""
        return self.dense.derivative(towards.flatten(1).to(self._activated.dtype), self._activated), self._inputs

    def gradients(self, towards: Tensor) -> list[Tensor]:
        """dW and, if there is a bias, db = sum over rows of dz."""
        error, inputs = self.factors(towards)
        weight = error.T @ inputs
        return [weight] if self.dense.linear.bias is None else [weight, error.sum(0)]


class AutogradTrace(Trace):
    """Any other layer, with an autograd graph that begins at its input and ends at its output.

    Args:
        layer: the layer.
        inputs: (n, ...).
    """

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        self._parameters = layer.parameters
        with torch.enable_grad():
            self._output: Tensor = layer.module(inputs.detach())
        self.output = self._output.detach()

    def gradients(self, towards: Tensor) -> list[Tensor]:
        """By autograd inside the layer."""
        if not self._parameters:
            return []
        return list(torch.autograd.grad(self._output, self._parameters, towards.to(self._output.dtype)))


@dataclass(frozen=True, eq=False)
class Dense:
    """`[Flatten ->] Linear [-> Unflatten] [-> ELU or ReLU]`.

    Attributes:
        linear: W and b.
        activation: f, or None for none.
        shape: of one sample of the output, or None for (d,).
    """

    linear: nn.Linear
    activation: nn.ELU | nn.ReLU | None
    shape: Shape | None

    @classmethod
    def of(cls, module: nn.Module) -> Dense | None:
        """The parts of a module that is nothing else, or None. A module with hooks is left to autograd."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
            return None
        shape = None
        rest = []
        for part in leaves(module):
            if isinstance(part, nn.Unflatten):
                shape = tuple(part.unflattened_size)
            elif not isinstance(part, nn.Flatten):
                rest.append(part)
        if not rest or type(rest[0]) is not nn.Linear:
            return None
        if len(rest) == 1:
            return cls(rest[0], None, shape)
        activation = rest[1]
        known = len(rest) == 2 and type(activation) in (nn.ELU, nn.ReLU)
        return cls(rest[0], cast("nn.ELU | nn.ReLU", activation), shape) if known else None

    def activate(self, sums: Tensor) -> Tensor:
        """f(z), (n, d)."""
        if self.activation is None:
            return sums
        return F.relu(sums) if isinstance(self.activation, nn.ReLU) else F.elu(sums, self.activation.alpha)

    def derivative(self, towards: Tensor, activated: Tensor) -> Tensor:
        """`towards` * f'(z), (n, d), told from f(z) alone."""
        if self.activation is None:
            return towards
        if isinstance(self.activation, nn.ReLU):
            return torch.ops.aten.threshold_backward(towards, activated, 0)
        return torch.ops.aten.elu_backward(towards, self.activation.alpha, 1, 1, True, activated)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of either network: everything that one local loss changes there.

    Attributes:
        module: what it computes.
        parameters: those that learn.
        dense: its parts if it learns in closed form, otherwise None.
    """

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    dense: Dense | None

    @classmethod
    def of(cls, module: nn.Module) -> Layer:
        """A layer, with what follows from its module."""
        parameters = trained(module)
        whole = len(parameters) == len(list(module.parameters()))
        return cls(module, tuple(parameters), Dense.of(module) if whole else None)

    def trace(self, inputs: Tensor) -> Trace:
        """Run the layer; its input is a constant to it."""
        return AutogradTrace(self, inputs) if self.dense is None else DenseTrace(self.dense, inputs)


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of nested `nn.Sequential`s in order."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from leaves(child)
    else:
        yield module


def core(block: nn.Module) -> nn.Linear | nn.Conv2d:
    """The one layer with weights of a block that can be mirrored.

    Raises:
        UsageError: something else is in the block.
    """
    weighted = None
    for part in leaves(block):
        if type(part) in (nn.Linear, nn.Conv2d) and weighted is None:
            weighted = part
        elif not isinstance(part, BEFORE if weighted is None else BEHIND):
            raise UsageError(
                f"a block must be one Linear or Conv2d, after Flatten or Upsample, before batch normalisation, an "
                f"activation and pooling; {type(part).__name__} has no counterpart there. "
                "What belongs to one block goes into an nn.Sequential of its own"
            )
    if weighted is None:
        raise UsageError("a block without a Linear or Conv2d has no counterpart")
    return weighted  # type: ignore[return-value]


def weighted(module: nn.Module) -> nn.Linear | nn.Conv2d:
    """The part with the matrix or kernel of a forward or feedback layer."""
    return next(part for part in leaves(module) if isinstance(part, (nn.Linear, nn.Conv2d)))


def feedback_module(block: nn.Module, below: nn.Module | None, given: Shape, made: Shape) -> nn.Sequential:
    """The feedback layer of a forward block, freshly initialised as PyTorch does.

    Args:
        block: forward layer l.
        below: forward layer l - 1, or None for l = 1.
        given: shape of one sample of a_{l-1}.
        made: shape of one sample of a_l.

    Raises:
        UsageError: a block that cannot be mirrored.
    """
    forward = core(block)
    parts: list[nn.Module]
    if isinstance(forward, nn.Linear):
        parts = [nn.Flatten(), nn.Linear(math.prod(made), math.prod(given), bias=forward.bias is not None)]
        if len(given) > 1:
            parts.append(nn.Unflatten(1, given))
    else:
        parts = _mirrored_convolution(forward, given, made)
    parts += _behind(below)
    return nn.Sequential(*parts)


def _mirrored_convolution(forward: nn.Conv2d, given: Shape, made: Shape) -> list[nn.Module]:
    if len(made) != 3:
        raise UsageError("a convolution's maps must be handed on as maps; put Flatten into the block of the Linear")
    mirrored = partial(nn.Conv2d, made[0], given[0], groups=forward.groups, bias=forward.bias is not None)
    (rows, columns), (down, across) = forward.kernel_size, forward.dilation
    if made[1] <= given[1] and made[2] <= given[2]:
        resize: list[nn.Module] = [nn.Upsample(size=given[1:])] if made[1:] != given[1:] else []
        return [*resize, mirrored((rows, columns), padding="same", dilation=(down, across))]
    shrink = mirrored(
        (rows, columns),
        stride=(math.ceil(made[1] / given[1]), math.ceil(made[2] / given[2])),
        padding=(down * (rows - 1) // 2, across * (columns - 1) // 2),
        dilation=(down, across),
    )
    if shrink(torch.zeros(1, *made)).shape[1:] != given:
        raise UsageError(f"no stride takes maps of {made[1:]} back to {given[1:]}")
    return [shrink]


def _behind(block: nn.Module | None) -> list[nn.Module]:
    """Normalisation and activation of a block, anew; normalisation is without weights, as in the paper's code."""
    made: list[nn.Module] = []
    for part in leaves(block) if block is not None else ():
        if isinstance(part, NORMS):
            kind = nn.BatchNorm1d if isinstance(part, nn.BatchNorm1d) else nn.BatchNorm2d
            made.append(kind(part.num_features, eps=part.eps, momentum=part.momentum, affine=False))
            if isinstance(part, (MapNorm, VectorNorm)) and part.rectified:
                made.append(nn.ReLU())
        elif isinstance(part, ACTIVATIONS):
            made.append(copy.deepcopy(part))
    return made


def feedback_modules(blocks: Sequence[nn.Module], shapes: Sequence[Shape]) -> nn.ModuleList:
    """The feedback network of a forward network: V_1..V_L, in the order of the forward layers.

    Args:
        blocks: forward layers 1..L.
        shapes: of one sample of a_0..a_L.

    Raises:
        UsageError: a block that cannot be mirrored, by its number.
    """
    made = []
    for index, block in enumerate(blocks):
        below = blocks[index - 1] if index else None
        try:
            made.append(feedback_module(block, below, shapes[index], shapes[index + 1]))
        except UsageError as error:
            raise UsageError(f"block {index}: {error}") from None
    return nn.ModuleList(made)


def freeze_norms(modules: Iterable[nn.Module]) -> None:
    """Take scale and shift of batch normalisation out of training, as the paper's code does."""
    for module in modules:
        for part in leaves(module):
            if isinstance(part, NORMS):
                part.requires_grad_(False)
