"""Measured energy: where joules come from, windows around pieces of a run, and what to doubt in them."""

from bpfree.energy.calibration import Calibration, calibrate
from bpfree.energy.carbon import CarbonTracker
from bpfree.energy.choose import KINDS, choose_source
from bpfree.energy.combined import CombinedSource
from bpfree.energy.flags import Flag, explain
from bpfree.energy.meter import EnergyMeter
from bpfree.energy.nvml import NvmlSource
from bpfree.energy.program import measure_program
from bpfree.energy.rapl import RaplSource
from bpfree.energy.result import EnergyResult, Regime
from bpfree.energy.simulated import SimulatedSource
from bpfree.energy.sources import NullSource, PowerSource, SourceUnavailableError, Status
from bpfree.energy.window import Window

__all__ = [
    "KINDS",
    "Calibration",
    "CarbonTracker",
    "CombinedSource",
    "EnergyMeter",
    "EnergyResult",
    "Flag",
    "NullSource",
    "NvmlSource",
    "PowerSource",
    "RaplSource",
    "Regime",
    "SimulatedSource",
    "SourceUnavailableError",
    "Status",
    "Window",
    "calibrate",
    "choose_source",
    "explain",
    "measure_program",
]
