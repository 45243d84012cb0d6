"""The search that found the demo's settings: ``python -m llqr_lab.search_demo``.

Every method gets the same budget: a Latin hypercube of configurations in its space, and successive
halving over rungs, each of which runs the best so far on further seeds. What counts is the mean
accuracy after the last epoch on validation pictures; the demo's test pictures and seeds are not
looked at. Methods share draws: configuration i of NG+SAM and of LLQR+SAM has the learning rate and
the rho of configuration i of SAM. No method's result depends on which others are searched. A
search that was killed goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.environment import describe_environment
from ..common.output import write_json
from ..common.processes import available_workers
from ..protocols import DEMO_KEYS, DEMO_METHODS
from ..recipes.halving import FIRST_SEED, Journal, Rungs, Space, run_rungs
from ..recipes.search import Trial, journal_beside, run_trial
from .runs import BATCH, EPOCHS, NOISE, SETTINGS_FILE

__all__ = ["RUNGS", "SPACES", "main", "search_demo"]

RUNGS = ((8, 1), (3, 2))  # (configurations, new seeds for each)

SGD: Space = {"lr": {"log": [0.003, 0.3]}}
ADAMW: Space = {"lr": {"log": [2e-4, 2e-2]}}
RHO: Space = {"rho": {"log": [0.05, 0.4]}}
# A decade above the largest rate of kfac nearly all refreshes are refused, and U stays as it was.
INNER_RATES = {"diagonal": (0.1, 1.0, 10.0), "kfac": (0.01, 0.1), "e-kfac": (0.01, 0.1, 1.0)}
LEARNED: Space = {
    "geometry": {
        "choice": [
            {"structure": structure, "inner_lr": rate}
            for structure, rates in INNER_RATES.items()
            for rate in rates
        ]
    }
}
# All else is the same for all methods, or the library's default.
SPACES: dict[str, Space] = {
    "SGDM": SGD,
    "AdamW": ADAMW,
    "SAM": SGD | RHO,
    "NG": SGD,
    "NG+SAM": SGD | RHO,
    "NG+SAM/5": SGD | RHO,
    "GM": ADAMW,
    "GM+SAM/5": ADAMW | RHO,
    "LLQR": SGD | LEARNED,
    "LLQR+SAM": SGD | RHO | LEARNED,
}


def make_trial(method: str, settings: Mapping[str, Any], seed: int, epochs: int) -> Trial:
    """Return a run of the search, by the protocols' names and keys."""
    dotted = {DEMO_KEYS[key]: value for key, value in settings.items()}
    return Trial("demo", DEMO_METHODS[method], dotted, seed, {"train.epochs": epochs})


def run_demo_trial(trial: Trial) -> dict[str, Any]:
    """Run; the demo's file says accuracy where the other searches say metric."""
    found = run_trial(trial)
    return {"accuracy": found.pop("metric"), **found}


def search_demo(
    methods: Sequence[str], rungs: Rungs, epochs: int, workers: int, journal: Path | None = None
) -> dict[str, Any]:
    """Search all methods and return everything that was tried, the best settings first."""
    trials, seed = run_rungs(
        {name: SPACES[name] for name in methods},
        rungs,
        lambda name, settings, seed: make_trial(name, settings, seed, epochs),
        run_demo_trial,
        workers,
        "accuracy",
        Journal(journal, {"experiment": "demo", "train.epochs": epochs}),
    )
    return {
        "search": {
            "command": "python -m llqr_lab.search_demo",
            "rungs": [{"configurations": c, "seeds": s} for c, s in rungs],
            "runs_a_method": sum(count * new for count, new in rungs),
            "seeds": [FIRST_SEED, seed - 1],
            "epochs": epochs,
            "batch": BATCH,
            "noise": NOISE,
        },
        "environment": describe_environment(),
        "methods": {
            name: {
                "settings": trials[name][0]["settings"],
                "validation_accuracy": trials[name][0]["accuracy"],
                "space": SPACES[name],
                "trials": trials[name],
            }
            for name in methods
        },
    }


def _parse_rungs(text: str) -> list[tuple[int, int]]:
    pairs = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if any(len(p) != 2 or min(p) < 1 for p in pairs) or pairs != sorted(pairs, key=lambda p: -p[0]):
        raise argparse.ArgumentTypeError("expected falling counts such as 8x1,3x2")
    return [(a, b) for a, b in pairs]


def main(argv: Sequence[str] | None = None) -> int:
    """Search and write the settings file."""
    parser = argparse.ArgumentParser(
        prog="python -m llqr_lab.search_demo",
        description=(__doc__ or "").split("\n\n", 1)[1],
    )
    parser.add_argument(
        "--out", type=Path, default=SETTINGS_FILE, help="JSON to write (default: %(default)s)"
    )
    parser.add_argument(
        "--rungs",
        type=_parse_rungs,
        default=list(RUNGS),
        help="configurations x new seeds, rung by rung (default: "
        + ",".join(f"{c}x{s}" for c, s in RUNGS)
        + "); 60x2,15x4,5x10 is a larger search",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=available_workers(), help="processes")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=DEMO_METHODS,
        default=list(DEMO_METHODS),
        help="search these; the others keep what is in the file (default: all)",
    )
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    kept = {}
    if set(arguments.methods) != set(DEMO_METHODS):
        kept = json.loads(arguments.out.read_text())["methods"]
    journal = journal_beside(arguments.out)
    found = search_demo(
        arguments.methods, arguments.rungs, arguments.epochs, arguments.workers, journal
    )
    methods = kept | found["methods"]
    found["methods"] = {name: methods[name] for name in DEMO_METHODS}
    write_json(arguments.out, found)
    journal.unlink()
    for name, entry in found["methods"].items():
        print(f"{name:18} {entry['validation_accuracy']:6.2f} %  {entry['settings']}")
    print(f"{time.perf_counter() - began:.0f} s; written to {arguments.out}")
    return 0
