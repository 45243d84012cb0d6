"""The figures of a study: its differences at a glance, and each problem over seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.drawing import new_figure, save_figure
from .costs import seconds_at
from .metrics import METRICS
from .plan import STUDIES
from .readings import best_tuned, gain

__all__ = ["draw_study"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PALETTE = ("#666666", "#000000", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7")
WITH_U, WITHOUT_U = "#0072b2", "#666666"


def draw_study(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the differences and each problem, as PNG and SVG; return the paths."""
    written = _draw_gains(results, folder)
    for name, problem in results["problems"].items():
        written += _draw_problem(results["study"], name, problem, folder)
    return written


def _draw_gains(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what methods are better by than the first baseline, a panel per problem."""
    study = STUDIES[results["study"]]
    baseline, problems = study.baselines[0], best_tuned(results["problems"])
    methods = [m for m in results["methods"] if m in study.glanced and m != baseline]
    if not methods or not problems:
        return []
    columns = min(4, len(problems))
    rows = math.ceil(len(problems) / columns)
    size = (2.2 + 2.2 * columns, rows * (1.1 + 0.22 * len(methods)))
    figure, grid = new_figure((rows, columns), size, sharey=True, squeeze=False)
    panels = grid.flatten()
    for axes, (name, problem) in zip(panels, problems.items(), strict=False):
        for height, method in enumerate(methods):
            found = gain(problem, method, baseline, "seconds")
            if found is None:
                continue
            spread = 2 * (found["standard_error"] or 0.0)
            colour = WITH_U if study.methods[method].geometry is not None else WITHOUT_U
            axes.errorbar(
                found["mean"], height, xerr=spread, fmt="o", color=colour, ms=4, capsize=2
            )
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(problems) :]:
        axes.set_visible(False)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    title = f"better than {baseline} at equal seconds, with two standard errors; blue: with U"
    figure.suptitle(title, fontsize=10)
    return _save(figure, folder, f"study-{results['study']}-gains")


def _draw_problem(study: str, name: str, problem: Mapping[str, Any], folder: Path) -> list[Path]:
    figure, (left, right) = new_figure((1, 2), (11, 4.2))
    for method, colour in zip(STUDIES[study].pictured, PALETTE, strict=False):
        entry = problem["methods"].get(method, {})
        runs = [r for r in entry.get("runs", {}).get("seconds", []) if r["ended"] == "finished"]
        if not runs:
            continue
        steps = [point[0] for point in runs[0]["curve"]]
        seconds = [seconds_at(entry["cost"], step) for step in steps]
        for axes, column in ((left, 1), (right, 2)):
            means = [
                statistics.fmean(r["curve"][i][column] for r in runs) for i in range(len(steps))
            ]
            # The first point is that of the untrained network: all methods begin there.
            axes.plot(seconds[1:], means[1:], ".-", color=colour, label=method, lw=1.5, ms=4)
    left.set_yscale("log")
    left.set_ylabel("training loss")
    right.set_ylabel(f"test {METRICS[problem['metric']].title}")
    for axes in (left, right):
        axes.set_xlabel("seconds of one core")
        axes.grid(alpha=0.3)
    figure.suptitle(problem["title"])
    if left.lines:
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return _save(figure, folder, f"study-{study}-{name}")


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    return save_figure(figure, folder / name, formats=("png", "svg"), dpi=110)
