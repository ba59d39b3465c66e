"""Gradient checkpointing: keep a block's input and compute what is inside it again when the backward pass needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.utils.checkpoint import checkpoint

from bpfree.errors import UsageError
from bpfree.networks.streams import StreamDropout


def recomputed(block: nn.Module, inputs: Any) -> Any:
    """What `block` makes of `inputs`, keeping nothing else for the backward pass (Chen et al., arXiv 1604.06174)."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    # random generators are left alone, which a CUDA graph needs; `refuse_noise` has seen to it that none is asked
    return checkpoint(block, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def refuse_noise(network: nn.Module) -> None:
    """Raise where a second forward pass would differ from the first.

    Raises:
        UsageError: the network has dropout.
    """
    if any(isinstance(module, (Dropout, StreamDropout)) for module in network.modules()):
        raise UsageError("blocks with dropout cannot be computed again: the second pass would drop others")


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch normalisation sees a batch for the second time, and must not count it twice."""
    norms = [module for module in block.modules() if isinstance(module, BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
