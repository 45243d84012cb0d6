"""Print the demo's LLQR+SAM and LLQR+FriendlySAM without settings of their own, as in the paper.

Base and probe are set as for the probe without LLQR, the geometry as for LLQR without a probe.
Differences are to the probe without LLQR, seed by seed, with their standard errors.
"""

import argparse
import json
import statistics

from common import arguments, show

from llqr_lab.common.output import difference_text
from llqr_lab.common.processes import available_workers, run_all
from llqr_lab.common.statistics import paired_difference
from llqr_lab.demo.runs import SETTINGS_FILE, DemoRun, run_demo


def main(options: argparse.Namespace) -> None:
    """Run the probes without and with LLQR's geometry; print the table."""
    found = json.loads(SETTINGS_FILE.read_text())["methods"]
    settings = {name: entry["settings"] for name, entry in found.items()}
    geometry = {k: settings["LLQR"][k] for k in ("structure", "inner_lr", "ema", "every", "graft")}
    rows = []
    for probe in ("SAM", "FriendlySAM"):
        pair = ((probe, settings[probe]), (f"LLQR+{probe}", settings[probe] | geometry))
        runs = [DemoRun(name, s, seed) for name, s in pair for seed in range(options.seeds)]
        histories = run_all(run_demo, runs, available_workers(), probe)
        final = [h.test_accuracy[-1] for h in histories]
        alone, both = final[: options.seeds], final[options.seeds :]
        changes = [r.change for h in histories for r in h.reports if r.change is not None]
        difference = paired_difference(both, alone)
        rows.append(
            {
                "method": f"LLQR+{probe}",
                "test accuracy %": f"{statistics.fmean(both):.2f} +- {statistics.stdev(both):.2f}",
                "minus its probe": difference_text(difference, mark="+-"),
                "|Ug-g|/|g|": statistics.median(changes),
            }
        )
    show(f"Settings reused, {options.seeds} seeds", rows, options)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.set_defaults(device="cpu")
    parser.add_argument("--seeds", type=int, default=10)
    main(parser.parse_args())
