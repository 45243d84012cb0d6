"""Which radii to try: the rise of the loss at theta + eps for a grid of rho."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_number, value_at_step
from .._html import format_table
from .._module_state import Buffers
from .._optimizer import Optimizer
from .._probing import Probing
from .._progress import Progress as Counters
from .._vectors import dots
from ..perturbations import SAM, Perturbation
from ..sharpness._data import Data, Forwards, Progress, measuring
from ..sharpness._mean_loss import MeanLoss
from ..sharpness._measurement import Effort
from ._advice import AdvisedTable, number_text

__all__ = ["RhoRow", "RhoTable", "find_rho"]

#: The part of the loss that a rise worth trying is of.
LOW, HIGH = 0.05, 0.5
#: The rise is called linear if it is within this factor of rho sqrt(g'Ug).
FACTOR = 2.0
#: The grid, as multiples of the perturbation's own rho.
MULTIPLES = tuple(2.0**k for k in range(-4, 5))
USUAL_RHO = 0.05


@dataclass(frozen=True, kw_only=True)
class RhoRow:
    r"""What a probe of one radius does to the loss.

    Attributes:
        rho: the radius.
        rise: :math:`L(\theta + \epsilon) - L(\theta)`, the mean over the batches, each at its own
            :math:`\epsilon`; infinite if a loss there is not finite.
        standard_error: of it, between the batches; None with one.
        linear: :math:`g^\top \epsilon`, for SAM :math:`\rho \sqrt{g^\top U g}`.
        share: ``rise`` divided by the loss; nan if that is not positive.
        cosine: of the angle between g and :math:`\tilde g`, the mean over the batches.
    """

    rho: float
    rise: float
    standard_error: float | None
    linear: float
    share: float
    cosine: float

    @property
    def ratio(self) -> float:
        """``rise / linear``: 1 where the loss is linear along the probe."""
        return self.rise / self.linear if self.linear > 0 else math.nan


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class RhoTable(AdvisedTable):
    """What :func:`llqr.find_rho` measured.

    Attributes:
        rows: one :class:`RhoRow` for each rho, the smallest first.
        loss: the mean loss at the weights.
        low: the smallest rho to try; None if no row says.
        high: the largest rho to try.
        perturbation: what probed, as text.
    """

    rows: tuple[RhoRow, ...]
    loss: float
    low: float | None
    high: float | None
    perturbation: str

    unit = "pass"

    def __str__(self) -> str:
        cells = [("rho", "rise", "+-", "of the loss", "linear", "rise/linear", "cos(g, g~)")]
        cells += [
            (
                number_text(row.rho),
                number_text(row.rise),
                number_text(row.standard_error, 2),
                f"{row.share:.1%}" if math.isfinite(row.share) else "-",
                number_text(row.linear),
                number_text(row.ratio, 2),
                number_text(row.cosine, 2),
            )
            for row in self.rows
        ]
        head = f"{self.perturbation}, loss {self.loss:.4g}; {self._effort()}"
        return f"{head}\n{format_table(cells, self.advice)}"


def find_rho(
    optimizer: Optimizer[Any] | nn.Module,
    forward: Forwards,
    *,
    batches: Iterable[Any] | None = None,
    rhos: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> RhoTable:
    r"""Measure what probes of several radii do to the loss, and say which to try.

    .. math::
        L(\theta + \epsilon) - L(\theta), \qquad \epsilon \text{ of length } \rho, \qquad
        \text{against } g^\top \epsilon = \rho \sqrt{g^\top U g} \text{ (SAM)}

    The probe is the optimizer's own: its perturbation, in the metric of its geometry as it is now,
    with the groups' own ``rho`` where they have one. Each batch is probed along its own gradient,
    as in training on one process, in the modes that the model is in: give it batches of the size
    that you train with. Which rho trains best cannot be seen from the loss at one point of the
    training: the range is where a search is worth its time. Measure again later, since the loss
    falls.

    Weights, buffers, gradients, random state, geometry, perturbation and counters are as before.

    Args:
        optimizer: a :class:`llqr.Optimizer`; without a perturbation it is measured with
            :class:`llqr.SAM`. Or a model, which is measured with SAM and U = I.
        forward: a function of a batch that returns the loss or (loss, outputs); without
            ``batches`` one without arguments, or a list of such functions.
        batches: read once, and kept; a handful is enough (see ``standard_error``).
        rhos: the radii; None: nine around the perturbation's own, each twice the one before.
        weights: how much each batch counts; None: by its rows, if they are known.
        progress: called after each pass with (passes done, of how many).

    Returns:
        :class:`llqr.finding.RhoTable`; print it.

    Raises:
        TypeError: neither an optimizer nor a model.
        ValueError: a rho is not positive; the perturbation has no clean gradient to probe along;
            all groups have a ``rho`` of their own; a loss is not finite at the weights.
        RuntimeError: U gives g no positive norm.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> found = llqr.find_rho(model, lambda: model.weight.square().sum(), rhos=[0.1, 3.0])
        >>> [round(row.rise, 4) for row in found.rows]  # 2 rho + rho^2
        [0.21, 15.0]
        >>> print(found.advice)
        Try rho = 0.1: there the probe raises the loss by 21.0 %, within a factor of 2 of g'eps.
    """
    source = _as_optimizer(optimizer)
    source._passes.refuse_if_displaced("find_rho", "call it before the passes of a step")
    source._prepare_pass()
    perturbation = source.perturbation or SAM(USUAL_RHO)
    _check_parts(source, perturbation)
    step = source._progress.step
    grid = _grid_of(rhos, value_at_step(perturbation.rho, step))
    beside = Buffers(source._step_modules.all())
    try:
        with measuring(forward, source.model, batches, weights, source.ranks.group) as data:
            _check_batches(data)
            effort = Effort(progress, len(data.forwards) * (1 + len(grid)))
            losses = MeanLoss(data)
            probe = _TrialProbe(source, perturbation, data)
            with data.ranks.together("find_rho"):
                measured = [
                    _probe_batch(i, losses, probe, grid, effort) for i in range(len(data.forwards))
                ]
            start = torch.tensor([loss for loss, _ in measured], dtype=torch.float64, device="cpu")
            numbers = torch.tensor(
                [rows for _, rows in measured], dtype=torch.float64, device="cpu"
            )
            loss = float(data.mean(start))
            rows = _rows_of(grid, loss, data.mean(numbers), data.standard_error(numbers))
            fields = {**effort.fields(data), "evaluations": 1 + len(grid)}
    finally:
        beside.restore()
    low, high, advice = advise(rows)
    if source.refresh_due:
        advice += (
            "\nA refresh is due before the next step, which will probe with another U: call "
            "optimizer.refresh(...) first."
        )
    return RhoTable(
        rows=rows,
        loss=loss,
        low=low,
        high=high,
        perturbation=type(perturbation).__name__,
        advice=advice,
        **fields,
    )


# -- what is measured ------------------------------------------------------------------------------


class _TrialProbe:
    """The optimizer's probe at a radius of choice, on copies of the perturbation.

    Args:
        source: whose probe.
        perturbation: what probes.
        data: whose flat vectors it takes and gives.
    """

    def __init__(self, source: Optimizer[Any], perturbation: Perturbation, data: Data) -> None:
        self._source, self._perturbation, self._data = source, perturbation, data
        named = source._parameters.named
        names = {id(p): name for name, p in named.items()}
        self._names = [names.get(id(p), "") for p in data.active]
        # Copies with a memory of their own, of the same parameters.
        self._shared = {id(p): p for p in named.values()}

    def own(self, g: Tensor) -> Tensor:
        """Return a flat gradient without the entries that the optimizer does not train."""
        named = self._as_named(g)
        return self._data.flatten(named.get(name) for name in self._names)

    @torch.no_grad()
    def displacement(self, g: Tensor, rho: float) -> Tensor:
        """Return eps, flat."""
        source, counters = self._source, Counters(self._source._progress.step)
        trial = copy.deepcopy(self._perturbation, dict(self._shared))
        trial.rho, trial.start, trial.interval = rho, 0, 1
        probing = Probing(source._parameters, source.geometry, trial, source.ranks, counters)
        if rho not in probing.radii.values():
            raise ValueError(
                "optimizer: every parameter group has a rho of its own, so that no other is tried; "
                "take 'rho' out of the groups while you measure"
            )
        eps, _ = probing.find_displacement(self._as_named(g), None)
        if counters.skipped_probes:
            raise RuntimeError(
                "geometry: U gives the gradient no positive norm g'Ug, so there is no probe; "
                "constraint='positive' keeps U positive definite"
            )
        return self._data.flatten(eps.get(name) for name in self._names)

    def _as_named(self, g: Tensor) -> dict[str, Tensor]:
        pairs = zip(self._names, self._data.unflatten(g), strict=True)
        return {name: t for name, t in pairs if name}


def _probe_batch(
    index: int, losses: MeanLoss, probe: _TrialProbe, grid: Sequence[float], effort: Effort
) -> tuple[float, list[list[float]]]:
    """Return the loss of a batch at w, and [rise, g'eps, cos(g, g~)] for each rho."""
    loss, g = losses.gradient_of(index)
    effort.count()
    if not math.isfinite(loss):
        raise ValueError(
            f"forward: the loss of batch {index} is {loss}; a rise is measured from a finite loss"
        )
    g = probe.own(g)
    rows = []
    for rho in grid:
        eps = probe.displacement(g, rho)
        after, moved = losses.gradient_of(index, eps)
        effort.count()
        rise = after - loss if math.isfinite(after) else math.inf
        rows.append([rise, float(dots(g, eps)), _cosine(g, probe.own(moved))])
    return loss, rows


def _cosine(a: Tensor, b: Tensor) -> float:
    lengths = math.sqrt(float(dots(a, a)) * float(dots(b, b)))
    return float(dots(a, b)) / lengths if lengths > 0 else math.nan


def _rows_of(
    grid: Sequence[float], loss: float, means: Tensor, errors: Tensor | None
) -> tuple[RhoRow, ...]:
    """Return the rows from (R, 3) means and standard errors."""
    spreads = [None] * len(grid) if errors is None else errors.tolist()
    found = zip(grid, means.tolist(), spreads, strict=True)
    return tuple(
        RhoRow(
            rho=rho,
            rise=rise,
            standard_error=None if error is None else error[0],
            linear=linear,
            share=rise / loss if loss > 0 else math.nan,
            cosine=cosine,
        )
        for rho, (rise, linear, cosine), error in found
    )


# -- what it says ----------------------------------------------------------------------------------


def advise(rows: Sequence[RhoRow]) -> tuple[float | None, float | None, str]:
    """Return the smallest and the largest rho to try, and why."""
    linear = [r for r in rows if 1 / FACTOR <= r.ratio <= FACTOR]
    within = [r for r in rows if LOW <= r.share <= HIGH]
    fit = [r for r in within if r in linear]
    part = f"{LOW:.0%} to {HIGH:.0%}".replace("%", " %")
    if fit:
        first, last = fit[0], fit[-1]
        many = first is not last
        radii = f"{first.rho:.3g} to {last.rho:.3g}" if many else f"= {first.rho:.3g}"
        shares = [f"{100 * r.share:.1f} %" for r in ((first, last) if many else (first,))]
        why = (
            f"Try rho {radii}: there the probe raises the loss by {' to '.join(shares)}, within a "
            f"factor of {FACTOR:g} of g'eps."
        )
        return first.rho, last.rho, why
    if all(math.isnan(r.share) for r in rows):
        return None, None, "The loss is not positive, so that a rise cannot be compared to it."
    if all(r.share < LOW for r in rows):
        return None, None, f"No rho raises the loss by {100 * LOW:g} %: pass larger rhos."
    if all(r.share > HIGH for r in rows):
        return (
            None,
            None,
            f"Every rho raises the loss by more than {100 * HIGH:g} %: pass smaller rhos.",
        )
    if not within:
        below = max(r.rho for r in rows if r.share < LOW)
        return (
            None,
            None,
            (
                f"Above rho = {below:.3g} the rise jumps past {part} of the loss: pass rhos "
                "between that and the next."
            ),
        )
    known = [r for r in linear if r.share < LOW]
    said = f"Where the loss rises by {part}, that is not within a factor of {FACTOR:g} of g'eps"
    if not known:
        return None, None, f"{said}, nor is it for smaller rhos: pass smaller ones."
    largest = known[-1].rho
    return largest, largest, f"{said}: the loss is curved there. Try rho = {largest:.3g} or less."


# -- arguments -------------------------------------------------------------------------------------


def _as_optimizer(optimizer: Any) -> Optimizer[Any]:
    """Return the optimizer that was given, or one with U = I for a model."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not isinstance(optimizer, nn.Module):
        raise TypeError(
            "optimizer: expected a llqr.Optimizer or a torch.nn.Module, got "
            f"{type(optimizer).__name__}; for another optimizer, pass its model"
        )
    trained = [p for p in optimizer.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("optimizer: no parameter of this model requires grad")
    return Optimizer(torch.optim.SGD(trained, lr=1.0), optimizer)


def _check_parts(source: Optimizer[Any], perturbation: Perturbation) -> None:
    if perturbation.looks_ahead:
        raise ValueError(
            f"optimizer: {type(perturbation).__name__} probes along the momentum, where the loss "
            "need not rise, so that a rise says nothing of its rho; measure with "
            "perturbation=llqr.SAM(...)"
        )
    if source.geometry is not None and source.geometry.sharded:
        raise ValueError(
            "optimizer: its geometry is sharded over processes and gives U g only where all have "
            "the same g; measure with a geometry that is not sharded"
        )


def _check_batches(data: Data) -> None:
    low, high = data.ranks.range(len(data.forwards))
    if low != high:
        raise ValueError(
            f"batches: the processes have {low:g} to {high:g} of them; pass as many in each"
        )


def _grid_of(rhos: Sequence[float] | None, usual: float) -> list[float]:
    if rhos is None:
        scale = usual if 0 < usual < math.inf else USUAL_RHO
        return [scale * factor for factor in MULTIPLES]
    grid = sorted({float(rho) for rho in rhos})
    if not grid:
        raise ValueError("rhos: there is none; pass at least one, or None for nine around rho")
    for rho in grid:
        check_number("rhos", rho, low=0, open_low=True)
    return grid
