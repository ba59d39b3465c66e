"""Statistics of paired runs, against simulations of known truth, hand-worked examples and published tables."""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from bpfree.errors import DataError, UsageError
from bpfree.experiments.statistics import (
    Equivalence,
    Estimate,
    Reached,
    ToAccuracy,
    constant,
    difference_p,
    energy_to_accuracy,
    equivalent,
    holm,
    paired_difference,
    paired_ratio,
    reached,
    relative_change,
)


def joules(rng: np.random.Generator, n: int, ratio: float, noise: float = 0.05) -> tuple[list[float], list[float]]:
    """Log-normal pairs: what a pair shares (a factor of e either way) is far larger than what differs within it."""
    shared = rng.normal(8, 1, n)
    ours = shared + math.log(ratio) + rng.normal(0, noise / math.sqrt(2), n)
    baseline = shared + rng.normal(0, noise / math.sqrt(2), n)
    return np.exp(ours).tolist(), np.exp(baseline).tolist()


# Intervals


@pytest.mark.parametrize("n", [5, 10, 20])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(n: int) -> None:
    """The default of 10,000 resamples, to save time, only in the next test."""
    rng = np.random.default_rng(n)
    pairs = [joules(rng, n, 0.8) for _ in range(1000)]
    trials = [paired_ratio(*pair, resamples=2000, seed=seed) for seed, pair in enumerate(pairs)]
    covered = [trial.low <= 0.8 <= trial.high for trial in trials if trial.low is not None and trial.high is not None]
    assert len(covered) == 1000
    assert 0.93 <= statistics.fmean(covered) <= 0.97


def test_the_interval_is_the_studentised_bootstraps() -> None:
    rng = np.random.default_rng(5)
    ours, baseline = joules(rng, 12, 0.8)
    logs = [math.log(a / b) for a, b in zip(ours, baseline, strict=True)]
    centre, spread = statistics.fmean(logs), statistics.stdev(logs)
    samples = np.random.default_rng(3).choice(logs, (999, 12)).tolist()
    ranked = sorted((statistics.fmean(sample) - centre) / statistics.stdev(sample) for sample in samples)
    high, low = (centre - ranked[math.ceil(share * 999) - 1] * spread for share in (0.025, 0.975))
    estimate = paired_ratio(ours, baseline, resamples=999, seed=3)
    assert (estimate.low, estimate.high) == (pytest.approx(math.exp(low)), pytest.approx(math.exp(high)))


def test_fewer_resamples_give_the_interval_of_ten_thousand() -> None:
    assert inspect.signature(paired_ratio).parameters["resamples"].default == 10_000
    ours, baseline = joules(np.random.default_rng(0), 20, 0.8)
    many, few = paired_ratio(ours, baseline), paired_ratio(ours, baseline, resamples=2000, seed=1)
    assert (few.low, few.high) == pytest.approx((many.low, many.high), rel=0.005)
    assert paired_ratio(ours, baseline) == many


def test_pairing_shows_what_unpaired_runs_hide() -> None:
    """A true saving of 20 %: seen in every trial by pairs, in hardly any when each run meets another's partner."""
    rng = np.random.default_rng(0)
    pairs = [joules(rng, 10, 0.8) for _ in range(100)]
    paired = [paired_ratio(ours, baseline, resamples=1000).high for ours, baseline in pairs]
    mixed = [paired_ratio(ours, rng.permutation(baseline).tolist(), resamples=1000).high for ours, baseline in pairs]
    assert sum(high is not None and high < 1 for high in paired) == 100
    assert sum(high is not None and high < 1 for high in mixed) < 20


def test_the_estimate_is_the_geometric_mean_of_ratios() -> None:
    """Ratios 1/2, 1/2, 2, 2, 2: their product is 2."""
    assert paired_ratio([1, 2, 6, 8, 10], [2, 4, 3, 4, 5]).value == pytest.approx(2 ** (1 / 5))
    difference = paired_difference([98.0, 97.5, 98.5, 98.0, 97.0], [97.0, 97.0, 97.0, 97.0, 97.0])
    assert difference.value == pytest.approx(0.8)


