"""The paper's tables 1 to 8 filled with finished runs: rows and columns as printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.output import difference_text, plus_minus
from ..common.statistics import mean_std
from ..paper import TABLES, parse_cell
from ..protocols import slug
from .cells import (
    Chosen,
    choose_runs,
    choose_scale,
    notes_on_choices,
    notes_on_differences,
    run_command,
    seed_differences,
    used_runs,
)
from .runs import Cell, Found, Run, RunError

__all__ = ["Table", "data_of", "fill_table", "notes_of"]

READING = (
    "Ours: mean ± sample standard deviation of the best epochs (number of seeds). "
    "Minus: difference to another method of the row, mean ± standard error over shared seeds "
    "(their number); of two seeds, both differences."
)


@dataclass(frozen=True)
class Table:
    """A table with its numbers.

    Attributes:
        number: the paper's.
        scale: of the runs.
        heads: of the columns with labels.
        columns: "group" and "label" of the columns with cells.
        rows: "labels" and "cells" of each row. A cell has at least "ours" (text, None: missing),
            "seeds", "paper" (text, None: the paper has none) and "minus" (text or None).
        notes: what has to be said, the most important first.
        reading: how a cell is read.
        runs: those that were used.
    """

    number: str
    scale: str
    heads: Sequence[str]
    columns: Sequence[dict[str, str]]
    rows: Sequence[dict[str, Any]]
    notes: Sequence[str]
    runs: Sequence[Run]
    reading: str

    @property
    def title(self) -> str:
        """Say what the table is."""
        return f"Table {self.number}: {TABLES[self.number]['title']}"

    @property
    def missing_cells(self) -> int:
        """Count the cells that no run fills."""
        return sum(cell["ours"] is None for row in self.rows for cell in row["cells"])

    def content(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rows = [{"labels": row["labels"], "cells": row["cells"]} for row in self.rows]
        return {
            "table": self.number,
            "title": TABLES[self.number]["title"],
            "entries": TABLES[self.number]["entries"],
            "scale": self.scale,
            "comparable": self.scale == "paper",
            "heads": list(self.heads),
            "columns": list(self.columns),
            "rows": rows,
            "missing": self.missing_cells,
            "notes": list(self.notes),
            "runs": [str(run.folder) for run in self.runs],
        }

    def long_rows(self) -> list[dict[str, Any]]:
        """Return one flat row per cell, for CSV."""
        found = []
        for row in self.rows:
            labels = {
                **dict.fromkeys(self.heads, ""),
                **dict(zip(self.heads, row["labels"], strict=False)),
            }
            for column, cell in zip(self.columns, row["cells"], strict=True):
                plain = {k: v for k, v in cell.items() if not isinstance(v, (list, dict))}
                found.append({**labels, "column": column["label"], **plain})
        return found


def fill_table(number: str, found: Found, asked: str | None = None) -> Table:
    """Fill a table of accuracies or BLEU.

    Args:
        number: 1 to 8.
        found: the runs.
        asked: the scale; None: the largest there is.

    Raises:
        RunError: runs of a cell contradict each other.
    """
    paper, recipe = TABLES[number], f"table{number}"
    cells = [
        [Cell(**run_of(paper, row, column)) for column in paper["columns"]] for row in paper["rows"]
    ]
    scale, notes = choose_scale(found, (c for line in cells for c in line), asked)
    runs = [run for run in found.runs if run["scale"] == scale]
    chosen: dict[Cell, Chosen] = {
        cell: choose_runs(runs, cell, recipe) for line in cells for cell in line
    }
    rows, compared = [], []
    for row, line in zip(paper["rows"], cells, strict=True):
        filled = []
        for text, column, cell in zip(row["cells"], paper["columns"], line, strict=True):
            baseline = row.get("minus") or column["minus"]
            against = cell.with_method(baseline) if baseline else None
            if against and against in chosen:
                compared.append((cell, chosen[cell], against, chosen[against]))
            filled.append(
                {
                    "dataset": cell.dataset,
                    "model": cell.model,
                    "method": cell.method,
                    "noise": cell.noise,
                    **_own_numbers(chosen[cell], paper["metric"]),
                    "paper": text,
                    "paper_mean": parse_cell(text).mean,
                    "paper_std": parse_cell(text).std,
                    "baseline": baseline,
                    **_baseline_numbers(chosen[cell], chosen.get(against) if against else None),
                    "command": run_command(
                        recipe,
                        cell,
                        scale,
                        out=str(found.root),
                        weight_decay=found.selected_for(scale, cell),
                    ),
                }
            )
        rows.append({"labels": row["labels"], "cells": filled})
    used = used_runs(chosen.values())
    notes = [
        *notes_of(scale, used, paper["seeds"]),
        *notes_on_choices(chosen.values()),
        *notes_on_differences(compared),
        *notes,
        *found.notes,
        *(f"Note on the paper: {note}" for note in paper["notes"]),
    ]
    columns = [{"group": c["group"], "label": c["label"]} for c in paper["columns"]]
    return Table(number, scale, paper["heads"], columns, rows, notes, used, READING)


def run_of(paper: dict[str, Any], row: dict[str, Any], column: dict[str, Any]) -> dict[str, Any]:
    """Return what a cell shows: what the table, the row and the column say together."""
    return {**paper["run"], **row["run"], **column["run"]}


def _own_numbers(chosen: Chosen, metric: str) -> dict[str, Any]:
    """Return the statistics of a cell; ``ours`` is their text."""
    # Accuracy of the test set and of other data are not the same quantity.
    for run in chosen.runs.values():
        if run["metric"] != metric:
            raise RunError(
                f"{run.folder}: metric: expected {metric!r}, got {run['metric']!r}; delete it "
                "and run again"
            )
    best, last = chosen.numbers_by_seed("best"), chosen.numbers_by_seed("last")
    mean, std = mean_std(best.values())
    last_mean, last_std = mean_std(last.values())
    return {
        "ours": None if mean is None else plus_minus(mean, std),
        "seeds": list(best),
        "n": len(best),
        "mean": mean,
        "std": std,
        "last": None if last_mean is None else plus_minus(last_mean, last_std),
        "last_mean": last_mean,
        "last_std": last_std,
        "changed": chosen.changed_settings,
    }


def _baseline_numbers(chosen: Chosen, baseline: Chosen | None) -> dict[str, Any]:
    """Return the difference to the baseline; ``minus`` is its text."""
    found = baseline and seed_differences(chosen, baseline, "best")
    if not found:
        return {"minus": None, "difference": None, "standard_error": None, "pairs": 0}
    return {
        "minus": difference_text(found),
        "difference": found["mean"],
        "standard_error": found["standard_error"],
        "pairs": len(found["seeds"]),
    }


def data_of(runs: Sequence[Run]) -> str:
    """Say what smaller runs read in place of the paper's data."""
    read = {
        f"{run['source']} in place of {run['dataset']}"
        for run in runs
        if slug(run["source"]) != slug(run["dataset"])
    }
    return ", ".join(sorted(read)) or "less data"


def notes_of(scale: str, runs: Sequence[Run], seeds: int | None) -> list[str]:
    """Say what the runs are, above all where they are not the paper's."""
    notes = []
    if scale != "paper":
        notes.append(
            f"SCALE {scale}: {data_of(runs)}, smaller networks and shorter training than the "
            "paper's. NOT COMPARABLE with the paper's numbers."
        )
    if any(run.data_digest == "unknown" for run in runs):
        notes.append(
            "Runs of earlier versions did not record their data; they are compared only among "
            "themselves."
        )
    changed = sorted({key for run in runs for key in run.changed_keys})
    if changed:
        notes.append(f"* settings were changed by hand: {', '.join(changed)}.")
    counts = {len({run["seed"] for run in runs if run.cell == c}) for c in {r.cell for r in runs}}
    if seeds and counts and counts != {seeds}:
        said = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        notes.append(f"Seeds per cell: {said}; the paper has {seeds}.")
    return notes
