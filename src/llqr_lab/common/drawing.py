"""What figures share: a colour per method, bands, and labels beside the lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

__all__ = ["COLOURS", "Line", "draw_lines", "label_lines", "line_of", "new_figure", "save_figure"]

# Okabe and Ito's colours: blue is NGD and orange Newton, as in the paper's tables; the darker of
# two has the probe as well.
COLOURS = {
    "SGDM": "#666666",
    "Adam": "#666666",
    "AdamW": "#666666",
    "SAM": "#000000",
    "FisherSAM": "#009e73",
    "F-SAM": "#000000",
    "LLQR (NGD)": "#56b4e9",
    "LLQR (Newton)": "#e69f00",
    "LLQR+SAM (NGD)": "#0072b2",
    "LLQR+SAM (Newton)": "#d55e00",
    "LLQR+F-SAM (NGD)": "#0072b2",
    "LLQR+F-SAM (Newton)": "#d55e00",
    "LLQR^Delta+SAM": "#cc79a7",
}
FORMATS = ("png", "svg", "pdf")
T = TypeVar("T")
GAP = 0.065  # between two labels, as a share of the axes' height


def new_figure(grid: tuple[int, int], size: tuple[float, float], **ratios: Any) -> Any:
    """Return a figure and its axes, rows by columns; no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*grid, figsize=size, layout="constrained", **ratios)


def save_figure(
    figure: Any, path: Path, caption: str = "", formats: Sequence[str] = FORMATS, dpi: int = 200
) -> list[Path]:
    """Write a figure with its caption below it, once per format; return the files.

    Args:
        figure: matplotlib's; it is closed.
        path: of the first file; the others differ in their suffix.
        caption: what has to be known to read the figure.
        formats: suffixes.
        dpi: of the pixels, where there are some.
    """
    import matplotlib
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    if caption:
        width = int(14.5 * figure.get_size_inches()[0])
        figure.supxlabel(textwrap.fill(caption, width), fontsize=8.5, x=0.01, ha="left")
    # No dates and no random names: the same numbers give the same files.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    written = [path.with_suffix(f".{name}") for name in formats]
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        for file, name in zip(written, formats, strict=True):
            figure.savefig(file, dpi=dpi, metadata=undated.get(name))
            figure.set_layout_engine("none")  # the first one has placed everything
    pyplot.close(figure)
    return written


class Line(NamedTuple):
    """A curve: its points, the standard deviation at each (None: no band), label and looks."""

    x: Sequence[float]
    y: Sequence[float]
    std: Sequence[float] | None
    label: str
    colour: str
    style: str


def line_of(
    method: str, x: Sequence[float], y: Sequence[float], label: str, std: Any = None
) -> Line:
    """Return a method's curve in its colour; the baselines are dashed."""
    return Line(x, y, std, label, COLOURS[method], "-" if "LLQR" in method else "--")


def draw_lines(axes: Any, lines: Sequence[Line]) -> None:
    """Draw curves and their bands."""
    for line in lines:
        axes.plot(line.x, line.y, line.style, color=line.colour, lw=1.8)
        axes.plot(line.x[-1], line.y[-1], ".", color=line.colour, ms=6)
        if line.std is not None:
            low = [y - s for y, s in zip(line.y, line.std, strict=True)]
            high = [y + s for y, s in zip(line.y, line.std, strict=True)]
            axes.fill_between(line.x, low, high, color=line.colour, alpha=0.18, lw=0)
    axes.grid(alpha=0.3)


def label_lines(axes: Any, lines: Sequence[Line]) -> None:
    """Write each line's label beside its end, moved apart where labels would overlap.

    Limits and scales of the axes must be final.
    """
    places = {}
    for i, line in enumerate(lines):
        end = axes.transData.transform((line.x[-1], line.y[-1]))
        places[i] = float(axes.transAxes.inverted().transform(end)[1])
    for i, place in spread_places(places, GAP).items():
        line = lines[i]
        axes.annotate(
            line.label,
            xy=(line.x[-1], line.y[-1]),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=line.colour,
            fontsize=10,
            va="center",
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=line.colour, lw=0.6, relpos=(0, 0.5)),
        )


def spread_places(places: Mapping[T, float], gap: float) -> dict[T, float]:
    """Return places at least ``gap`` apart, in the same order, that stay about where they were.

    Neighbours that are too close become a group, spaced evenly about the mean of its members.

    Example:
        >>> spread_places({"a": 0.5, "b": 0.5, "c": 0.875}, 0.25)
        {'a': 0.375, 'b': 0.625, 'c': 0.875}
    """
    groups: list[list[tuple[T, float]]] = []
    for entry in sorted(places.items(), key=lambda entry: entry[1]):
        groups.append([entry])
        while (
            len(groups) > 1
            and _group_ends(groups[-2], gap)[1] + gap > _group_ends(groups[-1], gap)[0]
        ):
            last = groups.pop()
            groups[-1] += last
    return {
        name: _group_ends(group, gap)[0] + i * gap
        for group in groups
        for i, (name, _) in enumerate(group)
    }


def _group_ends(group: Sequence[tuple[Any, float]], gap: float) -> tuple[float, float]:
    """Return the first and the last place of a group."""
    middle = sum(place for _, place in group) / len(group)
    half = (len(group) - 1) * gap / 2
    return middle - half, middle + half
