"""What every result says of itself: on how much data, at what cost."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from .._checks import short_repr
from ._data import Data, Progress

__all__ = ["ENOUGH", "Effort", "Measurement", "error_text", "plural"]

log = logging.getLogger("llqr")

#: From so many samples on twice the standard error covers at least 92 % (Student's t), and not 70 %
#: as from two.
ENOUGH = 10


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Measurement:
    """What was measured on, and the cost (base class).

    Attributes:
        batches: how many batches, in all processes.
        examples: rows of all batches; None for forwards without ``batches``.
        evaluations: how often all batches were gone through, in the unit of the measurement.
        seconds: wall-clock time.
    """

    batches: int
    examples: int | None
    evaluations: int
    seconds: float

    #: What ``evaluations`` counts.
    unit: ClassVar[str] = "product"

    def __post_init__(self) -> None:
        log.info("%s", self)

    def _effort(self) -> str:
        data = plural(self.batches, "batch")
        if self.examples is not None:
            data = f"{plural(self.examples, 'example')} in {data}"
        return f"{data}, {plural(self.evaluations, self.unit)}, {self.seconds:.1f} s"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).splitlines()[0]}>"


class Effort:
    """Counts evaluations while something is measured, and tells the caller's ``progress``.

    Args:
        progress: called with how many are done, and of how many.
        total: how many are expected at most.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        if not (progress is None or callable(progress)):
            raise TypeError(
                "progress: expected a function of (done, of how many), or None, got "
                f"{short_repr(progress)}"
            )
        self._progress, self._total = progress, total
        self._began = time.perf_counter()
        self.done = 0

    def count(self) -> None:
        """Count one evaluation."""
        self.done += 1
        if self._progress is not None:
            self._progress(self.done, max(self.done, self._total))

    @property
    def seconds(self) -> float:
        """Wall-clock time since the start."""
        return time.perf_counter() - self._began

    def fields(self, data: Data) -> dict[str, Any]:
        """Return the fields of a :class:`Measurement`."""
        return {
            "batches": data.batches,
            "examples": data.examples,
            "evaluations": self.done,
            "seconds": self.seconds,
        }


def plural(count: int, noun: str) -> str:
    """Return "1 batch" or "3 batches"."""
    ending = "" if count == 1 else "es" if noun.endswith(("ch", "s")) else "s"
    return f"{count:,} {noun}{ending}"


def error_text(error: float | None, count: int, noun: str) -> str:
    """Return "standard error 0.1 between 12 batches", or why there is none.

    The error is itself known to a share of 1 / sqrt(2 (count - 1)): a quarter from 9.
    """
    if error is None:
        return f"no standard error from {plural(count, noun)}"
    rough = "rough " if count < ENOUGH else ""
    return f"{rough}standard error {error:.2g} between {plural(count, noun)}"
