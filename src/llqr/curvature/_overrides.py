"""Functions written in Python, with function modes on in their body."""

from __future__ import annotations

from types import FunctionType
from typing import Any

__all__ = ["without_look_for_modes"]


def without_look_for_modes(func: Any) -> FunctionType:
    """Return a copy that does not hand itself to function modes, and so runs its body under them.

    torch leaves a mode out while it handles a function; the body's own calls would pass it by.
    """
    looks = "has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"
    names = {**func.__globals__, **dict.fromkeys(looks, _no)}
    copy = FunctionType(func.__code__, names, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _no(*_: Any) -> bool:
    return False
