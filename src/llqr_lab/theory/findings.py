"""What a check of a statement returns: what the paper says, what was measured, what follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ERRATUM", "Finding", "HOLDS", "LIMITS"]

HOLDS = "holds"
LIMITS = "holds with limits"
ERRATUM = "erratum"
REFUTED = "NOT CONFIRMED"


@dataclass(frozen=True)
class Finding:
    """One statement and its check.

    Attributes:
        source: where the paper has it.
        statement: what was checked, in a line.
        says: ``HOLDS``, ``LIMITS`` or ``ERRATUM``: what the check set out to show.
        confirmed: whether the measured numbers show it.
        measured: name -> number.
        note: the limit or the correction, in a sentence or two.
        curve: series of equal length for a picture; the first is drawn along x, the ones whose
            name begins with "measured" as marks, others as lines.
        drawn: the same words as a picture has them, with maths as maths: ``title``, ``y``, and
            the names of the series.
    """

    source: str
    statement: str
    says: str
    confirmed: bool
    measured: dict[str, int | float] = field(default_factory=dict)
    note: str = ""
    curve: dict[str, list[float]] = field(default_factory=dict)
    drawn: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """What is said, if the numbers show it."""
        return self.says if self.confirmed else REFUTED

    def plain_row(self) -> dict[str, Any]:
        """Return plain data for CSV and print."""
        numbers = "; ".join(
            f"{name}: {_number_text(value)}" for name, value in self.measured.items()
        )
        return {
            "source": self.source,
            "statement": self.statement,
            "verdict": self.verdict,
            "measured": numbers,
            "note": self.note,
        }


def _number_text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
