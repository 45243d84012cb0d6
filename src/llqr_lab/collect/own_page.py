"""Tables of this project's own experiments within a page: ``python -m llqr_lab.collect.own_page``.

The page is written by hand; what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` is
made from the runs. NAME is ``tableN`` of the paper, or an experiment and what its epochs measure,
as in ``help-texts token_error``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.output import difference_text, plus_minus
from ..common.refreshes import summarise_refreshes
from ..common.statistics import mean_std, paired_by_seed
from ..protocols import EXPERIMENTS, METHODS
from .about import reports_of
from .cells import Chosen, choose_runs
from .make import table_of
from .others import other_experiments
from .render import markdown_page
from .runs import Cell, Found, find_runs

__all__ = ["fill_page", "main", "own_table"]

BLOCK = re.compile(r"(<!-- table (\S+) ?(\w*) -->\n).*?(<!-- end -->)", re.DOTALL)


def own_table(recipe: str, measure: str, found: Found) -> str:
    """Return the table of an experiment: last epoch, and differences to the base and to SAM.

    Differences are taken seed by seed; behind ± stands their standard error, or
    both of them for two seeds.

    Args:
        recipe: the experiment.
        measure: an entry of its epochs.
        found: the runs.
    """
    runs = other_experiments(found.runs)[recipe]
    about = EXPERIMENTS[recipe]
    noise = runs[0]["noise"]
    cells = {m: Cell(about.datasets[0], about.models[0], m, noise) for m in about.methods}
    chosen = {m: choose_runs(runs, cell, recipe) for m, cell in cells.items()}
    base = about.methods[0]
    ends = {m: {s: r["epochs"][-1][measure] for s, r in c.runs.items()} for m, c in chosen.items()}
    name = measure.replace("_", " ")
    header = ["method", "seeds", name, f"minus {base}", "minus SAM", "U changes g by"]
    lines = [header, ["---"] * len(header)]
    for method in about.methods:
        mine = ends[method]
        mean, std = mean_std(mine.values())
        lines.append(
            [
                method,
                str(len(mine)),
                "missing" if mean is None else plus_minus(mean, std),
                *(
                    _difference_text(mine, ends[other])
                    if method != other and not chosen[method].differences_from(chosen[other])
                    else ""
                    for other in (base, "SAM")
                ),
                _change_text(chosen[method]) if METHODS[method].curvature else "",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _difference_text(mine: Mapping[int, float], baseline: Mapping[int, float]) -> str:
    found = paired_by_seed(mine, baseline)
    return difference_text(found) if found else ""


def _change_text(mine: Chosen) -> str:
    """Return the median of |Ug - g| / |g| over all refreshes, and how many were refused."""
    found = summarise_refreshes(reports_of(mine.runs.values()))
    if found is None:
        return ""
    refused = found["count"] - found["accepted"]
    return f"{found['change']:.2g}" + f" ({refused} of {found['count']} refused)" * bool(refused)


def fill_page(page: str, found: Found) -> str:
    """Return the page with its tables made anew: ``tableN`` of the paper, or an own experiment."""

    def made_block(match: re.Match[str]) -> str:
        name = match[2]
        number = name.removeprefix("table")
        if number == name:
            made = own_table(name, match[3], found)
        else:
            made = markdown_page(table_of(number, found, None)).replace("\n## ", "\n### ")
            made = made.partition("\n")[2]  # the page has a heading of its own
        return f"{match[1]}\n{made.strip()}\n\n{match[4]}"

    return BLOCK.sub(made_block, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the page."""
    parser = argparse.ArgumentParser(
        prog="python -m llqr_lab.collect.own_page", description="Fill the tables of a page."
    )
    parser.add_argument("runs", type=Path, help="folder of the finished runs")
    parser.add_argument("page", type=Path, help="Markdown file")
    arguments = parser.parse_args(argv)
    text = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(fill_page(text, find_runs(arguments.runs)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
