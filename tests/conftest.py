"""Shared fixtures, and what is skipped where a GPU or the full data sets are missing."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.seeds import manual_seed

torch.set_num_threads(1)  # tests run in parallel, and on small matrices
os.environ["OMP_NUM_THREADS"] = "1"  # so do processes that they start, whose threads would wait for each other
settings.register_profile("bpfree", deadline=None)  # a machine that is busy elsewhere is no defect
settings.load_profile("bpfree")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    without_data = pytest.mark.skip(reason="needs the full data sets: set BPFREE_DATA")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)
        if item.get_closest_marker("data") and not os.environ.get("BPFREE_DATA"):
            item.add_marker(without_data)


def pytest_collection_finish() -> None:
    """Thousands of tests and PyTorch's own objects stay to the end: no collection of garbage looks at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    manual_seed(0)


@pytest.fixture(autouse=True)
def _no_calibration_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BPFREE_CALIBRATION", str(tmp_path / "calibration"))
