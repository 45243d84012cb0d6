"""Where results go: files, written whole or not at all; on the terminal a table and a bar."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = [
    "RESULT_FORMAT",
    "difference_text",
    "plus_minus",
    "progress_bar",
    "show_refreshes",
    "step_bar",
    "table_lines",
    "without_nan",
    "write_csv",
    "write_json",
    "write_whole",
]

RESULT_FORMAT = 1  # of a run's result.json: what recipes write and collect reads
T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]


def progress_bar(steps: Iterable[T], what: str) -> Iterable[T]:
    """Show a bar on a terminal while the steps are gone through; leave no trace after it."""
    return tqdm(steps, desc=what, leave=False, disable=None)


class LineBar(tqdm):
    """A bar for a log file: a line every so many seconds, in place of one that moves."""

    seconds = 30.0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the state as a line, unless one was printed a moment ago."""
        now = time.monotonic()
        began = self.__dict__.setdefault("_last_line", now)
        if now - began >= self.seconds:
            self.__dict__["_last_line"] = now
            print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave no trace."""
        self.disable = True


def step_bar(total: int, done: int, what: str, *, silent: bool = False) -> tqdm:
    """Return a bar of steps: it moves on a terminal, and prints lines elsewhere."""
    bar = tqdm if sys.stderr.isatty() else LineBar
    options = {} if bar is tqdm else {"mininterval": LineBar.seconds, "ascii": True, "ncols": 100}
    shown = {"desc": what, "unit": "step", "leave": False, "disable": silent}
    return bar(total=total, initial=done, **shown, **options)


def show_refreshes(bar: tqdm, geometry: Any) -> None:
    """Show on a bar how far a long refresh is; geometry is None if nothing is learned."""

    def show(done: int, total: int, seconds: float) -> None:
        text = f"refresh: product {done} of at most {total}, {seconds:.0f} s"
        bar.set_postfix_str(text, refresh=True)

    if geometry is not None and not bar.disable:
        geometry.on_progress = show


def write_csv(path: Path, rows: Rows) -> Path:
    """Write rows of equal keys; return the path."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return write_whole(path, text.getvalue())


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for JSON, which has no NaN and no infinity: null in their place."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


def write_json(path: Path, content: Any) -> Path:
    """Write plain data; NaN is refused, since JSON has none. Return the path."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    return write_whole(path, text + "\n")


def write_whole(path: Path, text: str) -> Path:
    """Write a file and make its folder; an old file stays whole until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    # newline="": line ends are written as they are (CSV has its own).
    with new.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(new, path)
    return path


def table_lines(rows: Rows) -> list[str]:
    """Return rows as lines of aligned columns, numbers to the right."""
    header = list(rows[0])
    cells = [[_cell_text(row[key]) for key in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [not isinstance(rows[0][key], str) for key in header]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [header, *cells]
    ]


def _cell_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def plus_minus(mean: float, spread: float | None, sign: str = "", mark: str = "±") -> str:
    """Format a number and its spread with two decimals.

    Example:
        >>> plus_minus(1.5, 0.25, sign="+"), plus_minus(1.5, None)
        ('+1.50 ± 0.25', '1.50')
    """
    return f"{mean:{sign}.2f}" + ("" if spread is None else f" {mark} {spread:.2f}")


def difference_text(found: Mapping[str, Any], mark: str = "±") -> str:
    """Format a mean difference with its standard error, or with its range if there are two.

    Example:
        >>> difference_text({"mean": 1.5, "standard_error": 0.25, "range": None})
        '+1.50 ± 0.25'
        >>> difference_text({"mean": 1.5, "standard_error": None, "range": [1.0, 2.0]})
        '+1.50 [+1.00, +2.00]'
    """
    if found["range"]:
        low, high = found["range"]
        return f"{found['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"
    return plus_minus(found["mean"], found["standard_error"], "+", mark)
