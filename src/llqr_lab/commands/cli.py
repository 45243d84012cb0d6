"""The command line: ``llqr COMMAND ...``. A command is a module, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

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
    "select": (
        "llqr_lab.commands.select",
        "choose each row's weight decay by the baseline's best result",
    ),
    "table": ("llqr_lab.commands.table", "make a table of the paper"),
    "figure": ("llqr_lab.commands.figure", "make a figure of the paper"),
    "sharpness": (
        "llqr_lab.commands.sharpness",
        "measure and draw the sharpness of the network of a run",
    ),
    "study": (
        "llqr_lab.commands.study",
        "compare methods at equal steps, at equal seconds and to a target",
    ),
    "plan": (
        "llqr_lab.commands.plan",
        "say what a geometry would cost on a network: memory, operations, messages",
    ),
    "report": ("llqr_lab.commands.report", "show all finished runs in one HTML file"),
    "completion": ("llqr_lab.commands.completion", "print a script that completes llqr on TAB"),
}

# extra -> what it installs, by the name that is imported
EXTRAS = {
    "lab": (
        *("hydra", "omegaconf", "matplotlib", "numpy", "sklearn", "PIL", "tqdm"),
        *("tensorboard", "jinja2"),
    ),
    "translation": ("tokenizers", "sacrebleu"),
    "slurm": ("hydra_plugins", "submitit"),
    "vision": ("timm", "torchvision"),
}
TRACKERS = ("wandb", "trackio", "mlflow")  # of no extra: who uses one has it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 only when all asked for was done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with warnings.catch_warnings():
        # A line of the library says nothing to who typed a command.
        warnings.showwarning = _show_warning
        return _run_command(argv)


def _show_warning(message: Warning | str, *_where: Any) -> None:
    print(f"llqr: {message}", file=sys.stderr)


def _run_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="llqr",
        description="LLQR+SAM: the paper's demo, theory, tables and figures.",
        epilog="llqr COMMAND --help explains a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"llqr {llqr.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked: tuple[str, argparse.ArgumentParser] | None = None
    wanted = next((a for a in argv if not a.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name == wanted:
            asked = module, command
    if not argv:
        parser.print_help()
        return 2
    try:
        # Only the command that is called is imported: torch and Hydra take seconds.
        if asked:
            importlib.import_module(asked[0]).add_arguments(asked[1])
        arguments = parser.parse_args(as_options(argv, wanted))
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        status = int(importlib.import_module(COMMANDS[arguments.command][0]).main(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("llqr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `llqr table 1 | head`: nobody reads on
        # Python flushes stdout once more when it ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return 141
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        if extra is None and package not in TRACKERS:
            raise
        remedy = package if extra is None else f"'llqr[{extra}]'"
        print(f"llqr: {package} is not installed; pip install {remedy}", file=sys.stderr)
        return 2
    return status


def as_options(argv: Sequence[str], command: str | None) -> list[str]:
    """Return the arguments with ``out=DIR`` and ``runs=DIR`` as options, as ``llqr run`` has them.

    Example:
        >>> as_options(["table", "1", "runs=outputs", "out=results"], "table")
        ['table', '1', '--runs=outputs', '--out=results']
    """
    if command == "run":
        return list(argv)
    return [f"--{word}" if word.startswith(("out=", "runs=")) else word for word in argv]
