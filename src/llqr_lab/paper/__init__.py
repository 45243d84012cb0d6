"""The paper's numbers: every cell of its tables as printed, and what it says of its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["FIGURES", "Printed", "TABLES", "parse_cell"]

FOLDER = Path(__file__).parent


class Printed(NamedTuple):
    """A printed cell: the text, its number and the standard deviation behind a ±."""

    text: str
    mean: float
    std: float | None


def parse_cell(text: str) -> Printed:
    """Read a cell as the paper prints it.

    Example:
        >>> parse_cell("95.10 ± 0.14")
        Printed(text='95.10 ± 0.14', mean=95.1, std=0.14)
        >>> parse_cell("33.20").std is None
        True
    """
    mean, _, std = text.partition(" ± ")
    return Printed(text, float(mean), float(std) if std else None)


def _read_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


# number -> table: "run" of table, row and column together say which runs a cell shows; "minus" is
# the method that a cell is compared with seed by seed (ours, not the paper's)
TABLES: dict[str, dict[str, Any]] = {
    str(n): _read_json(f"table{n}.json") for n in (1, 2, 3, 4, 5, 6, 7, 8, 10)
}
FIGURES: dict[str, dict[str, Any]] = _read_json("figures.json")
