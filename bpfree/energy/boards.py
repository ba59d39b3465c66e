"""Which NVML board is a torch CUDA device?

Never the one with the same index: CUDA orders boards by speed and hides some (`CUDA_VISIBLE_DEVICES`), NVML
does neither. The UUID that torch reports is the sure way, the PCI address the next; only for torch builds
that report neither is `CUDA_VISIBLE_DEVICES` read. NVML must have been initialised by the caller.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from bpfree.energy.sources import SourceUnavailableError

if TYPE_CHECKING:
    import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"

MIG_REASON = "the board is cut up by MIG, and its energy counter cannot tell the slices apart"


def nvml_handle(device: torch.device) -> Any:
    """The NVML handle of the board that a torch CUDA device computes on.

    Raises:
        SourceUnavailableError: there is no such device for torch, or no way to tell which board it is.
        pynvml.NVMLError: NVML fails otherwise.
    """
    import pynvml
    import torch

    if not torch.cuda.is_available():
        raise SourceUnavailableError(_why_no_device())
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise SourceUnavailableError(f"torch sees {torch.cuda.device_count()} CUDA devices, there is no {device}")
    properties: Any = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
            pass  # the UUID of a MIG slice: its board is found by address
    if hasattr(properties, "pci_bus_id"):
        address = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        return pynvml.nvmlDeviceGetHandleByPciBusId(address)
    return handle_by_environment(torch.device("cuda", index))


def visible_boards(variable: str | None, boards: int) -> list[int | str]:
    """What `CUDA_VISIBLE_DEVICES` shows, in the order of CUDA's device numbers.

    Args:
        variable: its value, None when it is not set.
        boards: number of boards in the machine.

    Returns:
        Board numbers and (possibly abbreviated) UUIDs. CUDA ignores the first invalid entry and all after it,
        hence "0,-1,1" shows one board, and "-1" and the empty string none.
    """
    if variable is None:
        return list(range(boards))
    shown: list[int | str] = []
    for entry in (text.strip() for text in variable.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            shown.append(entry)
        elif entry.isdecimal() and int(entry) < boards:
            shown.append(int(entry))
        else:
            break
    return shown


def count_visible() -> int:
    """Number of boards that a CUDA program started now would see. NVML must have been initialised.

    Raises:
        pynvml.NVMLError: NVML fails.
    """
    import pynvml

    return len(visible_boards(os.environ.get(VISIBLE), pynvml.nvmlDeviceGetCount()))


def visible_handle(device: torch.device) -> Any:
    """The NVML handle of one of the boards that a CUDA program started now would see, without asking CUDA.

    Asking CUDA would make a context, which takes memory and power. Without `CUDA_VISIBLE_DEVICES` the program sees all
    boards, and it does not matter which is which.

    Raises:
        SourceUnavailableError: see `handle_by_environment`.
        pynvml.NVMLError: NVML fails.
    """
    import pynvml

    if VISIBLE in os.environ:
        return handle_by_environment(device)
    return pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)


def handle_by_environment(device: torch.device) -> Any:
    """The NVML handle of a CUDA device as `CUDA_VISIBLE_DEVICES` numbers them, without asking CUDA.

    Raises:
        SourceUnavailableError: there is no such device, it is a MIG slice, or numbers cannot be trusted because
            boards of several kinds are ordered by speed.
        pynvml.NVMLError: NVML fails otherwise.
    """
    import pynvml

    index = device.index or 0
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    shown = visible_boards(os.environ.get(VISIBLE), len(handles))
    if index >= len(shown):
        raise SourceUnavailableError(f"{VISIBLE} shows {len(shown)} boards, there is no cuda:{index}")
    entry = shown[index]
    if isinstance(entry, str) and entry.startswith("MIG-"):
        raise SourceUnavailableError(MIG_REASON)
    if isinstance(entry, str):
        matches = [handle for handle in handles if pynvml.nvmlDeviceGetUUID(handle).startswith(entry)]
        if len(matches) != 1:
            raise SourceUnavailableError(f"{VISIBLE} entry {entry} names {len(matches)} boards")
        return matches[0]
    # NVML numbers boards by PCI address. CUDA does so when told, or when no board is faster than another.
    kinds = {pynvml.nvmlDeviceGetName(handle) for handle in handles}
    if len(kinds) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise SourceUnavailableError("boards of several kinds: set CUDA_DEVICE_ORDER=PCI_BUS_ID to tell which is meant")
    return handles[entry]


def _why_no_device() -> str:
    hidden = os.environ.get(VISIBLE)
    if hidden is not None and not visible_boards(hidden, boards=sys.maxsize):
        return f"torch sees no CUDA device: {VISIBLE}={hidden!r} hides every board"
    return "torch sees no CUDA device"
