"""Batch normalisation, with what follows it in residual networks."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bpfree.networks.kernels import triton_kernels

KERNELS: Final = "bpfree.networks._norm_kernels"
MOMENTUM: Final = 0.1  # share of a batch in the running statistics, PyTorch's


class VectorNorm(nn.BatchNorm1d):
    """Batch normalisation of vectors, then ReLU if wanted.

    A batch of one sample is taken by the running statistics: one value has no variance. In training on a GPU it is a
    kernel of our own each way.

    Args:
        width: values of a vector.
        rectified: end with ReLU.
    """

    def __init__(self, width: int, *, rectified: bool = False) -> None:
        super().__init__(width, momentum=MOMENTUM)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        """(B, w) -> (B, w)."""
        if self._fuses(x):
            fused: Tensor = _FusedVectors.apply(x, self.weight, self.bias, self)
            return fused
        if self.training and len(x) == 1:
            normalized = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        else:
            normalized = super().forward(x)
        return F.relu(normalized) if self.rectified else normalized

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rectified={self.rectified}"

    def _fuses(self, x: Tensor) -> bool:
        if not (_suits(self, x) and x.ndim == 2 and x.is_contiguous()):
            return False
        kernels = triton_kernels(KERNELS)
        return kernels is not None and 2 <= len(x) <= kernels.MOST_ROWS and x.numel() < 2**31


class MapNorm(nn.BatchNorm2d):
    """Batch normalisation of maps, then a shortcut that is added, then ReLU: relu(norm(x) + shortcut).

    In training on a GPU it is a few kernels of our own for channels-last maps, instead of one for each operation.

    Args:
        width: channels.
        rectified: end with ReLU.
    """

    def __init__(self, width: int, *, rectified: bool = True) -> None:
        super().__init__(width, momentum=MOMENTUM)
        self.rectified = rectified

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """(B, channels, height, width), and as much to be added -> (B, channels, height, width)."""
        if self._fuses(x, shortcut):
            fused: Tensor = _Fused.apply(x, shortcut, self.weight, self.bias, self)
            return fused
        normalized = super().forward(x)
        if shortcut is not None:
            normalized = normalized + shortcut
        return F.relu(normalized) if self.rectified else normalized

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rectified={self.rectified}"

    def _fuses(self, x: Tensor, shortcut: Tensor | None) -> bool:
        return (
            _suits(self, x)
            and x.ndim == 4
            and x.numel() > x.shape[1]
            and x.is_contiguous(memory_format=torch.channels_last)
            and (shortcut is None or (self.rectified and shortcut.dtype == x.dtype and shortcut.shape == x.shape))
            and triton_kernels(KERNELS) is not None
        )


def _suits(norm: VectorNorm | MapNorm, x: Tensor) -> bool:
    """Whether the kernels know what this normalisation does with a batch: running statistics may be gone, or be plain
    averages over batches, as where others measure them (`torch.optim.swa_utils.update_bn`)."""
    running = norm.running_mean is not None and norm.momentum is not None
    return norm.training and running and x.is_cuda and x.dtype.itemsize <= 4 and norm.weight.dtype == torch.float32


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, norm: MapNorm) -> Tensor:
        kernels = triton_kernels(KERNELS)
        assert kernels is not None
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        out, mean, factor = kernels.normalized(
            x, shortcut, weight, bias, norm.running_mean, norm.running_var, norm.num_batches_tracked,
            norm.eps, norm.momentum, norm.rectified,
        )  # fmt: skip
        ctx.rectified = norm.rectified
        ctx.save_for_backward(x, None if shortcut is None else out, mean, factor, weight, bias)
        normalized: Tensor = out
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        kernels = triton_kernels(KERNELS)
        assert kernels is not None
        by_out = by_out.contiguous(memory_format=torch.channels_last)
        return *kernels.gradients(by_out, *ctx.saved_tensors, ctx.rectified), None


class _FusedVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: VectorNorm) -> Tensor:
        kernels = triton_kernels(KERNELS)
        assert kernels is not None
        out, mean, factor = kernels.normalized_vectors(
            x, weight, bias, norm.running_mean, norm.running_var, norm.num_batches_tracked,
            norm.eps, norm.momentum, norm.rectified,
        )  # fmt: skip
        ctx.rectified = norm.rectified
        ctx.save_for_backward(x, mean, factor, weight, bias)
        normalized: Tensor = out
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        kernels = triton_kernels(KERNELS)
        assert kernels is not None
        return *kernels.vector_gradients(by_out.contiguous(), *ctx.saved_tensors, ctx.rectified), None
