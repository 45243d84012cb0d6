"""Experiments that are none of the paper's: a row a method, compared seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..common.output import plus_minus
from ..common.statistics import mean_std
from ..protocols import EXPERIMENTS, METHODS
from .cells import Chosen, choose, difference
from .runs import Cell, Run

__all__ = ["PAPER", "other_rows", "others"]

PAPER = ("table", "figure")  # what the paper's recipes begin with


def others(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the trained runs of recipes that are no table or figure of the paper, by recipe."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if not run["recipe"].startswith(PAPER) and not run["timing"]:
            found.setdefault(run["recipe"], []).append(run)
    return dict(sorted(found.items()))


def other_rows(recipe: str, runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row a cell (last and best epoch, difference to a baseline), and notes.

    Raises:
        RunError: runs of a cell contradict each other.
    """
    order = [*getattr(EXPERIMENTS.get(recipe), "methods", ()), *METHODS]
    cells = sorted(
        {run.cell for run in runs},
        key=lambda c: (c.dataset, c.model, c.noise, order.index(c.method)),
    )
    chosen = {cell: choose(runs, cell, recipe) for cell in cells}
    rows = [row(cell, chosen) for cell in cells if chosen[cell].runs]
    return rows, [note for c in chosen.values() for note in c.notes]


def row(cell: Cell, chosen: dict[Cell, Chosen]) -> dict[str, Any]:
    """Return the row of a cell."""
    mine = chosen[cell]
    last, best = mine.values("last"), mine.values("best")
    baseline = next((m for m in baselines(cell.method) if _at(cell, m) in chosen), None)
    found = baseline and difference(mine, chosen[_at(cell, baseline)], "last")
    minus = found and plus_minus(found["mean"], found["standard_error"], "+")
    metric = next(iter(mine.runs.values()))["metric"].replace("_", " ")
    return {
        "dataset": cell.dataset + f", noise {cell.noise:g}" * bool(cell.noise),
        "network": cell.model,
        "method": cell.method,
        "metric": metric,
        "seeds": len(mine.runs),
        "last epoch": _said(last),
        "best epoch": _said(best),
        "last epoch minus": f"{baseline}: {minus} ({len(found['seeds'])})" if found else None,
        "changed by hand": ", ".join(mine.changed) or None,
    }


def baselines(method: str) -> list[str]:
    """Return what a method is compared with, the best comparison first.

    Example:
        >>> baselines("LLQR+F-SAM (NGD)"), baselines("SAM"), baselines("SGDM")
        (['F-SAM'], ['SGDM', 'AdamW'], [])
    """
    about = METHODS[method]
    if about.curvature and about.probe:
        return [n for n, m in METHODS.items() if m.probe == about.probe and not m.curvature]
    return ["SGDM", "AdamW"] if about.curvature or about.probe else []


def _at(cell: Cell, method: str) -> Cell:
    return Cell(cell.dataset, cell.model, method, cell.noise)


def _said(values: dict[int, float]) -> str | None:
    mean, std = mean_std(values.values())
    return None if mean is None else plus_minus(mean, std)
