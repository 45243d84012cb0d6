"""The local quadratic model of the loss: its gradient, and products with its curvature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import check_integer
from .._vectors import quadratic_value
from ._curvatures import Curvature, as_curvature
from ._forwards import Forward
from ._term import Term

__all__ = ["QuadraticModel", "check_scale", "normalised_weights", "quadratic_model"]

Scale = Literal["mean", "sum"] | float


def quadratic_model(
    forward: Forward | Sequence[Forward],
    parameters: Iterable[Tensor],
    curvature: Literal["fisher", "newton"] | Curvature = "fisher",
    *,
    scale: Literal["mean", "sum"] | float = "mean",
    weights: Sequence[float] | None = None,
    micro_batch: int | None = None,
) -> QuadraticModel:
    r"""Expand the loss to second order around the current parameters.

    .. math:: m(u) = g^\top u + \tfrac12 u^\top C u

    This is the local quadratic problem of the paper's equation (7), whose H is C here. One eager
    forward is run and its graph kept; every product is then two (Newton: one) backward passes
    through it. The model runs in the caller's mode: call ``model.eval()`` first if batch statistics
    or dropout are not wanted. Nothing is written to ``p.grad``.

    Args:
        forward: a function without arguments that returns the scalar loss, or ``(loss, outputs)``
            with the outputs (logits) that the loss was computed from; or a list of such
            functions, whose losses and curvatures are averaged.
        parameters: the tensors to differentiate by; all vectors are lists in this order.
        curvature: ``"fisher"``, ``"newton"`` or a :class:`llqr.Curvature`.
        scale: a factor on C: ``"mean"`` is 1; ``"sum"`` is the number of output rows (last
            dimension = classes) whose loss gradient is not zero, as in the authors' code; a
            number is taken as it is.
        weights: how much each forward counts; equal by default, normalised to sum 1.
        micro_batch: how many of the forwards keep their graph at a time (None: all). With fewer
            than there are, every product runs them again, one after another: the same result for
            the memory of ``micro_batch`` of them.

    Returns:
        A :class:`QuadraticModel` with ``gradient``, ``product(d)``, ``value(u)`` and ``loss``.

    Raises:
        ValueError: the loss is not a scalar, has no graph, is linear in the outputs, or the
            outputs are missing for a curvature that needs them; or the forward uses reentrant
            activation checkpointing, which hides its parameters.

    Warns:
        UserWarning: an operation has no double backward, and a slower way is taken: forward-mode
            differentiation (the forward runs once more per product), or, if that is missing too,
            central differences (twice more, and accurate to a few digits).

    Example:
        >>> import torch, llqr
        >>> layer = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> def forward():
        ...     z = layer(x)
        ...     return torch.nn.functional.cross_entropy(z, y), z
        >>> model = llqr.quadratic_model(forward, layer.parameters())
        >>> [tuple(v.shape) for v in model.product(model.gradient)]
        [(2, 3), (2,)]
    """
    forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    if not forwards:
        raise ValueError("forward: got an empty list; pass at least one function")
    relative = normalised_weights(weights, len(forwards))
    parameters = list(parameters)
    curvature = as_curvature(curvature)
    check_scale(scale)
    if micro_batch is not None:
        check_integer("micro_batch", micro_batch, low=1)
    keep = micro_batch is None or len(forwards) <= micro_batch
    terms = [Term(f, parameters, curvature, scale == "sum", keep) for f in forwards]
    return QuadraticModel(terms, relative, scale)


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weights of ``count`` forwards, summing to one (equal when None)."""
    if weights is None:
        return [1.0 / count] * count
    values = [float(w) for w in weights]
    if len(values) != count:
        raise ValueError(f"weights: expected {count} numbers, one per forward, got {len(values)}")
    total = sum(values)
    if not (all(w >= 0 for w in values) and 0 < total < float("inf")):
        raise ValueError(f"weights: expected numbers >= 0 with a positive sum, got {values}")
    return [w / total for w in values]


def check_scale(scale: Any) -> None:
    """Refuse a scale that is neither ``"mean"``, ``"sum"`` nor a positive number."""
    if scale in ("mean", "sum"):
        return
    if isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < float("inf"):
        return
    raise ValueError(f"scale: expected 'mean', 'sum' or a number > 0, got {scale!r}")


class QuadraticModel:
    r"""Gradient g and curvature products C d of a loss at fixed parameters.

    Attributes:
        loss: the (averaged) loss, a detached scalar.
        gradient: g, a list of tensors shaped like the parameters; zeros for a parameter that took
            no part.
        scale: the factor on C, as a number.
        products: how many curvature products were computed so far.
    """

    def __init__(self, terms: list[Term], weights: list[float], scale: Scale) -> None:
        self._terms = list(zip(weights, terms, strict=True))
        # C is a mean over the counted rows; times their number it is the authors' sum over rows.
        if scale == "sum":
            self.scale = float(sum(t.rows for w, t in self._terms if w > 0))
        else:
            self.scale = 1.0 if scale == "mean" else float(scale)
        self.products = 0
        self.loss = _weighted_sum((w, [t.loss]) for w, t in self._terms)[0]
        self.gradient = _weighted_sum((w, t.gradient) for w, t in self._terms)
        for _, term in self._terms:
            term.gradient = []  # the caller may let go of the sum, too

    def product(self, d: Sequence[Tensor]) -> list[Tensor]:
        """Return C d.

        Args:
            d: a direction, one tensor per parameter, shaped like it.
        """
        self.products += 1
        # C is linear in the loss: the mean of the losses has the mean of the curvatures.
        result = _weighted_sum((w, t.product(d)) for w, t in self._terms)
        return result if self.scale == 1.0 else [v * self.scale for v in result]

    def value(self, u: Sequence[Tensor]) -> Tensor:
        """Return g'u + u'Cu / 2, a scalar tensor: equation (7) at delta-theta = u."""
        image = self.product(u)
        values = [
            quadratic_value(v, g, c, _inner_product)
            for v, g, c in zip(u, self.gradient, image, strict=True)
        ]
        return torch.stack(values).sum()


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def _weighted_sum(terms: Iterable[tuple[float, list[Tensor]]]) -> list[Tensor]:
    """Return the weighted sum of lists of tensors, taken one by one (a single list: itself)."""
    # A single list has weight one, and its tensors are not copied.
    total: list[Tensor] = []
    first: float | None = None
    for weight, values in terms:
        if not total:
            first, total = weight, values
            continue
        if first is not None:
            total, first = [first * v for v in total], None
        for t, v in zip(total, values, strict=True):
            t.add_(v, alpha=weight)
    return total
