"""The balls in which the loss is searched for its largest value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from .._checks import short_repr
from .._vectors import dots
from ..geometry import Geometry
from ._data import Data

__all__ = ["Norm", "NormName", "ascent_direction", "metric_of", "norm_name"]

NormName = Literal["euclidean", "adaptive"]
#: A name, a geometry, or a function that returns U v for a list of tensors like the parameters.
Norm = NormName | Geometry | Callable[[list[Tensor]], Sequence[Tensor]]
#: v -> U v on flat vectors; the ball of radius rho is d' U^-1 d <= rho^2.
Metric = Callable[[Tensor], Tensor]


def metric_of(norm: Norm, data: Data, weights: Tensor, eta: float) -> Metric:
    """Return the metric U of a norm.

    Args:
        norm: see :data:`Norm`.
        data: what is measured on.
        weights: w, flat.
        eta: added to the size of the weights in the adaptive norm.
    """
    if isinstance(norm, Geometry):
        return _geometry_metric(norm, data)
    if norm == "euclidean":
        return lambda v: v.clone()
    if norm == "adaptive":
        square = (weights.abs() + eta).square_()
        return lambda v: square * v
    if callable(norm):
        return _function_metric(norm, data)
    raise ValueError(
        f"norm: expected 'euclidean', 'adaptive', a llqr.Geometry or a function, got "
        f"{short_repr(norm)}"
    )


def norm_name(norm: Norm) -> str:
    """Return how results call a norm."""
    return norm if isinstance(norm, str) else getattr(norm, "__name__", type(norm).__name__)


def _function_metric(function: Callable[[list[Tensor]], Any], data: Data) -> Metric:
    shapes = [tuple(p.shape) for p in data.active]

    def apply(v: Tensor) -> Tensor:
        image = function(data.unflatten(v))
        fits = isinstance(image, Sequence) and all(isinstance(t, Tensor) for t in image)
        if not fits or [tuple(t.shape) for t in image] != shapes:
            raise ValueError(
                f"norm: the function returned {short_repr(image)}, expected U v: a list of tensors "
                f"of the shapes {shapes}, as the list v that it is given"
            )
        return data.flatten(image)

    return apply


def _geometry_metric(geometry: Geometry, data: Data) -> Metric:
    geometry._require_bound()
    names = {id(p): name for name, p in geometry.parameters.items()}
    if not all(id(p) in names for p in data.active):
        raise ValueError(
            "norm: the geometry does not know all of the parameters; bind it to their model, or "
            "pass those that it knows (geometry.parameters)"
        )
    order = [names[id(p)] for p in data.active]

    def apply(v: Tensor) -> Tensor:
        image = geometry.apply(dict(zip(order, data.unflatten(v), strict=True)))
        return data.flatten(image[name] for name in order)

    return apply


def ascent_direction(gradient: Tensor, metric: Metric) -> tuple[Tensor, Tensor] | None:
    r"""Return the steepest ascent of norm one, and its dual vector; None for a zero gradient.

    .. math:: d = \frac{U g}{\sqrt{g^\top U g}}, \qquad U^{-1} d = \frac{g}{\sqrt{g^\top U g}}
    """
    d = metric(gradient)
    square = float(dots(d, gradient))
    if not square > 0:
        if bool(gradient.any()):
            raise ValueError(f"norm: g'Ug is {square}; U must be positive definite")
        return None
    length = square**0.5
    return d / length, gradient / length
