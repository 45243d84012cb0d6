"""Table 10: seconds per epoch and per refresh, by network, method and interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..common.output import plus_minus
from ..common.statistics import mean_std
from ..paper import TABLES
from ..protocols import EXPERIMENTS, METHODS
from .cells import (
    Chosen,
    choose_runs,
    choose_scale,
    notes_on_choices,
    notes_on_differences,
    run_command,
    used_runs,
)
from .runs import Cell, Found, Run
from .tables import Table, notes_of

__all__ = ["EPOCH", "describe_machines", "fill_cadence", "timed_cells"]

EPOCH = "epoch_seconds_without"  # the first refresh's overhead is left out, as in the paper
ABOUT = EXPERIMENTS["table10"]
ORDER = [*ABOUT.methods, *METHODS]  # those of the table first, as printed
MEASURED = ("Epoch time", "Steady update")
READING = (
    "Ours: mean ± sample standard deviation (number of runs). Updates are refreshes of the whole "
    "run; the steady update is the median of the refreshes after the first, measured directly. The "
    "JSON file also has what the protocol derives from the epochs: (epoch - that of the method "
    "without LLQR) / refreshes an epoch."
)


def fill_cadence(found: Found, asked: str | None = None) -> Table:
    """Fill table 10. At the paper's scale it has the paper's rows, else those that were run."""
    paper = TABLES["10"]
    cells = [cell for cell in timed_cells(found) if cell.model in ABOUT.models]
    scale, notes = choose_scale(found, cells, asked)
    runs = [run for run in found.runs if run["scale"] == scale and run["timing"]]
    # Smaller runs have other intervals than the table prints.
    rows = paper["rows"] if scale == "paper" else _rows_of(runs)
    chosen = {}
    for row in rows:
        cell = cell_of(row)
        chosen[cell] = choose_runs(runs, cell, "table10")
    filled = [
        {"labels": row["labels"], "cells": _fill_cells(row, chosen, scale, str(found.root))}
        for row in rows
    ]
    used = used_runs(chosen.values())
    notes = [
        *notes_of(scale, used, paper["seeds"]),
        *describe_machines(used),
        *notes_on_choices(chosen.values()),
        *notes_on_differences(
            (cell, mine, against, chosen[against])
            for cell, mine in chosen.items()
            for method in ("SGDM", "SAM")
            if (against := without_interval(cell, method)) in chosen
        ),
        *notes,
        *found.notes,
        *(f"Note on the paper: {note}" for note in paper["notes"]),
    ]
    columns = [{"group": "", "label": name} for name in paper["columns"]]
    return Table("10", scale, paper["heads"], columns, filled, notes, used, READING)


def cell_of(row: dict[str, Any]) -> Cell:
    """Return the cell of a row."""
    return Cell(**TABLES["10"]["run"], **row["run"])


def timed_cells(found: Found) -> list[Cell]:
    """Return the cells of the timings."""
    return sorted({run.cell for run in found.runs if run["timing"]}, key=_sort_key_of)


def _sort_key_of(cell: Cell) -> tuple[Any, ...]:
    return (cell.dataset, cell.model, ORDER.index(cell.method), cell.every or 0)


def _rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return rows for what was run at a scale that the paper does not have."""
    names = {row["run"]["model"]: row["labels"][0] for row in TABLES["10"]["rows"]}
    labels = {row["run"]["method"]: row["labels"][1] for row in TABLES["10"]["rows"]}
    shown = [
        c
        for c in sorted({run.cell for run in runs}, key=_sort_key_of)
        if c.model in names and c.method in labels
    ]
    return [
        {
            "labels": [names[c.model], labels[c.method], *([str(c.every)] if c.every else [])],
            "run": {"model": c.model, "method": c.method, "every": c.every},
            "cells": [None] * len(TABLES["10"]["columns"]),
        }
        for c in shown
    ]


