"""Every column of T3, T4 and T5 against numbers computed apart: scipy's tests, Holm's procedure by its definition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bpfree.experiments.collect import Entry, collect
from bpfree.experiments.compare import Analysis
from bpfree.experiments.study_tables import Table, make_tables
from tests.experiments.synthetic import H200, make_run

PAIRS = 7
"""Enough for tests, and few enough for Student's intervals, which scipy has too."""
ANALYSIS = Analysis(margin_accuracy=0.4, margin_relative=0.08)
SPREAD = np.array([-1.4, -0.9, -0.3, 0.1, 0.4, 0.8, 1.3]) / np.std([-1.4, -0.9, -0.3, 0.1, 0.4, 0.8, 1.3], ddof=1)
"""Mean 0, standard deviation 1."""


def one(entries: Sequence[Entry], name: str) -> Table:
    (table,) = make_tables([name], [replace(entry, analysis=ANALYSIS) for entry in entries])
    return table


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval."""
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    return float(differences.mean()), float(low), float(high)


def ratio(ours: Iterable[float], baseline: Iterable[float]) -> tuple[float, ...]:
    """Geometric mean of ratios and its 95 % interval."""
    logs = [math.log(a / b) for a, b in zip(ours, baseline, strict=True)]
    return tuple(math.exp(value) for value in interval(np.array(logs)))


def cell(numbers: Sequence[float], digits: int, sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def percent(numbers: Sequence[float], digits: int) -> str:
    """A ratio and its interval as a change."""
    return cell([100 * (number - 1) for number in numbers], digits, "+")


# T3: differences of known p values


def different(p: float, sign: int, margin: float) -> np.ndarray:
    """Pairs whose mean difference has this p value, spread too far for equivalence to be shown."""
    assert abs(SPREAD.mean()) < 1e-12
    sd = 5 * margin
    return sd * (SPREAD + sign * stats.t.isf(p / 2, PAIRS - 1) / math.sqrt(PAIRS))


def same(p: float, sign: int, margin: float) -> np.ndarray:
    """Pairs that differ by a twentieth of the margin, whose equivalence within it has this p value."""
    sd = 0.95 * margin * math.sqrt(PAIRS) / stats.t.isf(p, PAIRS - 1)
    return sign * margin / 20 + sd * SPREAD


def close(p: float, sign: int, margin: float) -> np.ndarray:
    """Pairs that differ by half the margin, and hardly from each other: both tests have p values around this."""
    sd = margin / 2 * math.sqrt(PAIRS) / stats.t.isf(p, PAIRS - 1)
    return sign * margin / 2 + sd * SPREAD


ARMS = (("bp-ds", None), ("mf-joint", None), ("mf", None), ("ff", 52), ("cafo", 52))
"""Rules, and data passes of the matched protocol: a column is one family of tests under both protocols."""
COLUMNS: dict[str, tuple[tuple[Any, float, int], ...]] = {
    "accuracy": ((different, 0.004, 1), (different, 0.014, -1), (different, 0.022, 1), (different, 0.4, -1)),
    "seconds": ((different, 0.013, 1), (different, 0.03, -1), (different, 0.04, 1), (different, 0.5, -1)),
    "wh": ((same, 0.004, 1), (same, 0.014, 1), (same, 0.022, 1), (different, 0.4, -1)),
    "device_mib": ((same, 0.013, -1), (same, 0.03, 1), (different, 0.012, -1), (same, 0.04, -1)),
}
"""How the first four arms differ from the baseline in each column; the fifth is `close` in all."""
SAID = {
    "accuracy": ["higher", "lower", "higher", "inconclusive", "equivalent"],
    "seconds": ["inconclusive"] * 4 + ["equivalent"],
    "wh": ["equivalent"] * 3 + ["inconclusive", "equivalent"],
    "device_mib": ["inconclusive", "inconclusive", "lower", "inconclusive", "equivalent"],
}
"""By hand: with the fifth arm first, p values are to be below a quarter, third, half and the whole of 0.05 in turn."""


@dataclass
class Family:
    """Differences from the baseline by column and arm: points of accuracy, logarithms of all else."""

    folder: Path
    differences: dict[str, list[np.ndarray]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    random = np.random.default_rng(4)
    margins = {name: math.log1p(ANALYSIS.margin_relative) for name in COLUMNS} | {"accuracy": ANALYSIS.margin_accuracy}
    differences = {
        name: [random.permutation(make(p, sign, margins[name])) for make, p, sign in (*columns, (close, 1e-5, -1))]
        for name, columns in COLUMNS.items()
    }
    for protocol in (None, 52):
        baseline = {name: random.uniform(2000, 6000, PAIRS) for name in COLUMNS} | {
            "accuracy": random.uniform(40, 60, PAIRS)
        }
        numbers = {"bp": baseline}
        for index, (rule, passes) in enumerate(ARMS):
            if passes == protocol:
                numbers[rule] = {
                    name: baseline[name] + differences[name][index]
                    if name == "accuracy"
                    else baseline[name] * np.exp(differences[name][index])
                    for name in COLUMNS
                }
        for rule, by_column in numbers.items():
            for seed in range(PAIRS):
                accuracy, seconds, joules, device = (float(by_column[name][seed]) for name in COLUMNS)
                make_run(
                    root, rule, seed, accuracy=accuracy, seconds=seconds, joules=joules, mib=device - 1000,
                    passes=protocol, utilisation=0.5 if rule == "mf" else 0.9,
                )  # fmt: skip
    return Family(root, differences)


def by_closed_testing(p_values: Sequence[float]) -> list[bool]:
    """Holm's procedure from its definition: a hypothesis falls if Bonferroni rejects every family it belongs to."""
    everyone = range(len(p_values))
    families = [set(chosen) for size in range(1, len(p_values) + 1) for chosen in combinations(everyone, size)]
    return [
        all(min(p_values[other] for other in some) <= 0.05 / len(some) for some in families if index in some)
        for index in everyone
    ]


