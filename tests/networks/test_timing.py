"""The clock of measurements, with a clock that tests wind themselves."""

from __future__ import annotations

import pytest
import torch

from bpfree.networks import timing
from bpfree.networks.timing import MOST_CALLS, WARMUPS, least_seconds

CPU = torch.device("cpu")


class Work:
    """Work whose n-th call takes the n-th of some seconds, and the last of them from then on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
        self.seconds, self.calls, self.now = seconds, 0, 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def __call__(self) -> None:
        self.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1


def test_the_least_of_the_readings_behind_the_warm_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch, *[0.25] * WARMUPS, 4.0, 2.0, 8.0)
    assert least_seconds(work, CPU, 3) == 2.0
    assert work.calls == WARMUPS + 3


@pytest.mark.parametrize(("lasting", "calls"), [(0.0, 1), (0.5, 1), (2.0, 4), (1.75, 4), (1e6, MOST_CALLS)])
def test_a_reading_lasts_as_long_as_asked(lasting: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch, 0.5)
    assert least_seconds(work, CPU, 2, lasting=lasting) == 0.5
    assert work.calls == WARMUPS + 2 * calls
