"""``llqr select RECIPE``: each row's weight decay, by the baseline's best result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ..collect.runs import find_runs
from ..collect.selection import BASELINE, further_commands, select_weight_decay, selection_path
from ..common.output import plus_minus, write_json
from ..protocols import EXPERIMENTS, SCALES
from .options import add_out, add_runs

__all__ = ["add_arguments", "main"]

ABOUT = """\
Chooses the weight decay of each network and data set, as appendix C.1 of the paper says: the value
of the grid (1e-4, 5e-4, 1e-3) with which the baseline, SGDM, is best. Reads the finished runs of
the grid, and writes what it chose, with the numbers that it chose by, as
selection-RECIPE-SCALE.json. `llqr table` and `llqr figure` find that file below --runs and show,
for these rows, the runs that have the chosen value.
"""
EXAMPLES = """\
example, the whole way:
  llqr run table1 --multirun model=resnet18 method=sgdm seed=0,1,2,3,4 \\
      base.weight_decay=1e-4,5e-4,1e-3 data=/data/cifar10
  llqr select table1                    writes outputs/selection-table1-paper.json, and prints the
                                        commands that run the other methods with what it chose
  llqr table 1

With --held-out, runs that were made with input.holdout=5000 choose, so that no test picture does.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and where the runs are."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = ABOUT, EXAMPLES
    parser.add_argument("recipe", metavar="RECIPE", help="table1, table2, table3, table5, table8")
    add_out(parser)
    add_runs(parser)
    parser.add_argument(
        "--scale", choices=SCALES, default=SCALES[0], help="of the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="choose by the runs that were evaluated on held out training data",
    )


def main(arguments: argparse.Namespace) -> int:
    """Choose, print and write; 1 if a row lacks runs, 2 if there is no such grid or on bad runs."""
    root = arguments.runs or arguments.out
    try:
        if arguments.recipe not in EXPERIMENTS:
            raise ValueError(f"RECIPE: there is no {arguments.recipe!r}; `llqr list` shows all")
        found = find_runs(root, selects=False, held_out=arguments.held_out)
        content = select_weight_decay(arguments.recipe, found, arguments.scale)
    except ValueError as error:
        print(f"llqr: {error}", file=sys.stderr)
        return 2
    content["evaluated_on"] = "held out training data" if arguments.held_out else "test data"
    for row in content["rows"]:
        print(row_text(row))
    missing = [command for row in content["rows"] for command in row["missing"]]
    if missing:
        print("llqr: runs of the grid are missing; the first seed of each:", file=sys.stderr)
        print("\n".join(f"    {command}" for command in missing), file=sys.stderr)
    if any(row["chosen"] is not None for row in content["rows"]):
        print("the other methods with what was chosen:")
        for command in further_commands(content, root):
            print(f"    {command}")
        path = selection_path(arguments.out, arguments.recipe, arguments.scale)
        print(f"wrote {write_json(path, content)}")
    return 1 if missing or any(row["chosen"] is None for row in content["rows"]) else 0


def row_text(row: Mapping[str, Any]) -> str:
    """Say what was chosen for a row, and by which numbers."""
    name = f"{row['dataset']}, {row['model']}" + f", noise {row['noise']:g}" * bool(row["noise"])
    numbers = ", ".join(
        f"{c['value']:g}: " + ("–" if c["mean"] is None else plus_minus(c["mean"], c["std"]))
        for c in row["candidates"]
    )
    if row["chosen"] is None:
        return f"{name}: nothing chosen; {BASELINE} has no seed that all values have"
    return f"{name}: {row['chosen']:g} ({BASELINE} at {numbers}; {len(row['seeds'])} seeds)"
