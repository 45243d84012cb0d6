"""How the toys are drawn: functions from measured data to a matplotlib figure."""

from __future__ import annotations

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
LAST = 80  # the last step that Figure 2 shows
MARKS = {"GD": "s", "LLQR": "D", "SAM": "o", "LLQR+SAM": "^"}


def picture_figure2(toy: Toy) -> Any:
    """Draw the distance of every method's points by step, beside the landscape they are in."""
    figure, (profile, radius) = new_figure(
        (1, 2), (12.5, 6.6), width_ratios=(1, 3.6), sharey=True, gridspec_kw={"wspace": 0.02}
    )
    draw_profile(profile, toy.well)
    # One ray of starts, the same for all methods: from the other angles it looks alike.
    ray = slice(7, 14)
    for method in METHODS:
        for r in toy.paths[method][ray, : LAST + 1].norm(dim=-1):
            radius.plot(r, STYLES[method], color=COLOURS[method], lw=0.8, alpha=0.5)
        middle = toy.paths[method][:, : LAST + 1].norm(dim=-1).median(0).values
        label = outcome_text(toy, method)
        radius.plot(middle, STYLES[method], color=COLOURS[method], lw=2.6, label=label)
    draw_places(radius, toy.well)
    radius.set(xlabel="optimizer step", xlim=(0, LAST), ylim=(0, 5.4))
    radius.set_title(f"Who leaves the sharp well? The same {toy.about['starts']} starts for all")
    radius.legend(fontsize=10, loc="upper right", bbox_to_anchor=(1, 0.8))
    radius.grid(alpha=0.3)
    draw_plane(radius.inset_axes((0.72, 0.22, 0.26, 0.33)), toy, ray)
    return figure


def outcome_text(toy: Toy, method: str) -> str:
    """Say in a legend what became of a method's starts."""
    found = toy.summary(method)
    if found["steps_mean"] is None:
        return f"{method}: none arrives"
    steps = f"{found['steps_mean']:.0f} ± {found['steps_std']:.0f} steps"
    share = found["arrived_percent"]
    return f"{method}: {'all arrive' if share == 100 else f'{share:.0f} % arrive'}, in {steps}"


def picture_figure3(toy: Toy) -> Any:
    """Draw r by step for some schedules, then length against number of steps for every one."""
    figure, (radius, scatter) = new_figure((1, 2), (12.5, 5.4))
    draw_radius(radius, toy, {m: toy.paths[m][:5, : DRAWN + 1] for m in METHODS})
    radius.set_title("Who leaves the sharp well? Five runs of each method, with noise")
    for method in METHODS:
        when, lengths = toy.arrivals(method), toy.lengths(method)
        colour, mark = COLOURS[method], MARKS[method]
        if (when >= 0).all():
            scatter.plot(when, lengths, mark, color=colour, ms=5, alpha=0.6, label=method)
        else:
            label = f"{method}: none arrives, path {float(lengths.max()):.3f} at most"
            scatter.plot([], [], mark, color=colour, label=label)
    straight = toy.well.bottom - INSIDE
    scatter.axhline(straight, color="black", lw=1, ls="--", label=f"shortest path: {straight:.2f}")
    scatter.set(
        xlabel="optimizer steps until $r < 1$",
        ylabel="path length until then",
        xscale="log",
        title=f"How long it takes: {toy.about['schedules']} runs of each method, same noise",
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
        title="Percent of the starts that leave the sharp well for the valley ($r < 1$)\n"
        "SAM | LLQR+SAM   (in brackets, where not 0: GD | LLQR)",
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
            panel.plot(x, y, mark, label=finding.drawn.get(name, name), alpha=0.8, ms=5)
        statement = finding.drawn.get("title", finding.statement)
        panel.set(xlabel=finding.drawn.get(along, along), ylabel=finding.drawn.get("y"))
        panel.set(xscale="log", yscale="log")
        if len(x) < 8:
            panel.set_xticks(x, [f"{value:g}" for value in x])
            panel.minorticks_off()
        panel.set_title(f"{finding.source} [{finding.verdict}]\n{statement}", fontsize=9.5)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(found) :]:
        panel.set_axis_off()
    return figure


def draw_profile(axes: Any, well: SharpWell) -> None:
    """Draw L along a ray, r upwards, so that it shares its axis with the distances beside it."""
    r = torch.linspace(0, 5.4, 500, dtype=torch.float64)
    axes.plot(well.loss(torch.stack([r, torch.zeros_like(r)], -1)), r, color="black", lw=1.8)
    draw_places(axes, well)
    for radius, said, shift in (
        (well.bottom, "sharp well", (7, 7)),
        (well.barrier, "barrier", (-52, -16)),
        (0.0, "flat valley,\nthe minimum", (18, 22)),
    ):
        value = float(well.loss(torch.tensor([radius, 0.0], dtype=torch.float64)))
        axes.plot(value, radius, "o", color="black", ms=4)
        axes.annotate(said, (value, radius), xytext=shift, textcoords="offset points", fontsize=9)
    axes.set(xlabel="loss $L$", ylabel="distance from the minimum, $r$", title="The landscape")
    axes.grid(alpha=0.3)


def draw_places(axes: Any, well: SharpWell, named: bool = False) -> None:
    """Draw the bottom of the sharp well, its barrier and the valley as heights of r."""
    # Below the paths: those of GD and LLQR lie on the bottom.
    under = {"color": "black", "lw": 0.8, "zorder": 0.5}
    axes.axhline(well.bottom, **under, label="bottom of the sharp well" if named else None)
    axes.axhline(well.barrier, **under, ls=":", label="its barrier" if named else None)
    arrived = "arrived: $r < 1$" if named else None
    axes.axhspan(0, INSIDE, color="#cccccc", alpha=0.5, zorder=0.4, label=arrived)


def draw_plane(axes: Any, toy: Toy, ray: slice) -> None:
    """Draw the plane from above: level lines, the ring-shaped well, and all starts."""
    line = torch.linspace(-6, 6, 200, dtype=torch.float64)
    xy = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    axes.contourf(line, line, toy.well.loss(xy), levels=14, cmap="Blues_r")
    starts = toy.paths["GD"][:, 0]
    axes.plot(*starts.unbind(-1), ".", color="black", ms=1.5)
    axes.plot(*starts[ray].unbind(-1), ".", color="#d55e00", ms=4)
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.set_title(
        "from above: the well is a ring;\ndots: starts (orange: the thin lines)", fontsize=8
    )


def draw_radius(axes: Any, toy: Toy, paths: dict[str, Tensor]) -> None:
    """Draw the distance from the minimum by step, with the bottom, the barrier and the valley."""
    for method, several in paths.items():
        for i, r in enumerate(several.norm(dim=-1)):
            label = method if i == 0 else None
            axes.plot(r, STYLES[method], color=COLOURS[method], lw=1.5, alpha=0.8, label=label)
    draw_places(axes, toy.well, named=True)
    axes.set(ylim=(0, 5.4), xlim=(0, len(r) - 1), xlabel="optimizer step")
    axes.set_ylabel("distance from the minimum, $r$")
    axes.legend(fontsize=8, loc="center right")
    axes.grid(alpha=0.3)
