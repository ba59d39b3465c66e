"""The examples in the documentation run and do what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

from examples import embed, energy, large_graph


def test_embedding_loop_learns_the_digits() -> None:
    assert embed.main(epochs=8) > 0.9


def test_measuring_example_tells_joules_or_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    energy.main()
    told = capsys.readouterr().out
    assert (" J by " in told and "inference: " in told) or "energy not measured: " in told


def test_a_graph_in_parts_is_learnt() -> None:
    pytest.importorskip("torch_geometric")
    assert large_graph.main(epochs=10) > 0.7


@pytest.mark.parametrize(
    "module",
    [
        "backprop",
        "competitive_forward",
        "direct_feedback",
        "forward_forward",
        "forward_gnn",
        "mono_forward",
        "noprop",
        "noprop_backprop",
    ],
)
def test_docstring_examples(module: str) -> None:
    loaded = importlib.import_module(f"bpfree.algorithms.{module}")
    result = doctest.testmod(loaded)
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_of_pages() -> None:
    torch.manual_seed(0)
    page = Path(__file__).parents[1] / "docs" / "algorithms" / "forward_forward.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0
