"""The process group: who is there, which device is whose, and small messages on the host.

Processes are started by torchrun; everything that travels does so by `torch.distributed`, NCCL between CUDA devices and
gloo between hosts.
"""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

# Its functions have the group of all processes as a default: imported later, they would keep it, and its threads.
import torch.distributed.nn.functional
from torch import Tensor

from bpfree.errors import BpfreeError, UsageError

TIMEOUT_S: Final = 300.0
"""How long a process waits for another one, s, before it takes it for dead."""

SAID: Final = "bpfree/said"
SPOKEN: Final = "bpfree/spoken"
SAY_WITHIN_S: Final = 5.0


class LostRankError(BpfreeError):
    """Another process has died or does not answer."""

    exit_code = 4


def launched() -> bool:
    """Whether torchrun (or anything that sets the same variables) has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_leader() -> bool:
    """Whether this process is the one that prints."""
    return not launched() or int(os.environ["RANK"]) == 0


class Ranks:
    """The processes that train together.

    Args:
        device: "auto", "cpu" or "cuda"; each process takes the CUDA device of its number on its machine.
        timeout_s: how long to wait for another process, s.
        store: where processes find each other, with `rank` and `size`; None for torchrun's variables.

    Raises:
        UsageError: one device was named for all, or a machine has fewer CUDA devices than processes.
        LostRankError: the others did not come in time.
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        timeout_s: float = TIMEOUT_S,
        store: dist.Store | None = None,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        timeout = timedelta(seconds=timeout_s)
        self.timeout_s = timeout_s
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if store is None else rank
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if store is None else size
        self.device = self._device(device)
        try:
            if store is None:
                store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
            store.set_timeout(timeout)
            self.rank, self.size, self._store = rank, size, store
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
            cuda = self.device.type == "cuda"
            self._timeout, self._backend = timeout, "nccl" if cuda else "gloo"
            self._groups: list[dist.ProcessGroup] = []
            world = dist.group.WORLD
            self._control = self._keep(world)
            self._everyone = self._keep(self._new_group()) if cuda else self._control
            self._members = list(range(self.size))
            self._parts = [self._members]
            self.add([0.0])  # connected; one that leaves at once would else be looked for in vain by those that are not
        except (RuntimeError, ValueError) as error:
            raise self.lost(error) from error

    def _device(self, name: str) -> torch.device:
        if name not in {"auto", "cpu", "cuda"}:
            raise UsageError(f"each rank takes a device of its own, so --device is auto, cpu or cuda, not {name}")
        boards = torch.cuda.device_count()
        if name == "cpu" or (name == "auto" and not boards):
            return torch.device("cpu")
        if self.local_size > boards:
            raise UsageError(f"{self.local_size} ranks need {self.local_size} CUDA devices, and there are {boards}")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def _keep(self, group: dist.ProcessGroup | None) -> int:
        """The number of a group of which this process is a member, for `group`."""
        assert group is not None
        self._groups.append(group)
        return len(self._groups) - 1

    def group(self, number: int) -> dist.ProcessGroup:
        """The group of this number; whoever keeps the group itself keeps `leave` from ending its threads."""
        return self._groups[number]

    @property
    def everyone(self) -> dist.ProcessGroup:
        """All of these processes, for tensors on their devices."""
        return self._groups[self._everyone]

    def sum(self, tensor: Tensor) -> Tensor:
        """Put the sum over these processes in place of a tensor on their devices, and return it."""
        dist.all_reduce(tensor, group=self.everyone)
        return tensor

    def part(self, control: dist.ProcessGroup, parts: list[list[int]]) -> Ranks:
        """Some of the processes by themselves, numbered from 0; all processes must call this.

        Args:
            control: the group of this process's part, over gloo.
            parts: all parts, of equal size, by the numbers of their processes.
        """
        some = copy.copy(self)
        some._control, some._parts = self._keep(control), parts
        some._members = next(part for part in parts if self.rank in part)
        some.rank, some.size = some._members.index(self.rank), len(some._members)
        if self.device.type == "cpu":
            some._everyone = some._control
        else:
            everyone = some._group(parts)
            assert everyone is not None
            some._everyone = everyone
        return some

    def _new_group(self, members: list[int] | None = None) -> dist.ProcessGroup:
        """A group of some processes, or of all, for tensors on their devices."""
        options = None
        if self._backend == "nccl":
            # messages before arithmetic: a kernel of NCCL finds no place on a GPU that learning fills
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options._timeout = self._timeout  # PyTorch warns where it is not that of the argument
        return dist.new_group(members, backend=self._backend, timeout=self._timeout, pg_options=options)

    def _group(self, parts: list[list[int]]) -> int | None:
        """A group for tensors in each of some parts, which all processes make; the number of this process's, if any."""
        groups = [self._new_group(part) for part in parts]
        me = self.among_all(self.rank)
        return next((self._keep(group) for group, part in zip(groups, parts, strict=True) if me in part), None)

    def among_all(self, rank: int) -> int:
        """The number among all processes of one of these."""
        return self._members[rank]

    def lost(self, error: Exception) -> LostRankError:
        """What to say when `torch.distributed` fails."""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return LostRankError(
            f"lost contact with another rank ({reason}); a rank died, or did not answer for {self.timeout_s:g} s"
        )

    @staticmethod
    def is_loss(error: RuntimeError) -> bool:
        """Whether this is how `torch.distributed` tells that another rank is gone or silent."""
        words = str(error)
        return isinstance(error, dist.DistError) or any(
            word in words for word in ("gloo", "Connection closed", "Connection reset", "Timed out", "NCCL")
        )

    def link(self, lower: int, *, back: bool = False) -> int | None:
        """The number of a group of rank `lower` and the next one, for what they send each other; None for others.

        All must call this.

        Each has a communicator of its own: messages of different links, and the two directions of one link, must not
        wait for each other.

        Args:
            lower: the lower of the two ranks.
            back: messages go from the higher to the lower one.
        """
        number = self._group([part[lower : lower + 2] for part in self._parts])
        if number is None:
            return None
        group = self._groups[number]
        sender, receiver = (lower + 1, lower) if back else (lower, lower + 1)
        token = torch.zeros(1, device=self.device)  # at its first message in a direction, NCCL waits for both sides
        if self.rank == sender:
            dist.send(token, self.among_all(receiver), group=group)
        else:
            dist.recv(token, self.among_all(sender), group=group)
        return number

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """The wishes of rank 0."""
        flags = torch.tensor(wishes, dtype=torch.int64)
        dist.broadcast(flags, self.among_all(0), group=self._groups[self._control])
        return tuple(bool(flag) for flag in flags)

    def from_leader(self, value: Any) -> Any:
        """Rank 0's value, any object that can be pickled."""
        box = [value]
        dist.broadcast_object_list(box, self.among_all(0), group=self._groups[self._control])
        return box[0]

    def of_all(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._groups[self._control])
        return values

    def add(self, numbers: Iterable[float | None]) -> list[float | None]:
        """Sums over ranks; None where one does not know its number."""
        given = [float("nan") if number is None else float(number) for number in numbers]
        sums = torch.tensor(given, dtype=torch.float64)
        dist.all_reduce(sums, group=self._groups[self._control])
        return [None if value != value else value for value in sums.tolist()]

    def to_leader(self, tensor: Tensor, owner: int) -> None:
        """Copy `tensor` of rank `owner` to that of rank 0, wherever either is."""
        if owner == 0:
            return
        if self.rank == owner:
            dist.send(tensor.detach().cpu().contiguous(), self.among_all(0))
        elif self.rank == 0:
            received = torch.empty(tensor.shape, dtype=tensor.dtype)
            dist.recv(received, self.among_all(owner))
            with torch.no_grad():
                tensor.copy_(received)

    def may_speak(self) -> bool:
        """Whether this rank is the one to report a failure: rank 0, or if that does not, the first of the others.

        They wait until it has reported. What all refuse is refused by rank 0, which has a folder to tidy before.
        """
        try:
            if self.among_all(self.rank) and self._spoken():
                return False
            if self._store.add(SAID, 1) == 1:
                return True
            self._spoken()
        except (RuntimeError, ValueError):  # the store is gone, and with it whoever could have spoken
            return False
        return False

    def _spoken(self) -> bool:
        """Whether a rank has reported the failure within a while."""
        until = time.monotonic() + SAY_WITHIN_S
        while not self._store.check([SPOKEN]):  # to wait for a key that never comes, PyTorch warns of
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def has_spoken(self) -> None:
        """Tell the others that the failure has been reported."""
        try:
            self._store.set(SPOKEN, "1")
        except (RuntimeError, ValueError):
            return

    def leave(self) -> None:
        """Take all groups down, and wait for their threads to end.

        A thread of gloo lets go of a message's tensors some time after the message has arrived, and for that needs the
        interpreter: one that is late, when Python has begun to end, aborts the process. Threads end with the last
        reference to their group, and so `_groups` is the only place that keeps any.
        """
        if dist.is_initialized():
            dist.destroy_process_group()
        self._groups.clear()
        gc.collect()  # a mesh of devices refers to its groups in cycles
