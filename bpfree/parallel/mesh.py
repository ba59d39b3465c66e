"""Consecutive blocks on the ranks of a column, a part of every batch on each column: a mesh of both.

Rank l D + d of an L x D mesh holds the l-th run of blocks and learns from the d-th part of each batch. A column is a
chain of ranks as in `layer`; the ranks of a row hold the same blocks and average their gradients as in `data`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from bpfree.algorithms.learner import Batch, Learner, Metrics, Stage
from bpfree.networks.partition import balanced_ends
from bpfree.parallel.data import Averages, average_statistics, draw_apart, rows_of
from bpfree.parallel.layer import LayerTeam, unit_seconds
from bpfree.parallel.ranks import Ranks
from bpfree.parallel.team import Team


class MeshTeam(Team):
    """Ranks of a mesh.

    Args:
        ranks: the processes, L D of them.
        learner: complete, on the CPU, and the same on every rank.
        sample: a batch to measure units with, on the rank's device.
        mesh: L and D.
        cut: the last unit of each rank of a column; None balances by measured time.

    Raises:
        UsageError: as for `LayerTeam`.
    """

    whole = False

    def __init__(
        self, ranks: Ranks, learner: Learner, sample: Batch, mesh: tuple[int, int], cut: Sequence[int] | None
    ) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._ranks, self._learner, self._shape = ranks, learner, mesh
        if cut is None:  # once for all columns
            costs = unit_seconds(learner, sample, ranks.device, graphs=False) if ranks.rank == 0 else None
            cut = balanced_ends(ranks.from_leader(costs), mesh[0])
        devices = init_device_mesh("cpu", mesh, mesh_dim_names=("layer", "data"))  # small messages go by gloo
        rows: list[list[int]] = devices.mesh.tolist()
        columns = [list(column) for column in zip(*rows, strict=True)]
        self._row = ranks.part(devices.get_group("data"), rows)
        self._column = LayerTeam(
            ranks.part(devices.get_group("layer"), columns), learner, sample, cut=cut, graphs=False
        )
        self._averages = Averages(self._row)
        for optimizer in learner.optimizers():
            optimizer.register_step_pre_hook(self._before_step)
        draw_apart(learner, self._row)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._averages.settle(parameter for group in optimizer.param_groups for parameter in group["params"])

    def stages(self, learner: Learner) -> tuple[Stage, ...]:
        return tuple(
            replace(stage, update=partial(self._update, stage), scores=partial(self._scores, stage))
            for stage in self._column.stages(learner)
        )

    def _update(self, stage: Stage, batch: Batch) -> Metrics:
        inputs, targets = batch
        share = rows_of(len(targets), self._row)
        return stage.update((inputs[share], targets[share]))

    def _scores(self, stage: Stage, inputs: Any) -> Tensor:
        """Every column answers for all inputs."""
        self._average()
        return stage.scores(inputs)

    def _average(self) -> None:
        average_statistics([buffer for buffer in self._learner.buffers() if self._column.owns(buffer)], self._row)

    def assembled(self, learner: Learner) -> AbstractContextManager[None]:
        return self._column.assembled(learner)

    def least(self, number: int) -> int:
        return min(self._ranks.of_all(number))

    def expect(self, steps: int) -> None:
        self._column.expect(steps)

    def share_metrics(self, rows: Tensor) -> Tensor:
        self._column.drain()
        shared = rows.clone()
        dist.all_reduce(shared, group=self._ranks.everyone)
        return shared.div_(self._shape[1])

    def keep_metrics(self, rows: Tensor) -> Tensor:
        return self._column.keep_metrics(rows)

    def share_rating(self, rating: Tensor) -> Tensor:
        rating = self._column.share_rating(rating)
        dist.broadcast(rating, 0, group=self._ranks.everyone)
        return rating

    def decide(self, *wishes: bool) -> tuple[bool, ...]:
        return self._ranks.agree(*wishes)

    def add(self, numbers: Iterable[float | None]) -> list[float | None]:
        return self._ranks.add(numbers)

    def owns(self, tensor: Tensor) -> bool:
        return self._column.owns(tensor)

    def collect(self, learner: Learner) -> None:
        self._average()
        self._column.collect(learner)

    def collect_copies(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
        return self._column.collect_copies(tensors, copies)

    def settle(self, learner: Learner) -> None:
        self._column.settle(learner)

    def describe(self) -> dict[str, Any]:
        return {**self._column.describe(), "form": "layer,data", "ranks": self.size, "mesh": list(self._shape)}
