"""How a run is spread: the forms by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bpfree.algorithms.learner import Batch, Learner
from bpfree.errors import UsageError, unknown_name
from bpfree.parallel.data import DataTeam, check_divides
from bpfree.parallel.layer import LayerTeam, checked_cut, cut_rule
from bpfree.parallel.mesh import MeshTeam
from bpfree.parallel.ranks import Ranks
from bpfree.parallel.team import Team

FORMS: Final = ("layer", "block", "data", "layer,data")


@dataclass(frozen=True)
class Spread:
    """What each process does.

    Attributes:
        form: "layer" (consecutive blocks that hand activations on), "block" (blocks that need nothing from each other)
            or "data" (a part of each batch), or "layer,data" (both).
        cut: the last block of each rank, from 0; () balances by measured time.
        mesh: for "layer,data", how many runs of blocks and how many parts of a batch; () otherwise.

    Raises:
        UsageError: an unknown form, a cut of batches, or a mesh where there is none or the other way round.
    """

    form: str
    cut: tuple[int, ...] = ()
    mesh: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown_name("form of --parallel", self.form, FORMS)
        if self.cut and self.form == "data":
            raise UsageError("--cut says which blocks a rank has, and with --parallel data each has all of them")
        if any(size < 1 for size in self.mesh):
            raise UsageError(f"a mesh has sizes from 1 on, got {'x'.join(map(str, self.mesh))}")
        if (self.form == "layer,data") != (len(self.mesh) == 2):
            raise UsageError("--parallel layer,data and --mesh LxD go together: L runs of blocks, D parts of a batch")

    @property
    def whole(self) -> bool:
        """Whether every rank holds the whole learner on its device."""
        return self.form == "data"


def check_spread(spread: Spread, learner: Learner, ranks: int, batch_size: int, *, graph: bool) -> None:
    """Refuse what cannot be spread this way, before anything is made.

    Args:
        spread: the form.
        learner: anywhere.
        ranks: number of processes.
        batch_size: of a whole batch.
        graph: whether inputs are graphs.

    Raises:
        UsageError: the reason.
    """
    if graph:
        raise UsageError("a graph is served whole to every block, so there is nothing to spread; leave out --nproc")
    if spread.whole:
        check_divides(learner, batch_size, ranks)
        return
    deep = ranks
    if spread.mesh:
        deep, wide = spread.mesh
        if deep * wide != ranks:
            raise UsageError(f"a mesh of {deep}x{wide} has {deep * wide} ranks, and there are {ranks}")
        check_divides(learner, batch_size, wide)
    chain = cut_rule(learner, spread.form, deep)
    if spread.cut:
        checked_cut(spread.cut, len(chain.units), deep)


def spread_over(
    ranks: Ranks, spread: Spread, learner: Learner, sample: Batch, *, batch_size: int, graphs: bool
) -> Team:
    """The team that trains `learner`; all processes must call this together.

    Args:
        ranks: the processes.
        spread: the form.
        learner: the same on all; on the rank's device for "data", otherwise on the CPU.
        sample: a batch on the device.
        batch_size: of a whole batch.
        graphs: whether steps may be CUDA graphs.

    Raises:
        UsageError: the learner cannot be spread this way; the message says why.
    """
    if spread.whole:
        return DataTeam(ranks, learner, batch_size)
    if spread.mesh:
        deep, wide = spread.mesh
        return MeshTeam(ranks, learner, sample, (deep, wide), spread.cut or None)
    return LayerTeam(ranks, learner, sample, cut=spread.cut or None, graphs=graphs, independent=spread.form == "block")
