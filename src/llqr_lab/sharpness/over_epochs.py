"""The largest eigenvalue over a training: each kept network of each run, in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from llqr import sharpness

from ..common.drawing import Line, draw_lines, label_lines, line_of, new_figure, save_figure
from ..common.output import progress_bar
from ..recipes.records import kept_networks
from ..recipes.trained import load_trained, training_data
from .pictures import data_of

__all__ = ["Course", "draw_courses", "measure_course", "refuse_unequal"]

SAME = ("recipe", "scale", "dataset", "model", "noise")


@dataclass(frozen=True)
class Course:
    """The largest eigenvalue of the Hessian of a run's kept networks.

    Attributes:
        about: what the run says of itself.
        folder: of the run.
        epochs: after which a network was kept.
        values: the eigenvalues.
        errors: their standard errors between the batches; None with one batch.
        batches: on how many training batches they were measured.
        examples: rows of these batches, if they are known.
    """

    about: dict[str, Any]
    folder: Path
    epochs: list[int]
    values: list[float]
    errors: list[float | None]
    batches: int
    examples: int | None = None


def measure_course(folder: Path, batches: int, data: str | None, device: str) -> Course:
    """Measure the kept networks of a run on its first training batches, in evaluation mode.

    Raises:
        ValueError: there is no run, or it kept no networks.
    """
    paths = kept_networks(folder)
    if not paths:
        raise ValueError(
            f"{folder}: no networks were kept over the epochs; run it with keep_every=N (epochs)"
        )
    about, task = load_trained(folder, data, device)
    forward, kept = training_data(task, batches)
    found = []
    for path in progress_bar(paths.values(), f"measuring {about['method']}, seed {about['seed']}"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        task.network.load_state_dict(weights)
        found.append(sharpness.eigenvalues(forward, task.network, batches=kept))
    errors = [None if f.standard_errors is None else float(f.standard_errors[0]) for f in found]
    values = [float(f.values[0]) for f in found]
    return Course(about, folder, list(paths), values, errors, found[0].batches, found[0].examples)


def refuse_unequal(courses: Sequence[Course]) -> None:
    """Raise ValueError unless the runs differ in the method and the seed only."""
    of_method: dict[str, Course] = {}
    for course in courses:
        first = of_method.setdefault(course.about["method"], course)
        for other, keys in ((courses[0], SAME), (first, ("settings",))):
            unequal = [key for key in keys if course.about[key] != other.about[key]]
            if unequal:
                raise ValueError(
                    f"{course.folder}: another {', '.join(unequal)} than {other.folder}; give runs "
                    "that differ in the method and the seed only"
                )
        if not set(course.epochs) & set(first.epochs):
            raise ValueError(f"{course.folder} and {first.folder} kept no epoch in common")


def draw_courses(courses: Sequence[Course], out: Path) -> list[Path]:
    """Draw a line per method over the epochs, on a logarithmic axis; bands between seeds."""
    figure, axes = new_figure((1, 1), (7.2, 4.2))
    lines = lines_of(courses)
    draw_lines(axes, lines)
    axes.set(
        title="How sharp the minimum is over the training",
        xlabel="epoch",
        ylabel="largest eigenvalue of the Hessian,\n$\\lambda_1(\\nabla^2 L)$",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    if all(y > 0 for line in lines for y in line.y):
        _set_logarithmic(axes)
    label_lines(axes, lines)
    about, seeds = courses[0].about, {c.about["seed"] for c in courses}
    band = f" Mean of {len(seeds)} seeds; bands are their standard deviations." * (len(seeds) > 1)
    shares = [e / abs(v) for c in courses for v, e in zip(c.values, c.errors, strict=True) if e]
    spread = f" Standard error between the batches: at most {max(shares):.0%}." if shares else ""
    noise = f", {about['noise']:.0%} wrong labels".replace("%", " %") if about["noise"] else ""
    caption = (
        f"{about['model']} on {about['dataset']}{noise}. "
        f"{data_of(courses[0].batches, courses[0].examples)}{band}{spread.replace('%', ' %')}"
    )
    return save_figure(figure, out / "eigenvalues_over_epochs.png", caption)


def _set_logarithmic(axes: Any) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def lines_of(courses: Sequence[Course]) -> list[Line]:
    """Return the mean over the runs of each method, at the epochs that all of them kept."""
    groups: dict[str, list[Course]] = {}
    for course in courses:
        groups.setdefault(course.about["method"], []).append(course)
    lines = []
    for method, runs in groups.items():
        values = [dict(zip(run.epochs, run.values, strict=True)) for run in runs]
        epochs = sorted(set.intersection(*(set(v) for v in values)))
        columns = [[v[epoch] for v in values] for epoch in epochs]
        std = [stdev(column) for column in columns] if len(runs) > 1 else None
        lines.append(line_of(method, epochs, [mean(column) for column in columns], method, std))
    return lines
