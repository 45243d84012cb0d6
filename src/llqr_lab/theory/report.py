"""``llqr theory``: every statement of section 4 and appendix B, checked."""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from collections.abc import Callable

from llqr_lab.output import add_out, progress, write_csv, write_json

from . import (
    damping,
    escape,
    hovering,
    selection,
    storage,
    toy_limits,
    transfer,
    two_scale,
    vanilla_sam,
)
from .findings import Finding
from .pictures import picture_findings, save

__all__ = ["CHECKS", "add_arguments", "main"]

CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "recursions": two_scale.findings,
    "hovering": hovering.findings,
    "escape": escape.findings,
    "vanilla SAM": vanilla_sam.findings,
    "selection": selection.findings,
    "damping": damping.findings,
    "toys": toy_limits.findings,
    "storage": storage.findings,
    "transfer": transfer.findings,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --out."""
    add_out(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run all checks, print and write them; 1 if a number does not show what is said of it."""
    found = [f for name in progress(CHECKS, "checks") for f in CHECKS[name]()]
    for finding in found:
        print("\n".join(lines(finding)))
    counts = Counter(f.verdict for f in found)
    print(f"{len(found)} checks: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    out = arguments.out
    caption = (
        "Marks are measured, lines are formulas. Two-cycle: rho = 0.1, average curvature 0.25. "
        "Corollary B.2: 200 random curvatures at matched contraction. B.3: an unstable well "
        "(eta lambda = 2.2) against a flat one. B.1: logistic regression, alpha and rho ~ "
        "1/sqrt(T)."
    )
    written = [
        save(picture_findings([f for f in found if f.curve]), out / "theory.png", caption),
        write_csv(out / "theory.csv", [f.row() for f in found]),
        write_json(out / "theory.json", [{**vars(f), "verdict": f.verdict} for f in found]),
    ]
    for path in written:
        print(f"wrote {path}")
    return 0 if all(f.confirmed for f in found) else 1


def lines(finding: Finding) -> list[str]:
    """Return one finding as lines of at most 100 characters."""
    row = finding.row()
    head = f"{row['verdict']:<18} {row['source']}: {row['statement']}"
    body = [text for text in (row["measured"], row["note"]) if text]
    return [head, *(line for text in body for line in textwrap.wrap(text, 96, **INDENT))]


INDENT = {"initial_indent": " " * 4, "subsequent_indent": " " * 6}
