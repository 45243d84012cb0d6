"""One forward's term of the quadratic model: its loss, gradient and curvature products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .._autocast import autocast_overruled
from .._warnings import warn_caller
from ._curvatures import Curvature
from ._forwards import Forward, RepeatableForward
from ._graphs import release_failed_backward
from ._missing_derivative import MissingDerivative, missing_derivative_in
from ._twice_differentiable import twice_differentiable
from .expansions import Expansion, ways_of_expanding

__all__ = ["Term"]

Result = TypeVar("Result")


class Term:
    """One forward, expanded by the first way of differentiating for which no derivative is missing.

    Args:
        forward: the function to expand.
        parameters: all parameters; those that do not require grad get zeros.
        curvature: which matrix C is.
        count_rows: whether to count ``rows``.
        keep: whether the graph is kept between products; if not, each product makes it again.

    Attributes:
        loss: the loss, detached.
        gradient: its gradient, zeros for a parameter that took no part.
        rows: output rows whose loss gradient is not zero (counted if asked for).
    """

    def __init__(
        self,
        forward: Forward,
        parameters: list[Tensor],
        curvature: Curvature,
        count_rows: bool,
        keep: bool = True,
    ) -> None:
        self._parameters, self._curvature, self._keep = parameters, curvature, keep
        self._active_indices = [i for i, p in enumerate(parameters) if p.requires_grad]
        self._forward = RepeatableForward(forward, parameters)
        self._count_rows = count_rows
        self._ways, self._suspect = ways_of_expanding(curvature), False
        self._expansion: Expansion | None = None
        self._operation_to_report: str | None = None
        self.loss, gradient, self.rows = self._use_expansion(
            lambda expansion: (expansion.loss, expansion.take_gradient(), expansion.rows)
        )
        self.gradient = self._spread_over_all(gradient)
        self._count_rows = False  # an expansion that is made again has the same

    def product(self, d: Sequence[Tensor]) -> list[Tensor]:
        """Return C d, unscaled."""
        active = self._active_part(d)
        result = self._use_expansion(lambda expansion: expansion.product(active))
        if self._operation_to_report:
            operation, way = self._operation_to_report, self._ways[0]
            warn_caller(
                f"the forward uses {operation}, which has no double backward: curvature "
                f"products use {way.name} instead, which is {way.cost}"
            )
            self._operation_to_report = None  # once is enough
        return self._spread_over_all(result)

    def _use_expansion(self, use: Callable[[Expansion], Result]) -> Result:
        """Return ``use(expansion)``, by the first way for which no derivative is missing."""
        # Also around products: activation checkpointing runs parts of the forward again there, and
        # must meet the same kernels.
        with autocast_overruled(), twice_differentiable():
            try:
                while True:
                    try:
                        return use(self._current_expansion())
                    # Whatever it is, the engine's hold on the graph must go with the error.
                    except BaseException as error:
                        release_failed_backward()
                        operation = missing_derivative_in(error)
                        if operation is None or len(self._ways) == 1:
                            raise
                        self._suspect = self._suspect or isinstance(error, MissingDerivative)
                    # Outside of the except clause, whose error holds frames that hold the graph:
                    # there are never two graphs at a time.
                    self._expansion, self._ways = None, self._ways[1:]
                    self._operation_to_report = self._operation_to_report or operation
            finally:
                if not self._keep:
                    self._expansion = None

    def _current_expansion(self) -> Expansion:
        """Return the expansion by the present way; make it if there is none."""
        if self._expansion is None:
            parameters = [self._parameters[i] for i in self._active_indices]
            way = self._ways[0]
            self._expansion = way(
                self._forward, parameters, self._curvature, self._count_rows, self._suspect
            )
        return self._expansion

    def _active_part(self, d: Sequence[Tensor]) -> list[Tensor]:
        if len(d) != len(self._parameters):
            raise ValueError(
                f"d: expected {len(self._parameters)} tensors, one per parameter, got {len(d)}"
            )
        return [_as_gradient_of(self._parameters[i], d[i]) for i in self._active_indices]

    def _spread_over_all(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Spread values of the active parameters over all, zeros elsewhere."""
        known = dict(zip(self._active_indices, values, strict=True))
        spread = []
        for i, parameter in enumerate(self._parameters):
            value = known.get(i)
            spread.append(torch.zeros_like(parameter).detach() if value is None else value)
        return spread


def _as_gradient_of(parameter: Tensor, v: Tensor) -> Tensor:
    """Return a direction in the form that backward passes meet gradients in."""
    # A solver may work in float64 for float32 parameters; autograd wants the parameter's dtype.
    v = v.to(parameter.dtype)
    # A slice of a flat vector begins anywhere: at an odd place, its pairs are no complex numbers.
    aligned = v.storage_offset() % 2 == 0 and (v.is_contiguous() or not parameter.is_contiguous())
    return v if aligned else v.clone(memory_format=torch.contiguous_format)
