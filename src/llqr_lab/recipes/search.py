"""The search for settings of this project's own experiments: ``python -m llqr_lab.recipes.search``.

Every method gets the same number of runs: a Latin hypercube of its space, and rungs in which the
best so far run on further seeds. What counts is the metric after the last epoch on examples that
are held out of the training set (images) or on the validation pairs (text), at seeds that the
experiments do not use. Methods share draws: configuration i of SAM has the learning rate of
configuration i of SGDM. Methods with U are not searched: they have the library's defaults, and what
was found for the same method without U. A search that was killed goes on when the same command is
given again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.environment import describe_environment
from ..common.output import write_json
from ..common.processes import available_workers
from ..data.digits import VALIDATION
from ..protocols import EXPERIMENTS, slug
from ..protocols.own import TUNED
from .config import compose_config, resolve_config
from .halving import FIRST_SEED, Journal, Rungs, Space, run_rungs

__all__ = ["SPACES", "Trial", "journal_beside", "main", "run_trial", "search_settings"]

SGD: Space = {"base.lr": {"log": [0.01, 0.5]}, "base.weight_decay": {"log": [1e-4, 1e-2]}}
ADAMW: Space = {"base.lr": {"log": [3e-4, 3e-2]}, "base.weight_decay": {"log": [1e-3, 1.0]}}
RHO: Space = {"probe.rho": {"log": [0.02, 0.4]}}
DECAY: Space = {"probe.decay": {"choice": [0.6, 0.9, 0.95]}}
TEXT: Space = {"base.lr": {"log": [1e-3, 8e-3]}, "base.weight_decay": {"log": [1e-4, 1e-1]}}
TEXT_RHO: Space = {"probe.rho": {"log": [0.005, 0.2]}}
IMAGES: dict[str, Space] = {
    "SGDM": SGD,
    "AdamW": ADAMW,
    "SAM": SGD | RHO,
    "F-SAM": SGD | RHO | DECAY,
}
SPACES: dict[str, dict[str, Space]] = {
    "fashion": IMAGES,
    "fashion-noise": IMAGES,
    "help-texts": {
        "AdamW": TEXT,
        "SAM": TEXT | TEXT_RHO,
    },
}
# Text has three parts: its search looks at the validation pairs.
HELD_OUT = {"fashion": 2000, "fashion-noise": 2000, "help-texts": 0, "demo": VALIDATION}


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        experiment: its recipe.
        method: as in the protocols.
        settings: by the protocols' keys.
        seed: of the run.
        overrides: what all runs of the search have besides, as ``key: value``.
    """

    experiment: str
    method: str
    settings: Mapping[str, Any]
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict)


def run_trial(trial: Trial) -> dict[str, Any]:
    """Run without a trace on disk; a failure is a result, and the worst."""
    from .records import Records
    from .run import describe_run, measure_run
    from .workers import Workers

    values = {
        "method": slug(trial.method),
        "seed": trial.seed,
        "scale": "small",  # these experiments have one size
        **trial.settings,
        "input.holdout": HELD_OUT[trial.experiment],
        **trial.overrides,
    }
    try:
        config = resolve_config(
            compose_config(trial.experiment, [f"{k}={v}" for k, v in values.items()])
        )
        measured = measure_run(config, Workers("cpu"), Records(), describe_run(config))
    except (RuntimeError, ValueError) as error:
        return {"metric": 0.0, "error": f"{type(error).__name__}: {error}"}
    found = {"metric": round(measured["last"], 3)}
    if reports := measured["refreshes"]:
        found["change"] = float(f"{statistics.median(r['change'] for r in reports):.3g}")
        found["refused"] = round(sum(not r["accepted"] for r in reports) / len(reports), 3)
    return found


def search_settings(
    experiment: str, rungs: Rungs, workers: int, data: str | None, journal: Path | None = None
) -> dict[str, Any]:
    """Search all methods of an experiment and return all that was tried, the best first."""
    spaces = SPACES[experiment]
    overrides = {"data": data} if data else {}
    record = Journal(journal, {"experiment": experiment, **overrides})
    trials, seed = run_rungs(
        spaces,
        rungs,
        lambda name, settings, seed: Trial(experiment, name, settings, seed, overrides),
        run_trial,
        workers,
        "metric",
        record,
    )
    return {
        "search": {
            "command": f"python -m llqr_lab.recipes.search {experiment}",
            "rungs": [{"configurations": c, "seeds": s} for c, s in rungs],
            "runs_a_method": sum(c * s for c, s in rungs),
            "seeds": [FIRST_SEED, seed - 1],
            "held_out": HELD_OUT[experiment],
        },
        "environment": describe_environment(),
        "methods": {
            name: {
                "settings": found[0]["settings"],
                "metric": found[0]["metric"],
                "space": spaces[name],
                "trials": found,
            }
            for name, found in trials.items()
        },
    }


def journal_beside(out: Path) -> Path:
    """Return the file in which the finished runs stand until ``out`` is written."""
    return out.with_name(out.name + ".journal")


def main(argv: Sequence[str] | None = None) -> int:
    """Search and write the settings that the recipe takes."""
    parser = argparse.ArgumentParser(
        prog="python -m llqr_lab.recipes.search", description=(__doc__ or "").split("\n\n", 1)[1]
    )
    parser.add_argument("experiment", choices=SPACES)
    parser.add_argument("--data", help="folder of the data (default: where Debian puts them)")
    parser.add_argument("--configurations", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--best", type=int, default=2, help="run on 2 further seeds (0: none; default: 2)"
    )
    parser.add_argument("--workers", type=int, default=available_workers(), help="processes")
    parser.add_argument("--out", type=Path, help="JSON to write (default: the package's own)")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    rungs = [(arguments.configurations, 1), (arguments.best, 2)][: 1 + bool(arguments.best)]
    out = arguments.out or TUNED / f"{arguments.experiment}.json"
    journal = journal_beside(out)
    found = search_settings(arguments.experiment, rungs, arguments.workers, arguments.data, journal)
    write_json(out, found)
    journal.unlink()
    for name, entry in found["methods"].items():
        print(f"{name:18} {entry['metric']:6.2f}  {entry['settings']}")
    print(f"{EXPERIMENTS[arguments.experiment].title}: {time.perf_counter() - began:.0f} s; {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
