"""What ``llqr table``, ``llqr figure`` and ``llqr report`` do with the runs they find."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..output import write_csv, write_json
from ..protocols import EXPERIMENTS
from .cadence import fill_cadence
from .cells import command
from .curves import figure1, figure4
from .figures import Figure
from .render import markdown, terminal
from .runs import Cell, Found, find
from .tables import Table, fill
from .timing import figure5, figure6

__all__ = [
    "COLLECTED_FIGURES",
    "first_command",
    "look",
    "make_figure",
    "make_table",
    "table_of",
    "write_figure",
]

COLLECTED_FIGURES: dict[str, Callable[[Found, str | None], Figure]] = {
    "1": figure1,
    "4": figure4,
    "5": figure5,
    "6": figure6,
}


# figure -> the recipe whose runs it shows
RECIPES = {"1": "table5", "4": "table6", "5": "table10", "6": "figure6"}


def look(arguments: argparse.Namespace) -> Found:
    """Find the runs that the options ask for, and say which are not finished."""
    found = find(arguments.runs or arguments.out, arguments.where)
    for folder in found.unfinished:
        print(f"unfinished, not used: {folder}", file=sys.stderr)
    return found


def table_of(number: str, found: Found, scale: str | None) -> Table:
    """Fill a table of the paper."""
    return fill_cadence(found, scale) if number == "10" else fill(number, found, scale)


def first_command(recipe: str, out: Path, scale: str | None) -> str:
    """Return a command that makes one run of a recipe."""
    about = EXPERIMENTS[recipe]
    cell = Cell(about.datasets[0], about.models[0], about.methods[-1])
    return command(recipe, cell, scale or "paper", out=str(out))


def nothing(what: str, recipe: str, found: Found, scale: str | None) -> int:
    """Say that no run was found, and the command that makes one; return the exit status."""
    of_scale = f" of scale {scale}" if scale else ""
    print(
        f"llqr: no finished run{of_scale} for {what} below {found.root}; make one:\n"
        f"    {first_command(recipe, found.root, scale)}",
        file=sys.stderr,
    )
    return 1


def make_table(number: str, arguments: argparse.Namespace) -> int:
    """Print a table and write it as JSON, CSV and Markdown; 1 if there is no run, 2 on bad runs."""
    try:
        found = look(arguments)
        table = table_of(number, found, arguments.scale)
    except ValueError as error:
        print(f"llqr: {error}", file=sys.stderr)
        return 2
    if not table.runs:
        return nothing(f"table {number}", f"table{number}", found, arguments.scale)
    print("\n".join(terminal(table)))
    for path in write_table(table, arguments.out):
        print(f"wrote {path}")
    return 0


def write_table(table: Table, out: Path) -> list[Path]:
    """Write a table as JSON, CSV and Markdown."""
    page = out / f"table{table.number}.md"
    paths = [
        write_json(out / f"table{table.number}.json", table.content()),
        write_csv(out / f"table{table.number}.csv", table.long()),
        page,
    ]
    page.write_text(markdown(table), encoding="utf-8")
    return paths


def make_figure(number: str, arguments: argparse.Namespace) -> int:
    """Draw a figure and write its numbers; 1 if there is no run, 2 on bad runs."""
    try:
        found = look(arguments)
        figure = COLLECTED_FIGURES[number](found, arguments.scale)
    except ValueError as error:
        print(f"llqr: {error}", file=sys.stderr)
        return 2
    if not figure.rows:
        return nothing(f"figure {number}", RECIPES[number], found, arguments.scale)
    print(figure.caption())
    for path in write_figure(figure, arguments.out):
        print(f"wrote {path}")
    return 0


def write_figure(figure: Figure, out: Path) -> list[Path]:
    """Write a figure as PNG, its numbers as CSV, and everything as JSON."""
    from ..theory.pictures import save

    name = f"figure{figure.number}"
    return [
        save(figure.paint(), out / f"{name}.png", figure.caption()),
        write_csv(out / f"{name}.csv", figure.rows),
        write_json(out / f"{name}.json", figure.content()),
    ]
