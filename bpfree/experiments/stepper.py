"""Consecutive training steps over a staging buffer: one by one, or replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from bpfree.algorithms._captures import captured
from bpfree.algorithms._lanes import side_stream
from bpfree.algorithms._optim import materialize_state
from bpfree.algorithms.learner import Learner, Stage
from bpfree.data.batches import Draw
from bpfree.data.graph_batches import AnyBatches
from bpfree.errors import unknown_name
from bpfree.networks.flops import FlopCounter
from bpfree.parallel.team import Alone, Team

PRECISIONS: Final = ("fp32", "tf32", "bf16")
STAGING_BYTES: Final = 64 * 2**20
MAX_STAGED_STEPS: Final = 64
WARMUP_STEPS: Final = 3
REHEARSED_STEPS: Final = 6  # of stages that capture their own graphs: eager ones, then one of each graph


@contextmanager
def numerics(precision: str) -> Iterator[None]:
    """Set how matrix products and convolutions compute, and put it back on leaving.

    "fp32" computes float32 products exactly, "tf32" and "bf16" allow TF32; "bf16" adds `step_precision` around each
    step. Convolutions are deterministic, so that a resumed run ends in the same bits. CPUs flush denormal numbers to
    zero: weight decay and Adam's moments run into them, and then a step takes several times as long.

    Raises:
        UsageError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    cudnn.allow_tf32, cudnn.deterministic = precision != "fp32", True
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.deterministic = before[1:]
        torch.set_flush_denormal(False)


def step_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context for one step or evaluation: bfloat16 autocast, or nothing.

    It must be entered anew for each step, because autocast keeps the cast weights until it is left.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