def test_swapping_the_arms_mirrors_the_interval() -> None:
    ours, baseline = joules(np.random.default_rng(3), 12, 0.7)
    ratio, inverse = paired_ratio(ours, baseline), paired_ratio(baseline, ours)
    assert None not in (ratio.low, ratio.high, inverse.low, inverse.high)
    assert 1 / inverse.value == pytest.approx(ratio.value)
    assert (1 / inverse.high, 1 / inverse.low) == pytest.approx((ratio.low, ratio.high), rel=1e-4)  # type: ignore[operator]


def test_a_higher_level_gives_a_wider_interval() -> None:
    ours, baseline = joules(np.random.default_rng(4), 10, 1.0)
    narrow, wide = paired_ratio(ours, baseline, level=0.8), paired_ratio(ours, baseline, level=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high  # type: ignore[operator]
    assert (narrow.n, narrow.level) == (10, 0.8)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_pairs_have_a_mean_but_no_interval(n: int) -> None:
    assert paired_difference([3.0, 4.0, 5.0, 6.0][:n], [1.0] * n) == Estimate((n + 3) / 2, None, None, n, 0.95)


def test_pairs_that_are_all_alike_have_no_interval_rather_than_a_certain_one() -> None:
    estimate = paired_difference([0.1] * 8, [0.0] * 8)
    assert (estimate.low, estimate.high) == (None, None)


@pytest.mark.parametrize("n", [5, 7, 10])
@pytest.mark.parametrize("rounding", [0.0, 2e-16])
def test_pairs_of_which_one_differs_have_students_interval(n: int, rounding: float) -> None:
    """Most resamples of these have no spread of their own, and their bootstrap no end."""
    differences = [(-1) ** i * rounding for i in range(n - 1)] + [0.1]
    estimate = paired_difference(differences, [0.0] * n)
    expected = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("n", "students"), [(5, True), (7, True), (8, False), (20, False)])
def test_few_pairs_have_students_interval(n: int, students: bool) -> None:
    differences = np.random.default_rng(n).normal(size=n)
    estimate = paired_difference(differences.tolist(), [0.0] * n)
    expected = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert ((estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-6)) == students


def test_a_ratio_too_large_to_print_is_still_a_number() -> None:
    estimate = paired_ratio([1.0, 1.0001, 1.0, 1.0002, 1e300], [1.0] * 5)
    assert estimate.high is not None
    assert math.isfinite(estimate.high)


@pytest.mark.parametrize(
    ("ours", "baseline"),
    [
        ([1.0, 2.0], [1.0]),
        ([], []),
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, None], [1.0, 2.0]),
        ([1.0, math.inf], [1.0, 2.0]),
    ],
    ids=["unequal", "empty", "nan", "unmeasured", "infinite"],
)
def test_what_is_no_pair_is_refused(ours: list[float], baseline: list[float]) -> None:
    for compare in (paired_ratio, paired_difference):
        with pytest.raises(DataError):
            compare(ours, baseline)
    with pytest.raises(DataError):
        equivalent(ours, baseline, margin=1.0)


def test_only_ratios_need_positive_numbers() -> None:
    with pytest.raises(DataError, match="positive"):
        paired_ratio([1.0, 0.0], [1.0, 1.0])
    with pytest.raises(DataError, match="positive"):
        equivalent([1.0] * 5, [1.0, 2.0, 3.0, 4.0, -5.0], margin=0.1, relative=True)
    assert paired_difference([-1.0, 0.0], [0.0, 1.0]).value == -1.0


# Equivalence

WORKED = [-0.2, -0.1, 0.0, 0.1, 0.2]
"""Mean 0, standard error sqrt(0.025 / 5); the 95 % quantile of t with 4 degrees of freedom is 2.1318 (any table)."""


