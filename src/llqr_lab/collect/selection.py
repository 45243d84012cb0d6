"""A weight decay for each network and data set: the one with which the baseline was best.

Appendix C.1 of the paper gives the grid and the rule, not what was chosen. ``llqr select`` follows
the rule and writes down what it chose; tables then show the runs that have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.statistics import mean_std
from ..protocols import EXPERIMENTS, resolve_settings, slug
from .cells import Chosen, choose_runs, run_command
from .runs import SELECTED, Cell, Found, Run, RunError

__all__ = ["BASELINE", "further_commands", "select_weight_decay", "selection_path"]

BASELINE = "SGDM"
RULE = (
    "the value of the grid with the largest mean of the baseline's best epochs over the seeds that "
    "all values have (appendix C.1)"
)


def selection_path(out: Path, recipe: str, scale: str) -> Path:
    """Return the file that a selection is written to, below the folder of the runs."""
    return out / f"selection-{recipe}-{scale}.json"


def select_weight_decay(recipe: str, found: Found, scale: str) -> dict[str, Any]:
    """Return, for each network and data set, the weight decay with which the baseline is best.

    Args:
        recipe: whose grid it is.
        found: all runs, of all values.
        scale: of the runs.

    Returns:
        Plain data: "rows", of which each has "chosen" (None: something is missing), "candidates"
        with mean and standard deviation, "seeds", and "missing", the commands of missing runs.

    Raises:
        ValueError: the recipe has no such grid, or no SGDM.
        RunError: runs contradict each other.
    """
    about = EXPERIMENTS[recipe]
    if BASELINE not in about.methods:
        raise ValueError(
            f"RECIPE: {recipe} has no {BASELINE}, which selects; its rows are those of "
            f"table1, table2 and table3"
        )
    rows = []
    for dataset in about.datasets:
        for model in about.models:
            protocol = resolve_settings(recipe, dataset, model, BASELINE, scale)
            if "search.weight_decay" not in protocol:
                raise ValueError(f"RECIPE: {recipe} has no grid of weight decays")
            grid = protocol["search.weight_decay"].value
            noises = {r.cell.noise for r in found.runs if _is_candidate(r, dataset, model, scale)}
            for noise in sorted(noises or {0.0}):
                cell = Cell(dataset, model, BASELINE, noise)
                rows.append(_select_row(recipe, found, scale, cell, grid))
    return {
        "selected": SELECTED,
        "recipe": recipe,
        "scale": scale,
        "baseline": BASELINE,
        "rule": RULE,
        "rows": rows,
    }


def _is_candidate(run: Run, dataset: str, model: str, scale: str) -> bool:
    cell = run.cell
    return (cell.dataset, cell.model, cell.method) == (dataset, model, BASELINE) and (
        run["scale"] == scale
    )


def _select_row(
    recipe: str, found: Found, scale: str, cell: Cell, grid: Sequence[float]
) -> dict[str, Any]:
    chosen = {value: _runs_with(recipe, found, scale, cell, value) for value in grid}
    numbers = {value: c.numbers_by_seed("best") for value, c in chosen.items()}
    examples = [c for c in chosen.values() if c.example]
    for other in examples[1:]:
        unlike = [d for d in examples[0].differences_from(other) if not d.startswith(SELECTED)]
        if unlike:
            raise RunError(f"{cell.dataset}, {cell.model}: the grid's runs differ in {unlike[0]}")
    seeds = sorted(set.intersection(*(set(n) for n in numbers.values())))
    means = {value: mean_std(n[s] for s in seeds) for value, n in numbers.items()}
    best = max(grid, key=lambda value: means[value][0] or 0.0) if seeds else None
    return {
        "dataset": cell.dataset,
        "model": cell.model,
        "noise": cell.noise,
        "chosen": best,
        "seeds": seeds,
        "candidates": [
            {"value": value, "mean": mean, "std": std} for value, (mean, std) in means.items()
        ],
        "missing": [
            run_command(recipe, cell, scale, out=str(found.root), weight_decay=value)
            for value in grid
            if not numbers[value]
        ],
    }


def _runs_with(recipe: str, found: Found, scale: str, cell: Cell, value: float) -> Chosen:
    """Return the cell's runs of one weight decay, with which nothing else was changed by hand."""
    runs = [
        run
        for run in found.runs
        if run["scale"] == scale
        and run["settings"].get(SELECTED) == value
        and set(run["changed"]) <= {SELECTED, "data.holdout"}
    ]
    return choose_runs(runs, cell, recipe)


def further_commands(content: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Yield the commands that run the other methods of each row with what was chosen."""
    about = EXPERIMENTS[content["recipe"]]
    for row in content["rows"]:
        if row["chosen"] is None:
            continue
        methods = [slug(m) for m in about.methods if m not in (BASELINE, "Adam", "AdamW")]
        cell = Cell(row["dataset"], row["model"], BASELINE, row["noise"])
        command = run_command(
            content["recipe"],
            cell,
            content["scale"],
            out=str(out),
            weight_decay=row["chosen"],
        )
        seeds = ",".join(map(str, row["seeds"]))
        yield (
            command.replace(f"method={slug(BASELINE)}", f"method={','.join(methods)}")
            .replace("seed=0", f"seed={seeds}")
            .replace(content["recipe"], f"{content['recipe']} --multirun", 1)
        )
