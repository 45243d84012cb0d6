"""What a notebook shows: tables in HTML, from the standard library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["TextTable", "format_table", "html_of_numbers", "html_of_rows"]

# Notebooks align cells to the right and join lines.
CELL = 'style="text-align: left; white-space: pre-line"'


class TextTable(str):
    """A table as aligned text, which a notebook shows as a table.

    Attributes:
        rows: the cells, the row of headers first.
        last_line: what stands below them.
    """

    rows: Sequence[Sequence[str]]
    last_line: str

    def _repr_html_(self) -> str:
        return html_of_rows(self.rows) + f"<p>{escape(self.last_line)}</p>"


def format_table(rows: Sequence[Sequence[str]], last_line: str) -> TextTable:
    """Return rows in aligned columns, and a line below them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    table = TextTable("\n".join([*(line.rstrip() for line in lines), last_line]))
    table.rows, table.last_line = rows, last_line
    return table


def html_of_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first row are its headers."""
    head, *body = rows
    shown = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in body)
    return f"<table><thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{shown}</tbody></table>"


def html_of_numbers(title: str, numbers: Mapping[str, str], *lines: str) -> str:
    """Return a title, a table of names and what they are, and lines of text below it."""
    rows = "".join(
        f"<tr><th {CELL}>{escape(name)}</th><td {CELL}>{escape(text)}</td></tr>"
        for name, text in numbers.items()
    )
    below = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"<p><b>{escape(title)}</b></p><table><tbody>{rows}</tbody></table>{below}"


def _cells(row: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag} {CELL}>{escape(cell)}</{tag}>" for cell in row)
