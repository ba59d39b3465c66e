"""Measure a program from outside, as `time` does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bpfree.energy.choose import choose_for_program
from bpfree.energy.meter import EnergyMeter
from bpfree.energy.result import EnergyResult
from bpfree.errors import BpfreeError

POLL_HZ = 10.0

NOT_EXECUTABLE, NOT_FOUND, SIGNALLED = 126, 127, 128
"""Exit codes of shells: the program cannot be run, is not there, was ended by signal N (128 + N)."""

PASSED_ON = (signal.SIGTERM, signal.SIGHUP)
"""Signals that are meant for the program. The terminal sends SIGINT to the program by itself."""


class CannotRunError(BpfreeError):
    """The program cannot be started."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Measured:
    """What a program took.

    Attributes:
        exit_code: of the program, as a shell tells it.
        energy: from its start to its end.
        peak_w: highest sampled power, W; None if power could not be sampled.
        source: how it was measured, ready for JSON.
    """

    exit_code: int
    energy: EnergyResult
    peak_w: float | None
    source: dict[str, Any]


def measure_program(
    command: Sequence[str], *, kind: str = "auto", idle_s: float = 0.0, on_start: Callable[[], object] = lambda: None
) -> Measured:
    """Run a program and measure the boards that it can see, or the CPU where there is no board.

    The counter is read at a change of its value, so that even short programs get an exact number; this begins up to
    two update periods before the program and ends up to two after it.

    Args:
        command: the program and its arguments.
        kind: see `choose_for_program`.
        idle_s: measure the idle device this long before and after, for net joules, s; 0 for not at all.
        on_start: called when the program is about to start.

    Raises:
        CannotRunError: the program is missing or cannot be executed.
        UsageError: unknown kind.
        SourceUnavailableError: the kind was asked for by name and cannot be had.
    """
    path = shutil.which(command[0])
    if path is None:
        there = Path(command[0]).exists()
        code, why = (NOT_EXECUTABLE, "is not executable") if there else (NOT_FOUND, "is not found")
        raise CannotRunError(f"{command[0]} {why}", code)
    source = choose_for_program(kind, is_ours=_descends_from_us)
    try:
        meter = EnergyMeter(source, sync=lambda: None, poll_hz=POLL_HZ, align=True)
        if idle_s:
            meter.measure_idle(idle_s)
        on_start()
        with meter:
            exit_code = _run(path, command)
        energy = meter.result
        peak_w = max(meter.trace.watts, default=None) if meter.trace else None
        if idle_s:
            meter.measure_idle(idle_s)
            energy = meter.result
        return Measured(exit_code, energy, peak_w, meter.info())
    finally:
        source.close()


def _run(path: str, command: Sequence[str]) -> int:
    with _Relay() as relay:
        try:
            program = subprocess.Popen(command, executable=path)
        except OSError as error:
            raise CannotRunError(f"{command[0]} cannot be run: {error.strerror}", NOT_EXECUTABLE) from error
        relay.to(program)
        code = program.wait()
    return SIGNALLED - code if code < 0 else code


class _Relay:
    """While it is entered, signals end the program and not us, so that its energy is still reported. Those that come
    before the program has started wait for it."""

    def __init__(self) -> None:
        self._program: subprocess.Popen[bytes] | None = None
        self._waiting: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Relay:
        for number in PASSED_ON:
            self._before[number] = signal.signal(number, self._pass_on)
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def to(self, program: subprocess.Popen[bytes]) -> None:
        """Send signals to `program` from now on."""
        self._program = program
        for number in self._waiting:
            program.send_signal(number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._program is None:
            self._waiting.append(number)
        else:
            self._program.send_signal(number)


def _descends_from_us(pid: int) -> bool:
    """Whether a process is this one or below it. One that we cannot see is not called foreign: to a container NVML
    may give the numbers of the host."""
    while pid > 1 and pid != os.getpid():
        parent = _parent(pid)
        if parent is None:
            return True
        pid = parent
    return pid == os.getpid()


def _parent(pid: int) -> int | None:
    try:
        # the name in parentheses may hold blanks; state and parent follow it
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
