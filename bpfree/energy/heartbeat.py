"""A thread that calls one function again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Heartbeat:
    """Calls `function` every `period_s` seconds in a daemon thread, between `start` and `stop`.

    The times are not exact, since the interpreter lock can hold the thread up: whoever samples must read the
    clock.
    """

    def __init__(self, function: Callable[[], object], period_s: float) -> None:
        self._function = function
        self._period_s = period_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bpfree-energy", daemon=True)

    def start(self) -> None:
        """Begin; the first call comes one period later. At most once."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for a call in progress. May be called again, or without a start."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._period_s):
            self._function()