def test_equivalence_is_the_90_percent_interval_within_the_margin() -> None:
    half_width = 2.1318 * math.sqrt(0.025 / 5)
    within = equivalent(WORKED, [0.0] * 5, margin=1.001 * half_width)
    beyond = equivalent(WORKED, [0.0] * 5, margin=0.999 * half_width)
    assert (within.verdict, beyond.verdict) == ("equivalent", "not shown")
    assert within.p == pytest.approx(0.05, abs=2e-4)
    shifted = [0.3 + value for value in WORKED]
    for ours, baseline in ((shifted, [0.0] * 5), ([0.0] * 5, shifted)):
        assert equivalent(ours, baseline, margin=0.3 + 1.001 * half_width).verdict == "equivalent"
        assert equivalent(ours, baseline, margin=0.3 + 0.999 * half_width).verdict == "not shown"


def test_a_relative_margin_is_symmetric_in_the_ratio() -> None:
    ours = [1.05 * math.exp(value / 100) for value in WORKED]
    half_width = 2.1318 * math.sqrt(0.025 / 5) / 100
    for a, b in ((ours, [1.0] * 5), ([1.0] * 5, ours)):
        assert equivalent(a, b, margin=1.05 * math.exp(1.001 * half_width) - 1, relative=True).verdict == "equivalent"
        assert equivalent(a, b, margin=1.05 * math.exp(0.999 * half_width) - 1, relative=True).verdict == "not shown"


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("sign", [1, -1])
def test_at_the_margin_equivalence_is_claimed_in_5_percent(n: int, sign: int) -> None:
    trials = 2000
    noise, none, one = np.random.default_rng(n).normal(0, 0.1, (trials, n)), [0.0] * n, [1.0] * n
    claims = [equivalent(sign * (0.25 + row), none, margin=0.25).verdict == "equivalent" for row in noise]
    ratios = [
        equivalent(np.exp(sign * (math.log(1.05) + row / 10)), one, margin=0.05, relative=True).verdict for row in noise
    ]
    error = math.sqrt(0.05 * 0.95 / trials)
    assert abs(statistics.fmean(claims) - 0.05) < 3 * error
    assert abs(ratios.count("equivalent") / trials - 0.05) < 3 * error


def test_power_at_no_difference() -> None:
    """At a margin of 3.3 standard errors nearly always; at one standard error hardly ever."""
    noise = np.random.default_rng(0).normal(0, 1, (300, 10))
    for margin, low, high in ((3.3 / math.sqrt(10), 0.8, 1.0), (1 / math.sqrt(10), 0.0, 0.05)):
        claims = [equivalent(row, [0.0] * 10, margin=margin).verdict == "equivalent" for row in noise]
        assert low <= statistics.fmean(claims) <= high


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_no_equivalence_from_few_pairs_however_close(n: int) -> None:
    close = [100.0 + index / 1e6 for index in range(n)]
    assert equivalent(close, [100.0] * n, margin=50.0) == Equivalence("not tested", None, n)


def test_the_same_runs_under_two_names_are_not_tested() -> None:
    runs = [62.31, 62.35, 62.36, 62.30, 62.33]
    assert equivalent(runs, runs, margin=0.25).verdict == "not tested"


@pytest.mark.parametrize(("margin", "level"), [(0.0, 0.05), (-1.0, 0.05), (math.nan, 0.05), (1.0, 0.95), (1.0, 0.0)])
def test_a_test_that_means_nothing_is_refused(margin: float, level: float) -> None:
    with pytest.raises(UsageError):
        equivalent(WORKED, [0.0] * 5, margin=margin, level=level)


# Holm


