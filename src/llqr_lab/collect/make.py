"""A table or a figure of the paper, by its number, and its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..common.drawing import save_figure
from ..common.output import write_csv, write_json, write_whole
from ..protocols import EXPERIMENTS
from .cadence import fill_cadence
from .cells import run_command
from .curves import collect_figure1, collect_figure4
from .figures import Figure
from .render import markdown_page
from .runs import Cell, Found
from .tables import Table, fill_table
from .timing import collect_figure5, collect_figure6

__all__ = ["COLLECTED_FIGURES", "first_command", "table_of", "write_figure", "write_table"]

COLLECTED_FIGURES: dict[str, Callable[[Found, str | None], Figure]] = {
    "1": collect_figure1,
    "4": collect_figure4,
    "5": collect_figure5,
    "6": collect_figure6,
}


def table_of(number: str, found: Found, scale: str | None) -> Table:
    """Fill a table of the paper."""
    return fill_cadence(found, scale) if number == "10" else fill_table(number, found, scale)


def first_command(recipe: str, out: Path, scale: str | None) -> str:
    """Return a command that makes one run of a recipe."""
    about = EXPERIMENTS[recipe]
    cell = Cell(about.datasets[0], about.models[0], about.methods[-1])
    return run_command(recipe, cell, scale or "paper", out=str(out))


def write_table(table: Table, out: Path) -> list[Path]:
    """Write a table as JSON, CSV and Markdown."""
    return [
        write_json(out / f"table{table.number}.json", table.content()),
        write_csv(out / f"table{table.number}.csv", table.long_rows()),
        write_whole(out / f"table{table.number}.md", markdown_page(table)),
    ]


def write_figure(figure: Figure, out: Path) -> list[Path]:
    """Write a figure as PNG, SVG and PDF, its numbers as CSV, and everything as JSON."""
    name = f"figure{figure.number}"
    return [
        *save_figure(figure.paint(), out / f"{name}.png", figure.caption()),
        write_csv(out / f"{name}.csv", figure.rows),
        write_json(out / f"{name}.json", figure.content()),
    ]
