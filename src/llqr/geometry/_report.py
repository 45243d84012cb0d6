"""What a refresh of the geometry reports, and the count of refreshes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from .._html import html_of_numbers

__all__ = ["INACTIVE", "RefreshError", "RefreshHistory", "RefreshReport"]

#: |Ug - g| / |g| below which training with U is hardly told from training without.
INACTIVE = 0.015
#: Names that stand behind their number.
COUNTED = {"products", "samples", "s"}


class RefreshError(RuntimeError):
    """Too many refreshes in a row were refused.

    Attributes:
        report: of the last one, if the geometry gave it.
    """

    def __init__(self, message: str, report: RefreshReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, kw_only=True)
class RefreshReport:
    """The numbers of one refresh; what a geometry does not have is None, and is not printed.

    Attributes:
        step: the optimizer step before which it ran.
        accepted: whether the new U was kept.
        reason: why it was refused, else None.
        J_before: the objective at the old U. With ``lr="auto"``, J(U) is what the step
            -(1 / kappa) U g would take off the loss in the model, with 1 / kappa the best length at
            g'Ug = g'g: at best half of |g|^2 / kappa.
        J_after: the objective at the U that would be stored (after EMA and projection).
        gradient_norm: |g|.
        ratio: |Ug| / |g|.
        change: |Ug - g| / |g|; below 0.1 U hardly acts.
        cosine: cos(g, Ug).
        eigenvalue_min: smallest eigenvalue of U (an estimate; see Geometry.spectrum).
        eigenvalue_max: largest eigenvalue of U (an estimate).
        products: curvature products computed.
        samples: curvature samples drawn, by all processes.
        seconds: wall-clock time.

    Example:
        >>> import llqr
        >>> print(llqr.RefreshReport(step=3, accepted=True, change=0.25, seconds=0.5))
        refresh at step 3 accepted: |Ug-g|/|g| 0.25, 0.50 s
        The new U is used from now on. It acts: it changes the gradient by 25 %.
    """

    step: int
    accepted: bool
    reason: str | None = None
    J_before: float | None = None
    J_after: float | None = None
    gradient_norm: float | None = None
    ratio: float | None = None
    change: float | None = None
    cosine: float | None = None
    eigenvalue_min: float | None = None
    eigenvalue_max: float | None = None
    products: int | None = None
    samples: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.headline()}\n{' '.join(self._explain())}"

    def _repr_html_(self) -> str:
        numbers = {"seconds" if k == "s" else k: text for k, text in self._numbers().items()}
        return html_of_numbers(self._verdict(), numbers, *self._explain())

    def headline(self) -> str:
        """Return the verdict and the numbers, in one line."""
        # A count stands before its noun: "12 products", but "cos 0.9".
        numbers = ", ".join(
            f"{text} {name}" if name in COUNTED else f"{name} {text}"
            for name, text in self._numbers().items()
        )
        return self._verdict() + (f": {numbers}" if numbers else "")

    def _verdict(self) -> str:
        verdict = "accepted" if self.accepted else f"refused ({self.reason})"
        return f"refresh at step {self.step} {verdict}"

    def _explain(self) -> list[str]:
        """Return sentences: what the numbers mean, and what to do."""
        if not self.accepted:
            said = ["U stays as it was, and training goes on with it."]
            if self.change is None:
                return said
            return [*said, "If this is common, a smaller inner lr or a larger refresh batch helps."]
        said = ["The new U is used from now on."]
        if self.gradient_norm == 0:
            said.append("The gradient of its batch is zero, so it tells nothing of how U acts.")
        elif self.change is not None:
            acts = f"It acts: it changes the gradient by {self.change:.0%}.".replace("%", " %")
            hardly = "It hardly acts: a larger inner lr, a smaller ema or more refreshes let it."
            said.append(hardly if self.change < INACTIVE else acts)
        if self.J_after is not None and self.J_after > 0:
            said.append("A step -Ug would raise the loss in the model: take a small base lr.")
        elif self.J_after is not None and self.J_after < 0:
            said.append("A step along -Ug lowers the loss in the model.")
        return said

    def _numbers(self) -> dict[str, str]:
        """Return the numbers that there are, as text, by name."""
        # What decides whether a number is shown, its name, and its text.
        shown = [
            (self.J_before, "J", f"{_short(self.J_before, 4)} -> {_short(self.J_after, 4)}"),
            (self.ratio, "|Ug|/|g|", _short(self.ratio)),
            (self.change, "|Ug-g|/|g|", _short(self.change)),
            (self.cosine, "cos", _short(self.cosine)),
            (
                self.eigenvalue_min,
                "eigenvalues",
                f"{_short(self.eigenvalue_min)} .. {_short(self.eigenvalue_max)}",
            ),
            (self.products, "products", str(self.products)),
            (self.samples, "samples", str(self.samples)),
            (self.seconds, "s", f"{self.seconds or 0.0:.2f}"),
        ]
        # The quotients of a gradient that is zero are nan.
        return {
            name: text for value, name, text in shown if value is not None and not math.isnan(value)
        }


def _short(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


@dataclass
class RefreshHistory:
    """How the refreshes of a geometry went.

    Attributes:
        refreshes: how many ran.
        refused: how many of them were refused.
        failures: how many refusals in a row there are now, of those that a setting can help.
        saturated: how many of the others, for which the loss has no curvature at present.
        last: the optimizer step of the last one; -1: none yet.
    """

    refreshes: int = 0
    refused: int = 0
    failures: int = 0
    saturated: int = 0
    last: int = -1

    @property
    def accepted(self) -> int:
        """How many were accepted."""
        return self.refreshes - self.refused

    def record(self, report: RefreshReport, *, is_failure: bool = True) -> None:
        """Count a refresh.

        Args:
            report: of the refresh.
            is_failure: whether its refusal, if it was refused, is one that a setting can help.
        """
        self.last = report.step
        self.refreshes += 1
        if report.accepted:
            self.failures = self.saturated = 0
        else:
            self.refused += 1
            # A saturated network is refused too, but is no failure of the settings.
            self.failures += is_failure
            self.saturated = 0 if is_failure else self.saturated + 1

    def counters(self) -> dict[str, int]:
        """Return the numbers, to checkpoint."""
        return asdict(self)

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Take over what :meth:`counters` returned."""
        self.refreshes, self.refused = counters["refreshes"], counters["refused"]
        self.failures, self.last = counters["failures"], counters["last"]
        self.saturated = counters.get("saturated", 0)  # older checkpoints have none
