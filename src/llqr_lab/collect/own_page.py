"""Tables of this project's own experiments within a page: ``python -m llqr_lab.collect.own_page``.

The page is written by hand; what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` is
made from the runs. NAME is ``tableN`` of the paper, or an experiment and what its epochs measure,
as in ``help-texts token_error``; or ``changes``: the runs beside those of an earlier version of the
library, which ``earlier.json`` in their folder keeps.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

__all__ = ["EARLIER", "changes_table", "fill_page", "main", "own_table"]

EARLIER = "earlier.json"  # beside the runs: what an earlier version of the library came to

BLOCK = re.compile(r"(<!-- table (\S+) ?(\w*) -->\n).*?(<!-- end -->)", re.DOTALL)


def own_table(recipe: str, measure: str, found: Found) -> str:
    """Return the table of an experiment: last epoch, and differences to the base and to SAM.

    Methods without a run are left out.

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
        if not mine:
            continue
        mean, std = mean_std(mine.values())
        assert mean is not None
        lines.append(
            [
                method,
                str(len(mine)),
                plus_minus(mean, std),
                *(
                    _difference_text(mine, ends[other])
                    if method != other and not chosen[method].differences_from(chosen[other])
                    else ""
                    for other in (base, "SAM")
                ),
                _change_text(chosen[method]) if METHODS[method].curvature else "",
            ]
        )
    return _markdown(lines)


def changes_table(earlier: Mapping[str, Any], found: Found) -> str:
    """Return the last epochs of an earlier version beside those of today, method by method.

    Args:
        earlier: by experiment, its ``measure`` and its ``methods``, each with ``values`` by seed
            and, if it has U, the median ``change``, and how many ``refreshes`` were ``refused``.
        found: the runs of today.
    """
    header = ["experiment", "method", "earlier", "now", "U changed g by, earlier", "now"]
    lines = [header, ["---"] * len(header)]
    for recipe, about in earlier.items():
        for method in EXPERIMENTS[recipe].methods:
            before = about["methods"].get(method)
            runs = {
                run["seed"]: run
                for run in found.runs
                if run["recipe"] == recipe and run["method"] == method
            }
            now = [run["epochs"][-1][about["measure"]] for run in runs.values()]
            if not before and not now:
                continue
            lines.append(
                [
                    f"{recipe}, {about['measure'].replace('_', ' ')}",
                    method,
                    _spread_text(list(before["values"].values())) if before else "",
                    _spread_text(now) if now else "not run again",
                    _earlier_change_text(before) if before else "",
                    _change_text(Chosen(runs)) if METHODS[method].curvature else "",
                ]
            )
    return _markdown(lines)


def _spread_text(values: Sequence[float]) -> str:
    mean, std = mean_std(values)
    return f"{plus_minus(mean, std)} ({len(values)})" if mean is not None else ""


def _earlier_change_text(entry: Mapping[str, Any]) -> str:
    if "change" not in entry:
        return ""
    return _with_refusals(entry["change"], entry["refused"], entry["refreshes"])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _difference_text(mine: Mapping[int, float], baseline: Mapping[int, float]) -> str:
    found = paired_by_seed(mine, baseline)
    return difference_text(found) if found else ""


def _change_text(mine: Chosen) -> str:
    """Return the median of |Ug - g| / |g| over all refreshes, and how many were refused."""
    found = summarise_refreshes(reports_of(mine.runs.values()))
    if found is None:
        return ""
    return _with_refusals(found["change"], found["count"] - found["accepted"], found["count"])


def _with_refusals(change: float, refused: int, count: int) -> str:
    return f"{change:.2g}" + f" ({refused} of {count} refused)" * bool(refused)


def fill_page(page: str, found: Found) -> str:
    """Return the page with its tables made anew: ``tableN``, an own experiment, or ``changes``."""

    def made_block(match: re.Match[str]) -> str:
        name = match[2]
        number = name.removeprefix("table")
        if name == "changes":
            earlier = json.loads((found.root / EARLIER).read_text(encoding="utf-8"))
            made = changes_table(earlier, found)
        elif number == name:
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