class Stepper:
    """Runs a stage's steps over batches staged on the device.

    On CUDA, for learners that say they are capture-safe, a whole staging buffer's worth of steps is one graph:
    no launch overhead, no host in between. Numbers that the steps report stay on the device until asked for.

    Args:
        learner: the learner that the stage belongs to.
        stage: what is trained.
        train: training batches, of stage inputs if they could be computed beforehand, otherwise of network inputs.
        live_prefix: the stage's frozen prefix when it has to run in every step (augmented inputs), or None.
        batch_size: samples per step; a graph is a batch of its own.
        precision: "fp32", "tf32" or "bf16".
        scheduled: whether the learning rate changes during training.
        graph: whether to use CUDA graphs where possible.
        team: the processes that train together. Where a step talks to others it is no single graph.
    """

    def __init__(
        self,
        learner: Learner,
        stage: Stage,
        train: AnyBatches,
        *,
        live_prefix: Callable[[Any], Any] | None,
        batch_size: int,
        precision: str,
        scheduled: bool,
        graph: bool,
        team: Team | None = None,
    ) -> None:
        self._team = team or Alone()
        self._learner, self._stage, self._train, self._live_prefix = learner, stage, train, live_prefix
        self._precision, self._scheduled = precision, scheduled
        device = train.device
        self.steps_per_epoch = train.steps_per_epoch(batch_size)
        most = max(1, min(MAX_STAGED_STEPS, STAGING_BYTES // max(1, train.bytes_per_step(batch_size))))
        most = self._team.least(most)  # processes agree between chunks, and their stage inputs may differ in size
        chunks = -(-self.steps_per_epoch // most)
        self.capacity = -(-self.steps_per_epoch // chunks)  # chunks of one length, the last one shorter
        self._staged = train.stage(self.capacity, batch_size)
        possible = graph and device.type == "cuda" and learner.capture_safe and train.fixed_shapes
        self.use_graph = possible and self._team.size == 1 and not self._team.captures
        on_device = self.use_graph or self._team.captures  # what a graph must find there
        self._groups = [group for optimizer in stage.optimizers for group in optimizer.param_groups]
        for group in self._groups:
            # kept in the optimiser's state, as torch's own schedulers do it; a graph reads the rate from the device
            rate = group.setdefault("initial_lr", float(group["lr"]))
            group["lr"] = torch.tensor(rate, device=device) if on_device else rate
            if "capturable" in group:
                group["capturable"] = on_device
        self._rates = torch.ones(self.capacity, device=device)
        self._factors = [1.0] * self.capacity
        self._metrics = torch.empty(0, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.metric_names: tuple[str, ...] = ()
        self.flops_per_step = 0

    def stage_batches(self, draw: Draw, first_step: int, count: int, factors: list[float]) -> None:
        """Fill the buffer with `count` batches of an epoch, and set their learning-rate factors."""
        self._staged.fill(draw, first_step, count)
        if self._scheduled:
            self._factors[:count] = factors
            self._rates[:count].copy_(torch.tensor(factors), non_blocking=True)

    def _step(self, position: int) -> dict[str, Tensor]:
        if self._scheduled:
            for group in self._groups:
                if isinstance(group["lr"], Tensor):
                    torch.mul(self._rates[position], group["initial_lr"], out=group["lr"])
                else:
                    group["lr"] = self._factors[position] * group["initial_lr"]
        inputs, targets = self._staged[position]
        with step_precision(self._precision, targets.device):
            if self._live_prefix is not None:
                inputs = self._live_prefix(inputs)
            return self._stage.step((inputs, targets))

    def _record(self, position: int) -> None:
        torch.stack(list(self._step(position).values()), out=self._metrics[position])

    def run(self, count: int, interrupted: Callable[[], bool]) -> Tensor:
        """Do the first `count` staged steps.

        Args:
            count: steps to do.
            interrupted: asked after every eager step whether to stop early. A graph always runs to its end, so
                that a resumed run replays the same graphs.

        Returns:
            (steps done, metrics) tensor on the device, a row per step; valid until the next call.
        """
        if self.use_graph:
            self._graphs[count].replay()
            return self._metrics[:count]
        self._team.expect(count)
        for position in range(count):
            self._record(position)
            if interrupted():
                return self._metrics[: position + 1]
        return self._metrics[:count]

    def rehearse(self, draw: Draw) -> None:
        """Run a few steps on a state that is thrown away: counts FLOPs, warms up, captures the graphs.

        Everything that training must not pay for happens here; parameters, buffers, optimiser state and
        random generators are as before when it returns.
        """
        device = self._train.device
        for optimizer in self._stage.optimizers:
            materialize_state(optimizer)
        state = [*self._learner.parameters(), *self._learner.buffers()]
        state += [
            t for o in self._stage.optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)
        ]
        saved = [tensor.detach().cpu().clone() for tensor in state]
        generators = torch.get_rng_state(), torch.cuda.get_rng_state_all() if device.type == "cuda" else []
        self.stage_batches(draw, 0, min(self.capacity, self.steps_per_epoch), self._factors)
        with FlopCounter() as counter:
            metrics = self._step(0)
        self.flops_per_step = counter.get_total_flops()
        if self._team.size > 1:  # a rank has counted what it does
            (flops,) = self._team.add([self.flops_per_step])
            self.flops_per_step = int(flops or 0)
        self.metric_names = tuple(metrics)
        self._metrics = torch.zeros(self.capacity, len(metrics), device=device)
        if self.use_graph:
            self._warm_up()
            trained = (parameter for group in self._groups for parameter in group["params"])
            self._graphs = captured(self._captured, trained) or {}
            self.use_graph = bool(self._graphs)
        for _ in range(REHEARSED_STEPS if self._team.captures else 0):
            self._record(0)
        with torch.no_grad():
            for tensor, before in zip(state, saved, strict=True):
                tensor.copy_(before)
        torch.set_rng_state(generators[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state_all(generators[1])

    def _warm_up(self) -> None:
        """What a capture must not be the first to do."""
        side = side_stream(self._train.device, 0)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_STEPS):
                self._record(0)
        torch.cuda.current_stream().wait_stream(side)
        for optimizer in self._stage.optimizers:  # gradients live in the graphs' own memory from here on
            optimizer.zero_grad(set_to_none=True)

    def _captured(self) -> dict[int, torch.cuda.CUDAGraph]:
        """Graphs by the number of steps that they hold."""
        pool = torch.cuda.graph_pool_handle()
        last = self.steps_per_epoch % self.capacity
        graphs = {}
        for count in sorted({self.capacity, last} - {0}):
            graphs[count] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[count], pool=pool):
                for position in range(count):
                    self._record(position)
        return graphs

    def close(self) -> None:
        """Free graphs, gradients and optimiser state of a stage that is done."""
        self._graphs.clear()
        for optimizer in self._stage.optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
