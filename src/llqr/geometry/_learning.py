"""The part of LLQR that refreshes U: expand the loss, solve, keep the result or refuse it."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..curvature import Curvature, LinearLoss, QuadraticModel, quadratic_model
from ..distributed._sharded import whole_parameters
from ._base import Geometry
from ._blocks import BlockDiagonal, States
from ._layers import Layout
from ._refresh import FlatModel, relearn
from ._report import RefreshError, RefreshReport
from ._settings import at_step

__all__ = ["Learning"]

log = logging.getLogger("llqr")

NAN = float("nan")
SATURATED = (
    "the loss has no curvature in its outputs (the network is certain of every answer, or the "
    "loss has become linear in `outputs`)"
)


class Learning(Geometry):
    """Learn U from forwards, and count how that went (base class)."""

    settings: dict[str, Any]
    curvature: Curvature
    layout: Layout
    _blocks: BlockDiagonal
    _states: States
    _refreshes: int
    _refused: int
    _failures: int
    _last: int
    _warned: set[str]

    def _follow(self, device: torch.device) -> None:
        raise NotImplementedError

    def due(self, step: int) -> bool:
        """Tell whether ``every`` steps have passed since the last refresh (first at start)."""
        if step < self.settings["start"]:
            return False
        return self._last < 0 or step - self._last >= at_step(self.settings, "every", step)

    def refresh(
        self,
        forwards: Sequence[Callable[[], Any]],
        *,
        step: int = 0,
        weights: Sequence[float] | None = None,
    ) -> RefreshReport:
        """Minimise J on the forwards' minibatch from the current U; average; keep or refuse.

        Args:
            forwards: functions that return (loss, outputs), or the loss alone for "newton".
            step: the optimizer step, for schedules and the report.
            weights: how much each forward counts; equal by default.

        Returns:
            The report; a refused refresh leaves U as it was and warns once.

        Raises:
            RefreshError: more than ``max_failures`` refreshes in a row were refused.
        """
        self._require_bound()
        began = time.perf_counter()
        scale = self.settings["scale"]
        self.ranks.check_replicas(self.parameters)
        # Whole until the end: a product may run the forwards again.
        with whole_parameters(self.model, self.parameters) as own:
            with self.ranks.together("refresh"):
                model = self._expand(forwards, list(own.values()), weights)
            if not self.ranks.all(model is not None) or model is None:
                report = self._refusal(SATURATED, step, began)
                self._settle(report)
                return report
            if scale == "sum":  # over the joined batch
                model.scale = self.ranks.sum(model.scale)
            with torch.no_grad():
                self._follow(next(iter(own.values())).device)
                flat = FlatModel(model, self.layout, list(self.parameters), self.ranks)
                number = self._refreshes - self._refused
                outcome = relearn(flat, self._blocks, self._states, self.settings, step, number)
                if outcome.reason is None:
                    self._states = outcome.states
                report = outcome.report(flat, self._blocks, self._states, step, began)
        self._settle(report)
        return report

    def _expand(
        self,
        forwards: Sequence[Callable[[], Any]],
        parameters: list[Tensor],
        weights: Sequence[float] | None,
    ) -> QuadraticModel | None:
        """Return the quadratic model, or None where the loss has lost its curvature."""
        settings = self.settings
        try:
            return quadratic_model(
                forwards,
                parameters,
                self.curvature,
                scale=settings["scale"],
                weights=weights,
                micro_batch=settings["micro_batch"],
            )
        except LinearLoss:
            # A loss that had curvature before is not linear: where a network is certain of every
            # answer, the second derivative in the outputs underflows.
            if self._refreshes > self._refused:
                return None
            raise

    def _refusal(self, reason: str, step: int, began: float) -> RefreshReport:
        """Return the report of a refresh that could not begin."""
        spectrum = self._blocks.extremes(self._states, exact=False).values()
        return RefreshReport(
            step=step,
            accepted=False,
            reason=reason,
            J_before=NAN,
            J_after=NAN,
            gradient_norm=NAN,
            ratio=NAN,
            change=NAN,
            cosine=NAN,
            eigenvalue_min=min((low for low, _ in spectrum), default=1.0),
            eigenvalue_max=max((high for _, high in spectrum), default=1.0),
            products=0,
            seconds=time.perf_counter() - began,
        )

    def _settle(self, report: RefreshReport) -> None:
        """Count the refresh, and say what the user should know of it."""
        self._last = report.step
        self._refreshes += 1
        log.info("%s", report)
        if report.accepted:
            self._failures = 0
            if report.eigenvalue_min < 0:
                self._warn_once(
                    "U has a negative eigenvalue (constraint="
                    f"{self.settings['constraint']!r}): g'Ug can be negative, and then the probe "
                    "is skipped; constraint='positive' keeps U positive definite"
                )
            return
        self._refused += 1
        self._failures += report.reason != SATURATED  # no setting helps there
        if self._failures > self.settings["max_failures"]:
            lr = at_step(self.settings, "lr", report.step)
            raise RefreshError(
                f"{self._failures} refreshes in a row were refused, the last one because "
                f"{report.reason} ({report}). U is unchanged. A smaller inner lr (now {lr}), a "
                "larger refresh batch or more damping helps; max_failures sets how many are "
                "tolerated"
            )
        self._warn_once(
            f"a refresh was refused because {report.reason}; U is kept as it was (see "
            "optimizer.last_report; later refusals are only counted)"
        )

    def _warn_once(self, message: str) -> None:
        key = message[:32]
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=4)

    def counters(self) -> dict[str, int]:
        """Return how many refreshes ran, were refused (in all, in a row), and when the last was."""
        return {
            "refreshes": self._refreshes,
            "refused": self._refused,
            "failures": self._failures,
            "last": self._last,
        }

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Take over what :meth:`counters` returned."""
        self._refreshes, self._refused = counters["refreshes"], counters["refused"]
        self._failures, self._last = counters["failures"], counters["last"]
