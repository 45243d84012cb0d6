"""Small curves of each run for the report, as points of inline SVG: training and refreshes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ..common.refreshes import INACTIVE
from .runs import Run

__all__ = ["curves_by_cell", "panels_of"]

WIDTH, HEIGHT = 200.0, 90.0  # of a panel's frame, in the units of the SVG
Values = Sequence[tuple[float, float | None]]


def curves_by_cell(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the trained runs by cell, each with its panels."""

    def name_of(run: Run) -> tuple[str, ...]:
        noise = f", noise {run['noise']:g}" * bool(run["noise"])
        return (run["recipe"], run["dataset"] + noise, run["model"], run["method"])

    trained = sorted((r for r in runs if r["epochs"]), key=lambda r: (*name_of(r), r["seed"]))
    cells = []
    for name, members in groupby(trained, name_of):
        shown = [
            {"name": f"seed {run['seed']}", "folder": str(run.folder), "panels": panels_of(run)}
            for run in members
        ]
        cells.append({"title": ", ".join(name), "runs": shown})
    return cells


def panels_of(run: Run) -> list[dict[str, Any]]:
    """Return the panels of a run: its losses and metric by epoch, its refreshes by step."""
    metric = run["metric"]
    names = dict.fromkeys(("train_loss", metric))
    panels = []
    for name in names:
        values = [(e["epoch"], e.get(name)) for e in run["epochs"]]
        panels.append(panel_of(name.replace("_", " "), "epoch", [values]))
    reports = run["refreshes"] or []
    if reports:

        def by_step(name: str) -> list[tuple[float, float | None]]:
            return [(r["step"], r.get(name)) for r in reports]

        refused = [r["step"] for r in reports if not r["accepted"]]
        change = panel_of("|Ug-g|/|g| of each refresh", "step", [by_step("change")], INACTIVE)
        change["note"] = f"{len(refused)} of {len(reports)} refused" if refused else ""
        extremes = [by_step("eigenvalue_min"), by_step("eigenvalue_max")]
        panels += [change, panel_of("extreme eigenvalues of U", "step", extremes, 1.0, log=True)]
    return [panel for panel in panels if panel["lines"]]


def panel_of(
    title: str, along: str, lines: Sequence[Values], level: float | None = None, log: bool = False
) -> dict[str, Any]:
    """Return a panel: its lines as points in the frame, and what its edges mean.

    Args:
        title: what goes up.
        along: what goes to the right.
        lines: of (x, y); what is not finite is left out.
        level: a height that is marked, if the values reach it.
        log: whether heights are logarithms.
    """

    def height(y: float) -> float:
        return math.log10(y) if log else y

    known = [
        [(x, y) for x, y in line if y is not None and math.isfinite(y) and (y > 0 or not log)]
        for line in lines
    ]
    known = [line for line in known if line]
    xs = [x for line in known for x, _ in line]
    ys = [y for line in known for _, y in line]
    if not ys:
        return {"title": title, "lines": []}
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    across = (right - left) or 1.0
    up = (height(high) - height(low)) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        part = (height(y) - height(low)) / up if high > low else 0.5
        return WIDTH * (x - left) / across, HEIGHT * (1 - part)

    return {
        "title": title + " (logarithmic)" * log,
        "along": along,
        "lines": [[place(x, y) for x, y in line] for line in known],
        "left": left,
        "right": right,
        "low": low,
        "high": high,
        "level": place(left, level)[1] if level is not None and low < level < high else None,
        "note": "",
    }
