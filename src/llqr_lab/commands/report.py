"""``llqr report``: all finished runs in one HTML file."""

from __future__ import annotations

import argparse
import sys

from ..collect.report import make_report
from ..common.output import write_whole
from .collected import find_asked_runs, say_nothing_found
from .options import add_run_options, show_examples

__all__ = ["add_arguments", "main"]

EXAMPLES = """\
example:
  llqr report --runs outputs --out results       reads below outputs, writes results/report.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --out, --runs, --scale and --where."""
    show_examples(parser, EXAMPLES)
    add_run_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Write report.html; 1 if there is no run, 2 on bad runs."""
    try:
        found = find_asked_runs(arguments)
        text = make_report(found, arguments.scale)
    except ValueError as error:
        print(f"llqr: {error}", file=sys.stderr)
        return 2
    if text is None:
        return say_nothing_found("", "table1", found, arguments.scale)
    print(f"wrote {write_whole(arguments.out / 'report.html', text)}")
    return 0
