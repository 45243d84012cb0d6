"""The figures of a study: the training loss and the metric over seconds, one per problem."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.drawing import new_figure
from .costs import seconds_at
from .metrics import METRICS
from .plan import STUDIES

__all__ = ["draw_study"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PALETTE = ("#666666", "#000000", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7")


def draw_study(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw each problem as PNG and SVG; return the paths."""
    written = []
    for name, problem in results["problems"].items():
        written += _draw_problem(results["study"], name, problem, folder)
    return written


def _draw_problem(study: str, name: str, problem: Mapping[str, Any], folder: Path) -> list[Path]:
    from matplotlib import pyplot

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
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"study-{study}-{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths
