"""The plain list of runs: what counts for accuracy and what for time and joules."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpfree.experiments.collect import collect
from bpfree.experiments.tables import readable, result_rows
from tests.experiments.synthetic import make_run

SHARED = ("FOREIGN_PROCESS",)
COSTS = ("time, s", "energy, J", "net, J", "mean power, W", "GPU busy, %")


def test_a_run_that_shared_its_board_counts_for_accuracy_alone(tmp_path: Path) -> None:
    make_run(tmp_path, "mf", 0, accuracy=60.0, joules=1000.0, seconds=10.0)
    make_run(tmp_path, "mf", 1, accuracy=64.0, joules=5000.0, seconds=40.0, flags=SHARED)
    make_run(tmp_path, "mf", 1, accuracy=66.0, joules=1200.0, seconds=14.0)
    make_run(tmp_path, "mf", 2, accuracy=67.0, joules=9000.0, seconds=90.0, utilisation=0.1, flags=SHARED)
    rows = result_rows(tmp_path)
    (cells,) = readable(rows)
    assert rows[0]["test_accuracy_mean"] == pytest.approx((60 + 65 + 67) / 3)
    assert (rows[0]["n"], rows[0]["n_apart"]) == (3, 2)
    assert [cells[name] for name in COSTS] == [
        "12.0 (n = 2)",
        "1100 (n = 2)",
        "860 (n = 2)",
        f"{(100 + 1200 / 14) / 2:.0f} (n = 2)",
        "95",
    ]
    assert "FOREIGN_PROCESS" in cells["flags"]


def test_a_row_of_runs_that_all_shared_the_board_has_no_time_and_no_joules(tmp_path: Path) -> None:
    make_run(tmp_path, "mf", 0, flags=SHARED)
    (cells,) = readable(result_rows(tmp_path))
    assert [cells[name] for name in COSTS] == ["", "not measured", "", "", ""]
    assert cells["test accuracy, %"] == "60.00"


def test_comparisons_leave_time_and_joules_of_a_shared_board_out(tmp_path: Path) -> None:
    make_run(tmp_path, "mf", 0)
    make_run(tmp_path, "mf", 1, flags=SHARED)
    (entry,) = collect(tmp_path)
    for quantity in ("seconds", "gross_j", "net_j", "mean_w", "j_per_sample", "utilisation"):
        assert entry.per_seed(quantity).keys() == {0}, quantity
    for quantity in ("accuracy", "passes", "flops", "allocator_mib"):
        assert entry.per_seed(quantity).keys() == {0, 1}, quantity
    curves = [entry.runs[seed][0].curve() for seed in (0, 1)]
    assert [accuracy for _, accuracy in curves[0]] == [accuracy for _, accuracy in curves[1]]
    assert any(spent is not None for spent, _ in curves[0])
    assert all(spent is None for spent, _ in curves[1])
