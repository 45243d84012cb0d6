"""The trace and the diagonal of the curvature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_flags, check_integer
from .._vectors import dots
from ..curvature import Curvature
from ._data import Data, Forwards, Parameters, Progress, generator_of, measuring
from ._lanczos import orthogonalise
from ._mean_curvature import MeanCurvature
from ._measurement import ENOUGH, Effort, Measurement, error_text

__all__ = ["Trace", "trace"]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Trace(Measurement):
    """The trace of the curvature.

    Attributes:
        value: the estimate.
        standard_error: of the estimate, between its random probes: for these batches.
        batch_error: standard error between the batches: for others like them; None with one.
        probes: how many random vectors.
        sketch: how many directions were taken exactly.
        diagonal: an estimate of the diagonal, shaped like the parameters, if it was asked for.
        dimension: the number of parameters that require grad; value / dimension is the mean
            eigenvalue.
        curvature: the matrix.
    """

    value: float
    standard_error: float
    batch_error: float | None
    probes: int
    sketch: int
    diagonal: tuple[Tensor, ...] | None
    dimension: int
    curvature: Curvature

    def __str__(self) -> str:
        return (
            f"trace of {self.curvature!r}: {self.value:.6g} "
            f"({error_text(self.standard_error, self.probes, 'probe')}, "
            f"{error_text(self.batch_error, self.batches, 'batch')}); "
            f"{self.dimension:,} parameters, {self._effort()}"
        )


def trace(
    forward: Forwards,
    parameters: Parameters,
    curvature: Literal["fisher", "newton"] | Curvature = "newton",
    *,
    batches: Iterable[Any] | None = None,
    weights: Sequence[float] | None = None,
    products: int = 60,
    sketch: int | None = None,
    diagonal: bool = False,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> Trace:
    r"""Estimate the trace of the curvature of the mean loss, and its standard error.

    .. math::
        \operatorname{tr} C \approx \operatorname{tr} Q C Q^\top
        + \frac1n \sum_{i=1}^n z_i^\top P C P z_i, \qquad P = I - Q^\top Q

    Hutch++: Q is an orthonormal basis of the image of a few random vectors, where most of a
    decaying spectrum is; that part is exact. Only the rest is estimated with random signs z.

    Args:
        forward: as in :func:`eigenvalues`.
        parameters: as there.
        curvature: as there.
        batches: as there.
        weights: as there.
        products: how many products are computed. At least ten are left for the random z: from
            fewer, the standard error would tell little.
        sketch: rows of Q, each of which costs two products and is held in memory; default: a third
            of the products, or what ten z leave. 0 is Hutchinson's estimate.
        diagonal: whether to return the diagonal too, which costs no product. It sums to the
            trace; its entries are noisier.
        seed: of the probes.
        process_group: as there.
        progress: as there.

    Returns:
        :class:`Trace`.

    Raises:
        ValueError: the loss is not finite, or an argument is out of its range.
        RuntimeError: a product is not finite.

    Source: R. Meyer, C. Musco, C. Musco and D. Woodruff, Hutch++: optimal stochastic trace
    estimation, SOSA 2021.

    Example:
        >>> import torch, llqr
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> def loss():
        ...     return (torch.tensor([3.0, 1.0, -2.0]) * w.square()).sum() / 2
        >>> round(llqr.sharpness.trace(loss, [w]).value, 4)
        2.0
    """
    if sketch is not None:
        check_integer("sketch", sketch, low=0)
    check_integer("products", products, low=2 * (sketch or 0) + ENOUGH)
    if sketch is None:
        sketch = min(products // 3, (products - ENOUGH) // 2)
    check_flags(diagonal=diagonal)
    with measuring(forward, parameters, batches, weights, process_group) as data:
        effort = Effort(progress, products)
        product = MeanCurvature(data, curvature, effort)
        generator = generator_of(seed)
        rows = _sketch_image(product, data, min(sketch, data.dimension), generator)
        entries = rows.new_zeros(data.dimension) if diagonal else None

        exact, exact_parts = 0.0, torch.zeros_like(data.shares)
        for q in rows:
            image = product(q)
            exact += float(dots(image, q))
            exact_parts += product.quadratics
            if entries is not None:  # diag(C Q'Q)
                entries.addcmul_(image, q)

        samples, parts = [], torch.zeros_like(data.shares)
        probes = products - effort.done
        for _ in range(probes):
            z = data.random_vector(generator, signs=True)
            pz = z.clone()
            orthogonalise(pz, rows)
            image = product(pz)
            samples.append(float(dots(image, pz)))
            parts += product.quadratics / probes
            if entries is not None:  # the mean of C P z z' P is C P
                entries.addcmul_(image, pz, value=1 / probes)

        values = torch.tensor(samples, dtype=torch.float64, device="cpu")
        between = data.standard_error(exact_parts + parts)
        return Trace(
            value=exact + float(values.mean()),
            standard_error=float(values.std()) / probes**0.5,
            batch_error=None if between is None else float(between),
            probes=probes,
            sketch=len(rows),
            diagonal=None if entries is None else data.spread(entries),
            dimension=data.dimension,
            curvature=product.curvature,
            **effort.fields(data),
        )


def _sketch_image(
    product: MeanCurvature, data: Data, many: int, generator: torch.Generator
) -> Tensor:
    """Return an orthonormal basis of the image of random vectors under C, as rows."""
    rows = torch.empty(many, data.dimension, dtype=data.dtype, device=data.device)
    size = 0
    for _ in range(many):
        image = product(data.random_vector(generator))
        _, rest = orthogonalise(image, rows[:size])
        if not rest:  # all of the image is in the basis: of a C of low rank
            break
        rows[size] = image / rest
        size += 1
    return rows[:size]
