"""Figures 5 and 6: what refreshes cost, by interval and by the size of the network."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..common.drawing import COLOURS, Line, draw_lines, label_lines, line_of, new_figure
from ..common.statistics import mean_std
from ..paper import FIGURES, TABLES
from ..protocols import EXPERIMENTS, METHODS
from .cadence import EPOCH, describe_machines, timed_cells
from .cells import Chosen, choose_runs, choose_scale, describe_cell, notes_on_choices, used_runs
from .figures import Figure
from .runs import Cell, Found
from .tables import notes_of

__all__ = ["collect_figure5", "collect_figure6", "power_law"]

NAMES = {row["run"]["model"]: row["labels"][0] for row in TABLES["10"]["rows"]}


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    r"""Return c and a of :math:`y = c x^a`, by least squares of the logarithms.

    Args:
        x: at least two different positive numbers.
        y: as many positive numbers.

    Example:
        >>> c, a = power_law([1.0, 10.0, 100.0], [3.0, 300.0, 30000.0])
        >>> round(c, 9), round(a, 9)
        (3.0, 2.0)
    """
    fitted = statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y])
    return math.exp(fitted.intercept), fitted.slope


def gather_timings(
    found: Found, asked: str | None, experiment: str
) -> tuple[str, dict[Cell, Chosen], list[str]]:
    """Return the scale, the timings of an experiment's networks and methods, and notes."""
    about = EXPERIMENTS[experiment]
    cells = [c for c in timed_cells(found) if c.model in about.models and c.method in about.methods]
    scale, notes = choose_scale(found, cells, asked)
    runs = [run for run in found.runs if run["scale"] == scale and run["timing"]]
    chosen = {cell: choose_runs(runs, cell, experiment) for cell in cells}
    chosen = {cell: c for cell, c in chosen.items() if c.runs}
    used = used_runs(chosen.values())
    notes = [
        *notes_of(scale, used, None),
        *describe_machines(used),
        *notes_on_choices(chosen.values()),
        *notes,
        *found.notes,
    ]
    return scale, chosen, notes


def collect_figure5(found: Found, asked: str | None = None) -> Figure:
    """Show the epoch's time against the interval, with the methods without U as lines across."""
    scale, chosen, notes = gather_timings(found, asked, "figure5")
    rows = []
    for cell, runs in chosen.items():
        epoch, spread = mean_std(runs.numbers_by_seed(EPOCH).values())
        rows.append(
            {
                "model": cell.model,
                "method": cell.method,
                "every": cell.every,
                "runs": len(runs.runs),
                "epoch_seconds": epoch,
                "epoch_seconds_std": spread,
            }
        )
    about = EXPERIMENTS["figure5"]
    present = {(cell.model, cell.method) for cell in chosen}
    missing = [
        f"{NAMES[model]} {method}"
        for model in about.models
        for method in about.methods
        if (model, method) not in present
    ]
    notes = ["The first refresh is left out, as in the paper.", *notes]
    used = used_runs(chosen.values())
    return Figure(
        "5", about.title, scale, rows, {}, notes, missing, used, lambda: paint_intervals(rows)
    )


