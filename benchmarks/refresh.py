"""A refresh in training steps: linearise, one product, products used, the whole, peak memory.

A step is one forward and backward on the same batch. The rows take curvature as a mean and as a
sum, a small and a large inner learning rate, and a clip that bites; "change" is |Ug - g| / |g| of
what was learned (a U that does not act is cheap). "plain" is the refresh with every product
computed, from one with 5 inner steps (x 10). Rows of NaturalGradient (8 samples, blocks of 512) are
the refresh that renews the bases and the one that keeps them; by default they take turns. "apply"
is one application of U.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import (
    PROBLEMS,
    Classifier,
    Clock,
    arguments,
    memory_of,
    optimizer_of,
    peak_memory,
    problem,
    resident,
    show,
)

import llqr

STRUCTURES: dict[str, dict[str, Any]] = {
    "diagonal": {"structure": "diagonal"},
    "diag-kfac": {"structure": "diag-kfac"},
    "e-kfac gradient 128": {"structure": "e-kfac", "bases": "gradient", "block_size": 128},
    "e-kfac 512": {"structure": "e-kfac", "block_size": 512},
    "kfac": {"structure": "kfac", "block_size": None},
    "kfac 512": {"structure": "kfac", "block_size": 512},
    "kfac 128": {"structure": "kfac", "block_size": 128},
}
CASES: dict[str, dict[str, Any]] = {
    "mean 1e-3": {"scale": "mean", "lr": 1e-3},
    "mean 0.1": {"scale": "mean", "lr": 0.1},
    "sum 1e-3": {"scale": "sum", "lr": 1e-3},
    "sum 0.1": {"scale": "sum", "lr": 0.1},
    "sum 1e-3, clip .01": {"scale": "sum", "lr": 1e-3, "clip": 0.01},
}


NATURAL = ("e-kfac", "kfac", "diagonal")


class Refresh:
    """A refresh that starts from the same U every time it is called."""

    def __init__(
        self,
        p: Classifier,
        kind: Callable[..., llqr.StructuredGeometry] = llqr.LLQR,
        **settings: Any,
    ) -> None:
        self.problem = p
        self.geometry = kind(**{"ema": 0.0, **settings})
        self.optimizer = optimizer_of(p, self.geometry)
        self.start_here()

    def start_here(self) -> None:
        """Start from the present U."""
        self.start, self.counters = self.geometry.states, self.geometry.counters()

    def __call__(self) -> None:
        self.geometry.states = self.start  # a refresh makes new ones
        self.geometry.load_counters({**self.counters, "failures": 0})
        with warnings.catch_warnings():  # a refused refresh costs the same
            warnings.simplefilter("ignore")
            self.report = self.optimizer.refresh(self.problem)


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, models=PROBLEMS, structures=tuple(STRUCTURES), cases=tuple(CASES))
    parser.add_argument("--natural", nargs="*", default=list(NATURAL), help="of NaturalGradient")
    parser.add_argument("--plain", action="store_true", help="also with every product computed")
    parser.add_argument("--memory", action="store_true", help="also the peaks, in processes apart")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        return child(*options.child, options)
    rows = []
    for name in options.models:
        p = problem(name, options.device, options.batch)
        clock = Clock(options.device)
        rows += [row for row in cost(name, p, clock, options)]
        rows += [row for s in options.structures for row in refreshes(name, s, p, clock, options)]
        rows += [natural(name, s, p, clock, options) for s in options.natural]
    show("Refresh, in steps", rows, options)


def cost(name: str, p: Classifier, clock: Clock, options: argparse.Namespace) -> list[dict]:
    """The two parts of which a refresh is made."""
    p.model.eval()
    parameters = [q for q in p.model.parameters() if q.requires_grad]
    made: list[llqr.QuadraticModel] = []

    def linearise() -> None:
        made[:] = []  # not two graphs at a time
        made.append(llqr.quadratic_model(p, parameters))

    linearise()
    times = clock.medians(
        {
            "step": p.step,
            "linearise": linearise,
            "product": lambda: made[0].product(made[0].gradient),
        },
        2 * options.repeats,
    )
    p.model.train()
    step = times["step"]
    return [
        {
            "model": f"{name} B{len(p.x)}",
            "structure": f"step {1e3 * step:.0f} ms",
            "case": "linearise, product",
            "refresh": times["linearise"] / step,
            "product": times["product"] / step,
        }
    ]


def refreshes(
    name: str, structure: str, p: Classifier, clock: Clock, options: argparse.Namespace
) -> list[dict]:
    """One row a case."""
    rows = []
    for case in options.cases:
        settings = {**STRUCTURES[structure], **CASES[case]}
        refresh = Refresh(p, **settings)
        calls = {"step": p.step, "refresh": refresh, "step after": p.step}
        if options.plain and case == "mean 0.1":
            calls["plain"] = Refresh(p, **settings, tolerance=0, steps=5)
        times = clock.medians(calls, options.repeats, warm=0)
        times["step"] = 0.5 * (times["step"] + times["step after"])
        row = {
            "model": f"{name} B{len(p.x)}",
            "structure": structure,
            "case": case,
            "refresh": times["refresh"] / times["step"],
            "products": refresh.report.products,
            "change": refresh.report.change,
        }
        if "plain" in times:
            row["plain"] = 10 * times["plain"] / times["step"]
        if options.memory and case in ("mean 1e-3", "mean 0.1"):
            same = ["--device", options.device, "--threads", str(options.threads)]
            same += ["--batch", str(options.batch)] if options.batch else []
            for column, what in (("step MiB", "step"), ("refresh MiB", structure)):
                row[column] = peak_memory(__file__, "--child", name, what, case, *same)
        rows.append(row)
        print(row, flush=True)
    return rows


def natural(
    name: str, structure: str, p: Classifier, clock: Clock, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: a refresh of NaturalGradient with new bases, one with the old, and applying U."""
    kind, settings = llqr.NaturalGradient, {"structure": structure, "ema": 0.9}
    renewing, keeping = (Refresh(p, kind, **settings, renew_every=n) for n in (1, 2))
    for refresh in (renewing, keeping):  # the second refresh is the usual one
        refresh.optimizer.refresh(p)
        refresh.start_here()
    gradients = {n: torch.randn_like(q) for n, q in renewing.geometry.parameters.items()}
    calls = {
        "step": p.step,
        "renewing": renewing,
        "keeping": keeping,
        "apply": lambda: renewing.geometry.apply(gradients),
        "step after": p.step,
    }
    times = clock.medians(calls, options.repeats, warm=0)
    step = 0.5 * (times["step"] + times["step after"])
    row = {
        "model": f"{name} B{len(p.x)}",
        "structure": f"NaturalGradient {structure}",
        "case": "new bases, old bases",
        "refresh": 0.5 * (times["renewing"] + times["keeping"]) / step,
        "new bases": times["renewing"] / step,
        "old bases": times["keeping"] / step,
        "apply": times["apply"] / step,
    }
    print(row, flush=True)
    return row


def child(name: str, what: str, case: str, options: argparse.Namespace) -> None:
    """Print the peak of training steps, or of those and a refresh."""
    before = resident()
    p = problem(name, options.device, options.batch)
    geometry = llqr.LLQR(**{**STRUCTURES.get(what, {}), **CASES[case]}, ema=0.0)
    optimizer = optimizer_of(p, geometry)

    def call() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            p()[0].backward()
            optimizer.base.step()
        if what != "step":
            optimizer.zero_grad()
            optimizer.refresh(p)

    print(memory_of(call, options.device, before))


if __name__ == "__main__":
    main()
