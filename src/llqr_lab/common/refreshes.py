"""What the refreshes of U did, over the reports of many of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import llqr

__all__ = ["INACTIVE", "summarise_refreshes"]

INACTIVE = 0.1  # below this median of |Ug-g|/|g|, U hardly acts


def summarise_refreshes(reports: Sequence[llqr.RefreshReport]) -> dict[str, Any] | None:
    """Return counts, medians and extreme eigenvalues; None if there was no refresh."""
    if not reports:
        return None
    accepted = [r for r in reports if r.accepted]

    def median_of(name: str, chosen: Sequence[llqr.RefreshReport] = reports) -> float | None:
        # A refused refresh has NaN in what it did not get to.
        values = [v for r in chosen if math.isfinite(v := getattr(r, name))]
        return statistics.median(values) if values else None

    change = median_of("change")
    return {
        "count": len(reports),
        "accepted": len(accepted),
        "J_before": median_of("J_before", accepted),
        "J_after": median_of("J_after", accepted),
        "ratio": median_of("ratio"),
        "change": change,
        "cosine": median_of("cosine"),
        "smallest_eigenvalue": min(r.eigenvalue_min for r in reports),
        "largest_eigenvalue": max(r.eigenvalue_max for r in reports),
        "products": median_of("products"),
        "seconds": sum(r.seconds for r in reports),
        "active": change is not None and change >= INACTIVE,
    }
