"""The spectral density of the curvature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_integer, check_number
from ..curvature import Curvature
from ._data import Forwards, Parameters, Progress, generator_of, measuring
from ._lanczos import LanczosBasis
from ._mean_curvature import MeanCurvature
from ._measurement import Effort, Measurement, error_text

__all__ = ["Density", "density"]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Density(Measurement):
    """The spectral density of the curvature.

    Attributes:
        grid: (points,), eigenvalues.
        values: (points,), the density there; it integrates to one.
        errors: (points,), standard errors of the density between the probes.
        nodes: (probes, steps), the Ritz values of each probe.
        weights: (probes, steps), their weights, which sum to one per probe.
        width: the standard deviation of the Gaussian that each node was smoothed by.
        dimension: the number of parameters that require grad.
        curvature: the matrix.
    """

    grid: Tensor
    values: Tensor
    errors: Tensor
    nodes: Tensor
    weights: Tensor
    width: float
    dimension: int
    curvature: Curvature

    def moment(self, order: int) -> tuple[float, float]:
        """Return tr C^order / dimension and its standard error between the probes.

        Args:
            order: at most 2 steps - 1.
        """
        each = (self.weights * self.nodes**order).sum(1)
        return float(each.mean()), float(each.std()) / len(each) ** 0.5

    def __str__(self) -> str:
        mean, error = self.moment(1)
        ends = f"{float(self.nodes.min()):.4g} .. {float(self.nodes.max()):.4g}"
        return (
            f"spectral density of {self.curvature!r}: eigenvalues {ends}, mean {mean:.4g} "
            f"({error_text(error, len(self.nodes), 'probe')}); "
            f"{self.dimension:,} parameters, {self._effort()}"
        )


def density(
    forward: Forwards,
    parameters: Parameters,
    curvature: Literal["fisher", "newton"] | Curvature = "newton",
    *,
    batches: Iterable[Any] | None = None,
    weights: Sequence[float] | None = None,
    steps: int = 30,
    probes: int = 5,
    points: int = 400,
    width: float | None = None,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> Density:
    r"""Estimate how the eigenvalues of the curvature are distributed.

    .. math::
        \phi(t) = \frac1n \sum_{i=1}^n \sum_{j=1}^m \tau_{ij}\,
        \mathcal N(t;\, \theta_{ij}, \sigma^2)

    Stochastic Lanczos quadrature: m steps from a random unit vector v give Ritz values
    :math:`\theta_j` with weights :math:`\tau_j`, the squares of the first entries of the
    eigenvectors of H. They have the first 2 m - 1 moments :math:`v^\top C^p v`.

    Args:
        forward: as in :func:`eigenvalues`.
        parameters: as there.
        curvature: as there.
        batches: as there.
        weights: as there.
        steps: m, the products of each probe; so many vectors are held in memory.
        probes: n, how many random vectors; at least 2, for the errors.
        points: of the grid, which reaches three widths beyond the Ritz values.
        width: the standard deviation sigma of each node; default: a hundredth of the range.
        seed: of the probes.
        process_group: as there.
        progress: as there.

    Returns:
        :class:`Density`.

    Raises:
        ValueError: the loss is not finite, or an argument is out of its range.
        RuntimeError: a product is not finite.

    Source: B. Ghorbani, S. Krishnan and Y. Xiao, An investigation into neural net optimization via
    Hessian eigenvalue density, ICML 2019.

    Example:
        >>> import torch, llqr
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> def loss():
        ...     return (torch.tensor([3.0, 1.0, -2.0]) * w.square()).sum() / 2
        >>> found = llqr.sharpness.density(loss, [w], steps=3)
        >>> [round(x, 4) for x in found.nodes[0].tolist()]
        [-2.0, 1.0, 3.0]
    """
    check_integer("steps", steps, low=1)
    check_integer("probes", probes, low=2)
    check_integer("points", points, low=2)
    if width is not None:
        check_number("width", width, low=0, open_low=True)
    with measuring(forward, parameters, batches, weights, process_group) as data:
        steps = min(steps, data.dimension)
        effort = Effort(progress, steps * probes)
        product = MeanCurvature(data, curvature, effort)
        generator = generator_of(seed)
        pairs = []
        for _ in range(probes):
            start = data.random_vector(generator, signs=True)
            pairs.append(_quadrature(product, start, steps))
        nodes, masses = (torch.stack(side) for side in zip(*pairs, strict=True))
        low, high = float(nodes.min()), float(nodes.max())
        # Of a C that is a multiple of I all nodes are one.
        sigma = width or 0.01 * (high - low) or 0.01 * max(abs(high), 1e-30)
        grid = torch.linspace(
            low - 3 * sigma, high + 3 * sigma, points, dtype=torch.float64, device="cpu"
        )
        each = _smooth(grid, nodes, masses, sigma)
        return Density(
            grid=grid,
            values=each.mean(0),
            errors=each.std(0) / math.sqrt(probes),
            nodes=nodes,
            weights=masses,
            width=sigma,
            dimension=data.dimension,
            curvature=product.curvature,
            **effort.fields(data),
        )


def _quadrature(product: MeanCurvature, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the Ritz values of a probe and their weights, (steps,)."""
    space = LanczosBasis(product, start, steps)
    for _ in range(steps):
        space.expand()
        if not space.rest:  # all that v sees is in the basis
            break
    values, vectors = space.ritz()
    missing = steps - space.size
    nodes = torch.cat([values, values[-1:].expand(missing)])
    return nodes, torch.cat([vectors[0].square(), values.new_zeros(missing)])


def _smooth(grid: Tensor, nodes: Tensor, masses: Tensor, sigma: float) -> Tensor:
    """Return the density of each probe on the grid, (probes, points)."""
    distance = (grid[:, None, None] - nodes) / sigma  # (points, probes, steps)
    kernel = (-0.5 * distance.square()).exp() / (sigma * math.sqrt(2 * math.pi))
    return (kernel * masses).sum(-1).mT
