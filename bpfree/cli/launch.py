"""Runs on several processes: torchrun starts them, this tells it how and says how it ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from bpfree.cli.base import told
from bpfree.errors import EXIT_STOPPED, BpfreeError, UsageError
from bpfree.parallel import LostRankError, Ranks

STARTED_BY_US = "BPFREE_STARTED_RANKS"
OWN_ERRORS = (1, 2, 3, EXIT_STOPPED)


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
        sys.exit(_verdict({rank: failure.exitcode for rank, failure in error.failures.items()}))
    except SignalException:  # the ranks have heard it too, have had time to save, and one of them has said so
        sys.exit(EXIT_STOPPED)
    sys.exit(0)


def _verdict(codes: dict[int, int]) -> int:
    """Say what no rank could say of itself; the exit code."""
    for rank, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM:  # which is how torchrun ends those that are left
            name = signal.Signals(-code).name
            click.echo(
                f"bpfree: error: rank {rank} was ended by {name}; all ranks have been stopped, and the last checkpoint "
                "is intact: go on with bpfree run --resume FOLDER",
                err=True,
            )
            return 1
    own = [code for code in codes.values() if code in OWN_ERRORS]
    if own:  # the rank has said why
        return own[0]
    click.echo(
        "bpfree: error: a rank died, or did not answer in time; all ranks have been stopped, and the last checkpoint "
        "is intact: go on with bpfree run --resume FOLDER",
        err=True,
    )
    return 1


@contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """Turn an error into the exit code of this rank, having said what it is on one rank alone."""
    try:
        yield
    except Exception as error:
        said = ranks.lost(error) if isinstance(error, RuntimeError) and ranks.is_loss(error) else told(error)
        if said is None:
            raise
        _say(said, ranks)
        sys.exit(said.exit_code)
    finally:
        sys.stdout.flush()


def _say(error: BpfreeError, ranks: Ranks) -> None:
    if isinstance(error, LostRankError) and os.environ.get(STARTED_BY_US):
        return  # whoever started the ranks sees which of them died
    if ranks.may_speak():
        click.echo(f"bpfree: error: {error}", err=True)
        ranks.has_spoken()
