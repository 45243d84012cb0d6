"""A training step with U against the same without: SGD and LLQR, SAM and LLQR+SAM.

"step" is the time over that of the base method; "at 500" adds the share of a refresh every 500
steps (and so on), from the refresh measured here. "apply" is U g alone, in plain steps.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import PROBLEMS, Classifier, Clock, arguments, optimizer_of, problem, show
from refresh import STRUCTURES, Refresh

import llqr


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, models=PROBLEMS, structures=tuple(STRUCTURES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        p = problem(name, options.device)
        for structure in options.structures:
            rows.append(row(name, structure, p, Clock(options.device), options))
            print(rows[-1], flush=True)
    show("A step, over the base method's", rows, options)


def row(
    name: str, structure: str, p: Classifier, clock: Clock, options: argparse.Namespace
) -> dict[str, Any]:
    """Time the four methods in turns."""
    settings = {**STRUCTURES[structure], "lr": 0.1, "every": 10**9}
    base = torch.optim.SGD(p.model.parameters(), lr=1e-3, momentum=0.9)

    def sgd() -> None:
        base.zero_grad()
        p()[0].backward()
        base.step()

    refresh = Refresh(p, **settings)
    took = clock(refresh)
    plain = optimizer_of(p, refresh.geometry)
    sam = optimizer_of(p, None, perturbation=llqr.SAM(0.05))
    both_geometry = llqr.LLQR(**settings)
    both = optimizer_of(p, both_geometry, perturbation=llqr.SAM(0.05))
    both.refresh(p)
    p.step()
    gradient = {n: q.grad.clone() for n, q in p.model.named_parameters() if q.grad is not None}
    times = clock.medians(
        {
            "step": p.step,
            "sgd": sgd,
            "llqr": lambda: plain.minimize(p),
            "sam": lambda: sam.minimize(p),
            "llqr+sam": lambda: both.minimize(p),
            "apply": lambda: refresh.geometry.apply(gradient),
        },
        options.repeats,
    )
    found: dict[str, Any] = {
        "model": f"{name} B{len(p.x)}",
        "structure": structure,
        "apply": times["apply"] / times["step"],
        "refresh": took / times["step"],
    }
    for method, against in (("llqr", "sgd"), ("llqr+sam", "sam")):
        found[f"{method} / {against}"] = times[method] / times[against]
        for every in (100, 500, 1500):
            share = times[method] + took / every
            found[f"{method} at {every}"] = share / times[against]
    return found


if __name__ == "__main__":
    main()
