"""On a real board: counter against integrated power (energy_protocol, section 8: 20), phases, a measured program."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from bpfree.energy import EnergyMeter, choose_source
from bpfree.energy.program import measure_program
from bpfree.energy.survey import survey

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


def test_phases_follow_the_device_and_not_the_host() -> None:
    source = choose_source("nvml", "cuda")
    meter = EnergyMeter(source, device="cuda", poll_hz=10)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    a @ a
    torch.cuda.synchronize()
    with meter.window("total"):
        for _ in range(2):
            with meter.phase("busy"):
                for _ in range(800):
                    a @ a
            with meter.phase("waiting"):
                torch.cuda._sleep(2_000_000_000)  # about a second in which nothing is multiplied
    totals = meter.totals()
    print(totals)
    source.close()
    busy, waiting, total = totals["busy"], totals["waiting"], totals["total"]
    assert busy.seconds + waiting.seconds == pytest.approx(total.seconds, rel=0.02)
    assert waiting.seconds > 0.5
    assert busy.gross_j is not None
    assert waiting.gross_j is not None
    assert busy.gross_j + waiting.gross_j == pytest.approx(total.gross_j, rel=0.03)
    assert busy.mean_w is not None
    assert waiting.mean_w is not None
    assert busy.mean_w > 1.3 * waiting.mean_w


def test_a_program_is_measured_without_a_context_of_ours() -> None:
    measured = measure_program([sys.executable, "-c", "import time; time.sleep(3)"])
    assert measured.exit_code == 0
    assert measured.energy.method == "nvml-counter"
    assert measured.energy.mean_w is not None
    assert measured.peak_w is not None
    assert 30 < measured.energy.mean_w <= measured.peak_w * 1.1
    assert any(row["measured"] and row["what"] == "gpu board cuda:0" for row in survey())
