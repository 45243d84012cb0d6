"""A filled table as lines for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..paper import TABLES
from .tables import Table

__all__ = [
    "head_lines",
    "markdown_page",
    "minus_text",
    "missing_commands",
    "own_text",
    "terminal_lines",
]


def own_text(cell: dict[str, Any]) -> str:
    """Say our number with its seeds; what is missing is said to be."""
    if cell["ours"] is None:
        return "missing"
    return cell["ours"] + "*" * bool(cell["changed"]) + f" ({cell['n']})" * (cell["n"] > 0)


def minus_text(cell: dict[str, Any]) -> str:
    """Say the difference to the baseline."""
    return f"{cell['minus']} ({cell['pairs']})" if cell["minus"] else ""


def terminal_lines(table: Table) -> list[str]:
    """Return the table as aligned lines: ours, the paper's and the differences below each other."""
    labels = len(table.heads)
    lines = [[*table.heads, "", *(c["label"] for c in table.columns)]]
    for row in table.rows:
        blank = [""] * (labels - len(row["labels"]))
        cells = row["cells"]
        lines.append([*row["labels"], *blank, "ours", *(own_text(c) for c in cells)])
        if any(c["paper"] for c in cells):
            lines.append([*[""] * labels, "paper", *(c["paper"] or "–" for c in cells)])
        if any(c["minus"] for c in cells):
            lines.append([*[""] * labels, "minus", *(minus_text(c) for c in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return [table.title, *head_lines(table), "", *aligned, "", *_baseline_lines(table)]


def head_lines(table: Table) -> list[str]:
    """Say what the table is, at which scale, and what has to be known to read it."""
    return [
        f"Scale {table.scale}; {table.missing_cells} of {count_cells(table)} cells missing.",
        f"Entries: {TABLES[table.number]['entries']}. {table.reading}",
        *table.notes,
    ]


def count_cells(table: Table) -> int:
    """Count the cells."""
    return sum(len(row["cells"]) for row in table.rows)


def _baseline_lines(table: Table) -> list[str]:
    """Say what each column or row is compared with."""
    pairs = {
        (cell.get("method"), cell["baseline"])
        for row in table.rows
        for cell in row["cells"]
        if cell["minus"]
    }
    said = ", ".join(f"{method} minus {baseline}" for method, baseline in sorted(pairs))
    return [f"minus: {said}"] if said else []


def markdown_page(table: Table) -> str:
    """Return the table as Markdown, with the differences and the missing cells below."""
    parts = [f"# {table.title}\n"]
    parts += [f"{line}\n" for line in head_lines(table)]
    parts.append(
        _markdown_rows(table, lambda c: f"{_bold_markdown(own_text(c), c)} \\| {c['paper'] or '–'}")
    )
    if any(cell["minus"] for row in table.rows for cell in row["cells"]):
        parts.append("## Differences, seed by seed\n")
        parts += [f"{line}\n" for line in _baseline_lines(table)]
        parts.append(_markdown_rows(table, lambda c: minus_text(c) or "–"))
    if any(cell.get("last") for row in table.rows for cell in row["cells"]):
        parts.append("## Ours after the last epoch\n")
        parts.append(_markdown_rows(table, lambda c: c["last"] or "–"))
    commands = list(missing_commands(table))
    if commands:
        parts.append("## Missing\n\nThe first seed of each:\n")
        parts.append("\n".join(["```bash", *commands, "```"]) + "\n")
    return "\n".join(parts)


def missing_commands(table: Table) -> Iterator[str]:
    """Return the commands that make the first seed of each missing cell, each once."""
    seen = dict.fromkeys(
        cell["command"] for row in table.rows for cell in row["cells"] if cell["ours"] is None
    )
    return iter(seen)


def _bold_markdown(text: str, cell: dict[str, Any]) -> str:
    return f"*{text}*" if cell["ours"] is None else text.replace("*", r"\*")


def _markdown_rows(table: Table, show: Any) -> str:
    groups = [c["group"] for c in table.columns]
    titles = [f"{c['label']}" for c in table.columns]
    lines: list[Sequence[str]] = [
        [*table.heads, *titles],
        ["---"] * (len(table.heads) + len(titles)),
    ]
    if any(groups):
        lines = [
            [*[""] * len(table.heads), *_without_repeats(groups)],
            lines[1],
            [*table.heads, *titles],
        ]
    for row in table.rows:
        blank = ["–"] * (len(table.heads) - len(row["labels"]))
        lines.append([*row["labels"], *blank, *(show(c) for c in row["cells"])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _without_repeats(names: Sequence[str]) -> list[str]:
    return [n if i == 0 or names[i - 1] != n else "" for i, n in enumerate(names)]
