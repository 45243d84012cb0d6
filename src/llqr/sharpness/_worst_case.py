"""How much the loss rises within a ball."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_flags, check_integer, check_number
from .._vectors import dots
from ._data import Data, Forwards, Parameters, Progress, generator_of, measuring
from ._mean_loss import MeanLoss
from ._measurement import Effort, Measurement, error_text, plural
from ._norms import Metric, Norm, ascent_direction, metric_of, norm_name

__all__ = ["WorstCase", "worst_case"]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class WorstCase(Measurement):
    """The largest rise of the loss that was found within a ball.

    Attributes:
        rise: L(w + d) - L(w) at the worst point found: a lower bound of the true maximum.
        standard_error: of that rise between the batches, at this point; None with one.
        loss: L(w).
        rises: (starts,), the rise that each start found.
        displacement: d, shaped like the parameters, if it was asked for.
        rho: the radius.
        norm: what the norm is called.
    """

    rise: float
    standard_error: float | None
    loss: float
    rises: Tensor
    displacement: tuple[Tensor, ...] | None
    rho: float
    norm: str

    unit = "gradient"

    def __str__(self) -> str:
        spread = f"{float(self.rises.min()):.4g} .. {float(self.rises.max()):.4g}"
        return (
            f"rise of the loss within rho = {self.rho:g} ({self.norm}): {self.rise:.6g} from "
            f"{self.loss:.6g} ({error_text(self.standard_error, self.batches, 'batch')}; "
            f"{plural(len(self.rises), 'start')}: {spread}); {self._effort()}"
        )


def worst_case(
    forward: Forwards,
    parameters: Parameters,
    rho: float = 0.05,
    norm: Norm = "euclidean",
    *,
    batches: Iterable[Any] | None = None,
    weights: Sequence[float] | None = None,
    steps: int = 20,
    starts: int = 3,
    eta: float = 0.0,
    displacement: bool = False,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> WorstCase:
    r"""Search a ball around the weights for the largest loss.

    .. math:: \max_{d^\top U^{-1} d \,\le\, \rho^2} L(w + d) - L(w)

    Projected steepest ascent in the metric U, from the centre and from random points. The first
    step from the centre is SAM's. A step that does not raise the loss is taken back and halved.

    Args:
        forward: as in :func:`eigenvalues`.
        parameters: as there.
        rho: the radius of the ball.
        norm: "euclidean" is U = I; "adaptive" is :math:`U = (|w| + \eta)^2` entry by entry, the
            ball of ASAM, which does not change when a layer is scaled up and the next one down; a
            :class:`llqr.Geometry` is its U; a function returns U v as a list for a list v of
            tensors like the parameters that require grad.
        batches: as there.
        weights: as there.
        steps: of each ascent, one gradient each.
        starts: how many ascents; the first from the centre.
        eta: of the adaptive norm; with 0 weights that are zero stay zero.
        displacement: whether to return the worst displacement.
        seed: of the random starts.
        process_group: as there.
        progress: called after each gradient with (gradients done, of how many at most).

    Returns:
        :class:`WorstCase`.

    Raises:
        ValueError: the loss is not finite at the weights, U is not positive definite, or an
            argument is out of its range.
        RuntimeError: the loss is not finite within the ball.

    Source: P. Foret et al., Sharpness-aware minimization, ICLR 2021, equation (1); J. Kwon et al.,
    ASAM, ICML 2021.

    Example:
        >>> import torch, llqr
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> def loss():
        ...     return (torch.tensor([4.0, 1.0]) * w.square()).sum() / 2
        >>> round(llqr.sharpness.worst_case(loss, [w], rho=0.5).rise, 4)
        0.5
    """
    check_number("rho", rho, low=0, open_low=True)
    check_number("eta", eta, low=0)
    check_integer("steps", steps, low=1)
    check_integer("starts", starts, low=1)
    check_flags(displacement=displacement)
    with measuring(forward, parameters, batches, weights, process_group) as data:
        effort = Effort(progress, 1 + starts * (steps + 1))
        losses = MeanLoss(data)
        metric = metric_of(norm, data, losses.weights, eta)
        generator = generator_of(seed)
        search = _Search(data, losses, metric, rho, effort)
        points = [
            search.ascend(search.centre if i == 0 else search.random_point(generator), steps)
            for i in range(starts)
        ]
        # The centre is in the ball: no rise is below zero.
        best = max([*points, search.centre], key=lambda point: point.rise)
        clean = search.centre.losses
        error = data.standard_error(best.losses - clean)
        return WorstCase(
            rise=best.rise,
            standard_error=None if error is None else float(error),
            loss=float(data.mean(clean)),
            rises=torch.tensor([p.rise for p in points], dtype=torch.float64, device="cpu"),
            displacement=data.spread(best.d.clone()) if displacement else None,
            rho=rho,
            norm=norm_name(norm),
            **effort.fields(data),
        )


class _Point(NamedTuple):
    """A point of the ball: d, its dual a with d = U a, and the loss there."""

    d: Tensor
    a: Tensor
    losses: Tensor
    gradient: Tensor
    rise: float


class _Search:
    """Ascents in one ball.

    Args:
        data: what is measured on.
        losses: the loss.
        metric: U.
        rho: the radius.
        effort: counts gradients.

    Attributes:
        centre: the point d = 0.
    """

    def __init__(
        self, data: Data, losses: MeanLoss, metric: Metric, rho: float, effort: Effort
    ) -> None:
        self._data, self._losses, self._metric = data, losses, metric
        self._rho, self._effort = rho, effort
        values, gradient = losses.gradient()
        effort.count()
        losses.check_start(values)
        zero = torch.zeros_like(gradient)
        self._clean = values
        self.centre = _Point(zero, zero, values, gradient, 0.0)

    def random_point(self, generator: torch.Generator) -> _Point:
        """Return a random point of the sphere."""
        a = self._data.random_vector(generator)
        return self._evaluate(self._metric(a), a, onto_sphere=True)

    def ascend(self, point: _Point, steps: int) -> _Point:
        """Return the end of an ascent."""
        # As long as the diameter: of a convex loss this is the power method, and never falls.
        length = 2 * self._rho
        for _ in range(steps):
            direction = ascent_direction(point.gradient, self._metric)
            if direction is None:
                break
            ahead = self._evaluate(
                point.d.add(direction[0], alpha=length), point.a.add(direction[1], alpha=length)
            )
            if ahead.rise > point.rise:
                point = ahead
            else:
                length /= 2
        return point

    def _evaluate(self, d: Tensor, a: Tensor, onto_sphere: bool = False) -> _Point:
        """Return the point, projected onto the ball: d'U^-1 d = a'd, so that U^-1 is not needed."""
        square = float(dots(a, d))
        if onto_sphere and not square > 0:
            raise ValueError(f"norm: a'Ua is {square} for a vector a; U must be positive definite")
        size = square**0.5
        if size > self._rho or onto_sphere:
            d, a = d * (self._rho / size), a * (self._rho / size)
        values, gradient = self._losses.gradient(d)
        self._effort.count()
        rise = float(self._data.mean(values - self._clean))
        if not self._data.ranks.all(abs(rise) < float("inf") and bool(gradient.isfinite().all())):
            raise RuntimeError(
                f"the loss or its gradient is not finite within rho = {self._rho:g}; pass a "
                "smaller rho"
            )
        return _Point(d, a, values, gradient, rise)
