"""The report: every table and figure that has runs, in one HTML file."""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..common.drawing import save_figure
from ..common.refreshes import INACTIVE
from ..paper import TABLES
from ..protocols import EXPERIMENTS, SCALES
from . import about
from .figures import Figure
from .make import COLLECTED_FIGURES, table_of
from .others import PAPER, other_experiments, other_rows
from .render import head_lines, minus_text, missing_commands, own_text
from .run_curves import curves_by_cell
from .runs import Found, Run
from .tables import Table, data_of

__all__ = ["make_report"]

# Notes that say how to read a table or a figure, and warn of nothing.
REMARKS = ("Note on the paper:", "Lines are means", "Measured on", "Interval", "The first refresh")
Section = dict[str, Any]  # "kind" names the template, "title" the heading


def make_report(found: Found, asked: str | None = None) -> str | None:
    """Return the report as HTML; None if there is no run.

    Args:
        found: the runs.
        asked: the scale; None: the largest there is. A report has one scale.

    Raises:
        RunError: runs of a cell contradict each other.
    """
    own = other_experiments(found.runs)
    papers = [run for run in found.runs if run["recipe"].startswith(PAPER)]
    scale = asked or next((s for s in SCALES if any(r["scale"] == s for r in papers)), SCALES[0])
    runs = [run for run in papers if run["scale"] == scale]
    if not runs and not own:
        return None
    # What holds of all runs is said once, not in every table.
    quiet = replace(found, runs=runs, notes=())
    tables = [t for n in TABLES if (t := table_of(n, quiet, scale)).runs]
    figures = [f for make in COLLECTED_FIGURES.values() if (f := make(quiet, scale)).rows]
    used = {run.folder: run for part in (*tables, *figures) for run in part.runs}
    shown = {**used, **{run.folder: run for several in own.values() for run in several}}
    everything = list(shown.values())
    left_out = len(papers) - len(runs)
    return render_page(
        title="Runs beside the paper's numbers",
        opening=(
            f"{len(used)} finished run{'s' * (len(used) != 1)} of the paper's tables and figures "
            f"at scale {scale}, and "
            f"{sum(map(len, own.values()))} of other experiments, below {found.root}. "
            f"{sum(t.missing_cells for t in tables)} cells of these tables have no run and are "
            "marked missing; nothing is filled in for them."
        ),
        sections=[
            warnings_section(
                None if scale == "paper" else scale_warning(scale, tables),
                [
                    *found.notes,
                    *[f"{left_out} runs of other scales are not shown."] * bool(left_out),
                    *about.describe_skipped_steps(everything),
                    *about.describe_refusals(everything),
                    *[f"{len(runs) - len(used)} runs stand in no table."] * (len(used) < len(runs)),
                ],
                [
                    *((f"Table {t.number}", t.notes) for t in tables),
                    *((f"Figure {f.number}", f.notes) for f in figures),
                ],
                found.unfinished,
            ),
            *map(table_section, tables),
            *map(figure_section, figures),
            *(own_section(recipe, several) for recipe, several in own.items()),
            *refreshes_section(everything),
            *curves_section(everything),
            values_section(everything),
            machines_section(everything),
        ],
    )


def render_page(**content: Any) -> str:
    """Fill the templates: plain HTML without scripts and without anything external.

    The page follows the reader's choice of light or dark. All text is escaped.
    """
    environment = Environment(
        loader=PackageLoader("llqr_lab.collect"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "anchor": lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),
        "curvature_of": curvature_of,
        "shown": shown_value,
        "own_text": own_text,
        "minus_text": minus_text,
    }
    return environment.get_template("report.html").render(**content)


def shown_value(value: object) -> str:
    """Return the text of a plain value; None becomes a dash."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def curvature_of(label: str) -> str | None:
    """Return the curvature that a label names, which has a colour."""
    kind = re.search(r"\((NGD|Newton)\)", label)
    return kind[1].lower() if kind else None


def scale_warning(scale: str, tables: Sequence[Table]) -> str:
    """Say that the runs are not the paper's."""
    read = data_of([run for table in tables for run in table.runs])
    return (
        f"Scale {scale}: {read}, smaller networks and shorter training than the paper's. "
        "These numbers do not compare with the paper's."
    )