def verdicts(columns: Sequence[np.ndarray], margin: float, *, corrected: bool = True) -> list[str]:
    """What may be said of each arm, by scipy's one-sample and one-sided tests."""
    differ = [stats.ttest_1samp(pairs, 0).pvalue for pairs in columns]
    equal = [
        max(
            stats.ttest_1samp(pairs, -margin, alternative="greater").pvalue,
            stats.ttest_1samp(pairs, margin, alternative="less").pvalue,
        )
        for pairs in columns
    ]
    if corrected:
        is_equal, is_different = by_closed_testing(equal), by_closed_testing(differ)
    else:
        is_equal, is_different = [p <= 0.05 for p in equal], [p <= 0.05 for p in differ]
    return [
        "equivalent" if e else ("higher" if pairs.mean() > 0 else "lower") if d else "inconclusive"
        for e, d, pairs in zip(is_equal, is_different, columns, strict=True)
    ]


def test_every_verdict_is_that_of_its_whole_column(family: Family) -> None:
    rows = {row["algorithm"]: row for row in one(collect(family.folder), "T3").rows}
    for name, columns in family.differences.items():
        margin = ANALYSIS.margin_accuracy if name == "accuracy" else math.log1p(ANALYSIS.margin_relative)
        assert verdicts(columns, margin) == SAID[name]
        # these two tell Holm's verdicts from uncorrected ones, the other two from Bonferroni's
        assert (verdicts(columns, margin, corrected=False) != SAID[name]) == (name in {"seconds", "device_mib"})
        assert [rows[rule][f"{name}_verdict"] for rule, _ in ARMS] == SAID[name], name


def test_every_column_of_changes(family: Family) -> None:
    shown = {cells["Variant"]: cells for cells in one(collect(family.folder), "T3").cells()}
    assert shown.keys() == {rule for rule, _ in ARMS}
    for index, (rule, passes) in enumerate(ARMS):
        points, *logs = (interval(family.differences[name][index]) for name in COLUMNS)
        seconds, energy, memory = (percent([math.exp(end) for end in ends], 2) for ends in logs)
        assert shown[rule] == {
            "Variant": rule,
            "Dataset": "cifar10",
            "Architecture": "mlp:3x2000",
            "Δ acc, pp": cell(points, 2, "+"),
            "acc": SAID["accuracy"][index],
            "Δ time, %": seconds,
            "time": SAID["seconds"][index],
            "Δ energy, %": energy,
            "energy": SAID["wh"][index],
            "Δ mem, %": memory,
            "mem": SAID["device_mib"][index],
            "Pairs": str(PAIRS),
            "Regime": "host-bound" if rule == "mf" else "busy",
            "Protocol": "own" if passes is None else "matched",
            "Hardware": H200,
            "Source": "this work",
        }


# T4 and T5: both arms in absolute numbers, over the seeds that they share


@dataclass
class Arm:
    """What was put into the records of an arm, by seed."""

    accuracy: dict[int, float]
    seconds: dict[int, float]
    joules: dict[int, float]
    mib: dict[int, float]
    passes: dict[int, int]

    def over(self, quantity: str, seeds: Iterable[int]) -> list[float]:
        return [getattr(self, quantity)[seed] for seed in seeds]


BASELINE_SEEDS, SEEDS = range(9), range(2, 11)
SHARED = range(2, 9)


