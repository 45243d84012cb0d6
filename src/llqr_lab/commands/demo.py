"""``llqr demo``: natural gradients, bases of moments, SAM and LLQR on digits with noisy labels."""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.environment import describe_environment
from ..common.output import table_lines, write_json
from ..common.processes import available_workers, run_all
from ..demo.page import write_page
from ..demo.pictures import draw_curves
from ..demo.runs import BATCH, EPOCHS, NOISE, SETTINGS_FILE, DemoRun, run_demo
from ..demo.summary import conclusion_lines, refresh_lines, result_rows, summarise_runs
from ..protocols import DEMO_METHODS
from ..recipes.halving import FIRST_SEED
from .options import add_out

__all__ = ["add_arguments", "main", "read_settings"]

ABOUT = """\
Trains a small convolutional network on scikit-learn's handwritten digits, of whose training labels
40 % are wrong, and tests on 500 pictures with clean labels: how fast does the training loss fall,
and who keeps from learning the wrong labels? Methods see the same noise, initial weights and
batches for a seed, so differences are taken seed by seed. Takes about two minutes on two cores and
needs no internet.
"""

METHODS = """\
  SGDM, AdamW    torch.optim's
  SAM            llqr.SAM on SGDM: two passes per step
  NG             llqr.NaturalGradient on SGDM, graft=True: U in closed form from the Fisher
  NG+SAM         the same with llqr.SAM(along="gradient"); NG+SAM/5 with interval=5: a second pass
                 at every fifth step
  GM, GM+SAM/5   AdamW in the bases of llqr.GradientMoments, transport="bases": nothing to refresh;
                 with that probe
  LLQR, +SAM     llqr.LLQR on SGDM, graft=True: the paper's, U learned by refreshes
"""

READING = f"""\
methods:
{METHODS}
examples:
  llqr demo --quick                    to see that it runs
  llqr demo --seeds 10 --out results   writes results/results.json and the picture

how to read it:
  training loss  mean of the last epoch, wrong labels included.
  minus SAM      mean difference to SAM over the seeds, and its standard error (of two seeds, as
                 with --quick: both differences). Within two standard errors of zero it is no
                 evidence of a difference.
  seconds        of the processor, for steps and refreshes (median over seeds).
  steps to ...   until the training loss is where SGDM's ends (median over seeds).
  |Ug-g|/|g|     how much U changes the gradient (median over refreshes). Below 0.1, U is inactive
                 and LLQR+SAM is SAM.
  J              what a refresh of LLQR lowers: g'u + u'Cu/2 at u = -Ug (medians over accepted
                 refreshes).

settings were tuned with equal budgets by `python -m llqr_lab.search_demo`, on other seeds and on
validation pictures; --settings takes the file of a search of your own.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = ABOUT, READING
    add_out(parser, Path("outputs/demo"))
    parser.add_argument(
        "--seeds", type=_seed_count, metavar="N", help="seeds 0 .. N-1 (default: 3; quick: 2)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="3 epochs, about 20 s; its numbers mean little"
    )
    parser.add_argument(
        "--workers",
        type=_seed_count,
        default=available_workers(),
        metavar="N",
        help="processes, of one thread each; results do not depend on it (default: %(default)s)",
    )
    parser.add_argument(
        "--settings",
        type=Path,
        default=SETTINGS_FILE,
        metavar="FILE",
        help="settings of the methods, as the search writes them (default: those of the package)",
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FOLDER",
        help="also write the results into FOLDER/demo.md, and the picture into FOLDER/images",
    )


def _seed_count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= FIRST_SEED:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {FIRST_SEED}, got {text}")
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """Return the file that the search wrote; raise if a method is missing."""
    found = json.loads(path.read_text())
    missing = [name for name in DEMO_METHODS if name not in found.get("methods", {})]
    if missing:
        raise ValueError(f"settings: {path} has no settings of {', '.join(missing)}")
    return found


def main(arguments: argparse.Namespace) -> int:
    """Run, print, write results.json and the pictures; 0 when all of it was done."""
    began = time.perf_counter()
    recorded = read_settings(arguments.settings)
    settings = {name: recorded["methods"][name]["settings"] for name in DEMO_METHODS}
    seeds = arguments.seeds or (2 if arguments.quick else 3)
    epochs = 3 if arguments.quick else EPOCHS
    # A process that gets no run would only cost its start.
    workers = min(arguments.workers, seeds * len(DEMO_METHODS))
    print(
        f"digits, {NOISE:.0%} of 1,297 training labels wrong, 500 clean test pictures: "
        f"{len(DEMO_METHODS)} methods, {seeds} seeds, {epochs} epochs, {workers} processes"
    )
    runs = [
        DemoRun(name, settings[name], seed, epochs)
        for seed in range(seeds)
        for name in DEMO_METHODS
    ]
    done = run_all(run_demo, runs, workers, "training")
    histories = {name: done[i :: len(DEMO_METHODS)] for i, name in enumerate(DEMO_METHODS)}
    methods = summarise_runs(settings, histories)
    _print_summary(methods, recorded["search"])
    out = arguments.out
    content = {
        "quick": arguments.quick,
        "seeds": list(range(seeds)),
        "epochs": epochs,
        "batch": BATCH,
        "noise": NOISE,
        "workers": workers,
        "seconds": time.perf_counter() - began,
        "environment": describe_environment(),
        "search": recorded["search"],
        "methods": methods,
    }
    write_json(out / "results.json", content)
    draw_curves(methods, NOISE, out / "curves.png")
    print(f"\nwritten to {out}: results.json, curves.png, curves.svg")
    if arguments.page is not None:
        write_page(arguments.page, settings, histories)
    print(f"{time.perf_counter() - began:.0f} s in all")
    if arguments.quick:
        print(
            "--quick: after so few epochs these numbers mean little; run `llqr demo` for the rest"
        )
    print(
        "next: the documentation's page How to choose: U, rho and the learning rate of your model"
    )
    return 0


def _print_summary(methods: Mapping[str, Mapping[str, Any]], search: Mapping[str, Any]) -> None:
    print(
        f"settings: the best of {search['runs_a_method']} runs per method "
        f"(`{search['command']}`), on other seeds and on validation pictures\n"
    )
    print("\n".join(table_lines(result_rows(methods))))
    print(f"\n{METHODS.rstrip()}")
    print("\nrefreshes of U (medians; eigenvalues: extremes)")
    print("\n".join(refresh_lines(methods)))
    skipped = {name: s for name, m in methods.items() if (s := sum(m["skipped_steps"]))}
    if skipped:
        print(f"steps skipped because gradients were not finite: {skipped}")
    print()
    for line in conclusion_lines(methods):
        print(textwrap.fill(line, 100))