def warnings_section(
    first: str | None,
    of_all: Sequence[str],
    of_parts: Sequence[tuple[str, Sequence[str]]],
    unfinished: Sequence[Path],
) -> Section:
    """Return what has to be known before the numbers are read, each thing once, with its places.

    Args:
        first: of the scale.
        of_all: what holds of the whole report.
        of_parts: a table or a figure, and its notes.
        unfinished: folders of runs that are not used.
    """
    places: dict[str, list[str]] = {said: [] for said in of_all}
    for name, notes in of_parts:
        for note in notes:
            if not note.startswith(REMARKS):
                places.setdefault(note, []).append(name)
    return {
        "kind": "warnings",
        "title": "Warnings",
        "first": first,
        "said": list(places.items()),
        "unfinished": unfinished,
    }


def curves_section(runs: Sequence[Run]) -> Iterator[Section]:
    """Draw the training and the refreshes of each run."""
    if cells := curves_by_cell(runs):
        yield {"kind": "curves", "title": "Curves of each run", "cells": cells}


def table_section(table: Table) -> Section:
    """Return a table in the paper's layout, with its notes and the commands for what is missing."""
    status, reading, *notes = head_lines(table)
    groups = groupby(column["group"] for column in table.columns)
    return {
        "kind": "table",
        "title": table.title,
        "heads": table.heads,
        "groups": [{"name": name, "span": len(list(members))} for name, members in groups],
        "columns": table.columns,
        "rows": table.rows,
        "status": status,
        "reading": reading,
        "notes": [note for note in notes if note.startswith(REMARKS)],
        "has_last": any(cell.get("last") for row in table.rows for cell in row["cells"]),
        "commands": list(missing_commands(table)),
    }


def figure_section(figure: Figure) -> Section:
    """Return a figure, drawn into the page."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figure.png")
        save_figure(figure.paint(), path, figure.caption(), formats=("png",), dpi=110)
        png = base64.b64encode(path.read_bytes()).decode("ascii")
    exponents = " and ".join(map(str, figure.facts.get("paper_exponents", ())))
    return {
        "kind": "figure",
        "title": f"Figure {figure.number}: {figure.title}",
        "png": png,
        "fits": [
            f"{method}: exponent {fit['exponent']:.2f} of {fit['points']} networks; the paper "
            f"has {exponents}."
            for method, fit in figure.facts.get("fits", {}).items()
        ],
        "missing": figure.missing,
    }


def rows_section(
    title: str, text: str, rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()
) -> Section:
    """Return a text with a table; its columns are the keys of the rows, in the order they come."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    values = [[row.get(key) for key in heads] for row in rows]
    return {
        "kind": "rows",
        "title": title,
        "text": text,
        "heads": heads,
        "rows": values,
        "notes": notes,
    }


def own_section(recipe: str, runs: Sequence[Run]) -> Section:
    """Return the table of an experiment that is not in the paper."""
    rows, notes = other_rows(recipe, runs)
    title = EXPERIMENTS[recipe].title if recipe in EXPERIMENTS else recipe
    text = (
        "An experiment of this project, not of the paper. Mean ± sample standard deviation over "
        "seeds; differences seed by seed, mean ± standard error over shared seeds (their number); "
        "of two seeds, both differences."
    )
    return rows_section(title, text, rows, notes)


def refreshes_section(runs: Sequence[Run]) -> Iterator[Section]:
    """Say what the refreshes of U did, if there were any."""
    if rows := about.refresh_rows(runs):
        text = (
            "Medians over all refreshes of the runs (J: over the accepted ones). |Ug-g|/|g| is how "
            f"much U changes the gradient; below {INACTIVE:g} U hardly acts, and LLQR+SAM is SAM."
        )
        yield rows_section("Refreshes", text, rows)


def values_section(runs: Sequence[Run]) -> Section:
    """Say which values were changed by hand, and which are assumed."""
    return {
        "kind": "values",
        "title": "Values",
        "changed": about.changed_values(runs),
        "assumed": about.assumed_values(runs),
    }


def machines_section(runs: Sequence[Run]) -> Section:
    """Say what was computed on."""
    return rows_section("Machines and versions", "", about.count_environments(runs))
