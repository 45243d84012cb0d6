"""``llqr theory``: every statement of section 4 and appendix B, checked."""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from ..common.drawing import save_figure
from ..common.output import progress_bar, write_csv, write_json
from ..theory import checks
from ..theory.pictures import picture_findings
from .options import add_out, show_examples

__all__ = ["add_arguments", "main"]

EXAMPLES = """\
example:
  llqr theory --out results                      writes results/theory.csv, .json, .png, .svg, .pdf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --out."""
    show_examples(parser, EXAMPLES)
    add_out(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run all checks, print and write them; 1 if a number does not show what is said of it."""
    torch.set_num_threads(1)  # tensors are small: more threads would only wait for each other
    found = [f for name in progress_bar(checks.CHECKS, "checks") for f in checks.CHECKS[name]()]
    for finding in found:
        print("\n".join(checks.finding_lines(finding)))
    counts = Counter(f.verdict for f in found)
    print(f"{len(found)} checks: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    out = arguments.out
    caption = (
        "Dots are measured, lines are formulas. "
        "(14), (16): ρ = 0.1, average curvature 0.25. Corollary B.2: 200 random curvatures at "
        "matched contraction; the crosses are what the printed formula gives. Proposition B.3: an "
        "unstable well (ηλ = 2.2) against a flat one. Proposition B.1: logistic regression, "
        "α and ρ fall as 1/√T; the line shows only the slope."
    )
    written = [
        *save_figure(picture_findings([f for f in found if f.curve]), out / "theory.png", caption),
        write_csv(out / "theory.csv", [f.plain_row() for f in found]),
        write_json(out / "theory.json", [{**vars(f), "verdict": f.verdict} for f in found]),
    ]
    for path in written:
        print(f"wrote {path}")
    return 0 if all(f.confirmed for f in found) else 1
