"""Which power source fits a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bpfree.energy.combined import CombinedSource
from bpfree.energy.nvml import NvmlSource
from bpfree.energy.rapl import RaplSource
from bpfree.energy.simulated import SimulatedSource
from bpfree.energy.sources import Device, NullSource, PowerSource, SourceUnavailableError, device_list
from bpfree.errors import UsageError, unknown_name

if TYPE_CHECKING:
    import torch

KINDS = ("auto", "nvml", "rapl", "simulated", "none")

SIMULATED_W = 100.0
"""Constant power of `choose_source("simulated")`, W."""


def choose_source(kind: str = "auto", device: Device | Sequence[Device] = "cpu") -> PowerSource:
    """Open the power source for a run on `device`, or on several devices whose energy is summed.

    "auto" takes NVML for CUDA devices and RAPL otherwise. Where that is not available it measures nothing and
    keeps the reason in `source.reason`: joules of the host are no substitute for joules of the GPU.

    Args:
        kind: "auto", "nvml", "rapl", "simulated" (a constant `SIMULATED_W`) or "none".
        device: where the run computes.

    Raises:
        UsageError: unknown kind or device, or NVML for something that is not a CUDA device.
        SourceUnavailableError: the kind was asked for by name and cannot be had; the message says why.
    """
    if kind not in KINDS:
        raise unknown_name("energy source", kind, KINDS)
    if kind == "simulated":
        return SimulatedSource(SIMULATED_W)
    if kind == "none":
        return NullSource("no energy measurement was asked for")
    if kind == "rapl":
        return RaplSource()
    boards = _cuda_devices(device)
    if kind == "nvml":
        return _open_boards(boards)
    try:
        return _open_boards(boards) if boards else RaplSource()
    except SourceUnavailableError as error:
        return NullSource(str(error))


def _cuda_devices(device: Device | Sequence[Device]) -> list[torch.device]:
    """The CUDA devices among those given, each once."""
    import torch

    try:
        devices = [torch.device(d) for d in device_list(device)]
    except RuntimeError as error:
        raise UsageError(f"no such device: {device}") from error
    return [d for d in dict.fromkeys(devices) if d.type == "cuda"]


def _open_boards(devices: Sequence[torch.device]) -> PowerSource:
    if not devices:
        raise UsageError("nvml measures CUDA devices and this run uses none; choose auto, rapl or none")
    sources: list[PowerSource] = []
    try:
        for device in devices:
            sources.append(NvmlSource(device))  # noqa: PERF401 - those opened before a failure must be closed
    except SourceUnavailableError:
        for source in sources:
            source.close()
        raise
    return sources[0] if len(sources) == 1 else CombinedSource(sources)
