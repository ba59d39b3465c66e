"""One learner on several processes: consecutive blocks, independent blocks, or parts of each batch.

`algorithms` knows nothing of this package; the fit loop sees a `Team`. Processes are torchrun's.
"""

from bpfree.parallel.ranks import LostRankError, Ranks, is_leader, launched
from bpfree.parallel.spread import FORMS, Spread, check_spread, spread_over
from bpfree.parallel.team import Alone, Team

__all__ = [
    "FORMS",
    "Alone",
    "LostRankError",
    "Ranks",
    "Spread",
    "Team",
    "check_spread",
    "is_leader",
    "launched",
    "spread_over",
]
