"""Print the share of refreshes accepted with LLQR's default settings on the demo's problem.

Defaults but for ``every``: 10 instead of 500, so that a run of 330 steps refreshes 33 times. Base
and probe are those of the demo's SAM; the runs are twice as long as the demo's.
"""

import argparse
import inspect
import json
from typing import Any

import torch
from common import arguments, show

import llqr
from llqr_lab.demo.runs import SETTINGS_FILE
from llqr_lab.protocols import DEMO_KEYS
from llqr_lab.recipes.config import compose_config, resolve_config
from llqr_lab.recipes.records import Records
from llqr_lab.recipes.run import describe_run, measure_run
from llqr_lab.recipes.workers import Workers

# The demo's recipe has other values of these.
CHANGED = ("lr", "ema", "bases")
DEFAULTS = {key: inspect.signature(llqr.LLQR).parameters[key].default for key in CHANGED}

GEOMETRIES = {
    "scalar": {"structure": "scalar"},
    "diagonal": {"structure": "diagonal"},
    "diag-kfac": {"structure": "diag-kfac"},
    "kfac": {"structure": "kfac"},
    "e-kfac, learned bases": {"structure": "e-kfac"},
    "e-kfac, gradient bases": {"structure": "e-kfac", "bases": "gradient"},
    "diagonal, newton": {"structure": "diagonal", "curvature": "newton"},
    "kfac, newton": {"structure": "kfac", "curvature": "newton"},
}


def reports_of(geometry: dict[str, str], seed: int) -> list[dict[str, Any]]:
    """Train LLQR+SAM once and return the reports of its refreshes."""
    found = json.loads(SETTINGS_FILE.read_text())["methods"]["SAM"]["settings"]
    settings = {DEMO_KEYS[key]: value for key, value in found.items()}
    settings |= {
        f"llqr.{key}": value for key, value in (DEFAULTS | geometry | {"every": 10}).items()
    }
    overrides = ["method=llqr-sam", f"seed={seed}", "optimizer.graft=false", "train.epochs=30"]
    config = resolve_config(
        compose_config("demo", overrides + [f"{k}={v}" for k, v in settings.items()])
    )
    return measure_run(config, Workers("cpu"), Records(), describe_run(config))["refreshes"]


def main(options: argparse.Namespace) -> None:
    """Print the table."""
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.geometries:
        runs = [reports_of(GEOMETRIES[name], seed) for seed in range(options.seeds)]
        reports = [report for run in runs for report in run]
        refused = [report for report in reports if not report["accepted"]]
        rows.append(
            {
                "geometry": name,
                "refreshes": len(reports),
                "accepted": f"{1 - len(refused) / len(reports):.1%}",
                "reasons": ", ".join(sorted({str(r["reason"]) for r in refused})) or "-",
            }
        )
    show(f"Refreshes accepted, defaults and every=10, {options.seeds} seeds", rows, options)


if __name__ == "__main__":
    parser = arguments(__doc__, geometries=list(GEOMETRIES))
    parser.set_defaults(device="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    main(parser.parse_args())
