"""The isolation audit: what it must find in learners whose every dependence is known, because it was built in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms import Audit, CaFo, Channel, CounterCurrent, ForwardForward, Learner, LocalLearning, audit
from bpfree.algorithms.learner import Batch, Metrics, Paper, Stage, Support
from bpfree.errors import TrainingError, UsageError
from bpfree.networks.blocks import Shape, block_output_shapes

WIDTH, CLASSES, DEPTH = 6, 3, 3
ONWARDS = ((1, None, None), (1, 1, None), (1, 1, 1))
"""What a local rule's blocks depend on: themselves and what makes their inputs."""


class Toy(Learner):
    """Linear blocks that learn from heads of their own, and one way in which they may hear of later blocks.

    Args:
        way: "not"; "gradient", through outputs; "weights" of the last block, which scale all losses; "late", those of
            the step before; "unsaved", a count of steps where no checkpoint looks; "deaf", not even their own weights
            in the gradient of block 0.
        locality: what is declared.
        channels: likewise.
        inner: blocks of two layers.
        frozen: nothing learns.
        blocks: others than linear ones of equal width.
    """

    paper = Paper("A toy", "nobody", 2026, None, "nothing")
    locality = "block"
    heard: Tensor

    def __init__(
        self,
        way: str = "not",
        *,
        locality: Any = "block",
        channels: tuple[Channel, ...] = (),
        inner: bool = False,
        frozen: bool = False,
        lr: float = 0.1,
        blocks: nn.Sequential | None = None,
        classes: int = CLASSES,
        input_shape: Shape | None = None,
    ) -> None:
        super().__init__(linear_blocks(inner) if blocks is None else blocks, classes, input_shape)
        self.way, self.locality, self.channels = way, locality, channels
        shapes = block_output_shapes(self.network, self.input_shape)
        self.heads = nn.ModuleList(nn.Linear(shape[0], classes) for shape in shapes)
        self.network.requires_grad_(not frozen)
        self.register_buffer("heard", torch.zeros(()))
        self.unsaved = torch.zeros(())
        self._optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=lr)

    def _update(self, batch: Batch) -> Metrics:
        signal, targets = batch
        said = torch.stack([p.detach().abs().mean() for p in self.network[-1].parameters()]).sum()
        louder = {"weights": said, "late": self.heard, "unsaved": self.unsaved}.get(self.way, torch.zeros(()))
        total = torch.zeros(())
        for index, (block, head) in enumerate(zip(self.network, self.heads, strict=True)):
            outputs = block(signal)
            total = total + F.cross_entropy(head(outputs), targets) * (1 + louder)
            if self.way == "deaf" and index == 0:
                total = outputs.sum()
            signal = outputs if self.way == "gradient" else outputs.detach()
        self._optimizer.zero_grad()
        total.backward()
        self._optimizer.step()
        if self.way == "late":
            self.heard.copy_(said)
        self.unsaved = self.unsaved + 1
        return {"loss": total.detach()}

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.network:
            inputs = block(inputs)
        return self.heads[-1](inputs)  # type: ignore[no-any-return]

    def stages(self) -> tuple[Stage, ...]:
        return (self.joint_stage("all", (self._optimizer,), self._update),)

    def diagnostics(self, batch: Batch) -> Metrics:
        return {}

    @property
    def variant(self) -> str:
        return self.way

    @classmethod
    def supports(cls, network: Any) -> Support:
        return Support(True)

    @staticmethod
    def search_space(trial: Any) -> dict[str, Any]:
        return {}


def linear_blocks(inner: bool) -> list[nn.Module]:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, WIDTH) for _ in range(2 * DEPTH))
    return [nn.Sequential(next(layers), nn.Tanh(), next(layers)) if inner else next(layers) for _ in range(DEPTH)]


def batches(count: int = 6, width: int = WIDTH, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, width, generator=generator), torch.arange(size) % CLASSES) for _ in range(count)
    ]  # fmt: skip


def audited(learner: Learner, **options: Any) -> Audit:
    return audit(learner, batches(), **options)


# 1. what there is, is found, and nothing else


