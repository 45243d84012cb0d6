"""How the toys are drawn: functions from measured data to a matplotlib figure."""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from torch import Tensor

from ..common.drawing import new_figure
from .findings import Finding
from .sharp_well import SharpWell
from .swarm import INSIDE, METHODS
from .toys import DRAWN, VERDICTS, Toy, Window

__all__ = ["picture_figure2", "picture_figure3", "picture_findings", "picture_window"]

COLOURS = {"GD": "#555555", "LLQR": "#0072b2", "SAM": "#d55e00", "LLQR+SAM": "#009e73"}
STYLES = {"GD": "-", "LLQR": "--", "SAM": "-", "LLQR+SAM": "-"}
MARKS = {"GD": "s", "LLQR": "D", "SAM": "o", "LLQR+SAM": "^"}


def picture_figure2(toy: Toy) -> Any:
    """Draw the profile, paths over the contours, r and the loss by step."""
    figure, axes = new_figure((2, 2), (12.5, 9.6), width_ratios=(1, 1.1))
    (profile, plane), (radius, curves) = axes
    draw_profile(profile, toy.well)
    draw_contours(plane, toy.well)
    # The same ring of starts for all; each method is drawn in a quarter of its own.
    for quarter, method in enumerate(METHODS):
        for i, angle in enumerate((1, 3, 5)):
            start = 7 * ((6 * quarter + angle) % 24) + 3
            draw_path(plane, method, toy.paths[method][start, :60], label=i == 0)
    plane.set_title("three starts a method, 60 steps; a quarter each")
    plane.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=8)
    start = 7 * 1 + 3
    draw_radius(radius, toy, {m: toy.paths[m][start : start + 1, :61] for m in METHODS})
    radius.set_title("one start: distance from the origin")
    steps = torch.arange(61)
    for method in METHODS:
        low, middle, high = quantiles(toy.losses(method)[:, :61])
        curves.plot(steps, middle, STYLES[method], color=COLOURS[method], label=method, lw=2)
        curves.fill_between(steps, low, high, color=COLOURS[method], alpha=0.18, lw=0)
    curves.set(
        xlabel="step",
        ylabel="loss L",
        yscale="log",
        ylim=(1e-4, 20),
        xlim=(0, 60),
        title=f"all {toy.about['starts']} starts: median and quartiles of the loss",
    )
    curves.legend(loc="lower left", fontsize=9)
    curves.grid(alpha=0.3)
    return figure


def picture_figure3(toy: Toy) -> Any:
    """Draw r by step for some schedules, then length against number of steps for every one."""
    figure, (radius, scatter) = new_figure((1, 2), (12.5, 5.4))
    draw_radius(radius, toy, {m: toy.paths[m][:5, : DRAWN + 1] for m in METHODS})
    radius.set_title("five schedules of noise: distance from the origin")
    for method in METHODS:
        when, lengths = toy.arrivals(method), toy.lengths(method)
        colour, mark = COLOURS[method], MARKS[method]
        if (when >= 0).all():
            scatter.plot(when, lengths, mark, color=colour, ms=5, alpha=0.6, label=method)
        else:
            label = f"{method}: stays, path {float(lengths.max()):.3f} at most"
            scatter.plot([], [], mark, color=colour, label=label)
    straight = toy.well.bottom - INSIDE
    scatter.axhline(straight, color="black", lw=1, ls="--", label=f"straight line {straight:.2f}")
    scatter.set(
        xlabel="steps until r < 1",
        ylabel="path length until then",
        xscale="log",
        title=f"{toy.about['schedules']} schedules, shared by the methods",
    )
    ticks = [10, 15, 20, 30, 50, 100, 200]
    scatter.set_xticks(ticks, [str(t) for t in ticks])
    scatter.minorticks_off()
    scatter.grid(alpha=0.3)
    scatter.legend(fontsize=8, loc="upper left")
    return figure


def picture_window(window: Window) -> Any:
    """Draw the verdict for every step and radius, with the shares that arrive."""
    figure, axes = new_figure((1, 1), (11, 6.4))
    from matplotlib.patches import Patch

    faces = dict(zip(VERDICTS, ("#a6dba0", "#92c5de", "#f4a582", "#d9d9d9"), strict=True))
    for i, row in enumerate(window.verdicts()):
        for j, said in enumerate(row):
            axes.fill([j, j + 1, j + 1, j], [i, i, i + 1, i + 1], color=faces[said], ec="white")
            share = {m: round(100 * float(v[i, j])) for m, v in window.arrived.items()}
            text = f"{share['SAM']} | {share['LLQR+SAM']}"
            if share["GD"] or share["LLQR"]:
                text += f"\n({share['GD']} | {share['LLQR']})"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8.5)
    axes.set_xticks([j + 0.5 for j in range(len(window.rhos))], [f"{r:g}" for r in window.rhos])
    axes.set_yticks([i + 0.5 for i in range(len(window.etas))], [f"{e:g}" for e in window.etas])
    axes.set(
        xlim=(0, len(window.rhos)),
        ylim=(0, len(window.etas)),
        xlabel=r"radius $\rho$",
        ylabel=r"learning rate $\eta$",
        title="percent that reach r < 1:  SAM | LLQR+SAM  (below, where not 0: GD | LLQR)",
    )
    handles = [Patch(facecolor=faces[name], label=name) for name in VERDICTS]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9)
    return figure


