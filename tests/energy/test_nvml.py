"""NVML boards: units, fallbacks, and which board is whose (energy_protocol, section 8: 9, 15)."""

from __future__ import annotations

import os
from unittest import mock

import pynvml
import pytest

from bpfree.energy import NvmlSource, SourceUnavailableError, Status
from bpfree.energy.boards import visible_boards
from bpfree.errors import UsageError

from .fakes import FakeBoard, FakeNvml

FIRST = "GPU-11111111-aaaa-bbbb-cccc-000000000001"
SECOND = "GPU-22222222-aaaa-bbbb-cccc-000000000002"
UNSUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED


def two_boards() -> list[FakeBoard]:
    return [
        FakeBoard(FIRST, bus=1, millijoules=lambda: 1000),
        FakeBoard(SECOND, bus=2, millijoules=lambda: 2000),
    ]


def test_the_counter_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch, [FakeBoard(millijoules=lambda: 1_234_567)])
    source = NvmlSource("cuda")
    assert source.energy_j() == 1234.567  # mJ
    assert source.power_w() == 100  # mW
    assert (source.name, source.scope, source.update_period_s) == ("nvml-counter", "gpu board", 0.1)
    assert source.standing_flags == frozenset()


@pytest.mark.parametrize(("kind", "watts"), [(None, 100), ("instant", 100), ("average", 90), ("usage", 80)])
def test_kinds_of_power(monkeypatch: pytest.MonkeyPatch, kind: str | None, watts: float) -> None:
    FakeNvml(monkeypatch, [FakeBoard()])
    source = NvmlSource("cuda:0", power=kind)
    assert source.power_w() == watts
    assert source.power_name == f"nvml-power-{kind or 'instant'}"


@pytest.mark.parametrize(
    "board",
    [
        FakeBoard(errors={"nvmlDeviceGetFieldValues": UNSUPPORTED}),
        FakeBoard(field_return=UNSUPPORTED),  # the call works, the field does not
    ],
)
def test_old_drivers_only_know_usage(monkeypatch: pytest.MonkeyPatch, board: FakeBoard) -> None:
    FakeNvml(monkeypatch, [board])
    source = NvmlSource("cuda")
    assert (source.power_w(), source.power_name) == (80, "nvml-power-usage")
    with pytest.raises(SourceUnavailableError, match="does not tell its average power"):
        NvmlSource("cuda", power="average")


def test_unknown_kind_of_power() -> None:
    with pytest.raises(UsageError, match="did you mean average"):
        NvmlSource("cuda", power="averge")


def test_a_board_without_counter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch, [FakeBoard(errors={"nvmlDeviceGetTotalEnergyConsumption": UNSUPPORTED})])
    source = NvmlSource("cuda")
    assert source.energy_j() is None
    assert source.name == "nvml-power-instant"
    assert {flag.name for flag in source.standing_flags} == {"COUNTER_UNSUPPORTED"}
    assert "counter" in source.info()["reason"]


def test_a_board_without_anything_is_refused_and_nvml_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = dict.fromkeys(
        ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues", "nvmlDeviceGetPowerUsage"],
        UNSUPPORTED,
    )
    nvml = FakeNvml(monkeypatch, [FakeBoard(errors=silent)])
    with pytest.raises(SourceUnavailableError, match="neither its energy nor its power"):
        NvmlSource("cuda")
    assert nvml.users == 0


def test_no_driver() -> None:
    error = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    with (
        mock.patch.object(pynvml, "nvmlInit", autospec=True, side_effect=error),
        pytest.raises(SourceUnavailableError, match=r"NVML cannot be started: .*[Ll]ibrary"),
    ):
        NvmlSource("cuda")


def test_mig_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch, [FakeBoard(mig=pynvml.NVML_DEVICE_MIG_ENABLE)])
    with pytest.raises(SourceUnavailableError, match="MIG"):
        NvmlSource("cuda")
    assert nvml.users == 0


def test_boards_without_mig_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch, [FakeBoard(errors={"nvmlDeviceGetMigMode": UNSUPPORTED})])
    assert NvmlSource("cuda").energy_j() == 0


def test_closing_gives_back_one_use_however_often(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch, [FakeBoard()])
    first, second = NvmlSource("cuda"), NvmlSource("cuda")
    first.close()
    first.close()
    assert nvml.users == 1
    assert first.energy_j() is None
    assert second.energy_j() == 0
    pynvml.nvmlShutdown()  # by somebody else, once too often
    assert second.energy_j() is None
    second.close()


def test_a_lost_board_answers_none_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    board = FakeBoard()
    FakeNvml(monkeypatch, [board])
    source = NvmlSource("cuda")
    board.lose()
    assert source.energy_j() is None
    assert source.power_w() is None
    assert source.status() == Status()
    assert source.info()["board"] is None


