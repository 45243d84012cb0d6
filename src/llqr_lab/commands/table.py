"""``llqr table N``: the tables of the paper, counted here or collected from finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..collect.make import table_of, write_table
from ..collect.render import terminal_lines
from ..common.output import table_lines, write_csv, write_json
from ..paper import TABLES as COLLECTED
from .collected import find_asked_runs, say_nothing_found
from .options import add_run_options, show_examples

__all__ = ["TABLES", "add_arguments", "main"]

EXAMPLES = """\
examples:
  llqr table 1                                   from the runs below outputs
  llqr table 1 --runs outputs --out results      reads below outputs, writes results/table1.md, ...
  llqr table 8 --where base.weight_decay=0.001   of several settings, the runs with this one
  llqr table 9                                   counted, without runs
"""


def count_table9(out: Path) -> list[Path]:
    """Count the numbers of U for vision transformers; print, write and return the files."""
    from ..theory.storage import storage_table

    rows = [row.plain_row() for row in storage_table()]
    print("\n".join(table_lines(rows)))
    print(
        "\nNumbers stored and MiB per device in fp32. The rows ViT-Ti/16, as the paper prints "
        "them, are ViT-Ti\nwith patch 8 on 64 x 64 images and 200 classes; ViT-Ti/16 at 224 has "
        "patch 16 and 1000 classes."
    )
    return [write_csv(out / "table9.csv", rows), write_json(out / "table9.json", rows)]


# number in the paper -> function(folder) that prints the table and returns the files it wrote
TABLES: dict[str, Callable[[Path], list[Path]]] = {"9": count_table9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the number of the table and where the runs are."""
    show_examples(parser, EXAMPLES)
    numbers = ", ".join(sorted([*TABLES, *COLLECTED], key=int))
    parser.add_argument(
        "number", metavar="N", help=f"number in the paper: {numbers}; 9 counts and needs no runs"
    )
    add_run_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Make one table: 2 if there is none of that number, 1 if no run was found for it."""
    if arguments.number in COLLECTED:
        return _make_table(arguments.number, arguments)
    if arguments.number not in TABLES:
        numbers = ", ".join(sorted([*TABLES, *COLLECTED], key=int))
        print(
            f"llqr: there is no table {arguments.number!r} here; there is: {numbers}",
            file=sys.stderr,
        )
        return 2
    for path in TABLES[arguments.number](arguments.out):
        print(f"wrote {path}")
    return 0


def _make_table(number: str, arguments: argparse.Namespace) -> int:
    """Print a table and write it as JSON, CSV and Markdown; 1 if there is no run, 2 on bad runs."""
    try:
        found = find_asked_runs(arguments)
        table = table_of(number, found, arguments.scale)
    except ValueError as error:
        print(f"llqr: {error}", file=sys.stderr)
        return 2
    if not table.runs:
        return say_nothing_found(f" for table {number}", f"table{number}", found, arguments.scale)
    # Written first: whoever reads the lines may stop reading (`| head`).
    written = write_table(table, arguments.out)
    print("\n".join(terminal_lines(table)))
    for path in written:
        print(f"wrote {path}")
    return 0
