"""The settings of LLQR: what is allowed, and what each value must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .._checks import Schedule, at, check_choice, check_flags, check_integer, check_number
from ..curvature import check_scale
from ._layers import STRUCTURES
from ._solver import SOLVERS

__all__ = ["StructureOf", "at_step", "check_settings", "check_structure"]

StructureOf = str | Callable[[str, Tensor], str]

# The settings that may be functions of the step, and their ranges.
SCHEDULED: dict[str, dict[str, Any]] = {
    "every": {"low": 1},
    "lr": {"low": 0, "open_low": True},
    "ema": {"low": 0, "high": 1},
}


def at_step(settings: Mapping[str, Any], name: str, step: int) -> float:
    """Return the value of a setting at an optimizer step; refuse one out of range."""
    value = at(settings[name], step)
    check_number(name, value, **SCHEDULED[name])
    return value


def check_structure(structure: StructureOf) -> None:
    """Refuse what is neither a structure's name nor a callable."""
    if not callable(structure) and structure not in STRUCTURES:
        raise ValueError(
            f"structure: expected one of {', '.join(STRUCTURES)} or a callable (name, parameter) "
            f"-> name, got {structure!r}"
        )


def check_settings(
    *,
    every: Schedule,
    steps: int,
    lr: Schedule,
    momentum: float,
    clip: float | None,
    ema: Schedule,
    damping: float,
    scale: str | float,
    bases: str,
    constraint: str,
    bounds: Sequence[float],
    block_size: int | None,
    tolerance: float,
    solver: str,
    start: int,
    max_failures: int,
    renew_every: int,
    shard: bool,
    micro_batch: int | None,
    application: str,
) -> None:
    """Refuse values out of range, naming the argument and the value."""
    for name, value in {"every": every, "lr": lr, "ema": ema}.items():
        check_number(name, value, **SCHEDULED[name], schedule=True)
    check_integer("steps", steps, low=1)
    check_flags(shard=shard)
    check_number("momentum", momentum, low=0, high=1)
    if clip is not None:
        check_number("clip", clip, low=0, open_low=True)
    check_number("damping", damping, low=0)
    check_scale(scale)
    check_choice("bases", bases, ("learned", "gradient"))
    check_choice("constraint", constraint, ("positive", "square", "none"))
    check_choice("solver", solver, tuple(SOLVERS))
    check_choice("application", application, ("full", "bfloat16"))
    pair = len(bounds) == 2 and all(isinstance(b, (int, float)) for b in bounds)
    if not (pair and 0 < bounds[0] <= 1 <= bounds[1] < math.inf and bounds[0] < bounds[1]):
        raise ValueError(
            "bounds: expected (u_min, u_max) with 0 < u_min <= 1 <= u_max (U starts at the "
            f"identity), got {bounds!r}"
        )
    if block_size is not None:
        check_integer("block_size", block_size, low=1)
    if not isinstance(tolerance, (int, float)) or not (tolerance == 0 or 1e-8 <= tolerance < 1):
        raise ValueError(
            "tolerance: expected 0 (every product is computed) or a number in [1e-8, 1), "
            f"got {tolerance!r}"
        )
    check_integer("start", start, low=0)
    check_integer("max_failures", max_failures, low=0)
    check_integer("renew_every", renew_every, low=1)
    if micro_batch is not None:
        check_integer("micro_batch", micro_batch, low=1)
