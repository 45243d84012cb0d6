"""The demo's picture: training loss and test accuracy over the processor's seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.drawing import save_figure, spread_places
from ..protocols import DEMO_METHODS, METHODS

__all__ = ["draw_curves"]

# Okabe and Ito's colours, which colour-blind readers can tell apart, and two of Tol's; dashed
# without U.
COLOURS = {
    "SGDM": "#777777",
    "AdamW": "#e69f00",
    "SAM": "#000000",
    "NG": "#56b4e9",
    "NG+SAM": "#0072b2",
    "NG+SAM/5": "#009e73",
    "GM": "#882255",
    "GM+SAM/5": "#999933",
    "LLQR": "#cc79a7",
    "LLQR+SAM": "#d55e00",
}
PANELS = (
    ("loss_by_epoch", "training loss (labels as given)", lambda m: f"{m['final_loss']:.2f}"),
    ("test_accuracy_by_epoch", "test accuracy, clean labels (%)", lambda m: f"{m['mean']:.1f} %"),
)
GAP = 0.055  # between two labels, as a share of the height


def draw_curves(methods: Mapping[str, Mapping[str, Any]], noise: float, path: Path) -> list[Path]:
    """Draw, epoch by epoch, the mean over seeds of both; return the files."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    for axes, (key, label, final) in zip(figure.subplots(1, 2), PANELS, strict=True):
        curves = {name: _over_seeds(statistics.fmean, m[key]) for name, m in methods.items()}
        times = {
            name: _over_seeds(statistics.median, m["seconds_by_epoch"])
            for name, m in methods.items()
        }
        for name, curve in curves.items():
            style = "--" if METHODS[DEMO_METHODS[name]].metric is None else "-"
            axes.plot(times[name], curve, style, color=COLOURS[name], linewidth=1.8)
            axes.plot(times[name][-1], curve[-1], "o", color=COLOURS[name], markersize=4)
        # The first epochs may leave the picture, so that the last ones can be told apart.
        if key == "test_accuracy_by_epoch":
            ends = [curve[-1] for curve in curves.values()]
            axes.set_ylim(max(0.0, min(ends) - 15), max(map(max, curves.values())) + 1)
        low, high = axes.get_ylim()
        # Labels stand at the right, in the colours of the lines and in the order of their ends.
        places = {name: (curve[-1] - low) / (high - low) for name, curve in curves.items()}
        for name, place in _within_axes(spread_places(places, GAP)).items():
            text = f"{name}  {final(methods[name])}"
            look = {"color": COLOURS[name], "fontsize": 9, "va": "center"}
            axes.text(1.02, place, text, transform=axes.transAxes, **look)
        axes.set_xscale("log")  # a method may take ten times as long as another
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("processor seconds")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    seeds = len(next(iter(methods.values()))["test_accuracy"])
    figure.suptitle(
        f"Digits, {noise:.0%} of the training labels wrong; mean of {seeds} seed"
        f"{'s' * (seeds != 1)}; dashed: no U"
    )
    return save_figure(figure, path, formats=("png", "svg"), dpi=150)


def _within_axes(places: Mapping[str, float]) -> dict[str, float]:
    """Return places moved together so that none is above the axes, or else none below."""
    shift = min(0.0, 1 - max(places.values())) or max(0.0, -min(places.values()))
    return {name: place + shift for name, place in places.items()}


def _over_seeds(
    statistic: Callable[[Sequence[float]], float], by_seed: Sequence[Sequence[float]]
) -> list[float]:
    return [statistic(values) for values in zip(*by_seed, strict=True)]
