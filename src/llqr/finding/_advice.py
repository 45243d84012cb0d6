"""A table that a person reads, with a sentence about what to try."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from ..sharpness import Measurement

__all__ = ["AdvisedTable", "number_text"]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class AdvisedTable(Measurement):
    """What was tried, and what to try next (base class).

    Attributes:
        advice: a sentence or two.
    """

    advice: str

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def number_text(value: float | None, digits: int = 3) -> str:
    """Return a number as a table shows it, and "-" for none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}g}"
