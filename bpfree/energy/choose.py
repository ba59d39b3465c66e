"""Which power source fits a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from bpfree.energy.boards import count_visible, visible_handle
from bpfree.energy.calibration import use_calibration
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
    if kind in {"nvml", "auto"}:
        boards = _cuda_devices(device)
        if kind == "nvml" and not boards:
            raise UsageError("nvml measures CUDA devices and this run uses none; choose auto, rapl or none")
        if boards:
            return _or_reason(kind, lambda: _joined(_open_boards(boards)))
    return _or_reason(kind, lambda: _open_host(kind))


def choose_for_program(kind: str = "auto", is_ours: Callable[[int], bool] | None = None) -> PowerSource:
    """Open the power source for a program that will be started by this process.

    "auto" takes all boards that the program can see (`CUDA_VISIBLE_DEVICES`), and RAPL where there is no board.
    No CUDA context is made here.

    Args:
        kind: see `choose_source`.
        is_ours: whether a process belongs to the program.

    Raises:
        UsageError: unknown kind.
        SourceUnavailableError: the kind was asked for by name and cannot be had; the message says why.
    """
    if kind not in KINDS:
        raise unknown_name("energy source", kind, KINDS)
    no_board = ""
    if kind in {"nvml", "auto"}:
        try:
            return _joined(visible_sources(is_ours))
        except SourceUnavailableError as error:
            if kind == "nvml":
                raise _with_a_way_out(error) from error
            no_board = str(error)
    source = _or_reason(kind, lambda: _open_host(kind))
    if no_board and isinstance(source, NullSource):
        source.reason = f"{no_board}; {source.reason}"
    return source


def visible_sources(is_ours: Callable[[int], bool] | None = None) -> list[PowerSource]:
    """A source for each board that a program started now would see, in CUDA's order; no CUDA context is made.

    Args:
        is_ours: whether a process is ours; all others on a board are foreign.

    Raises:
        SourceUnavailableError: there is no board, or one cannot be measured; the message says why.
    """
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        try:
            count = count_visible()
        finally:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise SourceUnavailableError(f"NVML cannot be started: {error}") from error
    if count == 0:
        raise SourceUnavailableError("no NVIDIA board is visible")
    devices = [torch.device("cuda", index) for index in range(count)]
    return _open_boards(devices, context=False, find=visible_handle, is_ours=is_ours)


def _or_reason(kind: str, open_source: Callable[[], PowerSource]) -> PowerSource:
    """The source; a null source with the reason if there is none and "auto" was asked for."""
    try:
        return open_source()
    except SourceUnavailableError as error:
        if kind != "auto":
            raise _with_a_way_out(error) from error
        return NullSource(str(error))


def _with_a_way_out(error: SourceUnavailableError) -> SourceUnavailableError:
    return SourceUnavailableError(f"{error}; choose another source, or auto or none to do without")


def _open_host(kind: str) -> PowerSource:
    if kind == "none":
        return NullSource("no energy measurement was asked for")
    source = SimulatedSource(SIMULATED_W) if kind == "simulated" else RaplSource()
    use_calibration(source)
    return source


def _cuda_devices(device: Device | Sequence[Device]) -> list[torch.device]:
    """The CUDA devices among those given, each once."""
    import torch

    try:
        devices = [torch.device(d) for d in device_list(device)]
    except RuntimeError as error:
        raise UsageError(f"no such device: {device}") from error
    return [d for d in dict.fromkeys(devices) if d.type == "cuda"]


def _open_boards(devices: Sequence[torch.device], *, context: bool = True, **how: Any) -> list[PowerSource]:
    sources: list[PowerSource] = []
    try:
        for device in devices:
            sources.append(NvmlSource(device, **how))  # noqa: PERF401 - those opened before a failure must be closed
    except SourceUnavailableError:
        for source in sources:
            source.close()
        raise
    for source in sources:
        use_calibration(source, context=context)
    return sources


def _joined(sources: list[PowerSource]) -> PowerSource:
    return sources[0] if len(sources) == 1 else CombinedSource(sources)
