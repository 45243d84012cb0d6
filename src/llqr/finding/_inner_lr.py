"""Which inner learning rates of LLQR to try: how good U is on batches that it did not see."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import check_number
from .._html import format_table
from .._optimizer import Optimizer
from .._vectors import Tensors
from ..curvature import quadratic_model
from ..distributed._sharded import whole_parameters
from ..geometry import LLQR, Geometry, NormStatistics, RefreshReport
from ..geometry._report import INACTIVE
from ..geometry.inner_solve import FlatModel
from ..geometry.structures import States
from ..sharpness._data import Forward, Forwards, Progress
from ..sharpness._measurement import Effort
from ._advice import AdvisedTable, number_text

__all__ = ["InnerLRRow", "InnerLRTable", "find_inner_lr"]

Rate = float | Literal["auto"]
USUAL: tuple[Rate, ...] = ("auto", 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class InnerLRRow:
    r"""What one refresh at one inner rate learns.

    Attributes:
        lr: the rate, or "auto".
        reason: why the refresh was refused; None: it was accepted.
        J_before: J at the present U, on the refresh batch.
        J_after: J at the new U; with "auto" in other units (see :class:`llqr.RefreshReport`).
        change: :math:`|Ug - g| / |g|` on the refresh batch.
        gain: what the best step along :math:`-U g` takes off the quadratic model of the refresh
            batch, divided by what the best step along :math:`-g` does. It does not depend on the
            scale of U.
        held_out: the same on the other batches, each with its own gradient: the mean. Above 1, U
            helps on data that it did not see.
        standard_error: of ``held_out``, between the batches; None with one.
        products: curvature products of the refresh.
    """

    lr: Rate
    reason: str | None = None
    J_before: float = math.nan
    J_after: float = math.nan
    change: float = math.nan
    gain: float = math.nan
    held_out: float = math.nan
    standard_error: float | None = None
    products: int | None = None


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class InnerLRTable(AdvisedTable):
    """What :func:`llqr.find_inner_lr` measured.

    Attributes:
        rows: one :class:`InnerLRRow` for each rate, in the order given.
        lr: the rate to try; None if none helps.
        structure: of U, as text.
    """

    rows: tuple[InnerLRRow, ...]
    lr: Rate | None
    structure: str

    def __str__(self) -> str:
        cells = [("lr", "J", "change", "gain", "held out", "+-", "products")]
        for row in self.rows:
            cells.append(
                (
                    _rate_text(row.lr),
                    f"{number_text(row.J_before)} -> {number_text(row.J_after)}",
                    number_text(row.change),
                    number_text(row.gain),
                    number_text(row.held_out),
                    number_text(row.standard_error, 2),
                    row.reason or str(row.products),
                )
            )
        head = f"inner rates of LLQR({self.structure}); {self._effort()}"
        return f"{head}\n{format_table(cells, self.advice)}"


def find_inner_lr(
    geometry: LLQR | Optimizer[Any],
    forward: Forwards,
    *,
    batches: Iterable[Any] | None = None,
    lrs: Sequence[Rate] | None = None,
    progress: Progress | None = None,
) -> InnerLRTable:
    r"""Refresh a copy of LLQR's U at several inner rates, and judge each U on other batches.

    .. math::
        \text{gain}(U) = \frac{\max_t -q(-t\,U g)}{\max_t -q(-t\,g)}
            = \frac{(g^\top U g)^2 / (U g)^\top C\, U g}{(g^\top g)^2 / g^\top C g}, \qquad
        q(u) = g^\top u + \tfrac12 u^\top (C + \lambda) u

    The first batch is the refresh minibatch; the others say whether what U learned there holds
    elsewhere. Each refresh starts from the present U and is not averaged with it (``ema=0``): a
    training with ``ema=0.95`` gets there in some twenty refreshes. The model is evaluated as in
    :meth:`llqr.Optimizer.refresh`.

    U, the counters of the geometry, weights, buffers, gradients and random state are as before.

    Args:
        geometry: a :class:`llqr.LLQR` that is bound to a model, or the optimizer that has it.
        forward: a function of a batch that returns (loss, outputs); without ``batches`` a list of
            functions without arguments. At least two batches.
        batches: read once, and kept.
        lrs: inner rates, numbers or "auto"; None: "auto" and 1e-4 to 10 by factors of ten.
        progress: called after each rate and each batch with (how many are done, of how many).

    Returns:
        :class:`llqr.finding.InnerLRTable`; print it.

    Raises:
        TypeError: the geometry is no LLQR.
        ValueError: a rate is not positive, or there are fewer than two batches.
        RuntimeError: the geometry is not bound to a model.

    Example:
        >>> import torch, llqr
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> def loss_of(rows):
        ...     z = model(x[rows])
        ...     return torch.nn.functional.cross_entropy(z, y[rows]), z
        >>> geometry = llqr.LLQR("kfac")
        >>> geometry.bind(model)
        >>> found = llqr.find_inner_lr(geometry, loss_of, batches=torch.arange(64).split(16))
        >>> len(found.rows), geometry.spectrum()  # U is the identity as before
        (7, {'': (1.0, 1.0)})
    """
    own, optimizer = _as_geometry(geometry)
    rates = _checked_rates(lrs)
    forwards = _as_forwards(forward, batches)
    effort = Effort(progress, len(rates) + len(forwards))
    trials = _Trials(own, rates, effort)
    runner = _refreshing_optimizer(own, optimizer, trials)
    # A refresh, so that modes, buffers, autocast and random state are a refresh's.
    runner.refresh(forwards)
    best, advice = advise(trials.rows)
    return InnerLRTable(
        rows=tuple(trials.rows),
        lr=best,
        structure=repr(own.structure),
        advice=advice,
        batches=len(forwards),
        examples=None,
        evaluations=trials.products,
        seconds=effort.seconds,
    )


# -- what is measured ------------------------------------------------------------------------------


class _Trials(Geometry):
    """Learn U at several rates from the first forward; judge each on all.

    Args:
        geometry: whose U, which stays as it is.
        rates: inner rates.
        effort: counts rates and batches.

    Attributes:
        rows: after :meth:`refresh`, one for each rate.
        products: how many were computed in all.
    """

    def __init__(self, geometry: LLQR, rates: Sequence[Rate], effort: Effort) -> None:
        self._geometry, self._rates, self._effort = geometry, rates, effort
        self.rows: list[InnerLRRow] = []
        self.products = 0

    @property
    def batch_norm(self) -> NormStatistics:
        return self._geometry.batch_norm

    def apply(self, gradients: Tensors) -> dict[str, Tensor]:
        """Return g: this optimizer makes no steps."""
        return dict(gradients)

    def refresh(
        self,
        forwards: Sequence[Callable[[], Any]],
        *,
        step: int = 0,
        weights: Sequence[float] | None = None,
    ) -> RefreshReport:
        """Fill in the rows."""
        with whole_parameters(self._geometry.model, self._geometry.parameters) as whole:
            parameters = list(whole.values())
            learned = [self._learn(lr, forwards[0], parameters) for lr in self._rates]
            states = [found for found, _ in learned]
            judged = torch.tensor(
                [self._judge(f, parameters, states) for f in forwards],
                dtype=torch.float64,
                device="cpu",
            )
        for i, (_, row) in enumerate(learned):
            (change, gain), others = judged[0, i].tolist(), judged[1:, i, 1]
            error = float(others.std() / math.sqrt(len(others))) if len(others) > 1 else None
            if row.reason is None:
                row = replace(
                    row,
                    change=change,
                    gain=gain,
                    held_out=float(others.mean()),
                    standard_error=error,
                )
            self.rows.append(row)
        return RefreshReport(step=step, accepted=True)

    def _learn(
        self, lr: Rate, forward: Forward, parameters: list[Tensor]
    ) -> tuple[States | None, InnerLRRow]:
        """Return what a refresh at a rate would store, and its numbers."""
        trial = copy.copy(self._geometry)
        trial.settings = replace(trial.settings, lr=lr, ema=0.0)
        trial.on_progress = None
        # learn() returns new states; only refresh() would store and count them.
        learned = trial.learn([forward], parameters, step=0, weights=None)
        self._effort.count()
        numbers = learned.numbers
        self.products += numbers.get("products") or 0
        row = InnerLRRow(
            lr=lr,
            reason=learned.reason,
            J_before=numbers.get("J_before", math.nan),
            J_after=numbers.get("J_after", math.nan),
            products=numbers.get("products"),
        )
        return learned.states, row

    def _judge(
        self, forward: Forward, parameters: list[Tensor], states: Sequence[States | None]
    ) -> list[tuple[float, float]]:
        """Return |Ug - g| / |g| and the gain of each U on a batch."""
        own, settings = self._geometry, self._geometry.settings
        with own.ranks.together("a held-out batch"):
            model = quadratic_model([forward], parameters, own.curvature, scale=settings.scale)
        with torch.no_grad():
            flat = FlatModel(model, own.layout, list(own.parameters), own.ranks)
            dot, g = own.layout.space.dot, flat.gradient

            def best_decrease(v: Tensor) -> float:
                # max over t of -q(-t v) = (g'v)^2 / (2 v'(C + damping) v)
                curved = float(dot(v, flat.product(v) + settings.damping * v))
                return float(dot(g, v)) ** 2 / (2 * curved) if curved > 0 else math.nan

            plain, length = best_decrease(g), float(dot(g, g).sqrt())
            found = []
            for entries in states:
                if entries is None:
                    found.append((math.nan, math.nan))
                    continue
                ug = own.blocks.apply(entries, g)
                change = float(dot(ug - g, ug - g).sqrt())
                gain = best_decrease(ug) / plain if plain > 0 else math.nan
                found.append((change / length if length > 0 else math.nan, gain))
        self.products += model.products
        self._effort.count()
        return found


def _refreshing_optimizer(
    geometry: LLQR, optimizer: Optimizer[Any] | None, trials: _Trials
) -> Optimizer[Any]:
    """Return an optimizer that refreshes ``trials`` as the given one would its geometry."""
    base = torch.optim.SGD(list(geometry.parameters.values()), lr=1.0)
    if optimizer is None:
        return Optimizer(base, geometry.model, geometry=trials)
    return Optimizer(
        base,
        optimizer.model,
        geometry=trials,
        modules=optimizer._step_modules.roots[1:],
        refresh_autocast=optimizer._refresher.autocast,
        process_group=optimizer.ranks.group,
    )


# -- what it says ----------------------------------------------------------------------------------


def advise(rows: Sequence[InnerLRRow]) -> tuple[Rate | None, str]:
    """Return the rate to try, and why."""
    kept = [r for r in rows if r.reason is None and math.isfinite(r.held_out)]
    if not kept:
        reasons = {r.reason for r in rows if r.reason}
        why = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        return None, (
            f"No rate gave a U that can be judged{why}: try smaller rates, a larger refresh batch "
            "or damping."
        )
    best = max(kept, key=lambda r: r.held_out)
    times = f"{best.held_out:.3g} times what the best step along -g does"
    if best.held_out <= 1 + (best.standard_error or 0.0):
        return None, (
            f"No rate helps on other batches: at best ({_rate_text(best.lr)}) the best step along "
            f"-Ug takes {times} off the loss. Try a larger refresh batch, more damping, or "
            "llqr.NaturalGradient."
        )
    auto = next((r for r in kept if r.lr == "auto"), None)
    if auto is not None and auto.held_out >= best.held_out - (best.standard_error or 0.0):
        best, times = auto, f"{auto.held_out:.3g} times what the best step along -g does"
    named = "lr='auto'" if best.lr == "auto" else f"lr = {best.lr:g}"
    text = f"Try {named}: on other batches the best step along -Ug takes {times} off the loss."
    if best.change < INACTIVE:
        text += " U hardly acts there: larger rates may help more."
    return best.lr, text


def _rate_text(lr: Rate) -> str:
    return "auto" if isinstance(lr, str) else f"{lr:g}"


# -- arguments -------------------------------------------------------------------------------------


def _as_geometry(geometry: Any) -> tuple[LLQR, Optimizer[Any] | None]:
    optimizer = geometry if isinstance(geometry, Optimizer) else None
    if optimizer is not None:
        optimizer._passes.refuse_if_displaced("find_inner_lr", "call it before the passes")
        optimizer._prepare_pass()
        geometry = optimizer.geometry
    if not isinstance(geometry, LLQR):
        raise TypeError(
            "geometry: expected a llqr.LLQR or an llqr.Optimizer that has one, got "
            f"{type(geometry).__name__}; no other geometry has an inner learning rate"
        )
    geometry._require_bound()
    return geometry, optimizer


def _checked_rates(lrs: Sequence[Rate] | None) -> list[Rate]:
    rates = list(USUAL if lrs is None else lrs)
    if not rates:
        raise ValueError("lrs: there is none; pass at least one, or None for the usual ones")
    for lr in rates:
        if lr != "auto":
            check_number("lrs", lr, low=0, open_low=True)
    return rates


def _as_forwards(forward: Any, batches: Iterable[Any] | None) -> list[Forward]:
    """Return a function without arguments for each batch."""
    if batches is not None:
        if not callable(forward):
            raise TypeError("forward: with batches it is one function of a batch, not a list")
        forwards: list[Forward] = [partial(forward, batch) for batch in batches]
    else:
        forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    if len(forwards) < 2:
        raise ValueError(
            f"batches: expected at least two, one to refresh on and others to judge, got "
            f"{len(forwards)}"
        )
    return forwards
