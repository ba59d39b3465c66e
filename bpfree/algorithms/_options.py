"""Options of learners that are given by name or as an object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from bpfree.errors import UsageError, unknown_name

Option = TypeVar("Option")
Function = TypeVar("Function", bound=Callable[..., Any])


def chosen(kind: str, given: Any, known: Mapping[str, Option], *own: type) -> Option:
    """What an option stands for: one of those with a name, or an object of the caller's own.

    Args:
        kind: the option's name.
        given: a name, or an object.
        known: by name.
        own: of what types an object may be.

    Raises:
        UsageError: another name, or an object of another type.
    """
    if own and isinstance(given, own):
        return cast(Option, given)
    if isinstance(given, str):
        if given in known:
            return known[given]
        raise unknown_name(kind, given, known)
    types = " or a ".join(cls.__name__ for cls in own)
    got = f"the class {given.__name__} itself" if isinstance(given, type) else type(given).__name__
    raise UsageError(f"{kind} must be one of {', '.join(known)}, or a {types}; got {got}")


def chosen_function(kind: str, given: Any, known: Mapping[str, Function]) -> tuple[str, Function]:
    """The name of a function, and the function that an option stands for: a known one, or the caller's own.

    Raises:
        UsageError: another name, or what cannot be called.
    """
    if callable(given):
        return getattr(given, "__name__", type(given).__name__), cast(Function, given)
    if isinstance(given, str):
        return given, chosen(kind, given, known)
    raise UsageError(f"{kind} must be one of {', '.join(known)}, or a function; got {type(given).__name__}")


def option_name(given: Any) -> str:
    """The name by which an option was given, or that of the object's type."""
    return given if isinstance(given, str) else type(given).__name__
