"""Means, standard deviations, and differences taken seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["mean_std", "paired_by_seed", "paired_difference"]


def mean_std(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation (n - 1); None if there are too few values."""
    known = list(values)
    return (
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
    )


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Return mean and standard error of the differences, seed by seed.

    What all methods of a seed share (its noise, its batches) cancels in the difference. The
    standard error is s / sqrt(n), with s the sample standard deviation of the n differences. Two
    differences say next to nothing of it: there it is None, and "range" has both, the smaller
    first.
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    mean, std = mean_std(differences)
    count = len(differences)
    return {
        "mean": mean,
        "standard_error": std / math.sqrt(count) if std is not None and count > 2 else None,
        "range": sorted(differences) if count == 2 else None,
    }


def paired_by_seed(
    values: Mapping[int, float], others: Mapping[int, float]
) -> dict[str, Any] | None:
    """Return :func:`paired_difference` over the shared ``seeds``; None without any."""
    # A seed that only one of them has would bring its own noise into the difference.
    shared = [seed for seed in values if seed in others]
    if not shared:
        return None
    found = paired_difference([values[s] for s in shared], [others[s] for s in shared])
    return {**found, "seeds": shared}
