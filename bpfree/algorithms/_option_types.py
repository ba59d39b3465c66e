"""Whether the options that a learner is made with are of the types that its constructor names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from bpfree.errors import UsageError

WORDS: Final[dict[type, str]] = {float: "a number", int: "a whole number", bool: "true or false", str: "a name"}
"""What values of a type are, as people say it."""


def check_options(made: type, options: Mapping[str, Any]) -> None:
    """Refuse keyword arguments of a class that are of another type than its constructor says, or not finite.

    Names that the constructor does not have are left to Python, objects and functions to whoever uses them.

    Raises:
        UsageError: one of them is.
    """
    check_types(_keywords(made), options)
    for name, value in options.items():
        if isinstance(value, Real) and not math.isfinite(value):
            raise UsageError(f"{name} must be a finite number, got {value}")


def check_types(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse values of another type than annotations say, where these are of numbers and names.

    Raises:
        UsageError: one of them is.
    """
    for name, value in given.items():
        kinds = _kinds(wanted.get(name, object))
        if all(map(_is_plain, kinds)) and not any(_is_of(value, kind) for kind in kinds):
            raise UsageError(f"{name} must be {' or '.join(filter(None, map(_words, kinds)))}, got {value!r}")


@cache
def _keywords(made: type) -> dict[str, Any]:
    """Annotations of keyword arguments; `input_shape` is looked at where the network is."""
    constructor: Callable[..., None] = made.__init__  # type: ignore[misc]
    try:
        hints = get_type_hints(constructor)
    except NameError:  # of a learner that a user has written inside a function
        return {}
    parameters = inspect.signature(constructor).parameters.values()
    names = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name != "input_shape"]
    return {name: hints[name] for name in names if name in hints}


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """What an annotation is a union of."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for part in get_args(annotation) for kind in _kinds(part))
    return (annotation,)


def _is_plain(kind: Any) -> bool:
    return kind in (*WORDS, NoneType) or get_origin(kind) is Literal


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:  # rules say themselves which names they know
        return type(value) in {type(choice) for choice in get_args(kind)}
    if kind is float:  # of PyTorch's optimisers, rates may be tensors
        return (isinstance(value, Real) and not isinstance(value, bool)) or isinstance(value, Tensor)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    return WORDS.get(kind, "")  # None is what an option is that was left out
