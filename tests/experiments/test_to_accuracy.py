"""T7 against Kaplan and Meier's product limit in fractions, on made-up records with runs that never got there."""

from __future__ import annotations

import json
import math
import random
import statistics
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from scipy import stats

from bpfree.cli import cli
from bpfree.experiments.arms import make_arms
from bpfree.experiments.compare import LEDGER, PLAN, Analysis, Ledger, Plan, Slot
from bpfree.experiments.records import RunFolder
from tests.experiments.synthetic import H200, make_run

TARGETS = (52.5, 57.5, 62.5, 67.5, 90.0)
SEEDS = range(12)
LEVELS = (50.0, 55.0, 60.0, 65.0, 70.0)
"""Validation accuracies of a run that goes all the way."""

Story = tuple[float, bool]
"""Joules, and whether the target was reached with them."""


def product_limit(stories: list[Story]) -> float | None:
    """The smallest number of joules by which half got there."""
    left = Fraction(1)
    for at in sorted({spent for spent, done in stories if done}):
        at_risk = sum(spent >= at for spent, _ in stories)
        left *= 1 - Fraction(sum(done and spent == at for spent, done in stories), at_risk)
        if left <= Fraction(1, 2):
            return at
    return None


class Study:
    """A comparison of two arms whose runs are known: joules at each validation by arm and seed, failures."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.curves = root, {"mf": {}, "bp": {}}  # type: ignore[var-annotated]
        draw = random.Random(seed)
        arms = make_arms(["mf@none", "bp@none"], "cifar10", "mlp:3x2000", baseline="bp@none")
        analysis = Analysis(baseline="bp@none", targets=TARGETS[:1])
        RunFolder(root).write_json(PLAN, Plan("cifar10", [H200], arms, list(SEEDS), ["own"], analysis).as_dict())
        self.failed = {"mf": set(draw.sample(SEEDS, 2)), "bp": {3}}
        for arm, rule in zip(arms, ("mf", "bp"), strict=True):
            for number in SEEDS:
                if number in self.failed[rule]:
                    Ledger(root / LEDGER).add("failed", Slot(arm, "own", number, None), reason="loss is nan")
                    continue
                length = draw.choice((1, 2, 3, 4, 5, 5, 5))
                spent = [0.0]
                for _ in range(length):
                    spent.append(spent[-1] + draw.uniform(50, 150) * (1.0 if rule == "bp" else 0.6))
                self.curves[rule][number] = list(zip(spent[1:], LEVELS[:length], strict=True))
                curve = [(joules or None, level) for joules, level in zip(spent[:-1], LEVELS[:length], strict=True)]
                make_run(root / "runs", rule, number, joules=spent[-1], curve=curve)

    def stories(self, rule: str, target: float) -> list[Story]:
        """What became of each run, failed ones with infinite joules."""
        told: list[Story] = [(math.inf, False)] * len(self.failed[rule])
        for curve in self.curves[rule].values():
            got_there = [joules for joules, level in curve if level >= target]
            told.append((got_there[0], True) if got_there else (curve[-1][0], False))
        return told

    def rows(self) -> list[dict[str, Any]]:
        options = [word for target in TARGETS for word in ("--target", str(target))]
        done = CliRunner().invoke(
            cli, ["table", str(self.root), "-t", "T7", "--format", "json", *options], catch_exceptions=False
        )
        rows: list[dict[str, Any]] = json.loads(done.stdout, parse_constant=pytest.fail)[0]["rows"]
        return rows


@pytest.mark.parametrize("seed", range(8))
def test_medians_bounds_and_counts_are_those_of_the_product_limit(seed: int, tmp_path: Path) -> None:
    study = Study(tmp_path, seed)
    rows = study.rows()
    assert [row["target"] for row in rows] == list(TARGETS)
    censored = 0
    for row in rows:
        for whose, rule in (("baseline_", "bp"), ("", "mf")):
            stories = study.stories(rule, row["target"])
            assert (row[f"{whose}k"], row[f"{whose}n"]) == (sum(done for _, done in stories), len(SEEDS))
            assert row[f"{whose}unmeasured"] is None
            whole = all(done for _, done in stories)
            median = statistics.median(spent for spent, _ in stories) if whole else product_limit(stories)
            if median is not None and sum(spent >= median for spent, _ in stories) >= 2:
                assert row[f"{whose}median_j"] == pytest.approx(median)
                assert row[f"{whose}bound_j"] is None
                censored += not whole
            else:
                assert row[f"{whose}median_j"] is None
                ends = sorted(spent for spent, _ in stories)
                assert row[f"{whose}bound_j"] == pytest.approx(ends[(len(ends) - 1) // 2])
        assert row["ratio"] is None  # some failed in each arm
    assert censored
    assert rows[-1]["median_j"] is rows[-1]["baseline_median_j"] is None  # nobody is at 90 %


def test_the_ratio_is_that_of_pairs_once_all_got_there(tmp_path: Path) -> None:
    draw = random.Random(1)
    spent = {rule: [draw.uniform(80, 120) * factor for _ in range(7)] for rule, factor in (("bp", 1.0), ("mf", 0.7))}
    for rule, joules in spent.items():
        for seed, at in enumerate(joules):
            # on the way back below the target, and beyond it for longer: neither counts
            make_run(tmp_path, rule, seed, joules=900, curve=[(None, 40), (at / 2, 60), (at, 55), (2 * at, 70)])
    done = CliRunner().invoke(cli, ["table", str(tmp_path), "-t", "T7", "--format", "json", "--target", "58"])
    (row,) = json.loads(done.stdout)[0]["rows"]
    logs = [math.log(a / b) for a, b in zip(spent["mf"], spent["bp"], strict=True)]
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert row["ratio"] == pytest.approx(math.exp(sum(logs) / 7))
    assert (row["ratio_low"], row["ratio_high"]) == (pytest.approx(math.exp(low)), pytest.approx(math.exp(high)))
    assert row["median_j"] == pytest.approx(sorted(spent["mf"])[3])


def test_an_arm_that_mostly_fails_has_no_median_of_its_survivors(tmp_path: Path) -> None:
    """Three of eight got there, five failed: half of the runs never get there, whatever they are given."""
    arms = make_arms(["mf@none", "bp@none"], "cifar10", "mlp:3x2000", baseline="bp@none")
    analysis = Analysis(baseline="bp@none", targets=(55.0,))
    RunFolder(tmp_path).write_json(PLAN, Plan("cifar10", [H200], arms, list(range(8)), ["own"], analysis).as_dict())
    for seed in range(8):
        make_run(tmp_path / "runs", "bp", seed, joules=1000, curve=[(None, 60)])
        if seed < 3:
            make_run(tmp_path / "runs", "mf", seed, joules=10 * (seed + 1), curve=[(None, 60)])
        else:
            Ledger(tmp_path / LEDGER).add("failed", Slot(arms[0], "own", seed, None), reason="loss is nan")
    done = CliRunner().invoke(cli, ["table", str(tmp_path), "-t", "T7", "--format", "json"], catch_exceptions=False)
    (row,) = json.loads(done.stdout, parse_constant=pytest.fail)[0]["rows"]
    assert (row["k"], row["n"], row["median_j"], row["bound_j"]) == (3, 8, None, 20)
    assert (row["baseline_k"], row["baseline_median_j"]) == (8, 1000)


def test_the_baseline_is_over_the_seeds_of_the_arm_that_it_is_beside(tmp_path: Path) -> None:
    arms = make_arms(["mf@none", "bp@none"], "cifar10", "mlp:3x2000", baseline="bp@none")
    analysis = Analysis(baseline="bp@none", targets=(55.0,))
    RunFolder(tmp_path).write_json(PLAN, Plan("cifar10", [H200], arms, list(range(6)), ["own"], analysis).as_dict())
    for seed in range(5):
        make_run(tmp_path / "runs", "bp", seed, joules=1000, curve=[(None, 60)])
        if seed < 2:
            make_run(tmp_path / "runs", "mf", seed, joules=500, curve=[(None, 60)])
    Ledger(tmp_path / LEDGER).add("failed", Slot(arms[1], "own", 5, None), reason="loss is nan")
    done = CliRunner().invoke(cli, ["table", str(tmp_path), "-t", "T7", "--format", "json"], catch_exceptions=False)
    (row,) = json.loads(done.stdout)[0]["rows"]
    assert (row["k"], row["n"], row["baseline_k"], row["baseline_n"]) == (2, 2, 2, 2)
    assert row["ratio"] == pytest.approx(0.5)
