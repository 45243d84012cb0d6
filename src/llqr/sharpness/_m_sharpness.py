"""m-sharpness: the rise of the loss of few rows after SAM's one step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .._checks import check_integer, check_number
from ..geometry import Geometry
from ._data import Forwards, Parameters, Progress, measuring
from ._mean_loss import MeanLoss
from ._measurement import Effort, Measurement, error_text
from ._norms import Metric, Norm, ascent_direction, metric_of, norm_name

__all__ = ["MSharpness", "m_sharpness"]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class MSharpness(Measurement):
    """The mean rise of the loss of sub-batches after SAM's step on each.

    Attributes:
        rise: the mean.
        standard_error: between the sub-batches; None with one.
        loss: the mean loss at the weights.
        m: rows of each sub-batch; None if the batches were taken as they are.
        rho: the radius.
        norm: what the norm is called.
    """

    rise: float
    standard_error: float | None
    loss: float
    m: int | None
    rho: float
    norm: str

    unit = "pass"

    def __str__(self) -> str:
        rows = "" if self.m is None else f"m = {self.m}, "
        return (
            f"m-sharpness ({rows}rho = {self.rho:g}, {self.norm}): {self.rise:.6g} from "
            f"{self.loss:.6g} ({error_text(self.standard_error, self.batches, 'sub-batch')}); "
            f"{self._effort()}"
        )


def m_sharpness(
    forward: Forwards,
    parameters: Parameters,
    rho: float = 0.05,
    norm: Norm = "euclidean",
    *,
    m: int | None = None,
    batches: Iterable[Any] | None = None,
    weights: Sequence[float] | None = None,
    eta: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> MSharpness:
    r"""Measure how much the loss of few rows rises after the step of SAM on them.

    .. math::
        \frac1n \sum_{B} L_B\!\left(w + \rho \frac{U g_B}{\sqrt{g_B^\top U g_B}}\right) - L_B(w)

    The sum is over sub-batches B of m rows, each with its own gradient :math:`g_B`. Small m tells
    more of generalisation than the sharpness of the whole batch.

    Args:
        forward: as in :func:`eigenvalues`; the loss of a batch must be a mean over its rows.
        parameters: as there.
        rho: the length of the step.
        norm: as in :func:`worst_case`.
        m: cut the batches into sub-batches of so many rows; what is left of a batch is not used.
            None: take them as they are.
        batches: as there.
        weights: as there, one per sub-batch.
        eta: as in :func:`worst_case`.
        process_group: as there.
        progress: called after each sub-batch with (sub-batches done, of how many) of this process.

    Returns:
        :class:`MSharpness`.

    Raises:
        ValueError: a loss is not finite at the weights, no batch has m rows, or an argument is out
            of its range.
        RuntimeError: a loss is not finite after the step.

    Source: P. Foret et al., Sharpness-aware minimization, ICLR 2021, section 4.1.

    Example:
        >>> import torch, llqr
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> rows = torch.tensor([1.0, -1.0, 3.0, 1.0])
        >>> found = llqr.sharpness.m_sharpness(
        ...     lambda x: (w - x).square().mean() / 2, [w], rho=0.5, m=1, batches=[rows]
        ... )
        >>> round(found.rise, 4)  # rho |g| + rho^2 / 2, mean |g| = 1.5
        0.875
    """
    check_number("rho", rho, low=0, open_low=True)
    check_number("eta", eta, low=0)
    if m is not None:
        check_integer("m", m, low=1)
    if isinstance(norm, Geometry) and norm.sharded:
        raise ValueError(
            "norm: a geometry that is sharded over processes gives U g only where all have the "
            "same g; use worst_case, or a geometry that is not sharded"
        )
    with measuring(forward, parameters, batches, weights, process_group, rows=m) as data:
        effort = Effort(progress, len(data.forwards))
        losses = MeanLoss(data)
        metric = metric_of(norm, data, losses.weights, eta)
        clean, moved = [], []
        with data.ranks.together("m_sharpness"):
            for index in range(len(data.forwards)):
                before, after = _losses_of_step(losses, index, metric, rho)
                clean.append(before)
                moved.append(after)
                effort.count()
        start = torch.tensor(clean, dtype=torch.float64, device="cpu")
        rises = torch.tensor(moved, dtype=torch.float64, device="cpu") - start
        error = data.standard_error(rises)
        return MSharpness(
            rise=float(data.mean(rises)),
            standard_error=None if error is None else float(error),
            loss=float(data.mean(start)),
            m=m,
            rho=rho,
            norm=norm_name(norm),
            **{**effort.fields(data), "evaluations": 2},
        )


def _losses_of_step(
    losses: MeanLoss, index: int, metric: Metric, rho: float
) -> tuple[float, float]:
    """Return the loss of one sub-batch at w and after its own step of SAM."""
    before, gradient = losses.gradient_of(index)
    if not math.isfinite(before):
        raise ValueError(
            f"forward: the loss of sub-batch {index} is {before}; a rise is measured from a finite "
            "loss"
        )
    direction = ascent_direction(gradient, metric)
    if direction is None:
        return before, before
    after = losses.loss_of(index, direction[0] * rho)
    if not math.isfinite(after):
        raise RuntimeError(
            f"the loss of sub-batch {index} is {after} after a step of rho = {rho:g}; pass a "
            "smaller rho"
        )
    return before, after
