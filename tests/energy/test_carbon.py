"""Grams of CO2-equivalents: from measured joules first, without the network, and never at the price of the run."""

from __future__ import annotations

import csv
import inspect
import json
import logging
import random
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from bpfree.energy import EnergyResult
from bpfree.energy.carbon import MEASURE_S, CarbonTracker
from bpfree.errors import UsageError

from .fakes import FakeBoard, FakeNvml

POLAND = 661.926  # g/kWh, what CodeCarbon's table has said since 3.0; year 2023
GPU_J, CPU_KWH, RAM_KWH = 3.6e6, 0.25, 0.125  # 3.6 MJ are one kWh


def measured(scope: str = "gpu board", gross_j: float | None = GPU_J, *flags: str, method: str = "m") -> EnergyResult:
    return EnergyResult(gross_j, 100.0, method, scope, flags=flags)


def board(index: int, last_energy: object = 1.0) -> SimpleNamespace:
    return SimpleNamespace(gpu_index=index, last_energy=last_energy)


def hardware(kind: str, **attributes: Any) -> Any:
    """A part as CodeCarbon holds it: known by the name of its class."""
    return type(kind, (), attributes)()


def gpus(*boards: SimpleNamespace, ids: list[int]) -> Any:
    return hardware("GPU", gpu_ids=ids, devices=SimpleNamespace(devices=list(boards)))


class FakeCodeCarbon:
    """In place of `OfflineEmissionsTracker`: a CPU by load, memory, and what a test adds."""

    parts: tuple[Any, ...] = ()
    gpu_kwh = 0.0
    cpu_mode = "cpu_load"
    cpu_kwh = CPU_KWH

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self._hardware = [hardware("RAM"), hardware("CPU", _mode=self.cpu_mode), *self.parts]

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.final_emissions_data = SimpleNamespace(
            cpu_energy=self.cpu_kwh, ram_energy=RAM_KWH, gpu_energy=self.gpu_kwh, duration=120.0
        )