def test_status(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = pynvml.nvmlClocksEventReasonSwPowerCap
    FakeNvml(monkeypatch, [FakeBoard(utilisation=17, temperature=61, reasons=reasons)])
    assert NvmlSource("cuda").status() == Status(
        temperature_c=61,
        sm_clock_mhz=1980,
        utilisation=0.17,
        power_limit_w=700,
        throttled=False,  # the power cap is what a busy board runs into by design
        foreign_processes=0,
    )


@pytest.mark.parametrize(
    "reason",
    [
        pynvml.nvmlClocksEventReasonHwSlowdown,
        pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
        pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    ],
)
def test_throttling(monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    FakeNvml(monkeypatch, [FakeBoard(reasons=reason | pynvml.nvmlClocksEventReasonSwPowerCap)])
    assert NvmlSource("cuda").status().throttled


@pytest.mark.parametrize(
    ("pids", "computing", "foreign"),
    [
        ([], True, 0),
        (["own"], True, 0),
        (["own", 7], True, 1),
        ([7], False, 1),
        ([7], True, 0),  # in a container our own process is listed under the host's number
        ([7, 8], True, 1),
    ],
)
def test_foreign_processes(
    monkeypatch: pytest.MonkeyPatch, pids: list[str | int], computing: bool, foreign: int
) -> None:
    numbers = [os.getpid() if pid == "own" else int(pid) for pid in pids]
    FakeNvml(monkeypatch, [FakeBoard(pids=numbers)])
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: computing)
    assert NvmlSource("cuda").status().foreign_processes == foreign


def test_info_names_the_board_without_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch, two_boards())
    info, other = NvmlSource("cuda:0").info(), NvmlSource("cuda:1").info()
    assert (info["board"], info["driver"], info["power_limit_w"]) == ("NVIDIA H200", "580.159.04", 700)
    assert (info["persistence"], info["ecc"], info["mig"]) == (True, False, False)
    assert info["uuid_hash"] != other["uuid_hash"]
    assert FIRST[4:] not in str(info)


def test_the_uuid_decides_not_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = two_boards()
    FakeNvml(monkeypatch, boards, visible=[boards[1], boards[0]])  # CUDA puts the faster one first
    assert NvmlSource("cuda:0").energy_j() == 2
    assert NvmlSource("cuda:1").energy_j() == 1
    assert NvmlSource("cuda").energy_j() == 2  # the current device


def test_the_pci_address_decides_when_the_uuid_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = two_boards()

    def properties(board: FakeBoard) -> dict[str, object]:
        return {"uuid": "of-a-slice", "pci_domain_id": 0, "pci_bus_id": board.bus, "pci_device_id": 0}

    FakeNvml(monkeypatch, boards, visible=[boards[1]], properties=properties)
    assert NvmlSource("cuda").energy_j() == 2


@pytest.mark.parametrize("value", ["1", SECOND, "GPU-22222222", " 1 ,0"])
def test_the_environment_decides_when_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    boards = two_boards()
    FakeNvml(monkeypatch, boards, visible=[boards[1]], properties=lambda board: {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert NvmlSource("cuda:0").energy_j() == 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [("GPU-", "names 2 boards"), ("GPU-9", "names 0 boards"), ("MIG-1", "MIG"), ("5", "shows 0 boards")],
)
def test_an_environment_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, value: str, reason: str) -> None:
    FakeNvml(monkeypatch, two_boards(), properties=lambda board: {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(SourceUnavailableError, match=reason):
        NvmlSource("cuda:0")


def test_indices_are_not_trusted_among_boards_of_different_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = [FakeBoard(FIRST, name="NVIDIA T4"), FakeBoard(SECOND, millijoules=lambda: 2000)]
    FakeNvml(monkeypatch, boards, properties=lambda board: {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    with pytest.raises(SourceUnavailableError, match="CUDA_DEVICE_ORDER"):
        NvmlSource("cuda:0")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert NvmlSource("cuda:0").energy_j() == 2


@pytest.mark.parametrize(
    ("variable", "shown"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("0,-1,1", [0]),
        ("0,3,1", [0]),
        (f"{SECOND},GPU-1", [SECOND, "GPU-1"]),
        ("MIG-5", ["MIG-5"]),
    ],
)
def test_visible_boards(variable: str | None, shown: list[int | str]) -> None:
    assert visible_boards(variable, boards=3) == shown


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_boards_are_explained(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    FakeNvml(monkeypatch, two_boards(), visible=[])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(SourceUnavailableError, match=r"CUDA_VISIBLE_DEVICES=.* hides every board"):
        NvmlSource("cuda")


def test_no_such_device(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch, two_boards())
    with pytest.raises(SourceUnavailableError, match="2 CUDA devices, there is no cuda:2"):
        NvmlSource("cuda:2")
