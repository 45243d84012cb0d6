"""``llqr table N``: the tables of the paper that are made here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from .output import add_out, table_lines, write_csv, write_json

__all__ = ["TABLES", "add_arguments", "main"]


def table9(out: Path) -> list[Path]:
    """Count the numbers of U for vision transformers; print, write and return the files."""
    from .theory.storage import storage_table

    rows = [row.row() for row in storage_table()]
    print("\n".join(table_lines(rows)))
    print(
        "\nNumbers stored and MiB a device in fp32. The rows ViT-Ti/16, as the paper prints them, "
        "are ViT-Ti\nwith patch 8 on 64 x 64 images and 200 classes; ViT-Ti/16 at 224 has patch 16 "
        "and 1000 classes."
    )
    return [write_csv(out / "table9.csv", rows), write_json(out / "table9.json", rows)]


# number in the paper -> function(folder) that prints the table and returns the files it wrote
TABLES: dict[str, Callable[[Path], list[Path]]] = {"9": table9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the number of the table and --out."""
    parser.add_argument("number", metavar="N", help=f"number in the paper: {', '.join(TABLES)}")
    add_out(parser)


def main(arguments: argparse.Namespace) -> int:
    """Make one table; 2 if there is none of that number."""
    if arguments.number not in TABLES:
        print(
            f"llqr: there is no table {arguments.number!r} here; there is: {', '.join(TABLES)}",
            file=sys.stderr,
        )
        return 2
    for path in TABLES[arguments.number](arguments.out):
        print(f"wrote {path}")
    return 0