def test_blocks_on_their_own_depend_on_what_comes_before() -> None:
    found = audited(Toy())
    assert found.first_changes == ONWARDS
    assert found.parts == {f"heads {index}": changes for index, changes in enumerate(ONWARDS)}
    assert (found.reach, found.late_reach, found.measured, found.entered) == (0, 0, "layer", ())
    assert found.agrees


def test_batches_may_come_one_by_one() -> None:
    assert audit(Toy(), (pair for pair in batches())).first_changes == ONWARDS


def test_gradients_that_cross_blocks_are_found_in_both_ways() -> None:
    found = audited(Toy("gradient"))
    assert found.first_changes == ((1, 1, 1),) * DEPTH
    assert (found.reach, found.measured, found.entered) == (2, "network", (1, 2))
    assert [(one.block, one.on, one.step) for one in found.unexplained] == [(0, 1, 1), (0, 2, 1), (1, 2, 1)]
    first, second = found.faults
    assert first.startswith("the update of block 0 depends on block 1 in step 1")
    assert first.endswith("(and 2 more)")
    assert second == "autograd leads out of blocks 1, 2 into another block"
    assert audited(Toy("gradient", locality="network")).agrees


def test_what_is_read_without_a_gradient_is_found_too() -> None:
    found = audited(Toy("weights"))
    # block 1 makes the last block's inputs, and so has a say in the weights that it has a step later
    assert found.first_changes == ((1, 2, 1), (1, 1, 1), (1, 1, 1))
    assert found.entered == ()
    assert not found.agrees


def test_what_arrives_a_step_late_is_found_in_the_second_step() -> None:
    found = audited(Toy("late"))
    assert found.first_changes == ((1, None, 2), (1, 1, 2), (1, 1, 1))
    assert (found.reach, found.late_reach, found.measured) == (0, 2, "layer")
    assert not found.agrees
    assert audited(Toy("late"), steps=1).late_reach == 0  # it cannot be seen there


def test_declared_localities_that_are_not_found_are_faults() -> None:
    assert audited(Toy(locality="network")).faults == (
        "locality network is declared, and no update depends on a later block",
    )
    assert audited(Toy(locality="layer")).agrees
    found = audited(Toy(locality="layer", inner=True))
    assert found.measured == "block"
    assert found.faults == ("inside a block the update of a layer depends on a later layer",)
    assert audited(Toy(inner=True)).agrees


def test_blocks_that_do_not_learn_are_said_not_to() -> None:
    found = audited(Toy(frozen=True))
    assert (found.trained, found.measured) == ((False,) * DEPTH, "nothing learns")
    assert set(found.parts) == {"heads 0", "heads 1", "heads 2"}
    assert found.agrees


# 2. channels


@pytest.mark.parametrize(
    ("channel", "allowed"),
    [
        (Channel("at once", ""), {(1, 1): True, (1, 5): True}),
        (Channel("late", "", 1), {(1, 1): False, (2, 1): True, (2, 5): True}),
        (Channel("later", "", 2), {(2, 1): False, (3, 1): True}),
        (Channel("next block at once", "", 0, 1), {(1, 1): True, (1, 2): False, (2, 2): True}),
        # as in test_local_learning.py: a copy of the next block's weights goes one block up per step at the most
        (
            Channel("next block late", "", 1, 1),
            {(1, 1): False, (2, 1): True, (2, 2): False, (3, 2): True, (3, 3): False},
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Channel) else "",
)
def test_a_channel_explains_what_it_can_have_carried(channel: Channel, allowed: dict[tuple[int, int], bool]) -> None:
    assert {(step, blocks): channel.explains(blocks, step) for step, blocks in allowed} == allowed


@pytest.mark.parametrize(
    ("way", "channel", "agrees"),
    [
        ("weights", Channel("weights", ""), True),
        ("weights", Channel("late", "", 1), False),
        ("weights", Channel("from the next block only", "", 0, 1), False),
        ("late", Channel("late", "", 1), True),
        ("late", Channel("later", "", 2), False),
        ("late", Channel("from the next block only", "", 1, 1), False),
        ("gradient", Channel("gradient", ""), False),  # autograd is no channel
    ],
)
def test_channels_are_allowed_what_they_declare_and_no_more(way: str, channel: Channel, agrees: bool) -> None:
    assert audited(Toy(way, channels=(channel,))).agrees == agrees


def linear_relu(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(DEPTH) for part in (nn.Linear(width, width), nn.ReLU())))


