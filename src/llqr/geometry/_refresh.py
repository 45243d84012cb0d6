"""One refresh: solve, project, average, judge."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..curvature import QuadraticModel
from ..curvature._recycling import RecycledProduct
from ..distributed import Ranks
from ._blocks import BlockDiagonal, States
from ._ekfac import EKfac
from ._inner import solve_buffered
from ._layers import Layout
from ._reduced import REDUCIBLE, solve_reduced
from ._report import RefreshReport
from ._settings import at_step
from ._solver import Objective, SolverOptions, solve

__all__ = ["FlatModel", "Outcome", "basis_capacity", "relearn"]

NAN = float("nan")
#: Memory that directions and their products may take in a refresh.
BASIS_BYTES = 2**31


class FlatModel:
    """A quadratic model in the flat order of a layout: the mean of those of all processes."""

    def __init__(
        self,
        model: QuadraticModel,
        layout: Layout,
        names: list[str],
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self._layout, self._names, self._ranks = model, layout, names, ranks
        self.gradient = self._pack(model.gradient)
        model.gradient = []  # one copy is enough while directions fill the memory

    def _pack(self, values: Sequence[Tensor]) -> Tensor:
        joined = self._layout.pack_all(dict(zip(self._names, values, strict=True)))
        return self._layout.own(joined if self._ranks is None else self._ranks.mean_(joined))

    def product(self, d: Tensor) -> Tensor:
        """Return C d."""
        parts = self._layout.unpack(d)
        return self._pack(self.model.product([parts[n] for n in self._names]))


@dataclass(frozen=True)
class Outcome:
    """What a refresh came to: the new states, J at the old and the new U, why to refuse it."""

    states: States
    before: float
    after: float
    reason: str | None

    def report(
        self, flat: FlatModel, blocks: BlockDiagonal, kept: States, step: int, began: float
    ) -> RefreshReport:
        """Return the report, for the states that were kept."""
        g = flat.gradient
        ug = blocks.apply(kept, g)
        dot = blocks.layout.dot
        norm, length, change = (float(dot(v, v).sqrt()) for v in (g, ug, ug - g))
        spectrum = blocks.extremes(kept, exact=False).values()
        return RefreshReport(
            step=step,
            accepted=self.reason is None,
            reason=self.reason,
            J_before=self.before,
            J_after=self.after,
            gradient_norm=norm,
            ratio=_quotient(length, norm),
            change=_quotient(change, norm),
            cosine=_quotient(float(dot(g, ug)), norm * length),
            eigenvalue_min=min((low for low, _ in spectrum), default=1.0),
            eigenvalue_max=max((high for _, high in spectrum), default=1.0),
            products=flat.model.products,
            seconds=time.perf_counter() - began,
        )


def relearn(
    flat: FlatModel,
    blocks: BlockDiagonal,
    old: States,
    settings: Mapping[str, Any],
    step: int,
    number: int,
) -> Outcome:
    """Solve from the current states, average with them, and judge J at the result.

    Args:
        flat: the quadratic model.
        blocks: the structure of U.
        old: the current states; not changed.
        settings: those of :class:`llqr.LLQR`.
        step: the optimizer step, for schedules.
        number: how many refreshes were accepted, for the renewal of bases.
    """
    g, damping, positive = flat.gradient, settings["damping"], settings["constraint"] == "positive"
    judged = settings["constraint"] != "none"
    if not blocks.layout.all(bool(torch.isfinite(g).all())):
        return Outcome(old, NAN, NAN, "the gradient is not finite")
    exact = Objective(blocks, g, flat.product, damping)
    start = _renew_bases(blocks, old, g, settings, number)
    options = SolverOptions(
        settings["solver"],
        settings["steps"],
        at_step(settings, "lr", step),
        settings["momentum"],
        settings["clip"],
    )
    solved, first = _solve(exact, old, start, options, settings["tolerance"])
    before = float(first)
    finite = all(bool(torch.isfinite(v).all()) for entries in solved for v in entries.values())
    if not blocks.layout.all(finite):
        return Outcome(old, before, NAN, "the inner solve left entries that are not finite")
    if positive:
        solved = blocks.project(solved, settings["bounds"])
    new = blocks.average(start, solved, at_step(settings, "ema", step))
    new = blocks.project(new, settings["bounds"]) if positive else _floor(blocks, new)
    after, rounding = (float(v) for v in exact.value_and_rounding(new))
    if not (math.isfinite(before) and math.isfinite(after)):
        return Outcome(old, before, after, "J is not finite")
    if judged and after > before + rounding:
        return Outcome(old, before, after, "J did not go down")
    return Outcome(new, before, after, None)


def _solve(
    objective: Objective, old: States, start: States, options: SolverOptions, tolerance: float
) -> tuple[States, Tensor]:
    """Run the inner solve, literally or with as few products as the tolerance allows.

    Returns:
        The states that ``start`` led to, and J at ``old``.
    """
    if tolerance == 0:
        states, first = solve(objective, start, options)
        return states, first if start is old else objective.value(old)
    blocks, g = objective.blocks, objective.gradient
    capacity = basis_capacity(blocks.layout, options.steps)
    if blocks.linear and options.solver in REDUCIBLE:
        known = None if start is old else objective.control(old)
        return solve_reduced(objective, start, options, tolerance, capacity, known)
    product = RecycledProduct(objective.product, g, tolerance, capacity, blocks.layout.dot)
    recycled = Objective(blocks, g, product, objective.damping)
    before = None if start is old else recycled.value(old)  # the first product is a real one
    # Leaves that processes share are clipped by what all of them have: the literal loop knows how.
    buffered = options.solver in REDUCIBLE and blocks.layout.ranks is None
    way = solve_buffered if buffered else solve
    states, first = way(recycled, start, options)
    return states, first if before is None else before


def basis_capacity(layout: Layout, steps: int) -> int:
    """Return how many directions a solve keeps: one a step, within ``BASIS_BYTES``, at least 8."""
    pair = 2 * layout.width * layout.dtype.itemsize
    return min(steps, max(8, BASIS_BYTES // max(pair, 1)))


def _renew_bases(
    blocks: BlockDiagonal, states: States, g: Tensor, settings: Mapping[str, Any], number: int
) -> States:
    """Let e-kfac bases that follow the gradient take in this one."""
    if settings["bases"] == "learned":
        return states
    rotate = number % settings["renew_every"] == 0
    return [
        part.renew(state, part.group.own(g), number == 0, rotate)
        if isinstance(part, EKfac)
        else state
        for part, state in zip(blocks.parts, states, strict=True)
    ]


def _floor(blocks: BlockDiagonal, states: States) -> States:
    """Keep unconstrained diagonals and scalars above 1e-8, as the authors' code does."""
    return [
        {"U": state["U"].clamp(min=1e-8)}
        if part.group.structure in ("diagonal", "scalar")
        else state
        for part, state in zip(blocks.parts, states, strict=True)
    ]


def _quotient(a: float, b: float) -> float:
    return a / b if b > 0 else NAN
