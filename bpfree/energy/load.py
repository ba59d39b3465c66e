"""A steady load, for calibration and for comparing sensors."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING

from bpfree.energy.sources import Device

if TYPE_CHECKING:
    import torch

GPU_SIZE = 8192
CPU_SIZE = 1024
"""Rows of the square matrices that are multiplied: enough to keep the device at its full power."""

QUEUED = 20
"""Products between two waits for the device, so that it never runs dry."""


class MatrixLoad:
    """Multiplies matrices in a thread, in bfloat16 on a GPU, in float32 on the CPU, from `__enter__` to `__exit__`.

    Args:
        device: the device to load.
    """

    def __init__(self, device: Device) -> None:
        import torch

        device = torch.empty(0, device=device).device  # with its index, which a thread cannot guess
        on_gpu = device.type == "cuda"
        size, dtype = (GPU_SIZE, torch.bfloat16) if on_gpu else (CPU_SIZE, torch.float32)
        self._a = torch.randn(size, size, device=device).to(dtype)
        self._product = torch.empty_like(self._a)
        self._wait_for: torch.device | None = device if on_gpu else None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bpfree-load", daemon=True)
        self._multiply()  # what the first product sets up is not the load

    def __enter__(self) -> MatrixLoad:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        if self._wait_for is not None:
            import torch

            torch.cuda.set_device(self._wait_for)  # a thread begins without a current context
        while not self._stopping.is_set():
            self._multiply()

    def _multiply(self) -> None:
        import torch

        for _ in range(QUEUED):
            torch.matmul(self._a, self._a, out=self._product)
        if self._wait_for is not None:
            torch.cuda.synchronize(self._wait_for)
