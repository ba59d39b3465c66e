"""Four processes that wait for jobs, made once for all tests and forked: importing PyTorch is what takes long."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from bpfree.parallel import Ranks

PROCESSES: Final = 4
TIMEOUT_S: Final = 60.0


def _serve(jobs: Connection) -> None:
    torch.set_num_threads(1)
    while (job := jobs.recv()) is not None:
        function, store, rank, size, arguments = job
        ranks = None
        try:
            ranks = Ranks("cpu", timeout_s=TIMEOUT_S, store=dist.FileStore(store, size), rank=rank, size=size)
            jobs.send((True, function(ranks, **arguments)))
        except BaseException as error:  # whatever it is, the test that asked must see it
            jobs.send((False, (type(error), str(error), traceback.format_exc())))
        finally:
            if ranks is not None:
                ranks.leave()


class Pool:
    """The processes; `run` gives the first `size` of them one job together."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "tests.parallel.jobs"])  # the first optimiser imports the one
        self._folder, self._jobs = folder, 0
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """What `function(ranks, **arguments)` returns on each rank; raises the error of the first rank that has one."""
        self._jobs += 1
        store = str(self._folder / f"store{self._jobs}")
        for rank, pipe in enumerate(self._pipes[:size]):
            pipe.send((function, store, rank, size, arguments))
        answers = [pipe.recv() for pipe in self._pipes[:size]]
        for done, answer in answers:
            if not done:
                kind, message, trace = answer
                print(trace)
                raise kind(message)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