def describe_machines(runs: Sequence[Run]) -> list[str]:
    """Say what the timings were measured on, and warn where that is more than one machine."""
    said = sorted({machine_of(run) for run in runs})
    if not said:
        return []
    warning = "NOT ONE MACHINE, so times do not compare: " if len(said) > 1 else "Measured on "
    return [warning + "; ".join(said) + "."]


def machine_of(run: Run) -> str:
    """Say the accelerator, or else the processor, of a run."""
    about = run["environment"]
    return str(about.get("accelerator") or about.get("processor") or "unknown")


def _fill_cells(
    row: dict[str, Any], chosen: dict[Cell, Chosen], scale: str, root: str
) -> list[dict[str, Any]]:
    """Return the five cells of a row."""
    cell = cell_of(row)
    mine = chosen[cell]
    learned = METHODS[cell.method].curvature is not None
    epoch, spread = mean_std(mine.numbers_by_seed(EPOCH).values())
    steady, steady_spread = mean_std(mine.numbers_by_seed("update_seconds").values())
    updates = [_count_refreshes(run) for run in mine.runs.values() if learned]
    texts: list[str | None] = [
        f"{max(updates)}" if updates else None,
        None if epoch is None else plus_minus(epoch, spread),
        *(
            _ratio_to(epoch, mine, chosen, without_interval(cell, method))
            for method in ("SGDM", "SAM")
        ),
        None if steady is None else plus_minus(steady, steady_spread),
    ]
    derived = _from_epochs(epoch, mine, chosen, cell) if learned else None
    cells = []
    for i, (name, text, theirs) in enumerate(
        zip(TABLES["10"]["columns"], texts, row["cells"], strict=True)
    ):
        # Without U there are no updates to count or to time.
        unused = not learned and i in (0, 4)
        cells.append(
            {
                "model": cell.model,
                "method": cell.method,
                "every": cell.every,
                "quantity": name,
                "ours": "–" if unused else text,
                "seeds": list(mine.runs),
                "n": len(mine.runs) if name in MEASURED and not unused else 0,
                "paper": theirs,
                "minus": None,
                "baseline": None,
                "changed": mine.changed_settings,
                "from_epochs": derived if i == 4 else None,
                "command": run_command("table10", cell, scale, out=root),
            }
        )
    return cells


def _count_refreshes(run: Run) -> int:
    """Count the refreshes of a run's epochs, at steps 0, every, 2 every ..."""
    timing = run["timing"]
    if "updates" in timing:
        return int(timing["updates"])
    # Results that were written before the count was.
    steps = timing["steps_an_epoch"] * run["settings"].get("train.epochs", 1)
    return math.ceil(steps / timing["every"])


def _epoch_seconds_of(mine: Chosen, chosen: dict[Cell, Chosen], cell: Cell) -> float | None:
    """Return the epoch's seconds of a cell, if its runs are comparable with one's own."""
    other = chosen.get(cell)
    if other is None or mine.differences_from(other):
        return None
    return mean_std(other.numbers_by_seed(EPOCH).values())[0]


def without_interval(cell: Cell, method: str) -> Cell:
    """Return the cell of a method without U on the same network, which has no interval."""
    return Cell(cell.dataset, cell.model, method)


def _ratio_to(
    epoch: float | None, mine: Chosen, chosen: dict[Cell, Chosen], against: Cell
) -> str | None:
    base = _epoch_seconds_of(mine, chosen, against)
    return f"{epoch / base:.2f}" if epoch is not None and base else None


def _from_epochs(
    epoch: float | None, mine: Chosen, chosen: dict[Cell, Chosen], cell: Cell
) -> float | None:
    """Return (epoch - that without LLQR) / refreshes an epoch, as the protocol has it."""
    against = without_interval(cell, "SAM" if METHODS[cell.method].probe else "SGDM")
    base = _epoch_seconds_of(mine, chosen, against)
    if epoch is None or base is None or mine.example is None:
        return None
    timing = mine.example["timing"]
    return (epoch - base) / (timing["steps_an_epoch"] / timing["every"])
