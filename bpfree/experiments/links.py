"""What connects devices, and how long messages over it take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from bpfree.errors import UsageError


@dataclass(frozen=True)
class Link:
    """What connects two devices, the same between all of them.

    Attributes:
        name: as the user calls it.
        bytes_per_second: in one direction, while the other one is busy too.
        latency_seconds: from asking for a message to its first byte.

    Raises:
        UsageError: a bandwidth that is not positive, or a latency that is negative.
    """

    name: str
    bytes_per_second: float
    latency_seconds: float

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0:
            raise UsageError(f"the bandwidth of a link must be positive, got {self.bytes_per_second / 1e9:g} GB/s")
        if not 0 <= self.latency_seconds < math.inf:
            raise UsageError(f"the latency of a link must not be negative, got {1e6 * self.latency_seconds:g} us")

    def transfer(self, size: float) -> float:
        """Seconds for a message of `size` bytes; none for an empty one, which is not sent."""
        return self.latency_seconds + size / self.bytes_per_second if size else 0.0

    def all_reduce(self, size: float, replicas: int) -> float:
        """Seconds to add up `size` bytes of R replicas: on a ring, or for many replicas on a tree if that is faster.

        The ring takes 2 (R - 1) messages of `size` / R bytes, one after another; the double binary tree 2 log2 R hops
        up and down, through which 2 `size` bytes flow. NCCL chooses between the two.
        """
        if replicas == 1 or not size:
            return 0.0
        ring = 2 * (replicas - 1) * self.transfer(size / replicas)
        tree = 2 * math.ceil(math.log2(replicas)) * self.latency_seconds + 2 * size / self.bytes_per_second
        return min(ring, tree)


def _link(name: str, gigabytes_per_second: float, latency_microseconds: float) -> tuple[str, Link]:
    return name, Link(name, gigabytes_per_second * 1e9, latency_microseconds * 1e-6)


LINKS: Final[dict[str, Link]] = dict(
    [
        _link("nvlink3", 300, 10),
        _link("nvlink4", 450, 10),
        _link("nvlink5", 900, 10),
        _link("pcie4", 32, 15),
        _link("pcie5", 64, 15),
        _link("infiniband200", 25, 15),
        _link("infiniband400", 50, 15),
        _link("ethernet10", 1.25, 50),
        _link("ethernet25", 3.125, 50),
        _link("ethernet100", 12.5, 50),
        _link("ethernet400", 50, 50),
    ]
)
"""Bandwidths per direction from vendors' specifications, latencies assumed; docs/planning.md has the sources."""
