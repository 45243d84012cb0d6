"""What metrics share whose U follows in closed form from second moments."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .._checks import check_number
from .._devices import widen
from ._metric_settings import MetricSettings
from ._structured import StructuredGeometry
from .structures import States, Structure
from .structures.closed_form import ClosedForm, closed_form_of
from .structures.closed_form._elementwise import DiagonalMoments
from .structures.closed_form._units import (
    choose,
    expand_mask,
    mask_of_parameters,
    masks_without_samples,
)

__all__ = ["ClosedFormGeometry", "ClosedFormSettings"]


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings(MetricSettings):
    """How U follows from second moments M: U = c (M + lambda)^-power.

    Attributes:
        damping: of lambda, relative to the mean of M.
        power: in (0, 2].
    """

    damping: float = 0.03
    power: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the argument and the value."""
        super().__post_init__()
        check_number("damping", self.damping, low=0, open_low=True)
        check_number("power", self.power, low=0, high=2, open_low=True)


class ClosedFormGeometry(StructuredGeometry):
    r"""Precondition with :math:`U = Q\, c\,(M + \lambda)^{-p}\, Q^\top` (base class).

    A subclass says where the second moments M come from.
    """

    settings: ClosedFormSettings
    vector_kind = DiagonalMoments

    def find_kind(self, name: str, parameter: Tensor) -> type[Structure]:
        """Return the closed form of a parameter's structure."""
        return self.closed_form(name, parameter)

    def closed_form(self, name: str, parameter: Tensor) -> type[ClosedForm]:
        """Return the closed form of a parameter's structure.

        Raises:
            ValueError: it has none.
        """
        return closed_form_of(super().find_kind(name, parameter))

    @property
    def parts(self) -> list[ClosedForm]:
        """The blocks of U, group by group."""
        return cast(list[ClosedForm], self.blocks.parts)

    # -- U from second moments -------------------------------------------------------------

    def _left_out(self, names: Collection[str]) -> list[Tensor | None]:
        """Return the mask of what belongs to these parameters only, part by part; None: nothing."""
        if not names:
            return [None] * len(self.parts)
        return [mask_of_parameters(part, names, self.ranks.device) for part in self.parts]

    def _without_samples(self, moments: Sequence[Tensor]) -> list[Tensor]:
        """Return the masks of blocks that nothing was seen of, part by part."""
        return masks_without_samples(self.layout, self.parts, moments)

    def _kept_back(self, moments: Sequence[Tensor], names: Collection[str]) -> list[Tensor | None]:
        """Return the masks of what keeps its U, these parameters and blocks without samples.

        None: nothing of a part.

        A head that the loss does not use would have the largest U, and set lambda and c.
        """
        pairs = zip(self._without_samples(moments), self._left_out(names), strict=True)
        masks = [fresh if out is None else fresh | out for fresh, out in pairs]
        if not masks:
            return []
        held = torch.stack([mask.any() for mask in masks]).tolist()  # one read from the device
        return [mask if some else None for mask, some in zip(masks, held, strict=True)]

    def _moments_of(self, states: States) -> list[Tensor]:
        """Return M, part by part."""
        pairs = zip(self.parts, states, strict=True)
        return [part.second_moment(state).to(self.ranks.device) for part, state in pairs]

    def _renew_u(self, states: States, names: Collection[str]) -> States:
        """Return the states with the U of their M, but for what belongs to these parameters."""
        moments = self._moments_of(states)
        return self._invert_moments(states, moments, self._kept_back(moments, names))

    def _invert_moments(
        self, states: States, moments: Sequence[Tensor], left_out: Sequence[Tensor | None]
    ) -> States:
        """Return the states with U = c (M + lambda)^-power, but for what is left out."""
        settings = self.settings
        count = self._total_trace([torch.ones_like(m) for m in moments], left_out)
        lam = settings.damping * self._total_trace(moments, left_out) / count
        values = [(m + lam.to(m.dtype)).pow_(-settings.power) for m in moments]
        c = count / self._total_trace(values, left_out)  # the mean of U is 1
        result = []
        for part, state, v, out in zip(self.parts, states, values, left_out, strict=True):
            new = part.set_eigenvalues(state, v.mul_(c.to(v.dtype)))
            result.append(new if out is None else choose(out, state, new))
        return result

    def _total_trace(self, values: Sequence[Tensor], left_out: Sequence[Tensor | None]) -> Tensor:
        """Return the trace over all blocks of all processes, a scalar on the device."""
        total = widen(torch.zeros((), device=self.ranks.device))
        for part, v, out in zip(self.parts, values, left_out, strict=True):
            total += widen(part.trace(v if out is None else v * ~expand_mask(out, v)))
        return self.layout.space.sum_over_shards(total)
