"""Where kernels of our own come from, where there are none, and how they share out sums."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


def shares(rows: int, tall: int, programs: int) -> tuple[int, int]:
    """How programs add up rows, `tall` of them at once.

    Returns:
        How many rows one adds up, a multiple of `tall`, and how many programs that makes, at most `programs`.
    """
    share = tall * -(-rows // (tall * programs))
    return share, -(-rows // share)


@cache
def triton_kernels(module: str) -> ModuleType | None:
    """A module of CUDA kernels by its full name, or None where Triton is missing."""
    try:
        return import_module(module)
    except ImportError:
        return None
