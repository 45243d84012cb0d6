"""Successive halving over a Latin hypercube: the same budget for every method."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .runs import run_all

__all__ = ["FIRST_SEED", "Space", "configurations", "halving"]

FIRST_SEED = 1000  # those of the experiments are 0, 1, ...
Space = dict[str, dict[str, list[Any]]]
Rungs = Sequence[tuple[int, int]]  # (configurations, new seeds for each)
Task = TypeVar("Task")


def configurations(space: Space, count: int) -> list[dict[str, Any]]:
    """Return a Latin hypercube: each hyperparameter visits ``count`` equal shares of its range.

    A choice among dicts sets several settings at once.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in space.items():
        draw = random.Random(f"{key}/{count}")
        strata = draw.sample(range(count), count)
        for row, stratum in zip(rows, strata, strict=True):
            value = _value(values, (stratum + draw.random()) / count)
            row.update(value if isinstance(value, dict) else {key: value})
    return rows


def _value(values: dict[str, list[Any]], u: float) -> Any:
    if "choice" in values:
        return values["choice"][int(u * len(values["choice"]))]
    low, high = map(math.log, values["log"])
    return float(f"{math.exp(low + u * (high - low)):.3g}")


def halving(
    spaces: Mapping[str, Space],
    rungs: Rungs,
    task: Callable[[str, dict[str, Any], int], Task],
    trial: Callable[[Task], dict[str, Any]],
    workers: int,
    score: str,
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Run the configurations of every method, each rung's best on further seeds.

    Args:
        spaces: of the methods.
        rungs: how many configurations go on, and the new seeds of each.
        task: (method, settings, seed) -> what a trial gets.
        trial: runs one; its result has the entry ``score``.
        workers: processes.
        score: the higher the better; a configuration counts by the mean over its seeds.

    Returns:
        What was tried, a list a method, the best first; and the first seed that was not used.
    """
    trials: dict[str, list[dict[str, Any]]] = {
        name: [{"settings": s, "runs": []} for s in configurations(space, rungs[0][0])]
        for name, space in spaces.items()
    }
    seed = FIRST_SEED
    for number, (count, new) in enumerate(rungs, 1):
        chosen = [(name, t) for name in spaces for t in trials[name][:count]]
        tasks = [task(name, t["settings"], seed + k) for name, t in chosen for k in range(new)]
        results = iter(run_all(trial, tasks, workers, f"rung {number} of {len(rungs)}"))
        for _, t in chosen:
            t["runs"] += [{"seed": seed + k, **next(results)} for k in range(new)]
            t[score] = round(statistics.fmean(r[score] for r in t["runs"]), 3)
        # Those that went further stay in front; sorting is stable.
        for name in spaces:
            trials[name][:count] = sorted(trials[name][:count], key=lambda t: -t[score])
        seed += new
    return trials, seed
