"""What the demo's runs say: means, paired differences, and what the refreshes did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import llqr

from .output import plain
from .train import History

__all__ = ["INACTIVE", "accuracy_rows", "paired", "refresh_lines", "refreshes", "summarise"]

INACTIVE = 0.1  # below this median of |Ug-g|/|g|, U hardly acts
Summary = dict[str, Any]


def paired(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard error of the differences, seed by seed.

    The standard error is s / sqrt(n), with s the sample standard deviation of the n differences;
    None for n = 1.
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    return {
        "mean": statistics.fmean(differences),
        "standard_error": _scaled_std(differences, math.sqrt(len(differences))),
    }


def _scaled_std(values: Sequence[float], divisor: float = 1.0) -> float | None:
    return statistics.stdev(values) / divisor if len(values) > 1 else None


def summarise(
    settings: Mapping[str, Mapping[str, Any]], histories: Mapping[str, Sequence[History]]
) -> dict[str, Summary]:
    """Return plain data (for JSON) of each method: one history a seed, in the same order."""
    final = {name: [h.test_accuracy[-1] for h in hs] for name, hs in histories.items()}
    return {
        name: {
            "settings": dict(settings[name]),
            "test_accuracy": final[name],
            "mean": statistics.fmean(final[name]),
            "std": _scaled_std(final[name]),
            "minus_SAM": paired(final[name], final["SAM"]),
            "train_accuracy": [h.train_accuracy for h in hs],
            "test_accuracy_by_epoch": [h.test_accuracy for h in hs],
            "loss_by_epoch": [h.loss for h in hs],
            "skipped_steps": [h.skipped_steps for h in hs],
            "seconds": [h.seconds for h in hs],
            "refreshes": refreshes([r for h in hs for r in h.reports]),
            "reports": [[plain(asdict(r)) for r in h.reports] for h in hs],
            "spectra": [h.spectra for h in hs],
        }
        for name, hs in histories.items()
    }


def refreshes(reports: Sequence[llqr.RefreshReport]) -> Summary | None:
    """Return what refreshes did: counts, medians, extreme eigenvalues; None if there were none."""
    if not reports:
        return None
    accepted = [r for r in reports if r.accepted]

    def median(name: str, of: Sequence[llqr.RefreshReport] = reports) -> float | None:
        values = [v for r in of if math.isfinite(v := getattr(r, name))]
        return statistics.median(values) if values else None

    change = median("change")
    return {
        "count": len(reports),
        "accepted": len(accepted),
        "J_before": median("J_before", accepted),
        "J_after": median("J_after", accepted),
        "ratio": median("ratio"),
        "change": change,
        "cosine": median("cosine"),
        "smallest_eigenvalue": min(r.eigenvalue_min for r in reports),
        "largest_eigenvalue": max(r.eigenvalue_max for r in reports),
        "products": median("products"),
        "seconds": sum(r.seconds for r in reports),
        "active": change is not None and change >= INACTIVE,
    }


def _plus_minus(mean: float, spread: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.2f}" + ("" if spread is None else f" +- {spread:.2f}")


def accuracy_rows(methods: Mapping[str, Summary]) -> list[dict[str, Any]]:
    """Return the table of accuracies, a row a method."""
    return [
        {
            "method": name,
            "test accuracy %": _plus_minus(m["mean"], m["std"]),
            "minus SAM": "-" if name == "SAM" else _plus_minus(*m["minus_SAM"].values(), sign="+"),
            "noisy train %": statistics.fmean(m["train_accuracy"]),
            "s a run": statistics.fmean(m["seconds"]),
        }
        for name, m in methods.items()
    ]


def refresh_lines(methods: Mapping[str, Summary]) -> list[str]:
    """Return two lines a method that learns U: what its refreshes did, and whether U acts."""
    lines = []
    for name, method in methods.items():
        r = method["refreshes"]
        if r is None:
            continue
        kind = "{structure}, inner lr {inner_lr:g}".format(**method["settings"])
        lines.append(
            f"{name} ({kind}): {r['accepted']} of {r['count']} refreshes accepted, "
            f"J {_number(r['J_before'])} -> {_number(r['J_after'])}, {r['products']:g} products"
        )
        verdict = "" if r["active"] else f"; U inactive (below {INACTIVE:g}: U hardly acts)"
        lines.append(
            f"    |Ug-g|/|g| {_number(r['change'])}, |Ug|/|g| {_number(r['ratio'])}, "
            f"cos {_number(r['cosine'])}, eigenvalues of U {_number(r['smallest_eigenvalue'])} .. "
            f"{_number(r['largest_eigenvalue'])}{verdict}"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
