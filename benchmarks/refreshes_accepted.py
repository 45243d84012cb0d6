"""Print the share of refreshes accepted with LLQR's default settings on the demo's problem.

Defaults but for ``every``: 10 instead of 500, so that a run of 330 steps refreshes 33 times. Base
and probe are those of the demo's SAM.
"""

import argparse
import json
import warnings

import torch
from common import arguments, show

import llqr
from llqr_lab.data.digits import digits, generator
from llqr_lab.methods import build
from llqr_lab.models.small_cnn import small_cnn
from llqr_lab.runs import BATCH, EPOCHS, NOISE, REFRESH_BATCH
from llqr_lab.search_demo import SETTINGS_FILE
from llqr_lab.train import train

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


def reports_of(geometry: dict[str, str], seed: int) -> list[llqr.RefreshReport]:
    """Train LLQR+SAM once and return the reports of its refreshes."""
    settings = json.loads(SETTINGS_FILE.read_text())["methods"]["SAM"]["settings"]
    torch.manual_seed(seed)
    model = small_cnn()
    base = build("SAM", model, settings)
    optimizer = llqr.Optimizer(
        base.base,
        model,
        geometry=llqr.LLQR(**geometry, every=10, max_failures=10**9),
        perturbation=base.perturbation,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a refresh was refused")
        history = train(
            model,
            optimizer,
            digits(seed, noise=NOISE),
            epochs=EPOCHS,
            batch=BATCH,
            order=generator(seed, "order"),
            refresh_batch=REFRESH_BATCH,
            refresh_order=generator(seed, "refresh"),
        )
    return history.reports


def main(options: argparse.Namespace) -> None:
    """Print the table."""
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.geometries:
        runs = [reports_of(GEOMETRIES[name], seed) for seed in range(options.seeds)]
        reports = [report for run in runs for report in run]
        refused = [report for report in reports if not report.accepted]
        rows.append(
            {
                "geometry": name,
                "refreshes": len(reports),
                "accepted": f"{1 - len(refused) / len(reports):.1%}",
                "reasons": ", ".join(sorted({str(r.reason) for r in refused})) or "-",
            }
        )
    show(f"Refreshes accepted, defaults and every=10, {options.seeds} seeds", rows, options)


if __name__ == "__main__":
    parser = arguments(__doc__, geometries=list(GEOMETRIES))
    parser.set_defaults(device="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    main(parser.parse_args())
