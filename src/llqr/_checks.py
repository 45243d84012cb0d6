"""Checks of argument values: errors name the argument, the value and what is expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, get_args

__all__ = [
    "Schedule",
    "check_choice",
    "check_flags",
    "check_integer",
    "check_number",
    "short_repr",
    "value_at_step",
]

#: A number, or a function of the optimizer step.
Schedule = float | Callable[[int], float]


def value_at_step(value: Schedule, step: int) -> float:
    """Return a setting's value at an optimizer step."""
    return value(step) if callable(value) else value


def short_repr(value: Any) -> str:
    """Return a value's repr, or the name of its type if that takes more than a part of a line."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"<{type(value).__name__}>"


def check_integer(name: str, value: Any, *, low: int) -> None:
    """Refuse what is not an integer >= low."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {short_repr(value)}")


def check_number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    schedule: bool = False,
) -> None:
    """Refuse what is not a number in [low, high), or in (low, high) with ``open_low``.

    With ``schedule`` a function of the step passes; its values are not known yet.
    """
    if schedule and callable(value):
        return
    good = isinstance(value, Real) and not isinstance(value, bool)
    good = good and (low < value if open_low else low <= value) and value < high
    if not good:
        sign = ">" if open_low else ">="
        limit = "" if high == math.inf else f" and < {high}"
        also = " or a function of the step" if schedule else ""
        raise ValueError(
            f"{name}: expected a number {sign} {low}{limit}{also}, got {short_repr(value)}"
        )


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Refuse what is not one of the strings of a ``Literal`` type."""
    choices = get_args(allowed)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {short_repr(value)}")


def check_flags(**flags: Any) -> None:
    """Refuse what is neither True nor False: a string such as "False" would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {short_repr(value)}")
