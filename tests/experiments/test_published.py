"""The published tables as shipped: complete, and consistent where the papers are."""

from __future__ import annotations

from decimal import Decimal

import pytest

from bpfree.algorithms import algorithm
from bpfree.experiments.published import published
from bpfree.experiments.statistics import relative_change

INCONSISTENT = {
    ("FF-AdamW", "fashion_mnist", "mlp:4x2000", "seconds"),
    ("CaFo-Rand-CE", "mnist", "cnn:cafo", "seconds"),
    ("CaFo-DFA-CE", "mnist", "cnn:cafo", "seconds"),
    ("CaFo-Rand-CE", "fashion_mnist", "cnn:cafo", "seconds"),
    ("CaFo-DFA-CE", "fashion_mnist", "cnn:cafo", "seconds"),
    ("CaFo-DFA-CE", "fashion_mnist", "cnn:cafo", "wh"),
    ("CaFo-Rand-CE", "cifar10", "cnn:cafo", "seconds"),
    ("CaFo-DFA-CE", "cifar10", "cnn:cafo", "seconds"),
    ("CaFo-Rand-CE", "cifar100", "cnn:cafo", "seconds"),
    ("CaFo-Rand-CE", "cifar100", "cnn:cafo", "wh"),
    ("CaFo-DFA-CE", "cifar100", "cnn:cafo", "seconds"),
}
"""Changes that do not follow from the first study's own means, by 0.02 to 14 points beyond rounding."""


def row_name(row: dict[str, str]) -> str:
    return "-".join((row["algorithm"], row["dataset"], row["network"]))


def printed_range(text: str) -> tuple[float, float]:
    """The numbers that are printed as `text`."""
    number = Decimal(text)
    half = Decimal(5).scaleb(int(number.as_tuple().exponent) - 1)
    return float(number - half), float(number + half)


def follows(ours: str, baseline: str, printed: str, *, percent: bool = True) -> bool:
    """Whether numbers that are printed so can have a change, or a ratio, that is printed so."""
    (ours_low, ours_high), (base_low, base_high) = printed_range(ours), printed_range(baseline)
    low, high = printed_range(printed)
    smallest, largest = relative_change(ours_low, base_high), relative_change(ours_high, base_low)
    if not percent:
        smallest, largest = 1 + smallest / 100, 1 + largest / 100
    return smallest <= high and largest >= low


def difference_follows(ours: str, baseline: str, printed: str) -> bool:
    (ours_low, ours_high), (base_low, base_high), (low, high) = map(printed_range, (ours, baseline, printed))
    return ours_low - base_high <= high + 1e-9 and ours_high - base_low >= low - 1e-9


def test_every_row_has_a_baseline_and_a_known_rule() -> None:
    means = published("s1")
    assert (len(means), len(published("s1_changes"))) == (27, 16)
    assert [len(published(f"s3_{table}")) for table in ("matched", "own", "ladder")] == [4, 16, 12]
    baselines = {(row["dataset"], row["network"]) for row in means if row["algorithm"] == "BP"}
    assert {(row["dataset"], row["network"]) for row in means} == baselines
    for table in ("s1", "s3_matched", "s3_own", "s3_ladder"):
        assert all(algorithm(row["rule"]).alias == row["rule"] for row in published(table))


@pytest.mark.parametrize("quantity", ["seconds", "wh", "device_mib"])
@pytest.mark.parametrize(
    "row", published("s1_changes"), ids=lambda r: f"{r['algorithm']}-{r['dataset']}-{r['network']}"
)
def test_changes_of_the_first_study_follow_from_its_means(row: dict[str, str], quantity: str) -> None:
    means = {(mean["algorithm"], mean["dataset"], mean["network"]): mean for mean in published("s1")}
    name, place = row["algorithm"], (row["dataset"], row["network"])
    ours, baseline = means[(name, *place)], means[("BP", *place)]
    expected = (name, *place, quantity) not in INCONSISTENT
    assert follows(ours[quantity], baseline[quantity], row[quantity]) == expected
    assert difference_follows(ours["accuracy"], baseline["accuracy"], row["accuracy"])


def test_the_headline_of_the_first_study() -> None:
    (row,) = (r for r in published("s1_changes") if (r["dataset"], r["network"]) == ("cifar10", "mlp:3x2000"))
    mf, bp = (r for r in published("s1") if (r["dataset"], r["network"]) == ("cifar10", "mlp:3x2000"))
    assert round(relative_change(float(mf["seconds"]), float(bp["seconds"])), 2) == float(row["seconds"]) == -33.81
    assert round(relative_change(float(mf["wh"]), float(bp["wh"])), 2) == -40.75  # printed from unrounded joules:
    assert row["wh"] == "-40.78"


@pytest.mark.parametrize("row", published("s3_matched"), ids=lambda r: r["dataset"])
def test_matched_passes_of_the_second_study(row: dict[str, str]) -> None:
    for quantity in ("wh", "mib", "w"):
        assert follows(row[quantity], row[f"baseline_{quantity}"], row[f"{quantity}_change"])
    assert int(row["stages"]) * (int(row["epochs"]) - 1) < float(row["baseline_passes"])
    assert int(row["stages"]) * int(row["epochs"]) >= float(row["baseline_passes"])


@pytest.mark.parametrize("row", published("s3_own"), ids=row_name)
def test_own_convergence_of_the_second_study(row: dict[str, str]) -> None:
    for quantity in ("wh", "seconds"):
        if row[quantity]:
            assert follows(row[quantity], row[f"baseline_{quantity}"], row[f"{quantity}_ratio"], percent=False)
    if row["accuracy_change"]:
        assert difference_follows(row["accuracy"], row["baseline_accuracy"], row["accuracy_change"])


def test_the_ladder_ends_where_own_convergence_does() -> None:
    own = {(row["dataset"], row["network"]): row for row in published("s3_own") if row["rule"] == "mf"}
    ladder = [row for row in published("s3_ladder") if row["rule"] == "mf"]
    assert len(ladder) == len(own) == 4
    for row in ladder:
        there = own[row["dataset"], row["network"]]
        assert row["accuracy_change"] == there["accuracy_change"]
        assert float(row["wh_percent"]) == 100 * float(there["wh_ratio"])