def test_holm_worked_by_hand() -> None:
    """The example of Wikipedia's article: at 0.05 the first and the fourth are rejected, and no other."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_bonferroni_applied_to_every_subfamily(p_values: list[float]) -> None:
    """The closed testing principle (Marcus, Peritz, Gabriel, 1976), by brute force."""
    count = len(p_values)
    families = [family for size in range(1, count + 1) for family in itertools.combinations(range(count), size)]
    expected = [
        max(min(1.0, len(family) * min(p_values[i] for i in family)) for family in families if index in family)
        for index in range(count)
    ]
    assert holm(p_values) == pytest.approx(expected)


# Energy to accuracy

CURVE = [(100.0, 40.0), (220.0, 55.0), (310.0, 52.0), (430.0, 56.0)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (30.0, ToAccuracy(100.0, True)),
        (40.0, ToAccuracy(100.0, True)),
        (53.0, ToAccuracy(220.0, True)),
        (55.5, ToAccuracy(430.0, True)),
        (60.0, ToAccuracy(430.0, False)),
    ],
    ids=["at once", "exactly", "first of two", "at the end", "never"],
)
def test_energy_to_accuracy_on_a_hand_made_curve(target: float, expected: ToAccuracy) -> None:
    assert energy_to_accuracy(CURVE, target) == expected


def test_unmeasured_is_not_censored() -> None:
    blind = [(None, accuracy) for _, accuracy in CURVE]
    assert energy_to_accuracy(blind, 50.0) == ToAccuracy(None, True)
    assert energy_to_accuracy(blind, 90.0) == ToAccuracy(None, False)
    assert energy_to_accuracy([(None, 10.0), (5.0, 50.0)], 50.0) == ToAccuracy(5.0, True)


def test_a_network_that_broke_down_reaches_nothing() -> None:
    assert energy_to_accuracy([(1.0, math.nan), (2.0, math.nan)], 10.0) == ToAccuracy(2.0, False)


@pytest.mark.parametrize("curve", [[], [(2.0, 10.0), (1.0, 20.0)], [(2.0, 10.0), (None, 15.0), (1.0, 20.0)]])
def test_a_curve_that_cannot_be_is_refused(curve: list[tuple[float | None, float]]) -> None:
    with pytest.raises(DataError):
        energy_to_accuracy(curve, 15.0)


def runs(*, done: Sequence[float], stopped: Sequence[float]) -> list[ToAccuracy]:
    """In an order that is not that of the joules."""
    return [*(ToAccuracy(j, False) for j in reversed(stopped)), *(ToAccuracy(j, True) for j in reversed(done))]


def test_the_median_of_the_leukaemia_trial() -> None:
    """Freireich et al. (1963), the textbooks' example, with ties and censoring: medians of 23 and 8 weeks."""
    treated = runs(done=[6, 6, 6, 7, 10, 13, 16, 22, 23], stopped=[6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35])
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    assert reached(treated) == Reached(9, 21, 0, 23.0, None)
    assert reached(runs(done=placebo, stopped=[])) == Reached(21, 21, 0, 8.0, None)


def test_where_all_got_there_it_is_the_plain_median() -> None:
    assert reached(runs(done=[10, 20, 40, 80], stopped=[])).median_j == 30
    assert reached(runs(done=[10, 20, 40], stopped=[15])).median_j == 20  # 3/4, then 3/8 are left


def test_a_median_worked_by_hand() -> None:
    """At 2 two of 5 get there (3/5 left), one is stopped, at 4 one of 2 (3/10 left); survivors alone would say 2."""
    assert reached(runs(done=[2, 2, 4], stopped=[3, 5])) == Reached(3, 5, 0, 4.0, None)
    assert reached(runs(done=[2, 2], stopped=[2, 5, 6])).median_j is None  # 3/5 are left: the stopped one was at risk


def test_one_run_that_outlasts_all_others_makes_no_median() -> None:
    summary = reached(runs(done=[1000], stopped=[10 * i for i in range(1, 10)]))
    assert (summary.k, summary.n, summary.median_j, summary.bound_j) == (1, 10, None, 50)
    assert reached(runs(done=[7], stopped=[])).median_j == 7  # the only one there is


