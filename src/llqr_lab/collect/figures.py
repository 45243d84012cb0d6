"""The data of a collected figure, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .runs import Run

__all__ = ["Figure"]


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, made of runs.

    Attributes:
        number: the paper's.
        title: what it shows.
        scale: of the runs.
        rows: the numbers drawn, flat and of equal keys.
        facts: what else was computed, for JSON.
        notes: what has to be said, the most important first.
        missing: methods, or networks with them, that no run shows.
        runs: those that were used.
        paint: returns the matplotlib figure.
    """

    number: str
    title: str
    scale: str
    rows: Sequence[dict[str, Any]]
    facts: dict[str, Any]
    notes: Sequence[str]
    missing: Sequence[str]
    runs: Sequence[Run]
    paint: Callable[[], Any]

    def caption(self) -> str:
        """Say in the picture what has to be known to read it."""
        gone = [f"Missing: {', '.join(self.missing)}."] if self.missing else []
        return " ".join([f"{self.title}.", *self.notes, *gone])

    def content(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "figure": self.number,
            "title": self.title,
            "scale": self.scale,
            "comparable": self.scale == "paper",
            **self.facts,
            "rows": list(self.rows),
            "missing": list(self.missing),
            "notes": list(self.notes),
            "runs": [str(run.folder) for run in self.runs],
        }
