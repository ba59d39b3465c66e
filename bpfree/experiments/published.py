"""Published tables, shipped as data: what a study says, beside what we measure. See published/README.md."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import Final

SOURCES: Final = {
    "s1": "Spyra 2025, arXiv 2509.19063 (A100, n = 3)",
    "s3": "Spyra and Dzwinel 2026, arXiv 2511.01061, PPAM version (A100)",
}


@cache
def published(name: str) -> tuple[dict[str, str], ...]:
    """Rows of a published table, every number as printed: "s1", "s1_changes", "s3_matched", "s3_own", "s3_ladder"."""
    file = resources.files("bpfree.experiments") / "published" / f"{name}.csv"
    return tuple(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def number(text: str) -> float | None:
    """A printed number; None where the table has none."""
    return float(text) if text else None
