"""Adding results, and what follows from the stored numbers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfree.energy import EnergyResult, Flag, Regime, explain
from bpfree.errors import UsageError

numbers = st.floats(0, 1e6)


def result(gross_j: float | None = 3600.0, seconds: float = 36.0, **fields: object) -> EnergyResult:
    return EnergyResult(gross_j, seconds, "nvml-counter", "gpu board", **fields)  # type: ignore[arg-type]


def test_derived_numbers() -> None:
    measured = result(idle_w=75.0, regime=Regime(power_limit_w=400))
    assert (measured.wh, measured.mean_w, measured.net_j, measured.power_share) == (1.0, 100.0, 900.0, 0.25)


def test_negative_net_energy_is_not_clipped() -> None:
    assert result(idle_w=150.0).net_j == -1800


def test_what_is_unknown_stays_unknown() -> None:
    unknown = result(None)
    assert (unknown.wh, unknown.mean_w, unknown.net_j, unknown.power_share) == (None, None, None, None)
    assert result().net_j is None
    assert result(0.0, 0.0).mean_w is None


@given(numbers, numbers, numbers, numbers, numbers, numbers)
def test_a_resumed_run_is_the_sum_of_its_parts(
    j1: float, s1: float, i1: float, j2: float, s2: float, i2: float
) -> None:
    parts = [result(j1, s1, idle_w=i1, windows=2), result(j2, s2, idle_w=i2, windows=3)]
    total = parts[0] + parts[1]
    assert total.gross_j == pytest.approx(j1 + j2)
    assert total.seconds == pytest.approx(s1 + s2)
    assert total.net_j == pytest.approx((j1 - i1 * s1) + (j2 - i2 * s2), abs=1e-3)
    assert total.windows == 5


def test_flags_are_united_and_ordered() -> None:
    total = result(flags=("THROTTLED", "SIMULATED")) + result(flags=("SHORT_WINDOW", "THROTTLED"))
    assert total.flags == ("SHORT_WINDOW", "THROTTLED", "SIMULATED")


def test_an_unmeasured_part_makes_the_sum_unknown_not_small() -> None:
    assert (result() + result(None)).gross_j is None
    assert (result(idle_w=1.0) + result()).net_j is None


def test_a_sum_of_two_methods_names_both() -> None:
    traced = EnergyResult(1.0, 1.0, "nvml-power-instant", "gpu board")
    assert (result() + traced).method == "nvml-counter + nvml-power-instant"
    assert (result() + traced + result()).method == "nvml-counter + nvml-power-instant"
    assert (result() + result()).scope == "gpu board"


def test_regimes_are_weighted_by_time() -> None:
    first = result(seconds=30.0, regime=Regime(0.75, 1980, 700, 40, 60))
    second = result(seconds=10.0, regime=Regime(0.25, 1780, 700, 55, 70))
    assert (first + second).regime == Regime(0.625, 1930, 700, 40, 70)


def test_only_results_are_added() -> None:
    with pytest.raises(TypeError):
        result() + 1.0  # type: ignore[operator]


def test_round_trip_through_json() -> None:
    original = result(idle_w=70.0, windows=4, flags=("THROTTLED",), regime=Regime(utilisation=0.5))
    record = json.loads(json.dumps(original.as_dict()))
    assert EnergyResult.from_dict(record) == original
    assert record["net_j"] == original.net_j
    with pytest.raises(KeyError):
        EnergyResult.from_dict({"gross_j": 1.0})


def test_every_flag_has_its_own_explanation() -> None:
    assert len({explain(name) for name in Flag.__members__}) == len(Flag.__members__) == 14
    assert "minimum window" in explain("SHORT_WINDOW")
    with pytest.raises(UsageError, match="did you mean SHORT_WINDOW"):
        explain("SHORT_WINDOWS")
