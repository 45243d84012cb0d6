"""The extreme eigenvalues of the curvature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_choice, check_flags, check_integer, check_number
from .._vectors import dots
from .._warnings import warn_caller
from ..curvature import Curvature
from ._data import Data, Forwards, Parameters, Progress, generator_of, measuring
from ._lanczos import LanczosBasis
from ._mean_curvature import MeanCurvature
from ._measurement import Effort, Measurement, error_text

__all__ = ["Eigenvalues", "eigenvalues"]

Which = Literal["largest", "smallest", "magnitude"]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Eigenvalues(Measurement):
    """Eigenvalues of the curvature.

    Attributes:
        values: (k,), the most extreme first, in float64 on the CPU.
        residuals: |C v - lambda v| of each, computed by a product of its own: there is an
            eigenvalue within this distance.
        standard_errors: of each between the batches (to first order: of v' C_b v); None with one.
        vectors: for each a tuple of tensors shaped like the parameters, of norm 1 in all; None if
            they were not asked for.
        converged: whether all residuals are within the tolerance.
        which: the end of the spectrum.
        curvature: the matrix.
    """

    values: Tensor
    residuals: Tensor
    standard_errors: Tensor | None
    vectors: list[tuple[Tensor, ...]] | None
    converged: bool
    which: Which
    curvature: Curvature

    def __str__(self) -> str:
        kind = {"magnitude": "largest (by magnitude)"}.get(self.which, self.which)
        errors = [None] * len(self.values) if self.standard_errors is None else self.standard_errors
        lines = [
            f"{value:.6g} (residual {residual:.1g}, "
            f"{error_text(None if error is None else float(error), self.batches, 'batch')})"
            for value, residual, error in zip(
                self.values.tolist(), self.residuals.tolist(), errors, strict=True
            )
        ]
        end = self._effort() + ("" if self.converged else "; NOT converged")
        if len(lines) == 1:
            return f"{kind} eigenvalue of {self.curvature!r}: {lines[0]}; {end}"
        return "\n  ".join([f"{kind} eigenvalues of {self.curvature!r}; {end}:", *lines])

    def __repr__(self) -> str:
        values = ", ".join(f"{value:.4g}" for value in self.values.tolist())
        residual = float(self.residuals.max())
        return f"<Eigenvalues: {values} (residuals <= {residual:.1g}); {self._effort()}>"


def eigenvalues(
    forward: Forwards,
    parameters: Parameters,
    k: int = 1,
    curvature: Literal["fisher", "newton"] | Curvature = "newton",
    *,
    which: Which = "largest",
    batches: Iterable[Any] | None = None,
    weights: Sequence[float] | None = None,
    tolerance: float = 1e-3,
    max_products: int = 200,
    basis: int | None = None,
    vectors: bool = False,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> Eigenvalues:
    r"""Return extreme eigenvalues of the curvature of the mean loss.

    .. math:: C v_i = \lambda_i v_i, \qquad |v_i| = 1

    Lanczos with full orthogonalisation and thick restarts. Afterwards each vector is multiplied by
    C once more, so that value and residual are measured and not estimated.

    What is returned are eigenvalues, as their residuals show; but of one that is exactly multiple
    (such as the zeros of a Fisher matrix of more parameters than outputs) there may be more.

    Args:
        forward: a function of a batch that returns the loss, or (loss, outputs) where the
            curvature needs the outputs ("fisher"); without ``batches`` a function without
            arguments, or a list of such functions. The model runs in the caller's mode.
        parameters: the model, or the tensors to differentiate by. Frozen ones are left out.
        k: how many.
        curvature: ``"newton"`` (the Hessian), ``"fisher"`` or a :class:`llqr.Curvature`.
        which: "largest", "smallest" (the most negative) or "magnitude".
        batches: an iterable, such as a list or a DataLoader. It is read once and kept; the graph of
            one batch is held at a time. With several processes each has its share of them.
        weights: how much each batch (or function) counts; default: by its rows, the length of its
            first tensor; functions without arguments count equally.
        tolerance: the residual that is accepted, relative to the largest |eigenvalue|. The error
            of a value is of second order in it where the next eigenvalue is not close.
        max_products: when to stop in any case.
        basis: vectors held in memory; default: 30, or 2 k + 10 if that is more.
        vectors: whether to return the eigenvectors.
        seed: of the start vector.
        process_group: the processes that measure together; default: those of the model.
        progress: called after each product with (products done, at most).

    Returns:
        :class:`Eigenvalues`; printed, it tells what was found, how exactly and at what cost.

    Raises:
        ValueError: k is larger than the number of parameters, the loss is not finite, or an
            argument is out of its range.
        RuntimeError: a product is not finite.

    Warns:
        UserWarning: ``max_products`` were not enough.

    Source: K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue
    problems, SIAM J. Matrix Anal. Appl. 22 (2000).

    Example:
        >>> import torch, llqr
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> def loss():
        ...     return (torch.tensor([3.0, 1.0, -2.0]) * w.square()).sum() / 2
        >>> found = llqr.sharpness.eigenvalues(loss, [w], k=2, which="magnitude")
        >>> [round(x, 4) for x in found.values.tolist()]
        [3.0, -2.0]
    """
    check_integer("k", k, low=1)
    check_choice("which", which, Which)
    check_number("tolerance", tolerance, low=0, open_low=True)
    check_integer("max_products", max_products, low=2 * k)
    if basis is not None:
        check_integer("basis", basis, low=k + 2)
    check_flags(vectors=vectors)
    with measuring(forward, parameters, batches, weights, process_group) as data:
        if k > data.dimension:
            raise ValueError(
                f"k: {k} eigenvalues were asked for, but there are {data.dimension} parameters "
                "that require grad"
            )
        effort = Effort(progress, max_products)
        product = MeanCurvature(data, curvature, effort)
        generator = generator_of(seed)

        def draw() -> Tensor:
            return data.random_vector(generator)

        space = LanczosBasis(
            product, draw(), basis or max(30, 2 * k + 10), draw, negligible=0.1 * tolerance
        )
        largest = _find_ritz_vectors(space, k, which, tolerance, max_products - k, effort)
        values, residuals, quadratics = _measure_pairs(space.rows[:k], product)
        order = _wanted(values, which)
        values, residuals = values[order], residuals[order]
        errors = data.standard_error(quadratics)
        converged = bool((residuals <= tolerance * largest).all())
        found = Eigenvalues(
            values=values,
            residuals=residuals,
            standard_errors=None if errors is None else errors[order],
            vectors=_copies(space.rows, order, data) if vectors else None,
            converged=converged,
            which=which,
            curvature=product.curvature,
            **effort.fields(data),
        )
    if not converged:
        warn_caller(
            f"eigenvalues: after {found.evaluations} products a residual is "
            f"{float(residuals.max()):.2g}, the tolerance {tolerance * largest:.2g}; raise "
            "max_products or basis, or the tolerance if the precision of the products is the limit"
        )
    return found


def _wanted(values: Tensor, which: Which) -> list[int]:
    """Return the order of values, the most wanted first."""
    size = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    return [int(i) for i in size.argsort(stable=True)]


def _find_ritz_vectors(
    space: LanczosBasis, k: int, which: Which, tolerance: float, limit: int, effort: Effort
) -> float:
    """Leave the wanted Ritz vectors in the first k rows; return the largest |eigenvalue| known."""
    while True:
        space.expand()
        if space.size < k:
            continue
        values, vectors = space.ritz()
        order, largest = _wanted(values, which), float(values.abs().max())
        estimates = space.residuals(vectors[:, order[:k]])
        # Each breakdown shows one copy of a multiple eigenvalue, of which k may be wanted.
        open_end = space.rest == 0 and space.breakdowns < k and space.size < space.rows.shape[1]
        done = bool((estimates <= tolerance * largest).all()) and not open_end
        if done or effort.done >= limit:
            space.restart(values, vectors, order[:k])
            return largest
        if space.size == space.capacity:
            space.restart(values, vectors, order[: k + (space.capacity - k) // 2])


def _measure_pairs(rows: Tensor, product: MeanCurvature) -> tuple[Tensor, Tensor, Tensor]:
    """Return v' C v, |C v - (v' C v) v| and v' C_b v of unit vectors, each by a product."""
    values, residuals, quadratics = [], [], []
    for v in rows:
        image = product(v)
        value = float(dots(image, v))
        rest = image.sub_(v, alpha=value)
        values.append(value)
        residuals.append(float(dots(rest, rest)) ** 0.5)
        quadratics.append(product.quadratics)
    wide = {"dtype": torch.float64, "device": "cpu"}
    return (
        torch.tensor(values, **wide),  # type: ignore[arg-type]
        torch.tensor(residuals, **wide),  # type: ignore[arg-type]
        torch.stack(quadratics, 1),
    )


def _copies(rows: Tensor, order: list[int], data: Data) -> list[tuple[Tensor, ...]]:
    return [data.spread(rows[i].clone()) for i in order]
