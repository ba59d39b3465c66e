"""The examples in the documentation run and do what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

from examples import embed, energy


def test_embedding_loop_learns_the_digits() -> None:
    assert embed.main(epochs=8) > 0.9


def test_measuring_example_tells_joules_or_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    energy.main()
    told = capsys.readouterr().out
    assert (" J by " in told and "inference: " in told) or "energy not measured: " in told


@pytest.mark.parametrize("module", ["bpfree.algorithms.backprop", "bpfree.algorithms.mono_forward"])
def test_docstring_examples(module: str) -> None:
    loaded = importlib.import_module(module)
    result = doctest.testmod(loaded)
    assert result.attempted > 0
    assert result.failed == 0
