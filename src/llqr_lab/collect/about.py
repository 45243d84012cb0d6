"""What the report says of the runs: refreshes, machines, changed and assumed values."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import llqr

from ..common.refreshes import INACTIVE, summarise_refreshes
from ..protocols import EXPERIMENTS, Source, resolve_settings
from .others import PAPER
from .runs import Run

__all__ = [
    "assumed_values",
    "changed_values",
    "count_environments",
    "describe_refusals",
    "describe_skipped_steps",
    "refresh_rows",
    "reports_of",
]


def refresh_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one row per cell that learns U: what its refreshes did, and whether U acts."""
    rows = []
    for cell in sorted({run.cell for run in runs}):
        mine = [run for run in runs if run.cell == cell]
        found = summarise_refreshes(reports_of(mine))
        if found is None:
            continue
        rows.append(
            {
                "dataset": cell.dataset + f", noise {cell.noise:g}" * bool(cell.noise),
                "network": cell.model,
                "method": cell.method,
                "runs": len(mine),
                "accepted": f"{found['accepted']} of {found['count']}",
                "|Ug-g|/|g|": found["change"],
                "|Ug|/|g|": found["ratio"],
                "cos(g, Ug)": found["cosine"],
                "J before": found["J_before"],
                "J after": found["J_after"],
                "U": "acts" if found["active"] else f"INACTIVE (below {INACTIVE:g})",
            }
        )
    return rows


def reports_of(runs: Iterable[Run]) -> list[llqr.RefreshReport]:
    """Return the reports of all refreshes of the runs."""
    return [report_from_json(r) for run in runs for r in run["refreshes"] or ()]


def report_from_json(values: dict[str, Any]) -> llqr.RefreshReport:
    """Return a report from a run's JSON, in which what is not known or not finite is null."""
    names = [field.name for field in dataclasses.fields(llqr.RefreshReport)]
    return llqr.RefreshReport(**{name: values.get(name) for name in names})  # type: ignore[arg-type]


def describe_skipped_steps(runs: Sequence[Run]) -> list[str]:
    """Say which runs skipped steps, since their gradients were not finite."""
    return [
        f"{run['skipped_steps']} steps without finite gradients were skipped: {run.folder}"
        for run in runs
        if run["skipped_steps"]
    ]


def describe_refusals(runs: Sequence[Run]) -> list[str]:
    """Say in which cells refreshes were refused, or U hardly acts."""
    said = []
    for row in refresh_rows(runs):
        cell = f"{row['dataset']}, {row['network']}, {row['method']}"
        accepted, count = map(int, row["accepted"].split(" of "))
        if accepted < count:
            said.append(f"{cell}: {count - accepted} of {count} refreshes were refused.")
        if row["U"] != "acts":
            said.append(f"{cell}: U is inactive, so the method is nearly the one without U.")
    return said


def count_environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each machine and set of versions, with the number of runs on it."""
    counts = Counter(json.dumps(run["environment"], sort_keys=True) for run in runs)
    return [{"runs": count, **json.loads(text)} for text, count in counts.most_common()]


def changed_values(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """Return cell, setting, value and how many runs, of what was changed by hand."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for run in runs:
        cell = ", ".join((run["recipe"], run["dataset"], run["model"], run["method"]))
        for key in run.changed_keys:
            counts[cell, key, json.dumps(run.setting_or_entry(key))] += 1
    return [(*entry, str(count)) for entry, count in sorted(counts.items())]


def assumed_values(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """Return setting, value, experiments and note of what neither paper nor authors say.

    Values are the protocol's at the paper's size, for the data, networks and methods that were run.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for recipe, dataset, model, method in sorted(
        {(run["recipe"], run["dataset"], run["model"], run["method"]) for run in runs}
    ):
        about = EXPERIMENTS.get(recipe)
        if about is None or not recipe.startswith(PAPER):
            continue
        if (dataset, model, method) not in product(about.datasets, about.models, about.methods):
            continue  # of another version of the protocol
        for key, setting in resolve_settings(recipe, dataset, model, method).items():
            if setting.source is Source.ASSUMED:
                entry = (key, str(setting.value), setting.note)
                names = found.setdefault(entry, [])
                if recipe not in names:
                    names.append(recipe)
    return [
        (key, value, _joined_names(names), note)
        for (key, value, note), names in sorted(found.items())
    ]


def _joined_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names, key=lambda name: (len(name), name)))
