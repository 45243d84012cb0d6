"""Where results go: CSV and JSON files, and on the terminal a table and a bar."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = [
    "add_out",
    "plain",
    "progress",
    "table_lines",
    "write_csv",
    "write_json",
    "write_whole",
]

T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]


def add_out(parser: argparse.ArgumentParser, default: Path = Path("outputs")) -> None:
    """Add the option --out, the folder that results are written to (made if it is not there)."""
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        metavar="DIR",
        help="folder to write to (default: %(default)s)",
    )


def progress(steps: Iterable[T], what: str) -> Iterable[T]:
    """Show a bar on a terminal while the steps are gone through; leave no trace after it."""
    return tqdm(steps, desc=what, leave=False, disable=None)


def write_csv(path: Path, rows: Rows) -> Path:
    """Write rows of equal keys; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for JSON, which has no NaN and no infinity: null in their place."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


def write_json(path: Path, content: Any) -> Path:
    """Write plain data; NaN is refused, since JSON has none. Return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    return write_whole(path, text + "\n")


def write_whole(path: Path, text: str) -> Path:
    """Write a file; an old one stays whole until the new one is. Return the path."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
    return path


def table_lines(rows: Rows) -> list[str]:
    """Return rows as lines of aligned columns, numbers to the right."""
    header = list(rows[0])
    cells = [[_shown(row[key]) for key in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [not isinstance(rows[0][key], str) for key in header]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [header, *cells]
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
