"""Figures 5 and 6: what refreshes cost, by interval and by the size of the network."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from ..common.drawing import COLOURS, Line, draw_lines, label_lines, line_of, new_figure
from ..common.statistics import mean_std
from ..paper import FIGURES, TABLES
from ..protocols import EXPERIMENTS, METHODS
from .cadence import EPOCH, describe_machines, machine_of, timed_cells
from .cells import Chosen, choose_runs, choose_scale, describe_cell, notes_on_choices, used_runs
from .figures import Figure
from .likeness import differences_between
from .runs import Cell, Found, Run
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
    scale, cells, notes = _scale_and_cells(found, asked, experiment)
    runs = [run for run in found.runs if run["scale"] == scale and run["timing"]]
    chosen = {cell: choose_runs(runs, cell, experiment) for cell in cells}
    chosen = {cell: c for cell, c in chosen.items() if c.runs}
    return scale, chosen, _timing_notes(scale, chosen.values(), [*notes, *found.notes])


def _scale_and_cells(
    found: Found, asked: str | None, experiment: str
) -> tuple[str, list[Cell], list[str]]:
    about = EXPERIMENTS[experiment]
    cells = [c for c in timed_cells(found) if c.model in about.models and c.method in about.methods]
    scale, notes = choose_scale(found, cells, asked)
    return scale, cells, notes


def _timing_notes(scale: str, chosen: Collection[Chosen], further: Sequence[str]) -> list[str]:
    used = used_runs(chosen)
    return [
        *notes_of(scale, used, None),
        *describe_machines(used),
        *notes_on_choices(chosen),
        *further,
    ]


def gather_structures(
    found: Found, asked: str | None
) -> tuple[str, dict[str, dict[Cell, Chosen]], list[str]]:
    """Return the scale, figure 6's timings by the structure of U's blocks, and notes."""
    scale, cells, notes = _scale_and_cells(found, asked, "figure6")
    gathered: dict[str, list[Run]] = {}
    for run in found.runs:
        if run["scale"] == scale and run.cell in cells:
            structure = run["settings"].get("llqr.structure", "structure unknown")
            gathered.setdefault(structure, []).append(run)
    by_structure = {
        structure: {
            cell: choose_runs(runs, cell, "figure6")
            for cell in cells
            if any(run.cell == cell for run in runs)
        }
        for structure, runs in sorted(gathered.items())
    }
    everything = [c for chosen in by_structure.values() for c in chosen.values()]
    return scale, by_structure, _timing_notes(scale, everything, [*notes, *found.notes])


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
    scale, by_structure, notes = gather_structures(found, asked)
    every = common_interval([cell for chosen in by_structure.values() for cell in chosen])
    rows, used, fits = [], [], {}
    for structure, everything in by_structure.items():
        chosen = {cell: c for cell, c in everything.items() if cell.every == every}
        used += used_runs(chosen.values())
        for cell, runs in chosen.items():
            seconds, spread = mean_std(runs.numbers_by_seed("update_seconds").values())
            if seconds is None or runs.example is None:
                notes = [*notes, f"{describe_cell(cell)}: no refresh after the first was timed."]
                continue
            rows.append(
                {
                    "line": cell.method + f", {structure}" * (len(by_structure) > 1),
                    "model": cell.model,
                    "method": cell.method,
                    "structure": structure,
                    "parameters": runs.example["parameters"],
                    "runs": len(runs.runs),
                    "update_seconds": seconds,
                    "update_seconds_std": spread,
                }
            )
        for method in dict.fromkeys(cell.method for cell in chosen):
            same = [c for cell, c in chosen.items() if cell.method == method]
            if unlike := differences_within(same):
                notes = [*notes, f"{method}, {structure}: no line is fitted, since {unlike}."]
                continue
            mine = [r for r in rows if (r["method"], r["structure"]) == (method, structure)]
            if len({r["parameters"] for r in mine}) > 1:
                sizes = [r["parameters"] for r in mine]
                c, a = power_law(sizes, [r["update_seconds"] for r in mine])
                fits[mine[0]["line"]] = {"c": c, "exponent": a, "points": len(mine)}
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
    return Figure(
        "6", about.title, scale, rows, facts, notes, missing, used, lambda: paint_sizes(rows, fits)
    )


def differences_within(several: Sequence[Chosen]) -> str:
    """Say in what cells differ beside their networks; nothing: one line may be fitted to them."""
    runs = [c.example for c in several if c.example is not None]
    for run in runs[1:]:
        if unlike := differences_between(runs[0], run, besides="model."):
            return f"{runs[0]['model']} and {run['model']} differ in {', '.join(unlike)}"
        if machine_of(runs[0]) != machine_of(run):
            return f"{runs[0]['model']} and {run['model']} were timed on different machines"
    return ""


def common_interval(cells: Sequence[Cell]) -> int | None:
    """Return the interval that most networks were timed at; of several the longest."""
    counts = Counter(every for _, every in {(cell.model, cell.every) for cell in cells} if every)
    return max(counts, key=lambda every: (counts[every], every)) if counts else None


def paint_sizes(rows: Sequence[dict[str, Any]], fits: dict[str, dict[str, float]]) -> Any:
    """Draw measured times as marks and the fits as lines, both axes logarithmic."""
    figure, axes = new_figure((1, 1), (11, 5.8))
    marks = dict(zip(EXPERIMENTS["figure6"].methods, "os", strict=True))
    lines = []
    styles = dict(zip(dict.fromkeys(r["structure"] for r in rows), ("-", "--", "-."), strict=False))
    for name, method, structure in dict.fromkeys(
        (row["line"], row["method"], row["structure"]) for row in rows
    ):
        mine = sorted((r for r in rows if r["line"] == name), key=lambda r: r["parameters"])
        x, y = [r["parameters"] for r in mine], [r["update_seconds"] for r in mine]
        spread = [r["update_seconds_std"] or 0.0 for r in mine]
        axes.errorbar(x, y, spread, fmt=marks[method], color=COLOURS[method], ms=7, capsize=3)
        label = name
        if name in fits:
            c, a = fits[name]["c"], fits[name]["exponent"]
            y, label = [c * v**a for v in x], f"{name}: $P^{{{a:.2f}}}$"
        style = styles.get(structure, ":")
        lines.append(line_of(method, x, y, label)._replace(style=style))
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
