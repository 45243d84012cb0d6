"""A table or a figure of the paper, by its number, and its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..common.drawing import save_figure
from ..common.output import write_csv, write_json, write_whole
from ..protocols import EXPERIMENTS
from .cadence import fill_cadence
from .cells import command
from .curves import figure1, figure4
from .figures import Figure
from .render import markdown
from .runs import Cell, Found
from .tables import Table, fill
from .timing import figure5, figure6

__all__ = ["COLLECTED_FIGURES", "first_command", "table_of", "write_figure", "write_table"]

COLLECTED_FIGURES: dict[str, Callable[[Found, str | None], Figure]] = {
    "1": figure1,
    "4": figure4,
    "5": figure5,
    "6": figure6,
}


def table_of(number: str, found: Found, scale: str | None) -> Table:
    """Fill a table of the paper."""
    return fill_cadence(found, scale) if number == "10" else fill(number, found, scale)


def first_command(recipe: str, out: Path, scale: str | None) -> str:
    """Return a command that makes one run of a recipe."""
    about = EXPERIMENTS[recipe]
    cell = Cell(about.datasets[0], about.models[0], about.methods[-1])
    return command(recipe, cell, scale or "paper", out=str(out))


def write_table(table: Table, out: Path) -> list[Path]:
    """Write a table as JSON, CSV and Markdown."""
    return [
        write_json(out / f"table{table.number}.json", table.content()),
        write_csv(out / f"table{table.number}.csv", table.long()),
        write_whole(out / f"table{table.number}.md", markdown(table)),
    ]


def write_figure(figure: Figure, out: Path) -> list[Path]:
    """Write a figure as PNG, its numbers as CSV, and everything as JSON."""
    name = f"figure{figure.number}"
    return [
        save_figure(figure.paint(), out / f"{name}.png", figure.caption()),
        write_csv(out / f"{name}.csv", figure.rows),
        write_json(out / f"{name}.json", figure.content()),
    ]
