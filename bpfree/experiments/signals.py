"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


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
