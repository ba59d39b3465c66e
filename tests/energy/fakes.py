"""Stand-ins for hardware and for time: a clock that is moved by hand, and NVML boards that obey it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import pynvml
import pytest
import torch


class FakeClock:
    """Time that only moves when told; timers that fall due on the way are called at their time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[FakeHeartbeat] = []

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and min(timer.due for timer in self._timers) <= end:
            timer = min(self._timers, key=lambda timer: timer.due)
            self.now = timer.due
            timer.beats += 1
            timer.function()
        self.now = end

    def heartbeat(self, function: Callable[[], object], period_s: float) -> FakeHeartbeat:
        """Takes the place of the class `Heartbeat`."""
        return FakeHeartbeat(self, function, period_s)


class FakeHeartbeat:
    def __init__(self, clock: FakeClock, function: Callable[[], object], period_s: float) -> None:
        self.function = function
        self.beats = 0
        self._clock = clock
        self._period_s = period_s

    @property
    def due(self) -> float:
        return self._started + (self.beats + 1) * self._period_s

    def start(self) -> None:
        self._started = self._clock.now
        self._clock._timers.append(self)

    def stop(self) -> None:
        if self in self._clock._timers:
            self._clock._timers.remove(self)


@dataclass
class FakeBoard:
    """One NVML board. `errors` maps the name of an NVML function to the code it fails with."""

    uuid: str = "GPU-11111111-aaaa-bbbb-cccc-000000000001"
    name: str = "NVIDIA H200"
    bus: int = 0x4B
    millijoules: Callable[[], int] = lambda: 0
    milliwatts: Callable[[], int] = lambda: 100_000
    milliwatts_average: Callable[[], int] = lambda: 90_000
    milliwatts_usage: Callable[[], int] = lambda: 80_000
    field_return: int = pynvml.NVML_SUCCESS
    mig: int = pynvml.NVML_DEVICE_MIG_DISABLE
    temperature: int = 40
    utilisation: int = 95
    reasons: int = 0
    pids: Sequence[int] = ()
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def pci(self) -> str:
        return f"00000000:{self.bus:02x}:00.0"

    def lose(self) -> None:
        """From now on the board answers nothing."""
        self.errors = dict.fromkeys(BOARD_FUNCTIONS, pynvml.NVML_ERROR_GPU_IS_LOST)


def _field_values(board: FakeBoard, fields: Sequence[int]) -> object:
    readings = {
        pynvml.NVML_FI_DEV_POWER_INSTANT: board.milliwatts,
        pynvml.NVML_FI_DEV_POWER_AVERAGE: board.milliwatts_average,
    }
    values = (pynvml.c_nvmlFieldValue_t * len(fields))()
    for value, number in zip(values, fields, strict=True):
        value.nvmlReturn = board.field_return
        value.value.uiVal = readings[number]()
    return values


BOARD_FUNCTIONS: dict[str, Callable[..., object]] = {
    "nvmlDeviceGetTotalEnergyConsumption": lambda board: board.millijoules(),
    "nvmlDeviceGetFieldValues": _field_values,
    "nvmlDeviceGetPowerUsage": lambda board: board.milliwatts_usage(),
    "nvmlDeviceGetMigMode": lambda board: [board.mig, board.mig],
    "nvmlDeviceGetTemperature": lambda board, sensor: board.temperature,
    "nvmlDeviceGetUtilizationRates": lambda board: SimpleNamespace(gpu=board.utilisation, memory=10),
    "nvmlDeviceGetCurrentClocksEventReasons": lambda board: board.reasons,
    "nvmlDeviceGetClockInfo": lambda board, kind: {pynvml.NVML_CLOCK_SM: 1980}[kind],
    "nvmlDeviceGetEnforcedPowerLimit": lambda board: 700_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": lambda board: 700_000,
    "nvmlDeviceGetPersistenceMode": lambda board: pynvml.NVML_FEATURE_ENABLED,
    "nvmlDeviceGetCurrentEccMode": lambda board: pynvml.NVML_FEATURE_DISABLED,
    "nvmlDeviceGetComputeRunningProcesses": lambda board: [SimpleNamespace(pid=pid) for pid in board.pids],
    "nvmlDeviceGetUUID": lambda board: board.uuid,
    "nvmlDeviceGetName": lambda board: board.name,
}


class FakeNvml:
    """The real names of `pynvml`, with their signatures, answered by fake boards; counts users as NVML does.

    Args:
        monkeypatch: of the test.
        boards: in NVML's order.
        visible: in CUDA's order, as torch sees them; all by default.
        properties: the attributes, besides the name, by which torch identifies a board.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        boards: Sequence[FakeBoard],
        *,
        visible: Sequence[FakeBoard] | None = None,
        properties: Callable[[FakeBoard], dict[str, object]] = lambda board: {"uuid": board.uuid[4:]},
    ) -> None:
        self.users = 0
        self._boards = boards
        visible = boards if visible is None else visible
        functions = {
            "nvmlInit": self._init,
            "nvmlShutdown": self._shutdown,
            "nvmlDeviceGetCount": lambda: len(boards),
            "nvmlDeviceGetHandleByIndex": lambda index: boards[index],
            "nvmlDeviceGetHandleByUUID": lambda uuid: self._find("uuid", uuid),
            "nvmlDeviceGetHandleByPciBusId": lambda address: self._find("pci", address),
            "nvmlSystemGetDriverVersion": lambda: "580.159.04",
            **{name: self._guarded(name, answer) for name, answer in BOARD_FUNCTIONS.items()},
        }
        for name, answer in functions.items():
            spec = mock.create_autospec(getattr(pynvml, name), side_effect=answer)
            monkeypatch.setattr(pynvml, name, spec)
        cuda = {
            "is_available": lambda: bool(visible),
            "device_count": lambda: len(visible),
            "current_device": lambda: 0,
            "get_device_properties": lambda index: SimpleNamespace(
                name=visible[index].name, **properties(visible[index])
            ),
        }
        for name, answer in cuda.items():
            spec = mock.create_autospec(getattr(torch.cuda, name), side_effect=answer)
            monkeypatch.setattr(torch.cuda, name, spec)

    def _init(self) -> None:
        self.users += 1

    def _shutdown(self) -> None:
        if self.users == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        self.users -= 1

    def _find(self, attribute: str, value: str) -> FakeBoard:
        for board in self._boards:
            if getattr(board, attribute) == value:
                return board
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def _guarded(self, name: str, answer: Callable[..., object]) -> Callable[..., object]:
        def ask(board: FakeBoard, *args: object) -> object:
            if self.users == 0:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
            if name in board.errors:
                raise pynvml.NVMLError(board.errors[name])
            return answer(board, *args)

        return ask
