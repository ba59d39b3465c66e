"""Energy of one NVIDIA board from NVML.

Primary is the energy counter that the driver keeps since Volta: two reads per window, no thread, nothing
missed between them. Sampled power is the cross-check, and the fallback for boards without a counter. NVML
counts in mJ and mW; nothing beyond this file does.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from bpfree.energy.boards import MIG_REASON, nvml_handle
from bpfree.energy.flags import Flag
from bpfree.energy.sources import Device, PowerSource, SourceUnavailableError, Status
from bpfree.errors import unknown_name

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

COUNTER_PERIOD_S = 0.1
"""Time between two refreshes of the counter, s: about 0.1 on data centre boards (https://ml.energy, zeus)."""

POWER_PERIOD_S = {"instant": 0.1, "average": 1.0, "usage": 1.0}
"""How stale each kind of power can be, s. On most boards since Ampere "usage" is the mean of a second."""


class NvmlSource(PowerSource):
    """One board: its whole energy, whoever uses it; the host is not included.

    Args:
        device: the torch CUDA device whose board is measured.
        power: "instant" (power now), "average" (over 1 s), "usage" (whichever of the two the board offers;
            the only one with old drivers). None takes the first of these that the board has.
        find: finds the board's handle.
        is_ours: whether a process counts as ours; all others on the board are foreign.

    Raises:
        UsageError: unknown kind of power.
        SourceUnavailableError: no driver, no such board, a board cut up by MIG, or neither energy nor power
            to be read.
    """

    scope = "gpu board"

    def __init__(
        self,
        device: Device,
        *,
        power: str | None = None,
        find: Callable[[torch.device], Any] = nvml_handle,
        is_ours: Callable[[int], bool] | None = None,
    ) -> None:
        import pynvml
        import torch

        if power is not None and power not in POWER_PERIOD_S:
            raise unknown_name("kind of power", power, POWER_PERIOD_S)
        self._nvml = pynvml
        self._is_ours = is_ours
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise SourceUnavailableError(f"NVML cannot be started: {error}") from error
        self._open = True
        try:
            self._handle = find(torch.device(device))
            self._refuse_mig()
            self._power = self._choose_power(power)
            self._choose_method()
        except pynvml.NVMLError as error:
            self.close()
            raise SourceUnavailableError(f"NVML does not answer for {device}: {error}") from error
        except SourceUnavailableError:
            self.close()
            raise

    def energy_j(self) -> float | None:
        millijoules = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1e3

    def power_w(self) -> float | None:
        return None if self._power is None else self._read_power(self._power)

    def powers(self) -> dict[str, Callable[[], float | None]]:
        return {f"nvml-power-{kind}": partial(self._read_power, kind) for kind in POWER_PERIOD_S}

    def status(self) -> Status:
        nvml = self._nvml
        temperature = self._ask(lambda h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU))
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates)
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksEventReasons)
        slowed = (
            nvml.nvmlClocksEventReasonHwSlowdown
            | nvml.nvmlClocksEventReasonHwThermalSlowdown
            | nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
            | nvml.nvmlClocksEventReasonSwThermalSlowdown
        )
        return Status(
            temperature_c=None if temperature is None else float(temperature),
            sm_clock_mhz=self._ask(lambda h: float(nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM))),
            utilisation=None if rates is None else rates.gpu / 100,
            power_limit_w=self._watts(nvml.nvmlDeviceGetEnforcedPowerLimit),
            throttled=bool((reasons or 0) & slowed),
            foreign_processes=self._foreign_processes(),
        )

    def info(self) -> dict[str, Any]:
        """The board, told apart from others by a hash of its UUID, and the settings that move its power."""
        nvml = self._nvml
        uuid = self._ask(nvml.nvmlDeviceGetUUID)
        ecc = self._ask(nvml.nvmlDeviceGetCurrentEccMode)
        persistence = self._ask(nvml.nvmlDeviceGetPersistenceMode)
        return {
            "method": self.name,
            "power_method": self.power_name,
            "scope": self.scope,
            "update_period_s": self.update_period_s,
            "reason": self.reason,
            "board": self._ask(nvml.nvmlDeviceGetName),
            "uuid_hash": None if uuid is None else hashlib.sha256(uuid.encode()).hexdigest()[:12],
            "driver": self._ask(lambda _: nvml.nvmlSystemGetDriverVersion()),
            "power_limit_w": self._watts(nvml.nvmlDeviceGetEnforcedPowerLimit),
            "power_limit_default_w": self._watts(nvml.nvmlDeviceGetPowerManagementDefaultLimit),
            "persistence": None if persistence is None else persistence == nvml.NVML_FEATURE_ENABLED,
            "ecc": None if ecc is None else ecc == nvml.NVML_FEATURE_ENABLED,
            "mig": False,
        }

    def close(self) -> None:
        # NVML counts its users: one shutdown for our one start, so that others in this process keep theirs.
        if self._open:
            self._open = False
            with suppress(self._nvml.NVMLError):  # somebody else may have shut it down once too often
                self._nvml.nvmlShutdown()

    def _refuse_mig(self) -> None:
        mode = self._ask(self._nvml.nvmlDeviceGetMigMode)
        if mode is not None and mode[0] == self._nvml.NVML_DEVICE_MIG_ENABLE:
            raise SourceUnavailableError(MIG_REASON)

    def _choose_power(self, wanted: str | None) -> str | None:
        kinds = POWER_PERIOD_S if wanted is None else [wanted]
        found = next((kind for kind in kinds if self._read_power(kind) is not None), None)
        if found is None and wanted is not None:
            raise SourceUnavailableError(f"the board does not tell its {wanted} power")
        return found

    def _choose_method(self) -> None:
        self.power_name = "none" if self._power is None else f"nvml-power-{self._power}"
        if self.energy_j() is not None:
            self.name = "nvml-counter"
            self.update_period_s = COUNTER_PERIOD_S
        elif self._power is not None:
            self.name = self.power_name
            self.update_period_s = POWER_PERIOD_S[self._power]
            self.standing_flags = frozenset({Flag.COUNTER_UNSUPPORTED})
            self.reason = "the board has no energy counter"
        else:
            raise SourceUnavailableError("the board tells neither its energy nor its power")

    def _read_power(self, kind: str) -> float | None:
        nvml = self._nvml
        if kind == "usage":
            return self._watts(nvml.nvmlDeviceGetPowerUsage)
        field = nvml.NVML_FI_DEV_POWER_INSTANT if kind == "instant" else nvml.NVML_FI_DEV_POWER_AVERAGE
        values = self._ask(lambda handle: nvml.nvmlDeviceGetFieldValues(handle, [field]))
        if values is None or values[0].nvmlReturn != nvml.NVML_SUCCESS:
            return None
        return float(values[0].value.uiVal) / 1e3

    def _foreign_processes(self) -> int | None:
        processes = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses)
        if processes is None:
            return None
        if self._is_ours is not None:
            return sum(not self._is_ours(process.pid) for process in processes)
        others = {process.pid for process in processes} - {os.getpid()}
        # In a container NVML may give the host's numbers, where we cannot find ourselves: one of them is us.
        unseen = len(others) == len(processes) and _computes_on_cuda()
        return max(len(others) - unseen, 0)

    def _watts(self, query: Callable[[Any], int]) -> float | None:
        milliwatts = self._ask(query)
        return None if milliwatts is None else milliwatts / 1e3

    def _ask(self, query: Callable[[Any], T]) -> T | None:
        """The answer to an NVML query, or None: unsupported, device lost, library shut down."""
        if not self._open:
            return None
        try:
            return query(self._handle)
        except self._nvml.NVMLError:
            return None


def _computes_on_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()
