"""``llqr sharpness FOLDER``: how sharp the minimum of a run is."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llqr import sharpness

from ..common.environment import describe_environment
from ..common.output import progress_bar, write_json
from ..data.errors import DataError
from ..recipes.trained import load_trained, training_data
from ..sharpness.over_epochs import draw_courses, measure_course, refuse_unequal
from ..sharpness.pictures import draw_density, draw_eigenvalues, draw_landscape, draw_line

__all__ = ["add_arguments", "main"]

ABOUT = """\
Measures the sharpness of the network that a run of `llqr run` has trained: the largest eigenvalues
of the Hessian, its trace and spectral density, the rise of the loss in balls, the loss on a line
along the sharpest direction and on a plane. Writes sharpness.json, and pictures of the eigenvalues,
the density, the line and the plane as PNG and SVG, into the folder `sharpness` of the run.
The documentation's page Seeing the sharpness says what each number is.

With --over-epochs, of one or several runs that kept networks (keep_every=N): the largest eigenvalue
over the epochs, a line per method, as eigenvalues_over_epochs.json, PNG and SVG.
"""
EXAMPLES = """\
examples:
  llqr sharpness outputs/table1/paper/cifar-10/resnet18/sam/seed0 --data /data/cifar10
  llqr sharpness --over-epochs RUN-OF-SAM RUN-OF-LLQR --out results    of runs with keep_every=N
"""


#: How far the line along the sharpest direction reaches, in radii.
RADII = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's folder and what to measure on."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = ABOUT, EXAMPLES
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="of a run: config.json and network.pt are in it; several with --over-epochs",
    )
    parser.add_argument(
        "--over-epochs", action="store_true", help="the largest eigenvalue of each kept network"
    )
    parser.add_argument(
        "--batches",
        type=_positive,
        default=4,
        metavar="N",
        help="training batches to measure on (default: %(default)s)",
    )
    parser.add_argument(
        "--points",
        type=_positive,
        default=15,
        metavar="N",
        help="of each side of the plane, odd (default: %(default)s)",
    )
    parser.add_argument("--rho", type=float, default=0.05, help="radius (default: %(default)s)")
    parser.add_argument("--data", metavar="DIR", help="folder of the data, as the run had it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write to (default: sharpness in the first FOLDER)",
    )


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text}")
    return int(text)


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 2 if there is no such run."""
    out = arguments.out or arguments.folders[0] / "sharpness"
    measure = measure_over_epochs if arguments.over_epochs else measure_network
    try:
        written = measure(arguments, out)
    except (DataError, ValueError) as error:
        print(f"llqr: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path}")
    return 0


def measure_network(arguments: argparse.Namespace, out: Path) -> list[Path]:
    """Measure the network of a run in all ways, print, and return the files written."""
    if len(arguments.folders) > 1:
        raise ValueError("FOLDER: expected one run; several are compared with --over-epochs")
    about, task = load_trained(arguments.folders[0], arguments.data, arguments.device)
    measures = measures_of(task, arguments)
    found = {name: measures[name]() for name in progress_bar(measures, "measuring")}
    for result in found.values():
        print(result)
    run = {k: about[k] for k in ("recipe", "scale", "dataset", "model", "method", "seed", "noise")}
    content = {name: _as_plain(result) for name, result in found.items()}
    return [
        write_json(
            out / "sharpness.json",
            {**run, **content, "environment": describe_environment(torch.get_num_threads())},
        ),
        *draw_eigenvalues(found["eigenvalues"], out),
        *draw_density(found["density"], out),
        *draw_line(found["line"], found["eigenvalues"], arguments.rho, out),
        *draw_landscape(found["landscape"], out),
    ]


def measure_over_epochs(arguments: argparse.Namespace, out: Path) -> list[Path]:
    """Measure the kept networks of all runs, print, and return the files written."""
    courses = [
        measure_course(folder, arguments.batches, arguments.data, arguments.device)
        for folder in arguments.folders
    ]
    refuse_unequal(courses)
    for course in courses:
        print(f"{course.about['method']}, seed {course.about['seed']}:")
        for epoch, value in zip(course.epochs, course.values, strict=True):
            print(f"  epoch {epoch}: largest eigenvalue {value:.4g}")
    environment = describe_environment(torch.get_num_threads())
    content = {"runs": [asdict(c) | {"folder": str(c.folder)} for c in courses]}
    path = out / "eigenvalues_over_epochs.json"
    return [
        write_json(path, {**content, "environment": environment}),
        *draw_courses(courses, out),
    ]


def measures_of(task: Any, arguments: argparse.Namespace) -> Mapping[str, Callable[[], Any]]:
    """Return what is measured, by name."""
    forward, batches = training_data(task, arguments.batches)
    given, rho = (forward, task.network), arguments.rho

    @functools.cache
    def eigenvalues() -> sharpness.Eigenvalues:
        return sharpness.eigenvalues(*given, 5, vectors=True, batches=batches)

    def line() -> sharpness.Landscape:
        sharpest = (eigenvalues().vectors or [])[0]
        return sharpness.landscape(*given, [sharpest], radius=RADII * rho, batches=batches)

    return {
        "eigenvalues": eigenvalues,
        "trace": lambda: sharpness.trace(*given, batches=batches),
        "density": lambda: sharpness.density(*given, batches=batches),
        "worst_case": lambda: sharpness.worst_case(*given, rho, batches=batches),
        "adaptive_worst_case": lambda: sharpness.worst_case(
            *given, rho, "adaptive", batches=batches
        ),
        "m_sharpness": lambda: sharpness.m_sharpness(*given, rho, batches=batches),
        "line": line,
        "landscape": lambda: sharpness.landscape(*given, points=arguments.points, batches=batches),
    }


def _as_plain(result: sharpness.Measurement) -> dict[str, Any]:
    """Return the numbers of a result for JSON, without what is as large as the network."""
    left_out = ("vectors", "diagonal", "displacement", "directions")
    kept = (f.name for f in fields(result) if f.name not in left_out)
    return {name: _plain(getattr(result, name)) for name in kept}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, (int, str)) else str(value)
