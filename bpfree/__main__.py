"""The `bpfree` command, which `python -m bpfree` is as well."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from bpfree.errors import EXIT_STOPPED


def main() -> None:
    """Entry point. Ctrl-C is one line even in the seconds that importing PyTorch takes."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # or else whoever started this ignores it
    if usual:
        signal.signal(signal.SIGINT, _stop)
    from bpfree.cli import main as command

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End at once. Nothing is open yet, and an exception could be swallowed by whatever is just being imported."""
    if os.environ.get("RANK", "0") == "0":  # of processes that all hear it
        os.write(2, b"bpfree: stopped before anything was started\n")
    os._exit(EXIT_STOPPED)


if __name__ == "__main__":
    main()
