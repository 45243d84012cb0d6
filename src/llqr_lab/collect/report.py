"""The report: every table and figure that has runs, in one HTML file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.refreshes import INACTIVE
from ..paper import TABLES
from ..protocols import EXPERIMENTS, SCALES
from . import about, html
from .figures import Figure
from .html import escape
from .make import COLLECTED_FIGURES, table_of, write_figure
from .others import PAPER, other_rows, others
from .render import head, minus, missing_commands, ours
from .runs import Found, Run
from .tables import Table, data_of

__all__ = ["report"]


def report(found: Found, asked: str | None = None) -> str | None:
    """Return the report as HTML; None if there is no run.

    Args:
        found: the runs.
        asked: the scale; None: the largest there is. A report has one scale.

    Raises:
        RunError: runs of a cell contradict each other.
    """
    own = others(found.runs)
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
    sections = [
        *(table_section(table) for table in tables),
        *(figure_section(figure) for figure in figures),
        *(own_section(recipe, several) for recipe, several in own.items()),
        refreshes_section(everything),
        values_section(everything),
        machines_section(everything),
    ]
    left_out = len(papers) - len(runs)
    opening = [
        *banner(scale, tables),
        html.paragraph(
            f"{len(used)} finished runs of the paper's tables and figures at scale {scale}, and "
            f"{sum(map(len, own.values()))} of other experiments, below {found.root}. "
            f"{sum(t.missing for t in tables)} cells of these tables have no run and are marked "
            "missing; nothing is filled in for them."
        ),
        html.list_of(
            [
                *found.notes,
                *[f"{left_out} runs of other scales are not shown."] * bool(left_out),
                *about.skipped(everything),
                *[f"{len(runs) - len(used)} runs stand in no table."] * (len(used) < len(runs)),
            ]
        ),
        unfinished(found.unfinished),
        html.contents(sections),
    ]
    return html.page("Runs beside the paper's numbers", [*opening, *sections])


def banner(scale: str, tables: Sequence[Table]) -> Iterator[str]:
    """Warn where the runs are not the paper's."""
    if scale != "paper":
        read = data_of([run for table in tables for run in table.runs])
        yield html.paragraph(
            f"Scale {scale}: {read}, smaller networks and shorter training than the paper's. "
            "These numbers do not compare with the paper's.",
            "warn",
        )


def unfinished(folders: Sequence[Path]) -> str:
    """List runs that are going on or were broken off."""
    if not folders:
        return ""
    listed = html.list_of(str(folder) for folder in folders)
    return html.details(f"{len(folders)} unfinished runs, not used", listed)


def table_section(table: Table) -> str:
    """Return a table in the paper's layout, with its notes and the commands for what is missing."""
    status, reading, *notes = head(table)
    parts = [html.heading(table.title), html.paragraph(status)]
    if table.scale != "paper":
        parts.append(html.paragraph(notes.pop(0), "warn"))
    parts += [table_of_cells(table, _cell), html.paragraph(reading, "soft"), html.list_of(notes)]
    if any(cell.get("last") for row in table.rows for cell in row["cells"]):
        parts.append(html.details("Ours after the last epoch", table_of_cells(table, _last)))
    commands = "\n".join(missing_commands(table))
    if commands:
        parts.append(
            html.details(
                "Commands for the first seed of each missing cell",
                f"<pre>{escape(commands)}</pre>",
            )
        )
    return "\n".join(parts)


def table_of_cells(table: Table, show: Callable[[dict[str, Any]], str]) -> str:
    """Return the paper's rows and columns, with what ``show`` makes of each cell."""
    labels = len(table.heads)
    groups = [c["group"] for c in table.columns]
    lines = []
    if any(groups):
        starts = [i for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g]
        spans = [b - a for a, b in zip(starts, [*starts[1:], len(groups)], strict=True)]
        tops = "".join(
            f'<th colspan="{n}">{escape(groups[i])}</th>'
            for i, n in zip(starts, spans, strict=True)
        )
        lines.append(f'<tr><th colspan="{labels}"></th>{tops}</tr>')
    names = "".join(f"<th>{escape(name)}</th>" for name in table.heads)
    names += "".join(f"<th{_geometry(c['label'])}>{escape(c['label'])}</th>" for c in table.columns)
    lines.append(f"<tr>{names}</tr>")
    body = []
    for row in table.rows:
        shown = [*row["labels"], *["–"] * (labels - len(row["labels"]))]
        first = "".join(f"<th{_geometry(text)}>{escape(text)}</th>" for text in shown)
        body.append(f"<tr>{first}{''.join(map(show, row['cells']))}</tr>")
    return html.wide(
        f"<table><thead>{''.join(lines)}</thead><tbody>{''.join(body)}</tbody></table>"
    )


