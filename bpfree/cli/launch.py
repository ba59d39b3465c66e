"""Runs on several processes: torchrun starts them, this tells it how and says how it ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NoReturn

import click
from torch.distributed import is_torchelastic_launched as torchrun_started

from bpfree.cli.base import told
from bpfree.errors import EXIT_STOPPED, BpfreeError, UsageError
from bpfree.experiments.signals import stop_without
from bpfree.parallel import LostRankError, Ranks

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

STARTED_BY_US = "BPFREE_STARTED_RANKS"
OWN_ERRORS = (1, 2, 3, EXIT_STOPPED)
LEFT_ALONE_S: Final = 15
"""A rank that is killed so long after the first one failed, s, was killed by torchrun, which gives it 30 s to end."""


def start_ranks(nproc: int, nnodes: str, rdzv_endpoint: str | None) -> NoReturn:
    """Run this very command again on `nproc` processes, under torchrun, and end with their exit code.

    Args:
        nproc: processes on this machine.
        nnodes: machines, as torchrun takes it.
        rdzv_endpoint: where machines find each other, host:port; None on a single machine.

    Raises:
        UsageError: several machines without a place to meet.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if nnodes != "1" and rdzv_endpoint is None:
        raise UsageError("several machines meet at one of them: add --rdzv-endpoint HOST:PORT")
    # alone, a machine meets itself at any free port, which is what torchrun calls standalone
    endpoint, number = ("localhost:0", str(uuid.uuid4())) if rdzv_endpoint is None else (rdzv_endpoint, "bpfree")
    how = ["--nnodes", nnodes, "--nproc-per-node", str(nproc), "--rdzv-backend", "c10d"]
    how += ["--rdzv-endpoint", endpoint, "--rdzv-id", number]
    # torchrun would set one thread, and say so at length
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ[STARTED_BY_US] = "1"
    logging.disable()  # this process only waits from here on, and says itself how it ended
    config, program, arguments = torchrun.config_from_args(torchrun.parse_args([*how, "--module", "bpfree"]))
    try:  # our own arguments go past torchrun's parser, which would take some for its own
        elastic_launch(config, program)(*arguments, *sys.argv[1:])
    except ChildFailedError as error:
        sys.exit(_verdict(error.failures))
    except SignalException:  # the ranks have heard it too, have had time to save, and one of them has said so
        sys.exit(EXIT_STOPPED)
    sys.exit(0)


def stop_with_launcher() -> int | None:
    """Ask this rank to save and stop when torchrun is gone: killed, it cannot end the ranks that it has started.

    Returns:
        The process id of torchrun; None where something else has started the ranks.
    """
    if not torchrun_started():
        return None
    launcher = os.getppid()
    stop_without(launcher)
    return launcher


def _verdict(failures: Mapping[int, ProcessFailure]) -> int:
    """Say what no rank could say of itself; the exit code.

    Args:
        failures: of the ranks of this machine, by rank: those that failed, and those that were ended for it.
    """
    first = min(failure.timestamp for failure in failures.values())
    how = "all ranks have been stopped, and the last checkpoint is intact: go on with bpfree run --resume FOLDER"
    for rank, failure in sorted(failures.items()):
        code = failure.exitcode
        if code >= 0 or code == -signal.SIGTERM:  # which is how torchrun ends those that are left
            continue
        if code == -signal.SIGKILL and failure.timestamp - first >= LEFT_ALONE_S:
            said = f"rank {rank} did not answer, and was killed when it did not end by itself"
        else:
            said = f"rank {rank} was ended by {signal.Signals(-code).name}"
        click.echo(f"bpfree: error: {said}; {how}", err=True)
        return 1
    own = [failure.exitcode for failure in failures.values() if failure.exitcode in OWN_ERRORS]
    if own:  # the rank has said why
        return own[0]
    click.echo(f"bpfree: error: a rank died, or did not answer in time; {how}", err=True)
    return 1


@contextmanager
def one_voice(ranks: Ranks, launcher: int | None) -> Iterator[None]:
    """Turn an error into the exit code of this rank, having said what it is on one rank alone.

    Args:
        ranks: the processes.
        launcher: see `stop_with_launcher`.
    """
    try:
        yield
    except Exception as error:
        said = ranks.lost(error) if isinstance(error, RuntimeError) and ranks.is_loss(error) else told(error)
        if said is None:
            raise
        _say(said, ranks, launcher)
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads may wait for ranks that are gone, and must not be waited for; nor may they outlive the interpreter.
        os._exit(said.exit_code)
    finally:
        sys.stdout.flush()


def _say(error: BpfreeError, ranks: Ranks, launcher: int | None) -> None:
    if launcher is not None and os.getppid() != launcher:  # whoever kept what ranks agree by is gone
        if ranks.rank == 0:
            click.echo(f"bpfree: error: {error}", err=True)
        return
    if isinstance(error, LostRankError) and os.environ.get(STARTED_BY_US):
        return  # whoever started the ranks sees which of them died
    if ranks.may_speak():
        click.echo(f"bpfree: error: {error}", err=True)
        ranks.has_spoken()
