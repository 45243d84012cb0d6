"""Successive halving over a Latin hypercube: the same number of runs for every method.

Not by optuna: its SuccessiveHalvingPruner judges a configuration when it reports, against those
that reported before, and cannot resume one that it has stopped. A method's number of runs, and what
wins, then depend on the order of the configurations (54 to 84 runs instead of 62, when the demo's
recorded trials are replayed in five orders). Here a rung is judged when all of it has run.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..common.processes import run_all

__all__ = ["FIRST_SEED", "Journal", "Rungs", "Space", "draw_configurations", "run_rungs"]

FIRST_SEED = 1000  # those of the experiments are 0, 1, ...
Space = dict[str, dict[str, list[Any]]]
Rungs = Sequence[tuple[int, int]]  # (configurations, new seeds for each)
Result = dict[str, Any]
Job = TypeVar("Job")


def draw_configurations(space: Space, count: int) -> list[dict[str, Any]]:
    """Return a Latin hypercube: each hyperparameter visits ``count`` equal shares of its range.

    The draws of a hyperparameter depend only on its name and ``count``, so that methods share them:
    configuration i of LLQR+SAM has the rho of configuration i of SAM. A choice among dicts sets
    several settings at once.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in space.items():
        draws = random.Random(f"{key}/{count}")
        strata = draws.sample(range(count), count)
        for row, stratum in zip(rows, strata, strict=True):
            value = _value_at(values, (stratum + draws.random()) / count)
            row.update(value if isinstance(value, dict) else {key: value})
    return rows


def _value_at(values: dict[str, list[Any]], share: float) -> Any:
    """Return the value at a share, in [0, 1), of a range or a list of choices."""
    if "choice" in values:
        return values["choice"][int(share * len(values["choice"]))]
    low, high = map(math.log, values["log"])
    return float(f"{math.exp(low + share * (high - low)):.3g}")


class Journal:
    """The finished runs of a search, one per line: a killed search resumes from them.

    Args:
        path: of the file; None: nothing is written or read.
        about: what the runs have in common; a file about something else is refused.

    Raises:
        ValueError: the file is of another search.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """Read what is there, or begin the file."""
        self.path = path
        self.results: dict[str, Result] = {}
        if path is None:
            return
        head = json.dumps(about, sort_keys=True)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        # A process that was killed may have left half a line.
        lines = [line for line in lines if line.endswith("\n")]
        if lines and lines[0] != head + "\n":
            raise ValueError(f"journal: {path} is of another search; delete it to begin anew")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines or [head + "\n"]), encoding="utf-8")
        self.results = {key: result for key, result in map(json.loads, lines[1:])}

    @staticmethod
    def key_of(method: str, settings: Mapping[str, Any], seed: int) -> str:
        """Return what identifies a run."""
        return json.dumps([method, settings, seed], sort_keys=True)

    def record(self, key: str, result: Result) -> None:
        """Keep the result of a run."""
        self.results[key] = result
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, result]) + "\n")


def run_rungs(
    spaces: Mapping[str, Space],
    rungs: Rungs,
    make_job: Callable[[str, dict[str, Any], int], Job],
    run_job: Callable[[Job], Result],
    workers: int,
    score: str,
    journal: Journal,
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Run the configurations of every method, each rung's best on further seeds.

    Args:
        spaces: of the methods.
        rungs: how many configurations go on, and the new seeds of each.
        make_job: (method, settings, seed) -> what a run gets.
        run_job: makes a run; its result has the entry ``score``.
        workers: processes.
        score: the higher the better; a configuration counts by the mean over its seeds.
        journal: of the runs that are finished.

    Returns:
        What was tried, a list per method, the best first; and the first seed that was not used.
    """
    trials: dict[str, list[dict[str, Any]]] = {
        name: [{"settings": s, "runs": []} for s in draw_configurations(space, rungs[0][0])]
        for name, space in spaces.items()
    }
    seed = FIRST_SEED
    for number, (count, new) in enumerate(rungs, 1):
        seeds = range(seed, seed + new)
        chosen = [(name, t) for name in spaces for t in trials[name][:count]]
        runs = [(name, t["settings"], s) for name, t in chosen for s in seeds]
        # What a killed search has done already is not run again.
        missing = [run for run in runs if journal.key_of(*run) not in journal.results]
        run_all(
            run_job,
            [make_job(*run) for run in missing],
            workers,
            f"rung {number} of {len(rungs)}",
            lambda i, result, missing=missing: journal.record(journal.key_of(*missing[i]), result),
        )
        for name, t in chosen:
            keys = {s: journal.key_of(name, t["settings"], s) for s in seeds}
            t["runs"] += [{"seed": s, **journal.results[key]} for s, key in keys.items()]
            t[score] = round(statistics.fmean(r[score] for r in t["runs"]), 3)
        # Those that went further stay in front; sorting is stable.
        for name in spaces:
            trials[name][:count] = sorted(trials[name][:count], key=lambda t: -t[score])
        seed += new
    return trials, seed
