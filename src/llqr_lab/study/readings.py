"""What the runs of a study say: at equal steps, at equal seconds, and to a target."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.environment import describe_environment
from ..common.statistics import paired_by_seed
from .costs import seconds_at
from .problems import DECAY_SEARCHED, PROBLEMS
from .run import Setup, costs_of, final_runs, lengths_of, tuned_of

__all__ = [
    "best_tuned",
    "collect",
    "gain",
    "interaction",
    "metrics_of",
    "time_to",
    "verdict",
    "write_results",
]

Entry = Mapping[str, Any]  # of a method on a problem
Difference = Mapping[str, Any]  # "mean" and "standard_error"


def collect(setup: Setup) -> dict[str, Any]:
    """Return the results that the journal has, as plain data; who lacks runs is left out."""
    problems = {name: _collect_problem(setup, name) for name in setup.problems}
    return {
        "study": setup.name,
        "scale": setup.scale,
        "effort": vars(setup.effort),
        "methods": [m for m in setup.methods if any(m in p["methods"] for p in problems.values())],
        "environment": describe_environment(),
        "problems": {name: found for name, found in problems.items() if found["methods"]},
    }


def _collect_problem(setup: Setup, name: str) -> dict[str, Any]:
    row, journal, costs = PROBLEMS[name], setup.journal(name), costs_of(setup, name)
    found: dict[str, Any] = {
        "title": row.title,
        "metric": row.metric,
        "sign": row.sign,
        "size": setup.size(name).plain(),
        "methods": {},
    }
    if setup.study.baselines[0] not in costs:
        return found
    lengths = lengths_of(setup, name, costs)
    found["budget"] = costs[setup.study.baselines[0]]["seconds"][-1]
    for method, cost in costs.items():
        if method not in lengths:
            found["methods"][method] = {"error": cost["error"]}
            continue
        runs = {
            reading: {run.seed: journal.read("runs", setup.key_of(run)) for run in runs}
            for reading, runs in final_runs(setup, name, method).items()
        }
        known = {
            reading: [{"seed": seed, **record} for seed, record in records.items() if record]
            for reading, records in runs.items()
        }
        if known and all(len(done) == setup.effort.seeds for done in known.values()):
            found["methods"][method] = {
                "cost": cost,
                "lengths": lengths[method],
                "tuned": tuned_of(setup, name, method),
                "runs": known,
            }
    return found


def write_results(path: Path, results: Mapping[str, Any]) -> Path:
    """Write results as JSON, a method a line."""
    from ..common.output import write_whole

    def text(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, Mapping) or not value:
            return json.dumps(value, allow_nan=False, ensure_ascii=False)
        inner = (f"{json.dumps(k)}: {text(v, depth - 1)}" for k, v in value.items())
        return "{\n" + ",\n".join(inner) + "\n}"

    return write_whole(path, text(results, 4) + "\n")


def best_tuned(problems: Mapping[str, Any]) -> dict[str, Any]:
    """Return problems without those that were also tuned with their weight decay.

    Example:
        >>> list(best_tuned({"cnn": 1, "cnn-few": 2, "cnn-few-decay": 3}))
        ['cnn', 'cnn-few-decay']
    """
    return {n: p for n, p in problems.items() if n + DECAY_SEARCHED not in problems}


def metrics_of(entry: Entry, reading: str) -> dict[int, float]:
    """Return the metric of each seed; a method with a run that failed at once has none."""
    runs = entry.get("runs", {}).get(reading, [])
    if any(run["metric"] is None for run in runs):
        return {}
    return {run["seed"]: run["metric"] for run in runs}


def gain(problem: Mapping[str, Any], method: str, baseline: str, reading: str) -> Difference | None:
    """Return how much better a method is than a baseline, seed by seed; None without shared seeds.

    Positive is better, for losses too.
    """
    rows = problem["methods"]
    found = paired_by_seed(
        *({s: problem["sign"] * v for s, v in metrics_of(rows.get(m, {}), reading).items()}
          for m in (method, baseline))
    )  # fmt: skip
    return found


def interaction(
    problem: Mapping[str, Any], square: Sequence[str], reading: str
) -> Difference | None:
    """Return what SAM adds with U minus what it adds without, seed by seed.

    Args:
        problem: of the results.
        square: the methods without either, with SAM, with U, with both.
        reading: "steps" or "seconds".
    """
    rows = problem["methods"]
    plain, sam, metric, both = (metrics_of(rows.get(m, {}), reading) for m in square)
    shared = set(plain) & set(sam) & set(metric) & set(both)
    sign = problem["sign"]
    return paired_by_seed(
        {s: sign * (both[s] - metric[s]) for s in shared},
        {s: sign * (sam[s] - plain[s]) for s in shared},
    )


def verdict(difference: Difference | None) -> str:
    """Return "better" or "worse" beyond two standard errors, "level" within, "" if unknown.

    Example:
        >>> verdict({"mean": 0.5, "standard_error": 0.2})
        'better'
    """
    if difference is None or difference["standard_error"] is None:
        return ""
    if abs(difference["mean"]) < 2 * difference["standard_error"] or difference["mean"] == 0:
        return "level"
    return "better" if difference["mean"] > 0 else "worse"


def step_of_target(
    curve: Sequence[Sequence[float]], column: int, target: float, sign: int
) -> float:
    """Return the first step at which a curve is at the target, in lines between its points.

    Example:
        >>> step_of_target([[0, 3.0], [10, 2.0], [20, 1.0]], 1, 1.5, sign=-1)
        15.0
    """
    for before, after in zip(curve, curve[1:]):  # noqa: B905
        if sign * (after[column] - target) >= 0:
            if sign * (before[column] - target) >= 0:
                return before[0]
            share = (target - before[column]) / (after[column] - before[column])
            return before[0] + share * (after[0] - before[0])
    return math.inf


def time_to(
    problem: Mapping[str, Any], method: str, baseline: str, column: int
) -> dict[str, float] | None:
    """Return the shares of a baseline's steps and seconds that a method takes to where it ends.

    Both are of the runs at equal seconds: to where the baseline ends with the same seed, the mean
    over the seeds that both have. A share is infinite if one does not get there within the budget.

    Args:
        problem: of the results.
        method: of the results.
        baseline: of the results.
        column: of the curves: 1 for the training loss, 2 for the metric.
    """
    rows = problem["methods"]
    runs, targets = (
        {r["seed"]: r["curve"] for r in rows.get(m, {}).get("runs", {}).get("seconds", [])}
        for m in (method, baseline)
    )
    shared = [seed for seed in runs if seed in targets and runs[seed] and targets[seed]]
    if not shared:
        return None
    sign = -1 if column == 1 else problem["sign"]
    steps = [step_of_target(runs[s], column, targets[s][-1][column], sign) for s in shared]
    if math.inf in steps:
        return {"steps": math.inf, "seconds": math.inf}
    cost = rows[method]["cost"]
    return {
        "steps": statistics.fmean(steps) / rows[baseline]["lengths"]["seconds"],
        "seconds": statistics.fmean(seconds_at(cost, k) for k in steps) / problem["budget"],
    }
