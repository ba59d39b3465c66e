"""The fit loop: stages, stopping, best state, matched passes, schedules, and failures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms import Backprop, Learner, MonoForward
from bpfree.data.batches import Batches
from bpfree.data.graph_batches import GraphBatches
from bpfree.errors import DataError, TrainingError, UsageError
from bpfree.experiments import InterruptedRunError, Trainer, TrainingConfig, evaluate
from bpfree.networks import Graph, cnn


def blobs(count: int, seed: int = 0, noise: float = 1.0, **options: Any) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    x = noise * torch.randn(count, 6, generator=generator) + 2 * F.one_hot(y, 6)
    return Batches(x, y, **options)


def images(count: int, seed: int = 0, **options: Any) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=generator)
    x = (100 * torch.rand(count, 1, 8, 8, generator=generator) + 100 * y[:, None, None, None]).to(torch.uint8)
    return Batches(x, y, mean=(0.5,), std=(0.25,), **options)


def build(rule: str = "mf", **options: Any) -> Learner:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
    make: Callable[..., Learner] = MonoForward if rule == "mf" else Backprop
    return make(network, 3, **{"lr": 5e-3, **options})


def weights(learner: Learner) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*learner.parameters(), *learner.buffers())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("schedule", ["simultaneous", "sequential"])
def test_best_state_is_restored(schedule: str) -> None:
    learner = build(schedule=schedule, lr=0.05)  # so large that the validation loss goes up again
    train, validation = blobs(60, noise=2), blobs(100, seed=1, noise=2)
    trainer = Trainer(learner, train, validation, TrainingConfig(batch_size=10, epochs=30, patience=30))
    progress = trainer.run()
    for stage, record in zip(learner.stages(), progress.finished, strict=True):
        losses = [r["validation_loss"] for r in progress.history if r["stage"] == stage.name]
        assert record["best_epoch"] == int(np.argmin(losses)) + 1
        assert record["best_epoch"] < len(losses), "the test needs a run that gets worse again"
        inputs = validation.inputs if stage.prefix is None else stage.prefix(validation.inputs)
        with torch.no_grad():
            restored = F.cross_entropy(stage.scores(inputs), validation.targets).item()
        assert restored == pytest.approx(min(losses), rel=1e-5)


def test_the_metric_can_be_what_stops_training() -> None:
    """Strictly better accuracy counts, ties do not; the state of the first best epoch is restored."""
    learner = build("bp", lr=0.05)
    train, validation = blobs(60, noise=2), blobs(40, seed=1, noise=2)
    config = TrainingConfig(batch_size=10, epochs=60, patience=7, monitor="metric")
    (record,) = (progress := Trainer(learner, train, validation, config).run()).finished
    accuracies = [r["validation_accuracy"] for r in progress.history]
    losses = [r["validation_loss"] for r in progress.history]
    first_best = int(np.argmax(accuracies))
    assert first_best != int(np.argmin(losses)), "the test needs the two to disagree"
    assert len(set(accuracies)) < len(accuracies), "the test needs ties"
    assert record["best_epoch"] == first_best + 1
    assert record["epochs"] == first_best + 1 + 7
    assert (record["best_validation_loss"], record["best_validation_accuracy"]) == (losses[first_best], max(accuracies))
    assert evaluate(learner, validation, "fp32")["accuracy"] == pytest.approx(max(accuracies))


def test_every_stage_stops_by_its_own_patience() -> None:
    learner = build(schedule="sequential", lr=0.05)
    config = TrainingConfig(batch_size=10, epochs=200, patience=4)
    progress = Trainer(learner, blobs(60, noise=2), blobs(100, seed=1, noise=2), config).run()
    assert [record["stage"] for record in progress.finished] == ["block 0", "block 1"]
    for record in progress.finished:
        assert record["stopped_early"]
        assert record["epochs"] == record["best_epoch"] + 4


def test_cap_ends_a_stage() -> None:
    progress = Trainer(build(), blobs(64), blobs(20, seed=1), TrainingConfig(batch_size=16, epochs=3)).run()
    assert [r["epoch"] for r in progress.history] == [1, 2, 3]
    assert progress.steps == 12
    assert not progress.finished[0]["stopped_early"]


@pytest.mark.parametrize(("schedule", "epochs"), [("simultaneous", [7]), ("sequential", [4, 4])])
def test_matched_passes_are_shared_by_the_stages_and_ignore_patience(schedule: str, epochs: list[int]) -> None:
    learner = build(schedule=schedule, lr=0.3)
    config = TrainingConfig(batch_size=10, passes=7, patience=1, epochs=2)
    progress = Trainer(learner, blobs(60, noise=3), blobs(50, seed=1, noise=3), config).run()
    assert [record["epochs"] for record in progress.finished] == epochs


def test_the_last_incomplete_batch_is_dropped() -> None:
    seen: list[int] = []
    trainer = Trainer(
        build(),
        blobs(50),
        blobs(20, seed=1),
        TrainingConfig(batch_size=16, epochs=1),
        on_steps=lambda s, e, n: seen.append(n),
    )
    trainer.run()
    assert sum(seen) == 3


def test_training_equals_a_plain_loop() -> None:
    """The loop adds bookkeeping, staging and validation, and changes nothing: the oracle is a for loop."""
    train, validation = blobs(64), blobs(20, seed=1)
    config = TrainingConfig(batch_size=16, passes=3)
    fitted, plain = build("bp"), build("bp")
    trainer = Trainer(fitted, train, validation, config, seed=5)
    trainer.run()
    best, kept = math.inf, weights(plain)
    for epoch in range(3):
        order = train.draw(5, 0, epoch).order
        for chosen in order.split(16):
            plain.step((train.inputs[chosen], train.targets[chosen]))
        loss = F.cross_entropy(plain.scores(validation.inputs), validation.targets).item()
        if loss < best:
            best, kept = loss, weights(plain)
    assert same(weights(fitted), kept)


def test_cosine_schedule_sets_the_rate_of_every_step() -> None:
    """An optimiser that only notes its rate, against the formula."""
    rates: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            rates.append(float(self.param_groups[0]["lr"]))

    learner = build(optimizer=lambda parameters: Spy(parameters, lr=0.1))
    config = TrainingConfig(batch_size=16, passes=2, lr_schedule="cosine", warmup_epochs=0.5)
    Trainer(learner, blobs(64), blobs(20, seed=1), config).run()
    trained = rates[-8:]  # the rehearsal comes first
    moments = [(step + 0.5) / 4 for step in range(8)]
    expected = [
        0.1 * (moment / 0.5 if moment < 0.5 else 0.5 * (1 + math.cos(math.pi * (moment - 0.5) / 1.5)))
        for moment in moments
    ]
    assert trained == pytest.approx(expected)


@pytest.mark.parametrize(
    ("augmentation", "cache", "expected"),
    # both sets once; or validation, rehearsal and every step; or every validation too
    [("none", True, 2), ("crop-flip", True, 1 + 1 + 3 * 4), ("none", False, 3 + 1 + 3 * 4)],
)
def test_sequential_prefix_is_computed_once_unless_augmented(augmentation: str, cache: bool, expected: int) -> None:
    first, second = cnn((1, 8, 8), (3, 4))
    learner = MonoForward([first, second], 2, schedule="sequential", input_shape=(1, 8, 8))
    calls: list[int] = []
    first.register_forward_hook(lambda *arguments: calls.append(1))

    def forget_first_stage(record: dict[str, Any]) -> None:
        if record["stage"] == "block 0":
            calls.clear()

    train, validation = images(64, augmentation=augmentation), images(16, seed=1)
    config = TrainingConfig(batch_size=16, passes=6, cache=cache)
    Trainer(learner, train, validation, config, on_epoch=forget_first_stage).run()
    assert len(calls) == expected


def test_kept_prefix_trains_to_the_same_weights_as_a_recomputed_one() -> None:
    train, validation = blobs(64), blobs(20, seed=1)
    kept = build(schedule="sequential")
    Trainer(kept, train, validation, TrainingConfig(batch_size=16, passes=6)).run()
    again = build(schedule="sequential")
    for index, stage in enumerate(again.stages()):
        best, state = math.inf, weights(again)
        for epoch in range(3):
            for chosen in train.draw(0, index, epoch).order.split(16):
                x = train.inputs[chosen]
                stage.step((x if stage.prefix is None else stage.prefix(x), train.targets[chosen]))
            x = validation.inputs if stage.prefix is None else stage.prefix(validation.inputs)
            loss = F.cross_entropy(stage.scores(x), validation.targets).item()
            if loss < best:
                best, state = loss, weights(again)
        with torch.no_grad():
            for parameter, value in zip(again.parameters(), state, strict=False):
                parameter.copy_(value)
    uncached = build(schedule="sequential")
    Trainer(uncached, train, validation, TrainingConfig(batch_size=16, passes=6, cache=False)).run()
    for a, b, c in zip(weights(kept), weights(again), weights(uncached), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(c, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "question"),  # the question after which the answer is yes; five are asked per epoch of four steps
    [("simultaneous", q) for q in (1, 3, 5, 6, 12)] + [("sequential", q) for q in (2, 15, 16, 18, 29)],
)
def test_interrupted_training_goes_on_bit_for_bit(schedule: str, question: int) -> None:
    def make() -> Learner:
        torch.manual_seed(0)
        network = cnn((1, 8, 8), (3, 4), batch_norm=True)
        return MonoForward(network, 2, schedule=schedule, input_shape=(1, 8, 8))  # type: ignore[arg-type]

    def trainer(learner: Learner, **options: Any) -> Trainer:
        config = TrainingConfig(batch_size=16, epochs=3, lr_schedule="cosine")
        return Trainer(learner, images(70, augmentation="crop-flip"), images(20, seed=1), config, **options)

    straight = make()
    whole = trainer(straight).run()

    questions = iter(range(1, 100))
    saved: dict[str, Any] = {}

    def save(state: dict[str, Any]) -> None:  # through a file, as a run does
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        saved.update(torch.load(file, weights_only=True))

    with pytest.raises(InterruptedRunError):
        trainer(make(), save=save, interrupted=lambda: next(questions) >= question).run()
    assert len(saved["progress"]["history"]) < len(whole.history)

    resumed = make()
    second = trainer(resumed)
    second.load_state_dict(saved)
    again = second.run()
    assert same(weights(straight), weights(resumed))
    assert again == whole


@pytest.mark.parametrize("where", ["loss", "validation"])
def test_a_loss_that_is_not_finite_stops_with_place_and_best_state(where: str) -> None:
    train, validation = blobs(64), blobs(20, seed=1)
    learner = build("bp")
    best: list[Tensor] = []

    def poison(record: dict[str, Any]) -> None:
        best[:] = weights(learner)
        if record["epoch"] == 2:
            (train if where == "loss" else validation).inputs[7] = math.nan

    trainer = Trainer(learner, train, validation, TrainingConfig(batch_size=16, epochs=9), on_epoch=poison)
    with pytest.raises(TrainingError, match=r"loss is nan.* of epoch 3 of all; the best state, of epoch 2, is kept"):
        trainer.run()
    assert all(record["best"] for record in trainer.progress.history)
    assert same(weights(learner), best)


def test_flops_are_those_of_the_cost_model() -> None:
    """Per sample: forward and weight gradient of each layer, three products of each head, no product backwards."""
    F_1, F_2, H_1, H_2 = 2 * 6 * 12, 2 * 12 * 8, 2 * 12 * 3, 2 * 8 * 3
    progress = Trainer(build(), blobs(64), blobs(16), TrainingConfig(batch_size=16, epochs=1)).run()
    assert progress.flops == 64 * (2 * (F_1 + F_2) + 3 * (H_1 + H_2))
    progress = Trainer(build("bp"), blobs(64), blobs(16), TrainingConfig(batch_size=16, epochs=1)).run()
    assert progress.flops == 64 * (3 * (F_1 + F_2) - F_1 + 3 * H_2)
    progress = Trainer(
        build(schedule="sequential"), blobs(64), blobs(16), TrainingConfig(batch_size=16, passes=2)
    ).run()
    assert progress.flops == 64 * ((2 * F_1 + 3 * H_1) + F_1 + (2 * F_2 + 3 * H_2))


def test_evaluation_counts_every_sample_once() -> None:
    learner, test = build(), blobs(5003, seed=2)
    report = evaluate(learner, test, "fp32")
    right = (learner.scores(test.inputs).argmax(1) == test.targets).sum().item()
    assert report["accuracy"] == pytest.approx(100 * right / 5003, rel=1e-12)
    assert report["loss"] == pytest.approx(F.cross_entropy(learner.scores(test.inputs), test.targets).item(), rel=1e-5)
    assert report["block 1 accuracy"] == pytest.approx(report["accuracy"], rel=1e-5)


def test_what_cannot_be_trained_says_why() -> None:
    with pytest.raises(DataError, match="do not fill one batch of 128"):
        Trainer(build(), blobs(100), blobs(10), TrainingConfig())
    with pytest.raises(DataError, match="no validation sample"):
        Trainer(build(), blobs(100), blobs(0), TrainingConfig(batch_size=10))
    with pytest.raises(UsageError, match="epochs must be at least 1"):
        TrainingConfig(epochs=0)
    with pytest.raises(UsageError, match="or fp32"):
        Trainer(build(), blobs(20), blobs(10), TrainingConfig(batch_size=10, precision="f32")).run()


def test_what_is_no_learner_or_no_batches_gets_one_line() -> None:
    train, validation = blobs(20), blobs(10)
    learner = build()
    graph = GraphBatches(Graph.of(torch.eye(4), torch.tensor([[0, 1], [1, 0]]), torch.arange(2)), torch.arange(2))
    for wrong, parts, message in (
        (learner.network, (train, validation), r"takes a learner, such as bpfree\.Backprop.*, got ModuleList"),
        (learner, ([1, 2], validation), "takes bpfree.Batches or bpfree.GraphBatches, got list"),
        (learner, (graph, graph), "takes tensors, got a Graph"),
    ):
        with pytest.raises(UsageError, match=message):
            Trainer(wrong, *parts, TrainingConfig())  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=message):
            evaluate(wrong, parts[0], "fp32")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", "64", "batch_size must be a whole number, got '64'"),
        ("epochs", 2.5, "epochs must be a whole number, got 2.5"),
        ("patience", None, "patience must be a whole number, got None"),
        ("min_delta", "small", "min_delta must be a number, got 'small'"),
        ("standardize", "no", "standardize must be true or false, got 'no'"),
        ("split", 3, "split must be a name, got 3"),
        ("monitor", ["loss"], r"monitor must be a name, got \['loss'\]"),
    ],
)
def test_training_settings_of_another_type_get_one_line(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingConfig(**{name: value})
