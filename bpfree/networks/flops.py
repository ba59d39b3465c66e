"""Floating-point operations of whatever runs."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


class _NoModules(ModuleTracker):
    """All operations belong to no module in particular."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class FlopCounter(FlopCounterMode):
    """PyTorch's counter, without its account by module.

    That account hangs hooks on the outputs of every module, and they keep alive what gradient checkpointing computes
    again: the peak memory of a counted step would be that of plain back-propagation, and more.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules()
