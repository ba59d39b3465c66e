"""Where joules come from: the small interface of every power source, and the source that has none.

A source covers one scope (a board, the CPU packages) and answers two questions, "how many joules so far" and
"how many watts now". A question that has no answer is answered with None, never with zero and never with an
exception: a sensor must not be able to end a training run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from bpfree.energy.flags import Flag
from bpfree.errors import BpfreeError

if TYPE_CHECKING:
    import torch

Device: TypeAlias = "torch.device | str"


def device_list(device: Device | Sequence[Device]) -> list[Device]:
    """The devices as a list, be there one or several."""
    if isinstance(device, str) or not isinstance(device, Sequence):
        return [device]
    return list(device)


class SourceUnavailableError(BpfreeError):
    """A power source that this machine does not offer; the message says why."""


@dataclass(frozen=True)
class Status:
    """State of a device at one moment; None where the source cannot tell.

    Attributes:
        temperature_c: °C.
        sm_clock_mhz: clock of the streaming multiprocessors, MHz.
        utilisation: share of the last sampling period with a kernel running, 0 to 1.
        power_limit_w: enforced limit, W.
        throttled: slowed down for heat, power supply or a fault. (A board at its power limit is not: that is
            normal.)
        foreign_processes: number of computing processes on the device that are not this one.
    """

    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    utilisation: float | None = None
    power_limit_w: float | None = None
    throttled: bool = False
    foreign_processes: int | None = None


class PowerSource(ABC):
    """One way to know the energy of one device.

    Attributes:
        name: what the energy counter is, printed as the method of a result.
        power_name: what `power_w` reads, printed as the method of a result that was integrated from samples.
        scope: what is measured, and with that what is not.
        update_period_s: how stale a reading of the counter can be, s.
        standing_flags: what is true of every number of this source.
        reason: why there is no counter; empty when there is one.
        idle_w: power of the idle device with its context alive, W, if a calibration tells.
        calibrated: date of the calibration in use, or why the one there is was not used; None if there is none.
    """

    name: str
    power_name: str
    scope: str
    update_period_s: float
    standing_flags: frozenset[Flag] = frozenset()
    reason: str = ""
    idle_w: float | None = None
    calibrated: str | None = None

    @abstractmethod
    def energy_j(self) -> float | None:
        """Energy since some fixed moment, J, never falling; None if it cannot be read."""

    @abstractmethod
    def power_w(self) -> float | None:
        """Power now, W; None if it cannot be read."""

    @abstractmethod
    def powers(self) -> dict[str, Callable[[], float | None]]:
        """Every kind of power that the device may tell, by name, for calibration."""

    @abstractmethod
    def status(self) -> Status:
        """State of the device now."""

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """What identifies and configures the device, for the run record, ready for JSON."""

    @abstractmethod
    def close(self) -> None:
        """Release what the source holds. May be called again; afterwards readings are None."""


class NullSource(PowerSource):
    """Measures nothing, and remembers why."""

    name = "none"
    power_name = "none"
    scope = "nothing"
    update_period_s = 0.0
    standing_flags = frozenset({Flag.COUNTER_UNSUPPORTED})

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def energy_j(self) -> float | None:
        return None

    def power_w(self) -> float | None:
        return None

    def powers(self) -> dict[str, Callable[[], float | None]]:
        return {}

    def status(self) -> Status:
        return Status()

    def info(self) -> dict[str, Any]:
        return {"method": self.name, "reason": self.reason}

    def close(self) -> None:
        pass
