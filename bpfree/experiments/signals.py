"""Signals that ask a run to save and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Final

LOOK_EVERY_S: Final = 0.5
ENDS_WITHIN_S: Final = 30.0
"""How long a process that was asked to stop may take, s, before it is killed; torchrun waits as long."""


class StopRequest:
    """Within it, the first SIGINT or SIGTERM asks to save and stop; a second one stops at once.

    They can be nested: the outer one hears what the inner one hears, even where that came too late to stop anything.
    Only the main thread can hear signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        around = getattr(self._previous.get(signal.Signals(number)), "__self__", None)
        self._restore()
        if isinstance(around, StopRequest):  # what is around this has to stop as well
            around._hear(number, frame)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def stop_without(parent: int) -> None:
    """Ask this process to stop once the one that started it is gone, as if that had passed a signal on.

    What has not stopped by `ENDS_WITHIN_S` is killed: nobody else is there to do it. Looking at the parent's number
    works on every Unix, and also when the parent was killed in a way that it could not hear.

    Args:
        parent: process id of the parent.
    """
    threading.Thread(target=_watch, args=(parent,), name="bpfree-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ENDS_WITHIN_S)
    os.kill(os.getpid(), signal.SIGKILL)
