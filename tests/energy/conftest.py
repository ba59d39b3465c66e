"""Time for all tests of the meter: a clock that is moved by hand, and drives what would be threads."""

from __future__ import annotations

import pytest

import bpfree.energy.rapl
import bpfree.energy.sampler

from .fakes import FakeClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    for module in (bpfree.energy.rapl, bpfree.energy.sampler):
        monkeypatch.setattr(module, "Heartbeat", clock.heartbeat)
    return clock
