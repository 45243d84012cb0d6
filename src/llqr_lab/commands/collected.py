"""What the commands table, figure and report share: find runs, or say that there are none."""

from __future__ import annotations

import argparse
import sys

from ..collect.make import first_command
from ..collect.runs import Found, find_runs

__all__ = ["find_asked_runs", "say_nothing_found"]


def find_asked_runs(arguments: argparse.Namespace) -> Found:
    """Find the runs that the options ask for, and say which are not finished."""
    found = find_runs(arguments.runs or arguments.out, arguments.where)
    for folder in found.unfinished:
        print(f"unfinished, not used: {folder}", file=sys.stderr)
    return found


def say_nothing_found(what: str, recipe: str, found: Found, scale: str | None) -> int:
    """Say that no run was found, and the command that makes one; return the exit status."""
    of_scale = f" of scale {scale}" if scale else ""
    print(
        f"llqr: no finished run{of_scale}{what} below {found.root}; make one:\n"
        f"    {first_command(recipe, found.root, scale)}",
        file=sys.stderr,
    )
    return 1
