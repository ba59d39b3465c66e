"""Where kernels of our own come from, and where there are none."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def triton_kernels(module: str) -> ModuleType | None:
    """A module of CUDA kernels by its full name, or None where Triton is missing."""
    try:
        return import_module(module)
    except ImportError:
        return None
