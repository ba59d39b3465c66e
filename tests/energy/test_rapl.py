"""RAPL on a folder that looks like /sys/class/powercap (energy_protocol, section 8: 8, 9)."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfree.energy import EnergyMeter, RaplSource, SourceUnavailableError
from bpfree.energy.rapl import WrappingCounter

from .fakes import FakeClock

RANGE_UJ = 262_143_328_850  # of a Xeon package


def add_zone(root: Path, zone: str, name: str, energy_uj: int) -> Path:
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder / "energy_uj"


@pytest.fixture
def package(tmp_path: Path, clock: FakeClock) -> Path:
    return add_zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)


def test_packages_and_memory_are_added_and_parts_of_packages_are_not(tmp_path: Path, package: Path) -> None:
    counters = [
        package,
        add_zone(tmp_path, "intel-rapl:0:0", "core", 5_000_000),
        add_zone(tmp_path, "intel-rapl:0:1", "dram", 5_000_000),
        add_zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000),
        add_zone(tmp_path, "intel-rapl:2", "psys", 5_000_000),
        add_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000),
    ]
    source = RaplSource(tmp_path)
    for i, counter in enumerate(counters):
        counter.write_text(str(5_000_000 + 10**i * 1_000_000))
    assert source.energy_j() == pytest.approx(1 + 100 + 1000)  # package-0, dram, package-1
    assert source.scope == "cpu package + dram"
    assert source.info()["zones"] == [
        "intel-rapl:0 package-0",
        "intel-rapl:0:1 dram",
        "intel-rapl:1 package-1",
    ]


def test_a_wrap_is_no_loss(tmp_path: Path, package: Path) -> None:
    package.write_text(str(RANGE_UJ - 3_000_000))
    source = RaplSource(tmp_path)
    package.write_text("4000000")
    assert source.energy_j() == pytest.approx(7)
    assert source.scope == "cpu package"


def test_a_long_window_looks_often_enough_to_see_every_wrap(tmp_path: Path, package: Path, clock: FakeClock) -> None:
    # 3 kW turn the counter over every 87 s; the window lasts for more than three turns.
    def read_text(path: Path) -> str:
        if path != package:
            return original(path)
        return str(int(clock.now * 3000e6) % RANGE_UJ)

    original = Path.read_text
    with mock.patch.object(Path, "read_text", autospec=True, side_effect=read_text):
        source = RaplSource(tmp_path)
        meter = EnergyMeter(source, clock=clock)
        with meter.window("epoch") as window:
            clock.advance(300)
    assert window.result.gross_j == pytest.approx(300 * 3000)
    assert (window.result.method, window.result.flags) == ("rapl", ())
    source.close()
    assert source.energy_j() is None


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
def test_a_counter_of_known_width_is_made_monotone(steps: list[int], start: int) -> None:
    # A 32-bit counter of millijoules wraps at 4.29 MJ, 1.7 h at 700 W.
    counter = WrappingCounter(2**32, start)
    total = 0
    for step in steps:
        total += step
        assert counter.advance((start + total) % 2**32) == total


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailableError, match="no RAPL packages"):
        RaplSource(tmp_path)


def test_only_for_root(tmp_path: Path, package: Path) -> None:
    def read_text(path: Path) -> str:
        if path == package:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    original = Path.read_text
    with (
        mock.patch.object(Path, "read_text", autospec=True, side_effect=read_text),
        pytest.raises(SourceUnavailableError, match=r"only root may read it .*energy_uj"),
    ):
        RaplSource(tmp_path)


def test_nonsense(tmp_path: Path, package: Path) -> None:
    package.write_text("n/a")
    with pytest.raises(SourceUnavailableError, match="cannot be read"):
        RaplSource(tmp_path)


def test_lost_while_measuring(tmp_path: Path, package: Path, clock: FakeClock) -> None:
    meter = EnergyMeter(RaplSource(tmp_path), clock=clock)
    with meter.window("epoch") as window:
        clock.advance(20)
        package.unlink()
    assert window.result.gross_j is None
    assert window.result.flags == ("SENSOR_LOST",)