@pytest.mark.parametrize("n", range(2, 41, 2))
def test_exactly_half_is_a_median(n: int) -> None:
    done, stopped = [float(j) for j in range(n // 2)], [1000.0] * (n // 2)
    assert reached(runs(done=done, stopped=stopped)).median_j == done[-1]


def test_no_median_when_most_never_got_there() -> None:
    """No joules are claimed for the half that nobody saw: at least the median spent, not the largest."""
    assert reached(runs(done=[5, 6], stopped=[8, 9, 100])) == Reached(2, 5, 0, None, 8.0)
    assert reached(runs(done=[], stopped=[10, 20, 30])) == Reached(0, 3, 0, None, 20.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.booleans(), st.integers(0, 20)), min_size=1, max_size=9))
def test_the_bound_holds_whatever_the_stopped_runs_would_have_spent(stories: list[tuple[int, bool, int]]) -> None:
    summary = reached([ToAccuracy(float(spent), done) for spent, done, _ in stories])
    truth = statistics.median_low(spent if done else spent + more for spent, done, more in stories)
    assert (summary.median_j is None) != (summary.bound_j is None)
    assert summary.bound_j is None or summary.bound_j <= truth


def test_unmeasured_runs_count_but_give_no_joules() -> None:
    unmeasured = [ToAccuracy(None, True), ToAccuracy(None, False)]
    assert reached([*runs(done=[3, 4, 5], stopped=[]), *unmeasured]) == Reached(4, 5, 2, 4.0, None)
    assert reached(unmeasured) == Reached(1, 2, 2, None, None)
    assert reached([*runs(done=[], stopped=[7]), *unmeasured]) == Reached(1, 3, 2, None, 7.0)
    assert reached([]) == Reached(0, 0, 0, None, None)


def test_runs_that_failed_stay_at_risk_for_ever() -> None:
    failed = [ToAccuracy(math.inf, False)] * 4
    assert reached([*runs(done=[3, 4, 5, 6, 7], stopped=[]), *failed]) == Reached(5, 9, 0, 7.0, None)
    assert reached([*runs(done=[3, 4, 5], stopped=[]), *failed]) == Reached(3, 7, 0, None, 4.0)
    assert reached([*runs(done=[3, 4], stopped=[1, 2, 6]), *failed]) == Reached(2, 9, 0, None, 6.0)
    assert reached(failed) == Reached(0, 4, 0, None, None)


def test_p_of_no_difference_is_right_as_often_as_it_says() -> None:
    """Type I error of the paired t test on normal differences, and power against a large one."""
    draws = np.random.default_rng(1).normal(size=(2000, 10))
    found = [difference_p(list(row), [0.0] * 10) for row in draws]
    assert 0.035 < np.mean([p is not None and p <= 0.05 for p in found]) < 0.065
    assert all((difference_p(list(np.exp(row / 10 + 1)), [1.0] * 10, relative=True) or 1) < 1e-6 for row in draws[:20])


def test_p_of_too_few_or_equal_pairs_is_not_known() -> None:
    assert difference_p([1.0, 2.0, 3.5, 4.0], [0.0] * 4) is None
    assert difference_p([1.0] * 6, [0.0] * 6) is None


def test_a_change_is_in_percent_of_the_baseline() -> None:
    assert [relative_change(ours, 4.0) for ours in (3.0, 4.0, 9.0)] == [-25, 0, 125]


@pytest.mark.parametrize("baseline", [0.0, -1.0, math.nan])
def test_a_change_against_nothing_is_refused(baseline: float) -> None:
    with pytest.raises(DataError):
        relative_change(1.0, baseline)


def test_a_difference_is_constant_if_enough_pairs_have_it_to_the_last_bit() -> None:
    baseline = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert constant([value + 0.5 for value in baseline], baseline)
    assert constant(baseline, baseline, relative=True)
    assert not constant([value + 0.5 for value in baseline[1:]], baseline[1:])  # too few to tell
    assert not constant([2.0, 3.0, 5.0, 9.0, 16.0], baseline)
    assert not constant([value + 0.5 for value in baseline], baseline, relative=True)
