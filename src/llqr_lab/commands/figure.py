"""``llqr figure N``: the paper's figures, computed here or collected from finished runs."""

from __future__ import annotations

import argparse
import sys

import torch

from ..collect.make import COLLECTED_FIGURES, write_figure
from ..theory.figures import FIGURES
from .collected import find_asked_runs, say_nothing_found
from .options import add_run_options, show_examples

__all__ = ["add_arguments", "main"]

# figure -> the recipe whose runs it shows
RECIPES = {"1": "table5", "4": "table6", "5": "table10", "6": "figure6"}

EXAMPLES = """\
examples:
  llqr figure 2                                  computed, without runs
  llqr figure 4 --runs outputs --out results     reads below outputs, writes results/figure4.*
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the number of the figure and where the runs are."""
    show_examples(parser, EXAMPLES)
    parser.add_argument(
        "number",
        metavar="N",
        help=f"number or name: {', '.join(FIGURES)} are computed; "
        f"{', '.join(COLLECTED_FIGURES)} show runs",
    )
    add_run_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Make one figure: 2 if there is none of that number, 1 if no run was found for it."""
    if arguments.number in COLLECTED_FIGURES:
        return _make_figure(arguments.number, arguments)
    if arguments.number not in FIGURES:
        print(
            f"llqr: there is no figure {arguments.number!r} here; there are: "
            f"{', '.join([*FIGURES, *COLLECTED_FIGURES])}",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)  # tensors are small: more threads would only wait for each other
    for path in FIGURES[arguments.number](arguments.out):
        print(f"wrote {path}")
    return 0


def _make_figure(number: str, arguments: argparse.Namespace) -> int:
    """Draw a figure and write its numbers; 1 if there is no run, 2 on bad runs."""
    try:
        found = find_asked_runs(arguments)
        figure = COLLECTED_FIGURES[number](found, arguments.scale)
    except ValueError as error:
        print(f"llqr: {error}", file=sys.stderr)
        return 2
    if not figure.rows:
        return say_nothing_found(f" for figure {number}", RECIPES[number], found, arguments.scale)
    written = write_figure(figure, arguments.out)
    print(figure.caption())
    for path in written:
        print(f"wrote {path}")
    return 0
