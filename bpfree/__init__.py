"""bpfree: train neural networks without back-propagation, and measure what that costs and saves.

learner = bpfree.MonoForward(my_blocks, classes=10, lr=1e-3)
for x, y in my_loader:
    learner.step((x, y))
accuracy = (learner.scores(x_test).argmax(1) == y_test).float().mean()
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpfree._public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name, or a part of the package, imported when it is first asked for.

    PyTorch takes seconds to import, and the command has to answer to Ctrl-C before.
    """
    if name == "__all__":
        return import_module("bpfree._public").__all__
    if not name.startswith("_"):
        if find_spec(f"bpfree.{name}") is not None:
            return import_module(f"bpfree.{name}")
        public = import_module("bpfree._public")
        if name in public.__all__:
            return getattr(public, name)
    raise AttributeError(f"module 'bpfree' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("bpfree._public").__all__})