def _geometry(label: str) -> str:
    """Return the class of the paper's colours: NGD blue, Newton orange."""
    kind = re.search(r"\((NGD|Newton)\)", label)
    return f' class="{kind[1].lower()}"' if kind else ""


def _last(cell: dict[str, Any]) -> str:
    """Return a cell with the last epoch's result."""
    return f"<td>{escape(cell['last'] or '–')}</td>"


def _cell(cell: dict[str, Any]) -> str:
    """Return a cell: ours, below it the paper's and the difference to the baseline."""
    gone = cell["ours"] is None
    parts = [f"<b>{escape(ours(cell))}</b>"]
    if cell["paper"]:
        parts.append(f'<span class="paper">paper {escape(cell["paper"])}</span>')
    if cell["minus"]:
        text = f"minus {cell['baseline']}: {minus(cell)}"
        parts.append(f'<span class="minus">{escape(text)}</span>')
    return f'<td class="number{" missing" * gone}">{"".join(parts)}</td>'


def figure_section(figure: Figure) -> str:
    """Return a figure, drawn into the page."""
    with tempfile.TemporaryDirectory() as folder:
        path, *_ = write_figure(figure, Path(folder))
        drawn = html.picture(path, f"Figure {figure.number}: {figure.title}")
    parts = [html.heading(f"Figure {figure.number}: {figure.title}"), drawn]
    for method, fit in figure.facts.get("fits", {}).items():
        exponents = " and ".join(map(str, figure.facts["paper_exponents"]))
        parts.append(
            html.paragraph(
                f"{method}: exponent {fit['exponent']:.2f} of {fit['points']} networks; the paper "
                f"has {exponents}."
            )
        )
    if figure.missing:
        parts.append(html.paragraph(f"Missing: {', '.join(figure.missing)}."))
    return "\n".join(parts)


def own_section(recipe: str, runs: Sequence[Run]) -> str:
    """Return the table of an experiment that is none of the paper's."""
    rows, notes = other_rows(recipe, runs)
    title = EXPERIMENTS[recipe].title if recipe in EXPERIMENTS else recipe
    text = (
        "An experiment of this project, not of the paper. Mean ± sample standard deviation over "
        "seeds; differences seed by seed, mean ± standard error over shared seeds (their number)."
    )
    shown = html.table(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""
    return f"{html.heading(title)}\n{html.paragraph(text)}\n{shown}\n{html.list_of(notes)}"


def refreshes_section(runs: Sequence[Run]) -> str:
    """Say what the refreshes of U did."""
    rows = about.refresh_rows(runs)
    if not rows:
        return ""
    text = (
        "Medians over all refreshes of the runs (J: over the accepted ones). |Ug-g|/|g| is how "
        f"much U changes the gradient; below {INACTIVE:g} U hardly acts, and LLQR+SAM is SAM."
    )
    shown = html.table(list(rows[0]), [list(row.values()) for row in rows])
    return f"{html.heading('Refreshes')}\n{html.paragraph(text)}\n{shown}"


def values_section(runs: Sequence[Run]) -> str:
    """Say which values were changed by hand, and which are assumed."""
    parts = [html.heading("Values"), "<h3>Changed by hand</h3>"]
    rows = about.changed(runs)
    heads = ("run", "setting", "value", "runs")
    parts.append(
        html.table(heads, rows) if rows else html.paragraph("None: all as the protocol has them.")
    )
    parts.append("<h3>Assumed</h3>")
    parts.append(
        html.paragraph(
            "Neither the paper nor its authors' code has these values of the protocol at the "
            "paper's size. A result that differs from the paper's may be due to one of them."
        )
    )
    assumed = about.assumed(runs)
    shown = html.table(("setting", "value", "experiments", "note"), assumed)
    parts.append(html.details(f"{len(assumed)} values", shown))
    return "\n".join(parts)


def machines_section(runs: Sequence[Run]) -> str:
    """Say what was computed on."""
    rows = about.environments(runs)
    heads = list(dict.fromkeys(key for row in rows for key in row))
    shown = html.table(heads, [[row.get(key) for key in heads] for row in rows])
    return f"{html.heading('Machines and versions')}\n{shown}"
