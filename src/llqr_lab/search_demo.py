"""The search that found the demo's settings: ``python -m llqr_lab.search_demo``.

Every method gets the same budget: a Latin hypercube of configurations in its space, and successive
halving over rungs, each of which runs the best so far on further seeds. What counts is the mean
accuracy after the last epoch on validation pictures; the demo's test pictures and seeds are not
looked at. Methods share draws: configuration i of LLQR+SAM has the learning rate, the weight decay
and the rho of configuration i of SAM. No method's result depends on which others are searched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .environment import environment
from .halving import FIRST_SEED, Space, halving
from .methods import METHODS
from .output import write_json
from .runs import BATCH, EPOCHS, NOISE, REFRESH_BATCH, Run, available_workers, run

__all__ = ["RUNGS", "SETTINGS_FILE", "SPACES", "main", "search"]

SETTINGS_FILE = Path(__file__).parent / "settings" / "demo.json"
RUNGS = ((30, 1), (8, 2), (4, 4))  # (configurations, new seeds for each)

SGD: Space = {"lr": {"log": [0.01, 0.5]}, "weight_decay": {"log": [1e-4, 3e-2]}}
# Without a probe, small steps are what keeps the network from the wrong labels.
SMALL_STEPS: Space = SGD | {"lr": {"log": [0.001, 0.5]}}
ADAMW: Space = {"lr": {"log": [1e-4, 3e-2]}, "weight_decay": {"log": [1e-3, 1.0]}}
RHO: Space = {"rho": {"log": [0.03, 0.5]}}
DECAY: Space = {"decay": {"choice": [0.6, 0.9, 0.95]}}
# A decade above the largest rate of kfac nearly all refreshes are refused, and U stays as it was.
INNER_RATES = {
    "diagonal": (0.01, 0.1, 1.0, 10.0),
    "kfac": (0.001, 0.01, 0.1),
    "e-kfac": (0.01, 0.1, 1.0),
}
LEARNED: Space = {
    "geometry": {
        "choice": [
            {"structure": structure, "inner_lr": rate}
            for structure, rates in INNER_RATES.items()
            for rate in rates
        ]
    },
    "ema": {"choice": [0.0, 0.5, 0.9]},
    "every": {"choice": [10, 30, 100]},
    "graft": {"choice": [False, True]},
}
SPACES: dict[str, Space] = {
    "SGDM": SMALL_STEPS,
    "AdamW": ADAMW,
    "LLQR": SMALL_STEPS | LEARNED,
    "SAM": SGD | RHO,
    "FriendlySAM": SGD | RHO | DECAY,
    "LLQR+SAM": SGD | RHO | LEARNED,
    "LLQR+FriendlySAM": SGD | RHO | DECAY | LEARNED,
}


def _trial(task: Run) -> dict[str, Any]:
    """Run; a failure is a result, and the worst."""
    try:
        history = run(task)
    except (RuntimeError, ValueError) as error:
        return {"accuracy": 0.0, "error": f"{type(error).__name__}: {error}"}
    found = {"accuracy": round(history.test_accuracy[-1], 3)}
    if history.reports:
        refused = sum(not r.accepted for r in history.reports)
        found["change"] = float(f"{statistics.median(r.change for r in history.reports):.3g}")
        found["refused"] = round(refused / len(history.reports), 3)
    return found


def search(
    methods: Sequence[str], rungs: Sequence[tuple[int, int]], epochs: int, workers: int
) -> dict[str, Any]:
    """Search all methods and return everything that was tried, the best settings first."""
    trials, seed = halving(
        {name: SPACES[name] for name in methods},
        rungs,
        lambda name, settings, seed: Run(name, settings, seed, epochs, validation=True),
        _trial,
        workers,
        "accuracy",
    )
    runs = sum(count * new for count, new in rungs)
    return {
        "search": {
            "command": "python -m llqr_lab.search_demo",
            "rungs": [{"configurations": c, "seeds": s} for c, s in rungs],
            "runs_a_method": runs,
            "seeds": [FIRST_SEED, seed - 1],
            "epochs": epochs,
            "batch": BATCH,
            "refresh_batch": REFRESH_BATCH,
            "noise": NOISE,
        },
        "environment": environment(),
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


def _rungs(text: str) -> list[tuple[int, int]]:
    pairs = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if any(len(p) != 2 or min(p) < 1 for p in pairs) or pairs != sorted(pairs, key=lambda p: -p[0]):
        raise argparse.ArgumentTypeError("expected falling counts such as 30x1,8x2,4x4")
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
        type=_rungs,
        default=list(RUNGS),
        help="configurations x new seeds, rung by rung (default: "
        + ",".join(f"{c}x{s}" for c, s in RUNGS)
        + "); 100x2,20x4,5x10 is a larger search",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=available_workers(), help="processes")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="search these; the others keep what is in the file (default: all)",
    )
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    kept = {}
    if set(arguments.methods) != set(METHODS):
        kept = json.loads(arguments.out.read_text())["methods"]
    found = search(arguments.methods, arguments.rungs, arguments.epochs, arguments.workers)
    methods = kept | found["methods"]
    found["methods"] = {name: methods[name] for name in METHODS}
    write_json(arguments.out, found)
    for name, entry in found["methods"].items():
        print(f"{name:18} {entry['validation_accuracy']:6.2f} %  {entry['settings']}")
    print(f"{time.perf_counter() - began:.0f} s; written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
