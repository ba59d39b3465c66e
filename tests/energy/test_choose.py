"""Which source fits a run, and what is said when none does."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import bpfree.energy.choose
from bpfree.energy import EnergyMeter, NvmlSource, RaplSource, SourceUnavailableError, choose_source
from bpfree.errors import UsageError

from .fakes import FakeBoard, FakeClock, FakeNvml
from .test_rapl import add_zone


@pytest.fixture(autouse=True)
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> Path:
    """The folder where RAPL is looked for, empty at first."""
    monkeypatch.setattr(bpfree.energy.choose, "RaplSource", partial(RaplSource, tmp_path))
    return tmp_path


def test_auto_on_a_gpu_is_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch, [FakeBoard()])
    assert isinstance(choose_source("auto", "cuda:0"), NvmlSource)


def test_auto_on_the_cpu_is_rapl(powercap: Path) -> None:
    add_zone(powercap, "intel-rapl:0", "package-0", 1)
    assert choose_source("auto", "cpu").name == "rapl"


def test_auto_on_a_gpu_never_falls_back_to_the_host(monkeypatch: pytest.MonkeyPatch, powercap: Path) -> None:
    add_zone(powercap, "intel-rapl:0", "package-0", 1)
    FakeNvml(monkeypatch, [], visible=[])
    source = choose_source("auto", "cuda")
    assert (source.name, source.energy_j(), source.power_w()) == ("none", None, None)
    assert "no CUDA device" in source.reason


def test_auto_without_rapl_keeps_the_reason() -> None:
    source = choose_source()
    assert source.name == "none"
    assert source.info() == {"method": "none", "reason": source.reason}
    assert "no RAPL packages" in source.reason


def test_what_is_asked_for_by_name_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch, [], visible=[])
    with pytest.raises(SourceUnavailableError, match="no CUDA device"):
        choose_source("nvml", "cuda")
    with pytest.raises(SourceUnavailableError, match=r"no RAPL packages.*; choose another source, or auto or none"):
        choose_source("rapl")


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="unknown energy source 'nvlm'; did you mean nvml"):
        choose_source("nvlm")
    with pytest.raises(UsageError, match="nvml measures CUDA devices"):
        choose_source("nvml", "cpu")
    with pytest.raises(UsageError, match="no such device: gpu0"):
        choose_source("auto", "gpu0")


def test_by_name() -> None:
    assert choose_source("simulated", "cuda").name == "simulated"
    assert choose_source("none", "cuda").name == "none"


def test_several_boards_are_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    hot = FakeBoard("GPU-1", millijoules=lambda: 1000, temperature=70, utilisation=100, pids=[1])
    cool = FakeBoard("GPU-2", millijoules=lambda: 500, temperature=40, utilisation=50)
    nvml = FakeNvml(monkeypatch, [hot, cool])
    source = choose_source("auto", ["cuda:0", "cuda:1", "cuda:0"])
    assert (source.energy_j(), source.power_w()) == (1.5, 200)
    assert (source.name, source.scope) == ("nvml-counter", "gpu board")
    status = source.status()
    assert (status.temperature_c, status.utilisation) == (70, 0.75)
    assert (status.power_limit_w, status.foreign_processes) == (1400, 1)
    assert len(source.info()["parts"]) == 2
    cool.lose()
    assert (source.energy_j(), source.power_w()) == (None, None)
    source.close()
    assert nvml.users == 0


def test_boards_opened_before_a_failure_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch, [FakeBoard()])
    with pytest.raises(SourceUnavailableError, match="there is no cuda:1"):
        choose_source("nvml", ["cuda:0", "cuda:1"])
    assert nvml.users == 0


def test_a_meter_closes_only_what_it_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch, [FakeBoard()])
    source = choose_source("nvml", "cuda")
    EnergyMeter(source).close()
    assert nvml.users == 1
    own = EnergyMeter()  # finds the CUDA device by itself
    assert nvml.users == 2
    own.close()
    assert nvml.users == 1


def test_importing_is_cheap() -> None:
    # A bare parent package keeps what the rest of bpfree imports out of the answer.
    code = f"""
import sys, types
sys.modules["bpfree"] = types.ModuleType("bpfree")
sys.modules["bpfree"].__path__ = {[str(Path(bpfree.energy.choose.__file__).parents[1])]!r}
import bpfree.energy
print([name for name in ("torch", "pynvml", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
