"""Errors that a user can act on: one clear line each, mapped to exit codes by the command line.

Anything else that escapes is a defect of bpfree and may show a stack trace.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import Final

EXIT_STOPPED: Final = 130
"""Exit code of a command that Ctrl-C or another signal has stopped, as shells have it for Ctrl-C."""


class BpfreeError(Exception):
    """Something the user can mend; the message is one line that says how. Exit code 1."""

    exit_code = 1


class UsageError(BpfreeError):
    """A wrong name, option or combination of options. Exit code 2."""

    exit_code = 2


class DataError(BpfreeError):
    """Missing, corrupt or ill-shaped data."""


class CheckpointError(BpfreeError):
    """A run folder or checkpoint that cannot be read or written."""


class WriteError(CheckpointError):
    """A file that cannot be written: the disk is full, or the place is no good. No other would be written either."""


FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""How systems say that a disk, or what is allowed of it, is full."""


def cannot_write(path: object, error: Exception, *, kept: bool = False) -> WriteError:
    """An error for what cannot be written, with what to do.

    Args:
        path: the file or folder.
        error: the reason; PyTorch reports a full disk as a RuntimeError of its stream writer, with the real reason
            behind it.
        kept: whether a previous version of it is left.
    """
    reason = error if isinstance(error, OSError) else error.__context__
    words, full = str(error).strip().splitlines()[0], True
    if isinstance(reason, OSError):
        words, full = reason.strerror or words, reason.errno in FULL
    remedy = "free some space and try again" if full else "make that possible, or choose another place"
    return WriteError(f"cannot write {path}: {words}{'; the previous version is kept' if kept else ''}; {remedy}")


class TrainingError(BpfreeError):
    """Training cannot go on: non-finite loss, memory exhausted."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """An error for a `name` that is not among `known`, with the nearest ones.

    Args:
        kind: what the name stands for, as the user says it ("algorithm", "data set").
        name: what the user gave.
        known: every valid name.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return UsageError(f"unknown {kind} {name!r}; {hint}")
