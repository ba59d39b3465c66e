"""Phases: pieces of a window that nobody waits for.

A window waits for the device and reads the counter at both ends, which takes milliseconds: too much for pieces
that come by the hundred, such as the validation after each epoch. A phase only leaves an event in the device's
queue. When the device has been waited for anyway, the events tell when the phase began and ended, and its joules
are read off the course of the counter, which a sampling thread has filled meanwhile.

Where work is not queued (no CUDA) the counter is read at the ends at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from bpfree.energy.counter import TOUCHING_S, CounterReader, Reading
from bpfree.energy.sources import Device, device_list
from bpfree.energy.tally import Tally
from bpfree.energy.trace import PowerTrace

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Edge(Protocol):
    """The begin or end of a phase: its reading, or None while the device has not come to it."""

    def __call__(self) -> Reading | None: ...


class Edges(Protocol):
    """Makes edges at the present moment of the device."""

    def now(self) -> Edge: ...


class HostEdges:
    """For work that is done when the call returns: the counter is read at once."""

    def __init__(self, counter: CounterReader) -> None:
        self._counter = counter

    def now(self) -> Edge:
        reading = self._counter.now()
        return lambda: reading


class CudaEdges:
    """For work that is queued on a CUDA device: events between the kernels, turned into times later.

    Args:
        device: the device whose current stream is marked.
        counter: its readings at the times of the events.
        clock: the meter's time, in s.
    """

    def __init__(self, device: torch.device, counter: CounterReader, clock: Callable[[], float]) -> None:
        import torch

        self._device = device
        self._counter = counter
        torch.cuda.synchronize(device)
        self._origin_s = clock()
        self._origin = self._event()

    def now(self) -> Edge:
        event = self._event()

        def read() -> Reading | None:
            if not event.query():
                return None
            return self._counter.course.at(self._origin_s + self._origin.elapsed_time(event) / 1e3)

        return read

    def _event(self) -> torch.cuda.Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Phases:
    """Marks the phases of the windows that are open, and sums them by name. Phases less than a millisecond apart share
    an edge.

    Args:
        clock: the meter's time, in s.
        make_edges: called before the first phase, and after each `settle`: the clocks of host and device drift.
    """

    def __init__(self, clock: Callable[[], float], make_edges: Callable[[], Edges]) -> None:
        self._clock = clock
        self._make_edges = make_edges
        self._edges: Edges | None = None
        self._spans: list[tuple[str, Edge, Edge]] = []
        self._running: tuple[str, Edge, Edges] | None = None
        self._latest: tuple[float, Edge] | None = None  # when the host passed the latest end, and the edge there

    @property
    def name(self) -> str | None:
        """The phase that is running, if any."""
        return None if self._running is None else self._running[0]

    def begin(self, name: str) -> None:
        self._edges = self._edges or self._make_edges()
        ended_s, edge = self._latest or (-math.inf, None)
        if edge is None or self._clock() - ended_s > TOUCHING_S:
            edge = self._edges.now()
        self._running = name, edge, self._edges

    def end(self) -> None:
        if self._running is not None:
            name, begin, edges = self._running
            end = edges.now()
            self._spans.append((name, begin, end))
            self._running, self._latest = None, (self._clock(), end)

    def settle(self, trace: PowerTrace | None) -> dict[str, Tally]:
        """The phases that have ended since the last call, by name; the device must have been waited for."""
        tallies: dict[str, Tally] = {}
        for name, begin, end in self._spans:
            first, last = begin(), end()
            if first is None or last is None:
                continue  # cut off by an exception, before the device came to it
            tally = tallies.setdefault(name, Tally())
            tally.windows += 1
            tally.add_span(first, last, trace)
        self._spans.clear()
        self._edges = self._latest = None
        return tallies


def edges_for(device: Device | Sequence[Device] | None, counter: CounterReader, clock: Callable[[], float]) -> Edges:
    """Edges for work on `device`: the first CUDA device of several, the current one for None."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        names = ["cuda"] if device is None else [str(d) for d in device_list(device)]
        cuda = next((torch.device(name) for name in names if name.startswith("cuda")), None)
        if cuda is not None:
            return CudaEdges(cuda, counter, clock)
    return HostEdges(counter)
