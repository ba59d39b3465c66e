"""Side streams on which independent parts of one step overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from bpfree.errors import UsageError


@cache
def side_stream(device: torch.device, index: int) -> torch.cuda.Stream:
    """The side stream of this number, always the same: cuBLAS keeps a workspace of 32 MiB for each it has seen."""
    return torch.cuda.Stream(device)


def side_streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """As many side streams while a CUDA graph is captured, none otherwise."""
    # made (and kept) at the first eager step, so that a capture never has to
    streams = [side_stream(device, i) for i in range(count)] if device.type == "cuda" and count > 1 else []
    return streams if streams and torch.cuda.is_current_stream_capturing() else []


def check_lanes(count: int) -> None:
    """Refuse what is no number of lanes that a user can ask for.

    Raises:
        UsageError: fewer than one.
    """
    if count < 1:
        raise UsageError(f"lanes must be at least 1, got {count}")


class Lanes:
    """Forks work of a step to side streams while the step is captured in a CUDA graph, and joins it.

    A captured fork costs nothing to launch, and lets updates that do not depend on each other share the device:
    the small kernels of one block's update fill the gaps that the next block's forward pass leaves. Outside of a
    capture, where forks would cost more than they gain, everything stays on the current stream.

    What a lane uses must stay referenced until `join`, because the allocator gives memory back to the stream
    that asked for it. `turn` sees to that for what it is told of.

    Args:
        device: where the step runs.
        count: number of lanes, from 0.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count
        self._streams = side_streams(device, count)
        self._used: list[torch.cuda.Stream] = []
        self._turns = 0
        self._handed: torch.cuda.Event | None = None  # where the last turn let the next one begin
        self._read: deque[tuple[int, tuple[Tensor, ...]]] = deque()  # in which turn

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

    @contextmanager
    def turn(self, *reads: Tensor) -> Iterator[None]:
        """Run the next part of a chain in the lanes' turn, from where the part before has handed on.

        As many parts are under way as there are lanes: each hands on what the next needs and goes on learning.

        Args:
            reads: what the part reads of earlier ones; it is kept until no lane can still read it.
        """
        if not self._streams:
            yield
            return
        number, self._turns = self._turns, self._turns + 1
        stream = self._streams[number % self.count]
        stream.wait_stream(torch.cuda.current_stream())
        if self._handed is not None:
            stream.wait_event(self._handed)
        # This turn is behind turn number - count, which was in the same lane, and later turns are behind where this one
        # begins: whichever lane that memory belongs to, nobody who takes it from here on does so before it was read.
        while self._read and self._read[0][0] <= number - self.count:
            self._read.popleft()
        self._read.append((number, reads))
        self._handed = None
        self._used.append(stream)
        with torch.cuda.stream(stream):
            yield
            if self._handed is None:
                self.hand_on()

    def hand_on(self) -> None:
        """Within a turn: let the next one begin."""
        if self._streams:
            self._handed = torch.cuda.current_stream().record_event()

    def join(self) -> None:
        """Let the current stream wait for the lanes that were used."""
        for stream in self._used:
            torch.cuda.current_stream().wait_stream(stream)
        self._read.clear()
