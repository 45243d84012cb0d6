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

    def known_values(name: str, chosen: Sequence[llqr.RefreshReport] = reports) -> list[float]:
        # A refused refresh has None, or what is not finite, in what it did not get to.
        values = (getattr(r, name) for r in chosen)
        return [v for v in values if v is not None and math.isfinite(v)]

    def median_of(name: str, chosen: Sequence[llqr.RefreshReport] = reports) -> float | None:
        values = known_values(name, chosen)
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
        "smallest_eigenvalue": min(known_values("eigenvalue_min"), default=None),
        "largest_eigenvalue": max(known_values("eigenvalue_max"), default=None),
        "products": median_of("products"),
        "seconds": sum(known_values("seconds")),
        "active": change is not None and change >= INACTIVE,
    }
