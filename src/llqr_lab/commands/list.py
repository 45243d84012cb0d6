"""``llqr list``: the recipes, and what each can run."""

from __future__ import annotations

import argparse
import textwrap

from ..protocols import EXPERIMENTS, slug
from ..recipes.config import RECIPES
from .options import show_examples

__all__ = ["add_arguments", "main"]

EXAMPLES = """\
example:
  llqr list | grep -A 3 table5                   what table 5 can run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options."""
    show_examples(parser, EXAMPLES)


def main(arguments: argparse.Namespace) -> int:
    """Print the recipes."""
    for name in RECIPES:
        experiment = EXPERIMENTS[name]
        print(f"{name}: {experiment.title}")
        for what, names in (
            ("dataset", experiment.datasets),
            ("model", experiment.models),
            ("method", experiment.methods),
        ):
            line = f"{what}: {', '.join(map(slug, names))}"
            print(textwrap.fill(line, 100, initial_indent="    ", subsequent_indent=" " * 12))
    print(
        "\n`llqr run --help` explains; scale=small runs a recipe in minutes, on data that come with"
        "\nthe package. Figure 1 is drawn from table 5's runs, figure 4 from table 6's, figure 5"
        "\nfrom table 10's; `llqr table 9` and `llqr figure 2`, `3` need no runs."
        "\nRecipes of pictures also take model=timm/NAME and model=torchvision/NAME, if these are"
        "\ninstalled (pip install 'llqr[vision]')."
    )
    return 0
