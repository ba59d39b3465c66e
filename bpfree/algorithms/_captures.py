"""Work captured in CUDA graphs, and what becomes of it where it cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Advance = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
WORTH_A_GRAPH: Final = 32  # steps, below which making a graph takes longer than it saves


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


def walked(advance: Advance, state: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What `advance` finds and the state that it leads to, step by step; many steps on a GPU are one graph, replayed.

    What is yielded is valid until the next step.

    Args:
        advance: takes a state and the number of a step, 0-d int64, and does the same kernels whatever they are.
        state: before the first step.
        steps: how many.
    """
    # the first step is no replay: a capture must not be the first to do anything
    for done, step in enumerate(torch.arange(steps, device=state.device)):
        if done == 1 and steps >= WORTH_A_GRAPH and _may_capture(state):
            graph = captured(partial(_Advance, advance, state, step), ())
            if graph is not None:
                yield from (graph() for _ in range(done, steps))
                return
        found, state = advance(state, step)
        yield found, state


def _may_capture(state: Tensor) -> bool:
    return state.is_cuda and not torch.is_grad_enabled() and not torch.cuda.is_current_stream_capturing()


class _Advance:
    """A step in a graph, which moves a state and a number of its own on at each call."""

    def __init__(self, advance: Advance, state: Tensor, step: Tensor) -> None:
        self._state, self._step = state.clone(), step.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._found, following = advance(self._state, self._step)
            self._state.copy_(following)
            self._step.add_(1)

    def __call__(self) -> tuple[Tensor, Tensor]:
        self._graph.replay()
        return self._found, self._state
