"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..protocols import SCALES

__all__ = ["add_out", "add_run_options", "add_runs", "show_examples"]


def show_examples(parser: argparse.ArgumentParser, examples: str) -> None:
    """Show examples below the help, as they are written."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = examples


def add_out(parser: argparse.ArgumentParser, default: Path = Path("outputs")) -> None:
    """Add the option --out, the folder that results are written to (made if it is not there)."""
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        metavar="DIR",
        help="folder to write to (default: %(default)s)",
    )


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the option --runs, the folder below which finished runs are read."""
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help="folder to read runs from, at any depth (default: that of --out)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add --out, --runs, --scale and --where."""
    add_out(parser)
    add_runs(parser)
    parser.add_argument(
        "--scale", choices=SCALES, help="of the runs that are used (default: the largest found)"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="leave out runs whose setting has another value (base.weight_decay=0.001); repeatable",
    )