def counter_current(**options: Any) -> CounterCurrent:
    return CounterCurrent(linear_relu(), CLASSES, lr=0.1, **options)  # at a rate of 1 all ReLU of a level may die


Making = Callable[[], Learner]


@pytest.mark.parametrize(
    ("make", "channels", "reach"),
    [
        (lambda: counter_current(), {"feedback stream"}, (0, 2)),
        (lambda: counter_current(feedback_lr=0), set(), (0, 0)),
        (lambda: counter_current(feedback_lr=0, clip=1e-3, clip_scope="network"), {"clipping"}, (2, 2)),
        (lambda: counter_current(feedback_lr=0, clip=0.0, flood=0.666), {"flood"}, (2, 2)),
        (lambda: LocalLearning(linear_relu(), CLASSES, ema=True, bias="twin"), {"momentum copy"}, (0, 1)),
        (lambda: LocalLearning(linear_relu(), CLASSES, ema=True, momentum=1.0), {"momentum copy"}, (0, 0)),
        (lambda: LocalLearning(linear_relu(), CLASSES, bias="twin"), set(), (0, 0)),
        (lambda: ForwardForward(linear_relu(), CLASSES, head_lr=1.0), {"hard negatives"}, (2, 2)),
        (lambda: ForwardForward(linear_relu(), CLASSES, negatives="random"), set(), (0, 0)),
        (
            lambda: ForwardForward(linear_relu(), CLASSES, negatives="random", loss="collaboration", temperature=10),
            {"collaboration"},
            (2, 2),
        ),
    ],
)
def test_options_of_rules_open_and_close_channels(make: Making, channels: set[str], reach: tuple[int, int]) -> None:
    """What each option does follows from the rule's equations; see the pages of the rules."""
    found = audit(make(), batches(12, width=12, size=32))
    assert {channel.name for channel in found.channels} == channels
    assert (found.reach, found.late_reach) == reach
    assert found.agrees


@pytest.mark.parametrize(("block_training", "locality"), [("random", "block"), ("dfa", "network")])
def test_the_locality_of_cafo_depends_on_how_its_blocks_learn(block_training: str, locality: str) -> None:
    """What is declared, and what noise on later blocks finds: blocks that learn hear the whole network's error."""
    learner = CaFo(linear_relu(), CLASSES, loss="ce", block_training=block_training)
    found = audit(learner, batches(12, width=12, size=32))
    assert learner.locality == found.locality == locality
    assert found.measured == ("network" if locality == "network" else "nothing learns")
    assert found.agrees


# 3. what would make it worthless is noticed


@pytest.mark.parametrize("way", ["not", "gradient", "late"])
def test_the_learner_and_the_random_numbers_are_left_as_they_were(way: str) -> None:
    learner = Toy(way)
    before, generator = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    audited(learner)
    after = learner.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "_extra_state")
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(block._forward_pre_hooks for block in learner.blocks())
    assert not learner._optimizer._optimizer_step_pre_hooks


def test_rules_that_do_not_repeat_themselves_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"other bits in network\.0\.weight.*state_dict does not hold"):
        audited(Toy("unsaved"))


def test_noise_that_nobody_notices_proves_nothing() -> None:
    found = audited(Toy("deaf"))
    assert found.unnoticed == (0,)
    assert "noise on block 0 changed nothing, so that nothing can be said of it" in found.faults
    diverged = audited(Toy(lr=1e30))
    assert diverged.unnoticed == (0, 1, 2)
    assert not diverged.agrees


@pytest.mark.parametrize(("count", "steps"), [(0, 1), (1, 1), (2, 2), (2, 0)])
def test_without_a_first_step_or_one_to_watch_there_is_no_audit(count: int, steps: int) -> None:
    with pytest.raises(UsageError, match="does not watch the first"):
        audit(Toy(), batches(count), steps=steps)


def test_a_network_is_no_learner() -> None:
    with pytest.raises(UsageError, match=r"takes a learner, such as bpfree\.Backprop\(network, .*got Sequential"):
        audit(nn.Sequential(*linear_blocks(False)), [])  # type: ignore[arg-type]