@pytest.fixture
def codecarbon(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a fake tracker."""
    module = pytest.importorskip("codecarbon")
    fake = type("Fake", (FakeCodeCarbon,), {})
    monkeypatch.setattr(module, "OfflineEmissionsTracker", fake)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # other tests may have used a board
    return fake


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network: an attempt fails, and is noted here in case the failure is swallowed."""
    requests = pytest.importorskip("requests")
    attempts: list[str] = []

    def refuse(*args: object, **kwargs: object) -> None:
        attempts.append(repr(args))
        raise OSError("no network in this test")

    for owner, name in (
        (socket, "socket"),
        (socket, "create_connection"),
        (socket, "getaddrinfo"),
        (requests.Session, "request"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    return attempts


def report_of(folder: Path, energy: EnergyResult | None = None) -> dict[str, Any]:
    with CarbonTracker("POL", folder=str(folder)) as carbon:
        pass
    report: dict[str, Any] = json.loads(json.dumps(carbon.report(energy)))
    return report


def test_measured_joules_of_the_board_replace_codecarbons(codecarbon: Any, tmp_path: Path) -> None:
    codecarbon.parts, codecarbon.gpu_kwh = (gpus(board(0), ids=[0]),), 7.0
    report = report_of(tmp_path, measured(method="nvml-counter"))
    assert report["parts"]["gpu"] == {
        "kwh": pytest.approx(1.0),
        "seconds": 100.0,
        "how": "measured: nvml-counter",
        "g_co2e": pytest.approx(661.926),
    }
    cpu, ram = report["parts"]["cpu"], report["parts"]["ram"]
    assert (cpu["kwh"], cpu["seconds"], cpu["how"]) == (0.25, 120.0, "modelled: rated power and load")
    assert (ram["kwh"], ram["seconds"], ram["how"]) == (0.125, 120.0, "modelled: memory modules guessed from the size")
    assert cpu["g_co2e"] == pytest.approx(165.4815)
    assert report["kwh"] == pytest.approx(1.375)
    assert report["g_co2e"] == pytest.approx(910.14825)
    assert (report["simulated"], report["reason"]) == (False, "")


def test_the_intensity_is_that_of_the_data_file_with_its_year_and_version(codecarbon: Any, tmp_path: Path) -> None:
    path = "data/private_infra/global_energy_mix.json"
    table = json.loads((files("codecarbon") / path).read_text())
    version = sys.modules["codecarbon"].__version__
    for country in ("POL", "SWE", "GUF"):
        with CarbonTracker(country.lower(), folder=tmp_path) as carbon:
            pass
        assert carbon.report()["intensity"] == {
            "g_per_kwh": table[country]["carbon_intensity"],
            "country": country,
            "year": table[country]["year"],
            "source": f"codecarbon {version}, {path}",
        }
    assert (table["POL"]["carbon_intensity"], table["POL"]["year"]) == (POLAND, 2023)
    assert table["GUF"]["year"] != 2023  # each country has its own


@pytest.mark.parametrize(
    ("scope", "kwh", "how_of_ram"),
    [
        ("cpu package", 0.0 + 1.0 + 0.125, "modelled: memory modules guessed from the size"),
        ("cpu package + dram", 0.0 + 1.0, "measured: rapl, in the number of cpu"),
    ],
)
def test_rapl_replaces_the_processor_and_memory_where_it_covers_it(
    codecarbon: Any, tmp_path: Path, scope: str, kwh: float, how_of_ram: str
) -> None:
    report = report_of(tmp_path, measured(scope, method="rapl"))
    assert (report["parts"]["cpu"]["kwh"], report["parts"]["cpu"]["how"]) == (1.0, "measured: rapl")
    assert report["parts"]["ram"]["how"] == how_of_ram
    assert report["kwh"] == pytest.approx(kwh)


def test_a_scope_of_board_and_processor_is_counted_once(codecarbon: Any, tmp_path: Path) -> None:
    report = report_of(tmp_path, measured("gpu board + cpu package", method="nvml-counter + rapl"))
    assert report["parts"]["cpu"]["kwh"] is None
    assert report["kwh"] == pytest.approx(1.0 + RAM_KWH)


def test_without_a_measurement_codecarbons_numbers_stay(codecarbon: Any, tmp_path: Path) -> None:
    for energy in (None, measured("nothing", None), measured("gpu board", None)):
        report = report_of(tmp_path, energy)
        assert report["kwh"] == CPU_KWH + RAM_KWH
        assert (report["parts"]["gpu"]["kwh"], report["parts"]["gpu"]["how"]) == (0.0, "none")


def test_simulated_joules_are_not_used_and_mark_everything(codecarbon: Any, tmp_path: Path) -> None:
    report = report_of(tmp_path, measured("gpu board", GPU_J, "SHORT_WINDOW", "SIMULATED"))
    assert report["simulated"] is True
    assert all("simulated" in part["how"] for part in report["parts"].values())
    assert "nothing was measured" in report["reason"]
    assert report["kwh"] == CPU_KWH + RAM_KWH


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("constant", "modelled: half the rated power"),
        ("intel_rapl", "measured: rapl, by CodeCarbon"),
        ("tea_leaves", "unknown: tea_leaves, by CodeCarbon"),
    ],
)
def test_what_codecarbon_measured_itself_is_said(codecarbon: Any, tmp_path: Path, mode: str, how: str) -> None:
    codecarbon.cpu_mode = mode
    codecarbon.parts, codecarbon.gpu_kwh = (gpus(board(0, None), board(1), board(2), ids=[1, 2]),), 2.0
    parts = report_of(tmp_path)["parts"]
    assert parts["cpu"]["how"] == how
    assert (parts["gpu"]["kwh"], parts["gpu"]["how"]) == (2.0, "measured: energy counters of 2 board(s), by CodeCarbon")


def test_a_board_without_counter_is_told_apart(codecarbon: Any, tmp_path: Path) -> None:
    codecarbon.parts, codecarbon.gpu_kwh = (gpus(board(0, None), board(1), ids=[0, 1]),), 2.0
    how = report_of(tmp_path)["parts"]["gpu"]["how"]
    assert how == "measured: sampled power of 2 board(s), by CodeCarbon"


def test_codecarbons_silent_zero_is_unknown_and_so_is_the_total(codecarbon: Any, tmp_path: Path) -> None:
    codecarbon.parts = (gpus(board(0, None), ids=[0]),)
    report = report_of(tmp_path)
    assert (report["parts"]["gpu"]["kwh"], report["parts"]["gpu"]["how"]) == (None, "not measured")
    assert (report["kwh"], report["g_co2e"], report["parts"]["gpu"]["g_co2e"]) == (None, None, None)
    assert report["parts"]["cpu"]["g_co2e"] == pytest.approx(CPU_KWH * POLAND)
    assert report_of(tmp_path, measured())["kwh"] == pytest.approx(1.375)

    codecarbon.cpu_kwh = 0.0
    assert report_of(tmp_path, measured())["parts"]["cpu"]["how"] == "not measured"


def test_a_hidden_board_costs_nothing_and_a_missed_one_is_unknown(
    codecarbon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codecarbon.parts = (gpus(board(0), ids=[]),)  # CUDA_VISIBLE_DEVICES=-1
    assert report_of(tmp_path)["parts"]["gpu"]["how"] == "none"
    codecarbon.parts = ()  # CodeCarbon sees no board where there is no nvidia-smi
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    report = report_of(tmp_path)
    assert (report["parts"]["gpu"]["how"], report["kwh"]) == ("not measured", None)


def test_apples_chip_is_named(codecarbon: Any, tmp_path: Path) -> None:
    codecarbon.parts, codecarbon.gpu_kwh = (hardware("AppleSiliconChip", chip_part="GPU"),), 2.0
    gpu = report_of(tmp_path)["parts"]["gpu"]
    assert (gpu["kwh"], gpu["how"]) == (2.0, "unknown: AppleSiliconChip, by CodeCarbon")


@pytest.mark.parametrize("method", ["__init__", "start", "stop"])
def test_a_tracker_that_raises_leaves_the_run_alone(
    codecarbon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(self: object, **settings: object) -> None:
        raise RuntimeError(f"{method} is\nbroken")

    monkeypatch.setattr(codecarbon, method, fail)
    report = report_of(tmp_path, measured())
    assert report["reason"] == f"RuntimeError: {method} is broken"
    assert report["parts"]["gpu"]["kwh"] == pytest.approx(1.0)
    assert (report["parts"]["cpu"]["kwh"], report["parts"]["cpu"]["how"]) == (None, "not measured")
    assert (report["kwh"], report["file"]) == (None, None)


def test_an_error_of_the_run_passes_through(codecarbon: Any, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), CarbonTracker("POL", folder=tmp_path) as carbon:
        raise ZeroDivisionError
    assert carbon.report()["kwh"] == CPU_KWH + RAM_KWH


@pytest.mark.parametrize("country", ["XXX", "PL", "Poland", "", "CAF"])
def test_a_country_without_data_is_refused(codecarbon: Any, tmp_path: Path, country: str) -> None:
    """CodeCarbon would take 475 g/kWh for the first ones, and has 0 g/kWh for the last."""
    with pytest.raises(UsageError, match=r"no carbon intensity for country .* such as .*POL") as caught:
        CarbonTracker(country, folder=tmp_path)
    assert "\n" not in str(caught.value)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(UsageError, match=r'pip install "bpfree\[carbon\]"'):
        CarbonTracker("POL", folder=tmp_path)


HOSTILE = {
    "output_methods": "api,logger,prometheus",
    "save_to_api": "true",
    "emissions_endpoint": "http://127.0.0.1:9/emissions",
    "co2_signal_api_token": "token",
    "electricitymaps_api_token": "token",
    "cloud_provider": "aws",
    "cloud_region": "us-east-1",
    "country_iso_code": "SWE",
    "tracking_mode": "process",
    "force_carbon_intensity_g_co2e_kwh": "1",
    "force_ram_power": "100000",
    "pue": "1000",
    "output_file": "emissions.csv",
    "log_level": "critical",
}


@pytest.fixture
def hostile_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything a user's configuration can switch on: half of it in a file, half in variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    lines = [f"{key} = {value}" for key, value in list(HOSTILE.items())[::2]]
    Path(".codecarbon.config").write_text("\n".join(["[codecarbon]", *lines]))
    for key, value in list(HOSTILE.items())[1::2]:
        monkeypatch.setenv(f"CODECARBON_{key.upper()}", value)


@pytest.mark.usefixtures("hostile_settings")
def test_two_real_trackers_are_quiet_offline_and_apart(
    offline: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real thing, whatever the user's configuration: no connection, no output, one file each."""
    pytest.importorskip("codecarbon")
    trackers = []
    for _ in range(2):
        random.seed(0)  # as paired runs with the same seed do
        torch.manual_seed(0)
        trackers.append(CarbonTracker("POL", folder=tmp_path / "new" / "run"))
    with trackers[0] as first, trackers[1] as second:
        time.sleep(0.06)  # CodeCarbon takes its second reading after 50 ms at the earliest
    reports = [first.report(), second.report()]

    assert offline == []
    assert capfd.readouterr() == ("", "")
    written = sorted(path.name for path in (tmp_path / "new" / "run").iterdir())
    assert written == sorted(report["file"] for report in reports)
    assert len(set(written)) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"new", ".codecarbon.config"}
    run_ids = set()
    for report in reports:
        assert report["reason"] == ""
        with (tmp_path / "new" / "run" / report["file"]).open() as file:
            (row,) = csv.DictReader(file)
        run_ids.add(row["run_id"])
        # An independent view of the same run: CodeCarbon's own product, by its own table.
        assert float(row["emissions"]) * 1000 == pytest.approx(float(row["energy_consumed"]) * POLAND)
        assert (row["country_iso_code"], row["on_cloud"], row["tracking_mode"]) == ("POL", "N", "machine")
        assert report["parts"]["ram"]["kwh"] == float(row["ram_energy"]) > 0
        assert report["parts"]["ram"]["seconds"] == float(row["duration"])
        watts = float(row["ram_energy"]) * 3.6e6 / float(row["duration"])
        assert watts < 300  # modelled, neither forced nor multiplied
    assert len(run_ids) == 2


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBoard]:
    """A fake board that the real CodeCarbon finds."""
    pytest.importorskip("codecarbon")
    from codecarbon.core import gpu, gpu_nvidia, hardware_cache

    one = FakeBoard()
    FakeNvml(monkeypatch, [one])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda board: SimpleNamespace(total=2, free=1, used=1))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeMode", lambda board: 0)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetGraphicsRunningProcesses", lambda board: [])
    monkeypatch.setattr(gpu_nvidia, "pynvml", pynvml)
    monkeypatch.setattr(gpu, "PYNVML_AVAILABLE", True)
    monkeypatch.setattr(gpu, "is_nvidia_system", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hardware_cache.clear_cache()
    yield one
    hardware_cache.clear_cache()


@pytest.mark.parametrize(
    ("unsupported", "how"),
    [
        ([], "measured: energy counters of 1 board(s), by CodeCarbon"),
        (["TotalEnergyConsumption"], "measured: sampled power of 1 board(s), by CodeCarbon"),
        (["TotalEnergyConsumption", "PowerUsage"], "not measured"),
    ],
)
def test_what_the_real_tracker_makes_of_a_board(
    nvidia: FakeBoard, tmp_path: Path, unsupported: list[str], how: str
) -> None:
    nvidia.errors = {f"nvmlDeviceGet{name}": pynvml.NVML_ERROR_NOT_SUPPORTED for name in unsupported}
    with CarbonTracker("POL", folder=tmp_path) as carbon:
        time.sleep(0.06)  # see above
        nvidia.millijoules = lambda: 7_200_000_000  # 7.2 MJ = 2 kWh
    report = carbon.report()
    gpu = report["parts"]["gpu"]
    assert gpu["how"] == how
    if not unsupported:
        assert gpu["kwh"] == pytest.approx(2.0, rel=1e-5)
        assert gpu["g_co2e"] == pytest.approx(2 * POLAND, rel=1e-5)
    elif len(unsupported) == 1:
        assert 0 < gpu["kwh"] <= 80 * gpu["seconds"] / 3.6e6  # 80 W
    else:
        assert (gpu["kwh"], report["kwh"]) == (None, None)


@pytest.mark.usefixtures("hostile_settings")
def test_what_the_real_tracker_swallows_becomes_the_reason(
    offline: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("codecarbon")
    folder = tmp_path / "run"
    with CarbonTracker("POL", folder=folder) as carbon:
        shutil.rmtree(folder)
    report = carbon.report()
    assert report["reason"].startswith("OSError")
    assert str(folder) in report["reason"]
    assert {part["how"] for part in report["parts"].values()} == {"not measured"}
    assert (report["kwh"], report["file"], offline) == (None, None, [])
    assert capfd.readouterr() == ("", "")


def test_codecarbons_log_is_given_back(codecarbon: Any, tmp_path: Path) -> None:
    log = logging.getLogger("codecarbon")
    before = list(log.filters)
    report_of(tmp_path)
    with pytest.raises(UsageError):
        CarbonTracker("XXX", folder=tmp_path)
    assert log.filters == before


def test_no_setting_is_left_to_the_users_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CodeCarbon that has learned a new way to send something fails here."""
    codecarbon = pytest.importorskip("codecarbon")
    real = codecarbon.OfflineEmissionsTracker
    known = {name for cls in real.__mro__[:2] for name in inspect.signature(cls.__init__).parameters}
    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", FakeCodeCarbon)
    with CarbonTracker("POL", folder=tmp_path) as carbon:
        given = carbon._tracker.settings
    without_output_method = {"api_endpoint", "api_key", "logging_logger", "prometheus_url", "metadata"}
    overruled = {"co2_signal_api_token"} | {name for name in known if name.startswith("save_to_")}
    labels = {"experiment_id", "experiment_name"}
    assert known - set(given) - without_output_method - overruled - labels == {"self", "args", "kwargs"}
    assert given["gpu_ids"] is None


def test_readings_are_rare_but_within_a_turn_of_rapl(codecarbon: Any, tmp_path: Path) -> None:
    """RAPL of 2^32 units of 15.3 uJ wraps after 65.7 kJ: 131 s at 500 W. CodeCarbon's default is 15 s."""
    with CarbonTracker("POL", folder=tmp_path) as carbon:
        settings = carbon._tracker.settings
    assert settings["measure_power_secs"] == MEASURE_S
    assert 15 < MEASURE_S < 65
    assert settings["allow_multiple_runs"] is True
