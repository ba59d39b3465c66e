"""PyTorch's seed, without what it costs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

manual_seed: Final[Callable[[int], torch.Generator]] = (
    torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
)
"""`torch.manual_seed`; it notes a stack trace for every kind of GPU that is not there, and keeps all of them."""
