"""The demo's two pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.drawing import save_figure

__all__ = ["draw_accuracy", "draw_spectrum"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "SGDM": "#999999",
    "AdamW": "#e69f00",
    "LLQR": "#56b4e9",
    "SAM": "#0072b2",
    "FriendlySAM": "#009e73",
    "LLQR+SAM": "#d55e00",
    "LLQR+FriendlySAM": "#cc79a7",
}
# The layers of the spectrum; norm layers, which are elementwise in every structure, are left out.
LAYERS = {"conv1": "#0072b2", "conv2": "#e69f00", "conv3": "#009e73", "head": "#cc79a7"}


def draw_accuracy(methods: Mapping[str, Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw test accuracy over epochs, and the range of seeds after the last one as a bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    lowest, highest = [], []
    for place, (name, method) in enumerate(methods.items()):
        by_epoch = list(zip(*method["test_accuracy_by_epoch"], strict=True))
        epochs = range(1, len(by_epoch) + 1)
        means = [statistics.fmean(values) for values in by_epoch]
        label = f"{name}  {means[-1]:.1f} %"
        style = "-" if "LLQR" in name else "--"
        axes.plot(epochs, means, style, color=COLOURS[name], label=label)
        # Seven bands on each other say nothing; bars stand beside each other.
        low, high = min(by_epoch[-1]), max(by_epoch[-1])
        beside = len(by_epoch) * (1.02 + 0.013 * place)
        axes.plot([beside] * 2, [low, high], color=COLOURS[name], lw=2, alpha=0.8)
        axes.plot(beside, means[-1], "o", color=COLOURS[name], ms=4)
        lowest += [means[len(means) // 3], low]
        highest += [*means, high]
    # The first epochs leave the picture, so that the last ones can be told apart.
    axes.set_ylim(max(0.0, min(lowest) - 1), max(highest) + 1)
    axes.set_xlim(left=1)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy, clean labels (%)")
    seeds = len(next(iter(methods.values()))["test_accuracy"])
    axes.set_title(
        f"Digits, 40 % of the training labels wrong: mean of {seeds} seeds; "
        "bars: their range at the end"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right center", title="after the last epoch")
    axes.grid(alpha=0.3)
    return save_figure(figure, path)


def draw_spectrum(methods: Mapping[str, Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw the extreme eigenvalues of each layer's block of U over the refreshes of one seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    learned = {name: m for name, m in methods.items() if m["refreshes"] is not None}
    figure = Figure(figsize=(4 * len(learned) + 1, 4), layout="constrained")
    panels = figure.subplots(1, len(learned), sharey=True, squeeze=False)[0]
    for axes, (name, method) in zip(panels, learned.items(), strict=True):
        steps = [report["step"] for report in method["reports"][0]]
        for layer, colour in LAYERS.items():
            low, high = zip(*(s[layer] for s in method["spectra"][0]), strict=True)
            axes.plot(steps, low, ".-", color=colour, linewidth=1, label=layer)
            axes.plot(steps, high, ".-", color=colour, linewidth=1)
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(-1, steps[-1] + 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("optimizer step of the refresh")
        axes.set_title("{}\n{structure}, inner lr {inner_lr:g}".format(name, **method["settings"]))
        axes.grid(alpha=0.3)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(min(low, 0.5), max(high, 2.0))  # a U near the identity shall look so
    panels[0].set_ylabel("smallest and largest eigenvalue of $U$")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right center",
        title="layer\n(norms not shown)",
    )
    return save_figure(figure, path)
