"""What results are measured by: a row per metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["METRICS", "Metric", "MetricName"]

MetricName = Literal["accuracy", "bleu", "loss"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric, as pages and curves show it.

    Attributes:
        title: what it is called.
        unit: in the head of a column.
        digits: behind the point.
        sign: 1 if a higher one is better, else -1.
        glance: examples that a point of a curve is measured on, the same at all points.
    """

    title: str
    unit: str
    digits: int
    sign: int
    glance: int = 800


METRICS: dict[MetricName, Metric] = {
    "accuracy": Metric(title="accuracy, %", unit="%", digits=2, sign=1),
    "bleu": Metric(title="BLEU", unit="BLEU", digits=2, sign=1, glance=200),  # slow to measure
    "loss": Metric(title="loss", unit="loss", digits=4, sign=-1),
}
