"""The command line: ``llqr COMMAND ...``. A command is a module, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

import llqr

__all__ = ["main"]

# name: (module with `add_arguments(parser)` and `main(arguments) -> exit status`, one line of help)
COMMANDS = {
    "demo": (
        "llqr_lab.commands.demo",
        "train LLQR+SAM beside its baselines on digits with noisy labels",
    ),
    "theory": ("llqr_lab.commands.theory", "check every statement of the paper's theory"),
    "list": ("llqr_lab.commands.list", "show the recipes, and what each can run"),
    "run": ("llqr_lab.commands.run", "make a run of a table or a figure of the paper"),
    "table": ("llqr_lab.commands.table", "make a table of the paper"),
    "figure": ("llqr_lab.commands.figure", "make a figure of the paper"),
    "sharpness": (
        "llqr_lab.commands.sharpness",
        "measure and draw the sharpness of the network of a run",
    ),
    "plan": (
        "llqr_lab.commands.plan",
        "say what a geometry would cost on a network: memory, operations, messages",
    ),
    "report": ("llqr_lab.commands.report", "show all finished runs in one HTML file"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 only when all asked for was done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="llqr",
        description="LLQR+SAM: the paper's demo, theory, tables and figures.",
        epilog="llqr COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"llqr {llqr.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((a for a in argv if not a.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        # Only the command that is called is imported: torch and Hydra take seconds.
        if name == wanted:
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        status = importlib.import_module(COMMANDS[arguments.command][0]).main(arguments)
    except KeyboardInterrupt:
        print("llqr: interrupted", file=sys.stderr)
        return 130
    return int(status)
