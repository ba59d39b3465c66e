"""Work captured in CUDA graphs, and what becomes of it where it cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


def captured(capture: Callable[[], T], parameters: Iterable[nn.Parameter]) -> T | None:
    """What `capture` makes of a step; None if a user's block does what a CUDA graph cannot hold, and runs eagerly.

    Args:
        capture: captures the step.
        parameters: what the step sets gradients of; they are dropped if it fails, as they lie in a graph's memory.
    """
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # PyTorch stays on that of a capture that has failed
            return capture()
    except RuntimeError as error:
        first: BaseException = error
        while first.__context__ is not None:  # ending a broken capture fails as well, and says less
            first = first.__context__
        reason = (str(first).strip() or type(first).__name__).splitlines()[0]
        warnings.warn(f"this step cannot be a CUDA graph and runs eagerly ({reason})", stacklevel=2)
        for parameter in parameters:
            parameter.grad = None
        return None