def picture_findings(found: list[Finding]) -> Any:
    """Draw the curve of every finding in a panel of its own, two in a row."""
    rows = (len(found) + 1) // 2
    figure, axes = new_figure((rows, 2), (12, 4.3 * rows), squeeze=False)
    for panel, finding in zip(axes.flat, found, strict=False):
        (along, x), *series = finding.curve.items()
        for name, y in series:
            # A line that is not a function of x (a value a point) would be a scribble.
            mark = "o" if name.startswith("measured") else "x" if name.startswith("as") else "-"
            panel.plot(x, y, mark, label=name, alpha=0.8, ms=5)
        title = textwrap.fill(f"{finding.source}: {finding.statement} [{finding.verdict}]", 62)
        panel.set(xlabel=along, xscale="log", yscale="log")
        if len(x) < 8:
            panel.set_xticks(x, [f"{value:g}" for value in x])
            panel.minorticks_off()
        panel.set_title(title, fontsize=10)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(found) :]:
        panel.set_axis_off()
    return figure


def draw_profile(axes: Any, well: SharpWell) -> None:
    """Draw L along a ray, and the well again in an inset."""

    def along(low: float, high: float) -> tuple[Tensor, Tensor]:
        r = torch.linspace(low, high, 400, dtype=torch.float64)
        return r, well.loss(torch.stack([r, torch.zeros_like(r)], -1))

    inset = axes.inset_axes((0.1, 0.5, 0.45, 0.36))
    axes.plot(*along(0, 6.3), color="black")
    inset.plot(*along(4.35, 5.02), color="black")
    for radius, name, mark in ((well.bottom, "bottom", "v"), (well.barrier, "barrier", "^")):
        value = float(well.loss(torch.tensor([radius, 0.0], dtype=torch.float64)))
        for part in (axes, inset):
            label = f"{name}: r = {radius:.3f}, L = {value:.3f}"
            part.plot(radius, value, mark, ms=8, label=label if part is axes else None)
    axes.indicate_inset_zoom(inset, edgecolor="black")
    inset.tick_params(labelsize=7)
    axes.set(xlabel="r", ylabel="loss L", title="the landscape along a ray", ylim=(-0.5, 16))
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)


def draw_contours(axes: Any, well: SharpWell) -> None:
    """Draw level lines of L, denser about the well; its bottom and barrier as circles."""
    from matplotlib.colors import BoundaryNorm

    line = torch.linspace(-6, 6, 500, dtype=torch.float64)
    xy = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    levels = [0, 0.5, 1, 2, 3, 4, 5, 6, 6.3, 6.5, 6.56, 6.6, 6.63, 7, 8, 10, 13, 17, 21, 26]
    norm = BoundaryNorm(levels, 256)
    filled = axes.contourf(line, line, well.loss(xy), levels=levels, norm=norm, cmap="YlGnBu_r")
    axes.contour(line, line, well.loss(xy), levels=levels, colors="black", linewidths=0.2)
    axes.figure.colorbar(filled, ax=axes, label="loss L (levels not even)", ticks=levels[::2])
    turn = torch.linspace(0, 6.2832, 200)
    for radius, style, name in ((well.bottom, "-", "bottom"), (well.barrier, ":", "barrier")):
        axes.plot(radius * turn.cos(), radius * turn.sin(), style, color="white", lw=1.2)
        axes.plot([], [], style, color="black", label=f"{name} (white)")
    axes.set(xlabel="x", ylabel="y", aspect="equal")


def draw_radius(axes: Any, toy: Toy, paths: dict[str, Tensor]) -> None:
    """Draw the distance from the origin by step, with the bottom, the barrier and the basin."""
    for method, several in paths.items():
        for i, r in enumerate(several.norm(dim=-1)):
            label = method if i == 0 else None
            axes.plot(r, STYLES[method], color=COLOURS[method], lw=1.5, alpha=0.8, label=label)
    axes.axhline(toy.well.bottom, color="black", lw=0.8, label="bottom of the well")
    axes.axhline(toy.well.barrier, color="black", lw=0.8, ls=":", label="barrier")
    axes.axhspan(0, INSIDE, color="#cccccc", alpha=0.5, label="arrived: r < 1")
    axes.set(xlabel="step", ylabel="r", ylim=(0, 5.4), xlim=(0, len(r) - 1))
    axes.legend(fontsize=8, loc="center right")
    axes.grid(alpha=0.3)


def draw_path(axes: Any, method: str, path: Tensor, label: bool = True) -> None:
    """Draw one path with a mark at each step."""
    x, y = path.unbind(-1)
    name = method if label else None
    axes.plot(
        x, y, MARKS[method] + "-", color=COLOURS[method], ms=3.5, lw=1.1, alpha=0.85, label=name
    )


def quantiles(values: Tensor) -> Tensor:
    """Return the quartiles and the median over starts: (3, steps)."""
    return torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype), dim=0)
