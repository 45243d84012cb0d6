"""What the demo's runs say: means, paired differences, and what the refreshes did."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..common.output import difference_text, plus_minus, without_nan
from ..common.refreshes import INACTIVE, summarise_refreshes
from ..common.statistics import mean_std, paired_difference
from .runs import History

__all__ = ["accuracy_rows", "refresh_lines", "summarise_runs"]

Summary = dict[str, Any]


def summarise_runs(
    settings: Mapping[str, Mapping[str, Any]], histories: Mapping[str, Sequence[History]]
) -> dict[str, Summary]:
    """Return plain data (for JSON) of each method: one history per seed, in the same order."""
    final = {name: [h.test_accuracy[-1] for h in hs] for name, hs in histories.items()}
    return {
        name: {
            "settings": dict(settings[name]),
            "test_accuracy": final[name],
            "mean": statistics.fmean(final[name]),
            "std": mean_std(final[name])[1],
            "minus_SAM": paired_difference(final[name], final["SAM"]),
            "train_accuracy": [h.train_accuracy for h in hs],
            "test_accuracy_by_epoch": [h.test_accuracy for h in hs],
            "loss_by_epoch": [h.loss for h in hs],
            "skipped_steps": [h.skipped_steps for h in hs],
            "seconds": [h.seconds for h in hs],
            "refreshes": summarise_refreshes([r for h in hs for r in h.reports]),
            "reports": [[without_nan(asdict(r)) for r in h.reports] for h in hs],
            "spectra": [h.spectra for h in hs],
        }
        for name, hs in histories.items()
    }


def accuracy_rows(methods: Mapping[str, Summary]) -> list[dict[str, Any]]:
    """Return the table of accuracies, one row per method."""
    return [
        {
            "method": name,
            "test accuracy %": plus_minus(m["mean"], m["std"], mark="+-"),
            "minus SAM": "-" if name == "SAM" else difference_text(m["minus_SAM"], mark="+-"),
            "noisy train %": statistics.fmean(m["train_accuracy"]),
            "s a run": statistics.fmean(m["seconds"]),
        }
        for name, m in methods.items()
    ]


def refresh_lines(methods: Mapping[str, Summary]) -> list[str]:
    """Return two lines per method that learns U: what its refreshes did, and whether U acts."""
    lines = []
    for name, method in methods.items():
        r = method["refreshes"]
        if r is None:
            continue
        kind = "{structure}, inner lr {inner_lr:g}".format(**method["settings"])
        lines.append(
            f"{name} ({kind}): {r['accepted']} of {r['count']} refreshes accepted, "
            f"J {_shown_number(r['J_before'])} -> {_shown_number(r['J_after'])}, "
            f"{r['products']:g} products"
        )
        verdict = "" if r["active"] else f"; U inactive (below {INACTIVE:g}: U hardly acts)"
        lines.append(
            f"    |Ug-g|/|g| {_shown_number(r['change'])}, |Ug|/|g| {_shown_number(r['ratio'])}, "
            f"cos {_shown_number(r['cosine'])}, eigenvalues of U "
            f"{_shown_number(r['smallest_eigenvalue'])} .. "
            f"{_shown_number(r['largest_eigenvalue'])}{verdict}"
        )
    return lines


def _shown_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
