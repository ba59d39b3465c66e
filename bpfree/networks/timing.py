"""How long a piece of work takes on a device, undisturbed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import torch

WARMUPS: Final = 3
MOST_CALLS: Final = 100


def least_seconds(call: Callable[[], object], device: torch.device, readings: int, *, lasting: float = 0.0) -> float:
    """Seconds of a call: the least of some readings, for whatever else runs on a machine only adds to them.

    Args:
        call: done again and again, a few times before the first reading too.
        device: which is waited for at both ends of a reading.
        readings: how many.
        lasting: what a reading should last, s; it is made of as many calls as that takes, at most `MOST_CALLS`.
    """

    def reading(calls: int) -> float:
        _wait_for(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        _wait_for(device)
        return (time.perf_counter() - started) / calls

    for _ in range(WARMUPS):
        once = reading(1)
    calls = max(1, min(MOST_CALLS, math.ceil(lasting / once)))
    return min(reading(calls) for _ in range(readings))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
