"""What a refresh of the geometry reports."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RefreshError", "RefreshReport"]


class RefreshError(RuntimeError):
    """Too many refreshes in a row were refused."""


@dataclass(frozen=True)
class RefreshReport:
    """The numbers of one refresh.

    Attributes:
        step: the optimizer step before which it ran.
        accepted: whether the new U was kept.
        reason: why it was refused, else None.
        J_before: the objective at the old U.
        J_after: the objective at the U that would be stored (after EMA and projection).
        gradient_norm: |g|.
        ratio: |Ug| / |g|.
        change: |Ug - g| / |g|; below 0.1 U hardly acts.
        cosine: cos(g, Ug).
        eigenvalue_min: smallest eigenvalue of U (an estimate; see Geometry.spectrum).
        eigenvalue_max: largest eigenvalue of U (an estimate).
        products: curvature products computed.
        seconds: wall-clock time.
    """

    step: int
    accepted: bool
    reason: str | None
    J_before: float
    J_after: float
    gradient_norm: float
    ratio: float
    change: float
    cosine: float
    eigenvalue_min: float
    eigenvalue_max: float
    products: int
    seconds: float

    def __str__(self) -> str:
        verdict = "accepted" if self.accepted else f"refused ({self.reason})"
        return (
            f"refresh at step {self.step} {verdict}: J {self.J_before:.4g} -> {self.J_after:.4g}, "
            f"|Ug|/|g| {self.ratio:.3g}, |Ug-g|/|g| {self.change:.3g}, cos {self.cosine:.3g}, "
            f"eigenvalues {self.eigenvalue_min:.3g} .. {self.eigenvalue_max:.3g}, "
            f"{self.products} products, {self.seconds:.2f} s"
        )
