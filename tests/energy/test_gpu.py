"""On a real board: counter against integrated power (energy_protocol, section 8: 20)."""

from __future__ import annotations

import time

import pytest
import torch

from bpfree.energy import EnergyMeter, choose_source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_counter_agrees_with_power_under_load_and_idle() -> None:
    source = choose_source("nvml", "cuda")
    meter = EnergyMeter(source, device="cuda", poll_hz=10)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    time.sleep(3)  # clocks fall back
    idle_w = meter.measure_idle(10)
    with meter.window("load") as load:
        begin = time.perf_counter()
        while time.perf_counter() - begin < 30:
            for _ in range(100):
                a @ a
            torch.cuda.synchronize()
    loaded, idle = load.result, meter.totals()["idle"]
    print(source.info(), loaded, idle, load.tally, sep="\n")
    source.close()
    assert loaded.method == "nvml-counter"
    assert loaded.gross_j is not None
    assert idle_w is not None
    assert load.tally.trace_j == pytest.approx(loaded.gross_j, rel=0.05)
    assert loaded.mean_w is not None
    assert loaded.mean_w > 2 * idle_w
    assert loaded.net_j is not None
    assert 0 < loaded.net_j < loaded.gross_j
    assert loaded.regime.utilisation is not None
    assert loaded.regime.utilisation > 0.9
