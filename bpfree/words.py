"""Numbers in sentences."""

from __future__ import annotations


def count_of(number: int, thing: str) -> str:
    """A number of things, whose name takes an s where there is not just one.

    Example:
        >>> count_of(1, "pass"), count_of(2, "pass"), count_of(0, "trial")
        ('1 pass', '2 passes', '0 trials')
    """
    plural = thing + ("es" if thing.endswith("s") else "s")
    return f"{number} {thing if number == 1 else plural}"
