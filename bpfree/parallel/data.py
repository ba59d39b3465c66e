"""A part of every batch on each rank: gradients are averaged before they are used.

Every rank holds the whole learner and takes its share of the rows of each batch. For rules that are chains of local
units, the gradients of a unit travel while the next unit computes; for back-propagation, in buckets while the error
still goes backwards; for others, when their optimiser is about to step. With losses that are means over the batch the
update is that of one process with the whole batch, but for rounding. What a closed form notes of samples is added up,
and a rule that needs more of the whole batch within a step asks for it (`WholeBatch`).

What depends on the batch as a whole does not: batch normalisation and other statistics are those of each rank's rows
(the kept ones are averaged over ranks when they are read), and random numbers are drawn by each rank for its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._optim import parameters_of
from bpfree.algorithms._whole_batch import WholeBatch
from bpfree.algorithms.learner import Batch, Collects, Learner, Metrics, Stage
from bpfree.algorithms.local_units import HasLocalUnits, LocalUnit, LocalUnits
from bpfree.errors import UsageError
from bpfree.networks.streams import Stream
from bpfree.parallel.ranks import Ranks
from bpfree.parallel.team import Team

BUCKET_BYTES: Final = 25 * 2**20


class Averages:
    """Gradients on their way to become means over ranks.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._waiting: list[nn.Parameter] = []
        self._bytes = 0
        self._sent: list[tuple[Any, Tensor, list[nn.Parameter]]] = []
        self._known: set[int] = set()

    def add(self, parameters: Iterable[nn.Parameter]) -> None:
        """These parameters have their gradient; it travels when a bucket is full."""
        for parameter in parameters:
            if parameter.grad is None or id(parameter) in self._known:
                continue
            self._known.add(id(parameter))
            self._waiting.append(parameter)
            self._bytes += parameter.grad.nbytes
            if self._bytes >= BUCKET_BYTES:
                self.send()

    def send(self) -> None:
        """Let what is waiting travel, without waiting for it; gradients of one type in one message."""
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self._waiting:
            assert parameter.grad is not None
            by_type.setdefault(parameter.grad.dtype, []).append(parameter)
        for parameters in by_type.values():
            message = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            work = dist.all_reduce(message, group=self._ranks.everyone, async_op=True)
            self._sent.append((work, message, parameters))
        self._waiting, self._bytes = [], 0

    def settle(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make all of these gradients means; those that are not under way yet travel now."""
        self.add(parameters)
        self.send()
        for work, message, sent in self._sent:
            work.wait()
            message.div_(self._ranks.size)
            pieces = message.split([parameter.numel() for parameter in sent])
            for parameter, piece in zip(sent, pieces, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(piece.view(parameter.grad.shape))
        self._sent.clear()
        self._known.clear()


class DataTeam(Team):
    """Ranks that take a part of each batch.

    Args:
        ranks: the processes.
        learner: the same on every rank, on the rank's device.
        batch_size: of the whole batch.

    Raises:
        UsageError: a rule, task or batch that does not divide.
    """

    def __init__(self, ranks: Ranks, learner: Learner, batch_size: int) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._ranks, self._learner = ranks, learner
        check_divides(learner, batch_size, ranks.size)
        self._averages = Averages(ranks)
        for optimizer in learner.optimizers():
            optimizer.register_step_pre_hook(self._before_step)
        draw_apart(learner, ranks)
        for module in learner.modules():
            if isinstance(module, WholeBatch):
                module.processes, module.average = ranks, self._average_now
        self._chain = chain_of(learner)
        self._used: set[int] = set()  # parameters whose optimiser has taken this step already
        self._settled: set[int] = set()  # parameters whose gradients are means before their optimiser's step
        # The error goes backwards in one piece: let gradients go as they come, unless they are changed behind it.
        if learner.locality == "network" and not getattr(learner, "centralize", False):
            for parameter in learner.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda arrived: self._averages.add([arrived]))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = parameters_of([optimizer])
        self._used.update(map(id, parameters))
        self._averages.settle(parameter for parameter in parameters if id(parameter) not in self._settled)
        self._settled.difference_update(map(id, parameters))

    def _average_now(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make gradients means before an optimiser asks for them, for a learner that clips them first."""
        clipped = list(parameters)
        self._averages.settle(clipped)
        self._settled.update(map(id, clipped))

    def stages(self, learner: Learner) -> tuple[Stage, ...]:
        return tuple(
            replace(
                stage,
                update=partial(self._update, stage),
                scores=partial(self._scores, stage),
                finish=None if stage.finish is None else partial(self._finish, stage.modules, stage.finish),
            )
            for stage in learner.stages()
        )

    def _update(self, stage: Stage, batch: Batch) -> Metrics:
        inputs, targets = batch
        share = rows_of(len(targets), self._ranks)
        part = inputs[share], targets[share]
        self._used.clear()
        return stage.update(part) if self._chain is None else self._chain.update(part, learnt=self._learnt)

    def _learnt(self, unit: LocalUnit) -> None:
        """A unit has its gradients: they travel while the next unit computes, unless it has used them itself."""
        parameters = (parameter for module in unit.modules for parameter in module.parameters())
        self._averages.add(parameter for parameter in parameters if id(parameter) not in self._used)
        self._averages.send()

    def _finish(
        self,
        modules: Iterable[nn.Module],
        finish: Callable[[Iterable[Batch]], Metrics],
        validation: Iterable[Batch],
    ) -> Metrics:
        """The closed form of what all ranks have noted, by each of them; the first one's weights count."""
        self._merge()
        made = finish(validation)
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            dist.broadcast(parameter.data, self._ranks.among_all(0), group=self._ranks.everyone)
        return made

    def _merge(self) -> None:
        for module in self._learner.modules():
            if isinstance(module, Collects):
                module.merge(self._ranks, self._ranks.device)

    def _scores(self, stage: Stage, inputs: Any) -> Tensor:
        """Scores of all inputs, each rank having answered for some of them."""
        average_statistics(self._learner.buffers(), self._ranks)
        rows = len(inputs)
        most = -(-rows // self.size)
        first = min(rows, self.rank * most)
        part = inputs[first : first + most]
        answers = stage.scores(part if len(part) else inputs[:1])[: len(part)]
        padded = answers.new_zeros(most, *answers.shape[1:])
        padded[: len(part)] = answers
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self._ranks.everyone)
        return torch.cat(gathered)[:rows]

    def assembled(self, learner: Learner) -> AbstractContextManager[None]:
        return nullcontext()

    def least(self, number: int) -> int:
        return min(self._ranks.of_all(number))

    def expect(self, steps: int) -> None:
        pass

    def share_metrics(self, rows: Tensor) -> Tensor:
        shared = rows.clone()
        dist.all_reduce(shared, group=self._ranks.everyone)
        return shared.div_(self.size)

    def keep_metrics(self, rows: Tensor) -> Tensor:
        return rows

    def share_rating(self, rating: Tensor) -> Tensor:
        dist.broadcast(rating, self._ranks.among_all(0), group=self._ranks.everyone)
        return rating

    def decide(self, *wishes: bool) -> tuple[bool, ...]:
        return self._ranks.agree(*wishes)

    def add(self, numbers: Iterable[float | None]) -> list[float | None]:
        return self._ranks.add(numbers)

    def owns(self, tensor: Tensor) -> bool:
        return True

    def collect(self, learner: Learner) -> None:
        average_statistics(learner.buffers(), self._ranks)
        self._merge()
        self.settle(learner)

    def collect_copies(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
        return list(copies)

    def settle(self, learner: Learner) -> None:
        for module in learner.modules():
            if isinstance(module, Collects) and not self.leader:
                module.clear()  # it is the leader's, and would be added up again

    def describe(self) -> dict[str, Any]:
        return {"form": "data", "ranks": self.size}


def chain_of(learner: Learner) -> LocalUnits | None:
    """The units of a rule that is a chain of them with the options that it has; None for others."""
    if not isinstance(learner, HasLocalUnits):
        return None
    try:
        return learner.local_units()
    except UsageError:  # its blocks wait for each other, which a part of a batch does not mind
        return None


def rows_of(rows: int, ranks: Ranks) -> slice:
    """Which of the rows of a batch are this rank's."""
    return slice(*(rows * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1)))


def draw_apart(learner: Learner, ranks: Ranks) -> None:
    """Let each rank draw random numbers of its own for its own rows."""
    for module in learner.modules():
        if isinstance(module, Stream):
            module.share = (ranks.rank, ranks.size)


@torch.no_grad()
def average_statistics(buffers: Iterable[Tensor], ranks: Ranks) -> None:
    """Make kept statistics means over ranks."""
    kept = [buffer for buffer in buffers if buffer.is_floating_point()]
    if not kept:
        return
    own = torch.cat([buffer.flatten().double() for buffer in kept])
    first = own.clone()
    dist.broadcast(first, ranks.among_all(0), group=ranks.everyone)
    apart = own.sub_(first)  # so that what is the same everywhere stays what it is, to the bit
    dist.all_reduce(apart, group=ranks.everyone)
    pieces = first.add_(apart.div_(ranks.size)).split([buffer.numel() for buffer in kept])
    for buffer, piece in zip(kept, pieces, strict=True):
        buffer.copy_(piece.view(buffer.shape))


def check_divides(learner: Learner, batch_size: int, ranks: int) -> None:
    """Refuse what has no mean over parts of a batch.

    Raises:
        UsageError: what, and why.
    """
    rule = type(learner).__name__
    if batch_size % ranks:
        nearest = max(1, batch_size // ranks) * ranks
        raise UsageError(f"batches of {batch_size} do not divide by {ranks} ranks; use --batch-size {nearest}")
    if getattr(learner, "clip", 0) and not any(isinstance(module, WholeBatch) for module in learner.modules()):
        raise UsageError(
            f"{rule} cannot be spread with --parallel data: it clips gradients before those of other ranks are added; "
            "set clip=0"
        )
    if getattr(learner, "dropout", 0):
        raise UsageError(
            f"{rule} cannot be spread with --parallel data: its dropout draws from PyTorch's own generator, on every "
            "rank the same numbers; set dropout=0 and use a network that has dropout layers"
        )
