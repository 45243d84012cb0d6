"""Experiments that are not in the paper: one row per method, compared seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..common.output import difference_text, plus_minus
from ..common.statistics import mean_std
from ..protocols import EXPERIMENTS, METHODS
from .cells import (
    Chosen,
    choose_runs,
    notes_on_choices,
    notes_on_differences,
    seed_differences,
)
from .runs import Cell, Run

__all__ = ["PAPER", "other_experiments", "other_rows"]

PAPER = ("table", "figure")  # what the paper's recipes begin with


def other_experiments(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the trained runs of recipes that are no table or figure of the paper, by recipe."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if not run["recipe"].startswith(PAPER) and not run["timing"]:
            found.setdefault(run["recipe"], []).append(run)
    return dict(sorted(found.items()))


def other_rows(recipe: str, runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row per cell (last and best epoch, difference to a baseline), and notes.

    Raises:
        RunError: runs of a cell contradict each other.
    """
    # Methods as the experiment has them, then those that only its runs have.
    order = [*getattr(EXPERIMENTS.get(recipe), "methods", ()), *METHODS]
    cells = sorted(
        {run.cell for run in runs},
        key=lambda c: (c.dataset, c.model, c.noise, order.index(c.method)),
    )
    chosen = {cell: choose_runs(runs, cell, recipe) for cell in cells}
    rows = [cell_row(cell, chosen) for cell in cells if chosen[cell].runs]
    compared = [
        (cell, chosen[cell], against, chosen[against])
        for cell in cells
        if (against := _baseline_of(cell, chosen))
    ]
    return rows, [*notes_on_choices(chosen.values()), *notes_on_differences(compared)]


def _baseline_of(cell: Cell, chosen: dict[Cell, Chosen]) -> Cell | None:
    """Return the cell that a cell is compared with, if there is one."""
    named = (cell.with_method(m) for m in baselines_of(cell.method))
    return next((against for against in named if against in chosen), None)


def cell_row(cell: Cell, chosen: dict[Cell, Chosen]) -> dict[str, Any]:
    """Return the row of a cell."""
    mine = chosen[cell]
    last, best = mine.numbers_by_seed("last"), mine.numbers_by_seed("best")
    against = _baseline_of(cell, chosen)
    found = against and seed_differences(mine, chosen[against], "last")
    minus = found and difference_text(found)
    metric = next(iter(mine.runs.values()))["metric"].replace("_", " ")
    return {
        "dataset": cell.dataset + f", noise {cell.noise:g}" * bool(cell.noise),
        "network": cell.model,
        "method": cell.method,
        "metric": metric,
        "seeds": len(mine.runs),
        "last epoch": _mean_text(last),
        "best epoch": _mean_text(best),
        "last epoch minus": f"{against.method}: {minus} ({len(found['seeds'])})"
        if against and found
        else None,
        "changed by hand": ", ".join(mine.changed_settings) or None,
    }


def baselines_of(method: str) -> list[str]:
    """Return what a method is compared with, the best comparison first.

    Example:
        >>> baselines_of("LLQR+F-SAM (NGD)"), baselines_of("SAM"), baselines_of("SGDM")
        (['F-SAM'], ['SGDM', 'AdamW'], [])
    """
    about = METHODS[method]
    if about.metric and about.probe:
        return [n for n, m in METHODS.items() if m.probe == about.probe and not m.metric]
    return ["SGDM", "AdamW"] if about.metric or about.probe else []


def _mean_text(values: dict[int, float]) -> str | None:
    mean, std = mean_std(values.values())
    return None if mean is None else plus_minus(mean, std)