@pytest.fixture(scope="module", params=["own", "matched"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def records(protocol: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Arm]]:
    """Two arms that share seven seeds of nine each, in everything far apart and without any order."""
    root = tmp_path_factory.mktemp(protocol)
    random = np.random.default_rng(11)
    made = {}
    for rule, seeds, training in (("bp", BASELINE_SEEDS, {}), ("mf", SEEDS, {"patience": 4, "epochs": 15})):
        low = 1.0 if rule == "bp" else 1.7
        arm = Arm(
            {seed: random.uniform(50, 60) * low for seed in seeds},
            {seed: random.uniform(100, 200) / low for seed in seeds},
            {seed: random.uniform(20_000, 40_000) * low for seed in seeds},
            {seed: random.uniform(300, 600) * low for seed in seeds},
            {seed: int(random.integers(3, 9) * low) for seed in seeds},
        )
        for seed in seeds:
            curve = [(None, 40.0)] * arm.passes[seed]
            settings: dict[str, Any] = training if protocol == "own" else {"passes": 52}
            make_run(
                root, rule, seed, accuracy=arm.accuracy[seed], seconds=arm.seconds[seed], joules=arm.joules[seed],
                mib=arm.mib[seed], curve=curve, utilisation=0.9 if rule == "bp" else 0.5, **settings,
            )  # fmt: skip
        made[rule] = arm
    return root, made


def mean(arm: Arm, quantity: str) -> float:
    return float(np.mean(arm.over(quantity, SHARED)))


def test_every_column_of_either_protocol(protocol: str, records: tuple[Path, dict[str, Arm]]) -> None:
    root, made = records
    bp, mf = made["bp"], made["mf"]
    entries = collect(root)
    (shown,) = one(entries, "T5" if protocol == "own" else "T4").cells()
    assert one(entries, "T4" if protocol == "own" else "T5").cells() == []

    def both(quantity: str, digits: int, divisor: float = 1) -> str:
        return f"{mean(bp, quantity) / divisor:.{digits}f} / {mean(mf, quantity) / divisor:.{digits}f}"

    def over_bp(quantity: str) -> tuple[float, ...]:
        return ratio(mf.over(quantity, SHARED), bp.over(quantity, SHARED))

    watts = [[arm.joules[seed] / arm.seconds[seed] for seed in SHARED] for arm in (bp, mf)]
    points = interval(np.subtract(mf.over("accuracy", SHARED), bp.over("accuracy", SHARED)))
    place = {"Dataset": "cifar10", "Architecture": "mlp:3x2000", "Algorithm": "mf"}
    source = {"Pairs": "7", "Regime": "host-bound", "Hardware": H200, "Source": "this work"}
    if protocol == "own":
        expected = {
            **place,
            "BP acc, %": f"{mean(bp, 'accuracy'):.2f}",
            "Alg acc, %": f"{mean(mf, 'accuracy'):.2f}",
            "Δ acc, pp": cell(points, 2, "+"),
            "Time x": cell(over_bp("seconds"), 2),
            "Energy x": cell(over_bp("joules"), 2),
            "Stops after, BP": "20 epochs without gain, at most 100 a stage",
            "Stops after, alg": "4 epochs without gain, at most 15 a stage",
            **source,
        }
    else:
        expected = {
            **place,
            "Passes BP / alg": both("passes", 1),
            "Acc BP / alg, %": both("accuracy", 2),
            "Δ acc, pp": cell(points, 2, "+"),
            "Energy BP / alg, Wh": both("joules", 3, 3600),
            "Δ energy, %": percent(over_bp("joules"), 1),
            "Allocator BP / alg, MiB": both("mib", 1),
            "Δ mem, %": percent(over_bp("mib"), 1),
            "Mean W BP / alg": f"{np.mean(watts[0]):.1f} / {np.mean(watts[1]):.1f}",
            "Δ W, %": percent(ratio(watts[1], watts[0]), 1),
            "Δ time, %": percent(over_bp("seconds"), 1),
            **source,
        }
    assert shown == expected


def test_a_run_without_joules_leaves_means_empty_and_its_pair_out(tmp_path: Path) -> None:
    """A mean over the runs that were measured would be one of fewer seeds than the baseline's beside it."""
    joules = {seed: None if seed == 3 else 900.0 + 7 * seed**2 for seed in range(PAIRS)}
    for seed in range(PAIRS):
        make_run(tmp_path, "bp", seed, joules=1000.0 + 20 * seed, passes=52)
        make_run(tmp_path, "mf", seed, joules=joules[seed], passes=52)
    (cells,) = one(collect(tmp_path), "T4").cells()
    known = [seed for seed in range(PAIRS) if seed != 3]
    assert "Energy BP / alg, Wh" not in cells  # a column in which nothing is known
    assert cells["Δ energy, %"] == percent(ratio([joules[s] or 0 for s in known], [1000.0 + 20 * s for s in known]), 1)
