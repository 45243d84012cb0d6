"""Figures 1 and 4: how accuracy, loss, BLEU and token error change over training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.drawing import Line, draw_lines, label_lines, line_of, new_figure
from ..common.statistics import mean_std
from ..paper import TABLES
from ..protocols import EXPERIMENTS
from .cadence import describe_machines
from .cells import Chosen, choose_runs, choose_scale, notes_on_choices, used_runs
from .figures import Figure
from .likeness import differences_between
from .runs import Cell, Found
from .tables import notes_of

__all__ = ["collect_figure1", "collect_figure4"]


@dataclass(frozen=True)
class Panel:
    """What a panel shows: a column of the rows, against another."""

    x: str
    y: str
    title: str
    label: str


def top1_error(epoch: Mapping[str, Any]) -> float | None:
    """Return the top-1 error of an epoch, percent."""
    accuracy = epoch.get("test_accuracy")
    return None if accuracy is None else 100 - accuracy


def curve_rows(
    method: str, chosen: Chosen, columns: Mapping[str, Callable[..., Any]]
) -> list[dict]:
    """Return one row per epoch: mean and standard deviation over seeds of each column.

    "seconds" are of steps and refreshes, "elapsed_seconds" with loading and evaluation (None if a
    run did not record them). An epoch where a seed has no finite value has None there.
    """
    by_epoch: dict[int, list[dict[str, Any]]] = {}
    for run in chosen.runs.values():
        for epoch in run["epochs"]:
            by_epoch.setdefault(epoch["epoch"], []).append(epoch)
    rows = []
    for number, epochs in sorted(by_epoch.items()):
        # A mean over fewer seeds would jump where one of them ends.
        if len(epochs) < len(chosen.runs):
            continue
        row: dict[str, Any] = {"method": method, "seeds": len(epochs), "epoch": number}
        row["seconds"] = mean_std(e["seconds"] for e in epochs)[0]
        elapsed = [e.get("elapsed_seconds") for e in epochs]
        row["elapsed_seconds"] = None if None in elapsed else mean_std(elapsed)[0]
        for name, value in columns.items():
            values = [value(e) for e in epochs]
            known = values if all(v is not None for v in values) else []
            row[name], row[f"{name}_std"] = mean_std(known)
        rows.append(row)
    return rows


def collect_curves(
    number: str,
    table: str,
    found: Found,
    asked: str | None,
    columns: Mapping[str, Callable[..., Any]],
    panels: tuple[Panel, Panel],
) -> Figure:
    """Collect the runs of a table that a figure shows by epoch."""
    about = EXPERIMENTS[f"figure{number}"]
    cells = {m: Cell(about.datasets[0], about.models[0], m) for m in about.methods}
    scale, notes = choose_scale(found, cells.values(), asked)
    runs = [run for run in found.runs if run["scale"] == scale]
    chosen = {m: choose_runs(runs, cell, f"table{table}") for m, cell in cells.items()}
    used = used_runs(chosen.values())
    rows = [r for m, c in chosen.items() for r in curve_rows(m, c, columns)]
    notes = [
        *notes_of(scale, used, TABLES[table]["seeds"]),
        "Lines are means over seeds, bands one standard deviation.",
        *describe_machines(used),
        *notes_on_unlike(chosen),
        *notes_on_choices(chosen.values()),
        *notes,
        *found.notes,
    ]
    missing = [m for m, c in chosen.items() if not c.runs]
    facts = {"panels": [vars(panel) for panel in panels]}
    return Figure(
        number,
        about.title,
        scale,
        rows,
        facts,
        notes,
        missing,
        used,
        lambda: paint_curves(rows, panels),
    )


def notes_on_unlike(chosen: Mapping[str, Chosen]) -> list[str]:
    """Say which curves differ from the first in more than their method: they do not compare."""
    examples = {m: c.example for m, c in chosen.items() if c.example is not None}
    notes = []
    for method, run in list(examples.items())[1:]:
        first, against = next(iter(examples.items()))
        if unlike := differences_between(against, run):
            notes.append(f"UNLIKE RUNS: {first} and {method} differ in {', '.join(unlike)}.")
    return notes


def collect_figure1(found: Found, asked: str | None = None) -> Figure:
    """Show ImageNet's error by epoch, and its test loss by time."""
    return collect_curves(
        "1",
        "5",
        found,
        asked,
        {"error": top1_error, "test_loss": lambda e: e.get("test_loss")},
        (
            Panel("epoch", "error", "top-1 error (lower is better)", "test error (%)"),
            Panel(
                "elapsed_seconds", "test_loss", "test loss by time (lower is better)", "test loss"
            ),
        ),
    )


def collect_figure4(found: Found, asked: str | None = None) -> Figure:
    """Show IWSLT14's validation BLEU and token error."""
    return collect_curves(
        "4",
        "6",
        found,
        asked,
        {
            "bleu": lambda e: e.get("bleu"),
            "token_error": lambda e: e.get("token_error"),
            "validation_loss": lambda e: e.get("validation_loss"),
        },
        (
            Panel("epoch", "bleu", "validation BLEU (higher is better)", "BLEU"),
            Panel(
                "epoch",
                "token_error",
                "validation token error (lower is better)",
                "token error (%)",
            ),
        ),
    )


UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
TIMES = {
    "elapsed_seconds": "elapsed time with loading and evaluation",
    "seconds": "time of steps and refreshes only",
}


def paint_curves(rows: list[dict[str, Any]], panels: tuple[Panel, Panel]) -> Any:
    """Draw two panels of curves, each labelled at its end."""
    figure, both = new_figure((1, 2), (13.5, 5.6))
    clock = "seconds" if any(row["elapsed_seconds"] is None for row in rows) else "elapsed_seconds"
    longest = max(row[clock] for row in rows)
    unit, seconds = next((u, s) for u, s in UNITS if longest > 2 * s or s == 1)
    for axes, panel in zip(both, panels, strict=True):
        lines = []
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [r for r in rows if r["method"] == method and r[panel.y] is not None]
            if not mine:
                continue
            timed = panel.x in TIMES
            x = [r[clock] / seconds if timed else r["epoch"] for r in mine]
            y = [r[panel.y] for r in mine]
            std = [r[f"{panel.y}_std"] for r in mine]
            several = all(s is not None for s in std)
            label = f"{method}  {y[-1]:.2f}"
            lines.append(line_of(method, x, y, label, std if several else None))
        draw_lines(axes, lines)
        _zoom_to_ends(axes, lines)
        axes.set_title(panel.title, fontsize=12)
        axes.set_xlabel(f"{TIMES[clock]} ({unit})" if panel.x in TIMES else "epoch", fontsize=11)
        axes.set_ylabel(panel.label, fontsize=11)
        if panel.x == "epoch":
            axes.xaxis.get_major_locator().set_params(integer=True)
        label_lines(axes, lines)
    return figure


def _zoom_to_ends(axes: Any, lines: Sequence[Line]) -> None:
    """Let the first fifth of training leave the picture, so that the ends can be told apart."""
    kept = []
    for line in lines:
        first = math.ceil(len(line.y) / 5) - 1
        std = line.std or [0.0] * len(line.y)
        for y, spread in list(zip(line.y, std, strict=True))[first:]:
            kept += [y - spread, y + spread]  # with the whole band
    if kept:
        margin = 0.06 * (max(kept) - min(kept)) or 1.0
        low = min(kept) - margin
        # No score or error is negative, so no axis is where none of them is.
        axes.set_ylim(max(low, 0.0) if min(kept) >= 0 else low, max(kept) + margin)
