"""Learning-rate schedules and the stopping rule."""

from __future__ import annotations

import math

import pytest

from bpfree.errors import UsageError
from bpfree.experiments.schedules import EarlyStopping, learning_rate_factor


def test_constant_is_constant() -> None:
    assert {learning_rate_factor("constant", epoch, 10) for epoch in (0, 3.3, 9.9)} == {1.0}


@pytest.mark.parametrize(("epoch", "expected"), [(0, 1), (5, 0.5), (2.5, (1 + math.sqrt(0.5)) / 2), (10, 0)])
def test_cosine_passes_through_known_values(epoch: float, expected: float) -> None:
    assert learning_rate_factor("cosine", epoch, 10) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "cosine-epochs", "cooldown"])
@pytest.mark.parametrize("beyond", [0, 0.5, 3])
def test_nothing_rises_again_behind_the_end(schedule: str, beyond: float) -> None:
    assert learning_rate_factor(schedule, 10 + beyond, 10) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("epoch", "expected"), [(0, 1), (4.99, 1), (5, 0.1), (7.49, 0.1), (7.5, 0.01), (10, 0.01)])
def test_step_divides_by_ten_at_half_and_three_quarters(epoch: float, expected: float) -> None:
    assert learning_rate_factor("step", epoch, 10) == pytest.approx(expected)


@pytest.mark.parametrize("epochs", [10, 60])
def test_cooldown_is_hinton_s_gain_in_the_middle_of_each_epoch(epochs: int) -> None:
    """1 in the first half, then (1 + 2 (E - e)) / E for epoch e = 1..E."""
    for epoch in range(1, epochs + 1):
        gain = 1 if 2 * epoch <= epochs else (1 + 2 * (epochs - epoch)) / epochs
        assert learning_rate_factor("cooldown", epoch - 0.5, epochs) == pytest.approx(gain)


def test_warm_up_is_linear_and_then_hands_over() -> None:
    assert learning_rate_factor("constant", 1, 10, warmup_epochs=4) == pytest.approx(0.25)
    assert learning_rate_factor("constant", 4, 10, warmup_epochs=4) == 1
    assert learning_rate_factor("cosine", 4, 10, warmup_epochs=4) == pytest.approx(1)
    assert learning_rate_factor("cosine", 7, 10, warmup_epochs=4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (1, 0.01),
        (2, 0.8 * (1 + math.cos(math.pi * 2 / 400)) / 2 / 10 + 0.01 * 9 / 10),
        (10, 0.8 * (1 + math.cos(math.pi * 10 / 400)) / 2 * 9 / 10 + 0.01 / 10),
        (11, 0.8 * (1 + math.cos(math.pi * 11 / 400)) / 2),
        (200, 0.4),
        (400, 0),
    ],
)
def test_cosine_by_epochs_is_the_published_schedule(epoch: int, rate: float) -> None:
    """lr = 0.8, E = 400, ten epochs of warm-up: the specification of MAN, section 5; constant within an epoch."""
    for moment in (epoch - 1, epoch - 0.5, epoch - 1e-6):
        factor = learning_rate_factor("cosine-epochs", moment, 400, warmup_epochs=10)
        assert 0.8 * factor == pytest.approx(rate, abs=1e-9)


def test_unknown_schedule() -> None:
    with pytest.raises(UsageError, match="did you mean cosine"):
        learning_rate_factor("cosin", 0, 1)


def feed(stopping: EarlyStopping, losses: list[float]) -> int:
    """Epochs that a run with these validation losses lasts."""
    for epoch, loss in enumerate(losses):
        stopping.update(epoch, loss)
        if stopping.stop:
            return epoch + 1
    return len(losses)


def test_patience_counts_epochs_since_the_best() -> None:
    stopping = EarlyStopping(patience=3)
    assert feed(stopping, [5, 4, 4.5, 4.2, 4.0, 1]) == 5  # 4.0 equals the best: no improvement
    assert (stopping.best_epoch, stopping.best_loss) == (1, 4)


def test_improvement_resets_patience() -> None:
    assert feed(EarlyStopping(patience=2), [5, 6, 4, 6, 3, 6, 6, 0]) == 7


def test_min_delta_is_how_much_better_it_must_be() -> None:
    assert feed(EarlyStopping(patience=2, min_delta=0.5), [5, 4.6, 4.51, 0]) == 3
    assert feed(EarlyStopping(patience=2, min_delta=0.5), [5, 4.49, 4.2, 4.1]) == 4


def test_no_patience_never_stops() -> None:
    assert feed(EarlyStopping(patience=None), [1] + [2] * 500) == 501
