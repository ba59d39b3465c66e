"""Side streams on which independent parts of one step overlap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def side_stream(device: torch.device, index: int) -> torch.cuda.Stream:
    """The side stream of this number, always the same: cuBLAS keeps a workspace of 32 MiB for each it has seen."""
    return torch.cuda.Stream(device)


class Lanes:
    """Forks work of a step to side streams while the step is captured in a CUDA graph, and joins it.

    A captured fork costs nothing to launch, and lets updates that do not depend on each other share the device:
    the small kernels of one block's update fill the gaps that the next block's forward pass leaves. Outside of a
    capture, where forks would cost more than they gain, everything stays on the current stream.

    What a lane uses must stay referenced until `join`, because the allocator gives memory back to the stream
    that asked for it.

    Args:
        device: where the step runs.
        count: number of lanes, from 0.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count
        # made (and kept) at the first eager step, so that a capture never has to
        streams = [side_stream(device, i) for i in range(count)] if device.type == "cuda" and count > 1 else []
        self._streams = streams if streams and torch.cuda.is_current_stream_capturing() else []
        self._used: list[torch.cuda.Stream] = []

    @contextmanager
    def lane(self, index: int, *, after: int | None = None) -> Iterator[None]:
        """Run the block in lane `index`, after everything that the current stream, and lane `after` if one is named,
        have been given so far."""
        if not self._streams:
            yield
            return
        stream = self._streams[index]
        stream.wait_stream(torch.cuda.current_stream())
        if after is not None:
            stream.wait_stream(self._streams[after])
        self._used.append(stream)
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for the lanes that were used."""
        for stream in self._used:
            torch.cuda.current_stream().wait_stream(stream)