def paint_intervals(rows: Sequence[dict[str, Any]]) -> Any:
    """Draw one panel per network, both axes logarithmic."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = new_figure((1, len(models)), (6.75 * len(models), 5.6), squeeze=False)
    intervals = sorted({row["every"] for row in rows if row["every"]}) or [1, 2]
    ends = [intervals[0], intervals[-1] if len(intervals) > 1 else 2 * intervals[0]]
    for axes, model in zip(panels[0], models, strict=True):
        lines = []
        for method in METHODS:
            mine = [r for r in rows if (r["model"], r["method"]) == (model, method)]
            if not mine:
                continue
            if mine[0]["every"] is None:
                x, y = ends, [mine[0]["epoch_seconds"]] * 2
                label = f"{method}  {y[0]:.3g} s"
            else:
                mine.sort(key=lambda r: r["every"])
                x, y = [r["every"] for r in mine], [r["epoch_seconds"] for r in mine]
                label = method
                axes.plot(x, y, "o", color=COLOURS[method], ms=5)
            lines.append(line_of(method, x, y, label))
        draw_lines(axes, lines)
        axes.set(xscale="log", yscale="log")
        axes.set_title(NAMES[model], fontsize=12)
        axes.set_xlabel("optimizer steps between refreshes", fontsize=11)
        axes.set_ylabel("seconds per epoch", fontsize=11)
        axes.set_xticks(intervals, [f"{t}" for t in intervals])
        axes.minorticks_off()
        plain_ticks(axes.yaxis)
        label_lines(axes, lines)
    return figure


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def collect_figure6(found: Found, asked: str | None = None) -> Figure:
    """Show the time of a refresh against the number of parameters, with a power law fitted."""
    scale, everything, notes = gather_timings(found, asked, "figure6")
    every = common_interval(everything)
    chosen = {cell: c for cell, c in everything.items() if cell.every == every}
    rows = []
    for cell, runs in chosen.items():
        seconds, spread = mean_std(runs.numbers_by_seed("update_seconds").values())
        if seconds is None:
            notes = [*notes, f"{describe_cell(cell)}: no refresh after the first was timed."]
            continue
        rows.append(
            {
                "model": cell.model,
                "method": cell.method,
                "parameters": next(iter(runs.runs.values()))["parameters"],
                "runs": len(runs.runs),
                "update_seconds": seconds,
                "update_seconds_std": spread,
            }
        )
    fits = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [r for r in rows if r["method"] == method]
        if len({r["parameters"] for r in mine}) > 1:
            c, a = power_law([r["parameters"] for r in mine], [r["update_seconds"] for r in mine])
            fits[method] = {"c": c, "exponent": a, "points": len(mine)}
    about = EXPERIMENTS["figure6"]
    present = {(row["model"], row["method"]) for row in rows}
    missing = [
        f"{model} {method}"
        for model in about.models
        for method in about.methods
        if (model, method) not in present
    ]
    exponents = FIGURES["figure6"]["exponents"]
    notes = [
        f"Interval {every}. Lines: c P^a, least squares of the logarithms; the paper has "
        f"a = {exponents[0]} and {exponents[1]}.",
        *notes,
    ]
    facts = {"every": every, "fits": fits, "paper_exponents": exponents}
    used = used_runs(chosen.values())
    return Figure(
        "6", about.title, scale, rows, facts, notes, missing, used, lambda: paint_sizes(rows, fits)
    )


def common_interval(chosen: dict[Cell, Chosen]) -> int | None:
    """Return the interval that most networks were timed at; of several the longest."""
    counts = Counter(every for _, every in {(cell.model, cell.every) for cell in chosen} if every)
    return max(counts, key=lambda every: (counts[every], every)) if counts else None


def paint_sizes(rows: Sequence[dict[str, Any]], fits: dict[str, dict[str, float]]) -> Any:
    """Draw measured times as marks and the fits as lines, both axes logarithmic."""
    figure, axes = new_figure((1, 1), (11, 5.8))
    marks = dict(zip(EXPERIMENTS["figure6"].methods, "os", strict=True))
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["parameters"])
        x, y = [r["parameters"] for r in mine], [r["update_seconds"] for r in mine]
        spread = [r["update_seconds_std"] or 0.0 for r in mine]
        axes.errorbar(x, y, spread, fmt=marks[method], color=COLOURS[method], ms=7, capsize=3)
        if method in fits:
            c, a = fits[method]["c"], fits[method]["exponent"]
            lines.append(line_of(method, x, [c * v**a for v in x], f"{method}: $P^{{{a:.2f}}}$"))
        else:
            lines.append(line_of(method, x, y, method))
    first = min(rows, key=lambda row: row["parameters"])
    sizes = {r["parameters"]: r["model"] for r in sorted(rows, key=lambda r: r["parameters"])}
    reach = [min(sizes), max(sizes)]
    low, high = FIGURES["figure6"]["exponents"]
    slopes = {1.0: "linear", (low + high) / 2: f"the paper's, {low} to {high}", 2.0: "quadratic"}
    if reach[0] < reach[1]:
        for power, said in slopes.items():
            y = [first["update_seconds"] * (p / reach[0]) ** power for p in reach]
            lines.append(Line(reach, y, None, f"slope: {said}", "#777777", ":"))
    draw_lines(axes, lines)
    axes.set(xscale="log", yscale="log")
    plain_ticks(axes.yaxis)
    axes.set_xticks(
        list(sizes), [f"{_parameters_text(p)}\n{m}" for p, m in sizes.items()], fontsize=9
    )
    axes.minorticks_off()
    axes.set_xlabel("parameters P", fontsize=11)
    axes.set_ylabel("seconds per refresh (after the first)", fontsize=11)
    label_lines(axes, lines)
    return figure


def _parameters_text(parameters: float) -> str:
    return f"{parameters / 1e6:.3g} M" if parameters >= 1e6 else f"{parameters / 1e3:.3g} k"
