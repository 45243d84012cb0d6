"""The part of an optimizer that keeps its geometry up to date."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from ._module_state import autocast_off, undisturbed
from ._parameters import NamedParameters
from ._passes import Passes
from ._shared import SharedOptimizer
from .distributed import Ranks
from .geometry import Geometry, RefreshReport

__all__ = ["Forward", "RefreshHook", "Refreshing", "as_list"]

Forward = Callable[[], Any]
RefreshHook = Callable[[Any, RefreshReport], None]


class Refreshing(SharedOptimizer):
    """Refresh a geometry when it is due, without a trace in the model (base class)."""

    model: nn.Module
    geometry: Geometry | None
    refresh_forward: Forward | None
    refresh_autocast: bool
    ranks: Ranks
    _parameters: NamedParameters
    _passes: Passes
    _reports: list[RefreshReport]
    _refresh_hooks: list[RefreshHook]
    _step: int
    _warned: set[str]

    @property
    def refresh_due(self) -> bool:
        """Whether the geometry wants a refresh before the next step."""
        return self.geometry is not None and self.geometry.due(self._step)

    def refresh(
        self,
        forward: Forward | Sequence[Forward] | None = None,
        *,
        weights: Sequence[float] | None = None,
    ) -> RefreshReport:
        """Refresh the geometry now, due or not.

        The model is in evaluation mode meanwhile; buffers, random state and p.grad stay untouched.

        Args:
            forward: as in :meth:`minimize`; default ``refresh_forward``.
            weights: how much each forward counts.

        Returns:
            The report, also kept as ``last_report`` and handed to the refresh hooks.
        """
        if self.geometry is None:
            raise RuntimeError("refresh: this optimizer has no geometry (geometry=None)")
        forward = self.refresh_forward if forward is None else forward
        if forward is None:
            raise ValueError(
                "refresh: no forward; hand one over, or pass refresh_forward to llqr.Optimizer"
            )
        self._passes.close()
        forwards = as_list(forward)
        device = self._parameters.device
        precision = nullcontext() if self.refresh_autocast else autocast_off(device, self._notice)
        with undisturbed(self.model, device), precision, self.ranks.bypassed():
            report = self.geometry.refresh(forwards, step=self._step, weights=weights)
        self._reports[:] = [report]
        for hook in list(self._refresh_hooks):
            hook(self, report)
        return report

    def _notice(self) -> None:
        self._warn_once(
            "the forward's autocast is switched off during a refresh, since curvature products in "
            "low precision are wrong in the third digit; refresh_autocast=True leaves it on"
        )

    @property
    def last_report(self) -> RefreshReport | None:
        """The report of the last refresh, if there was one."""
        return self._reports[-1] if self._reports else None

    def refresh_if_due(
        self,
        forward: Forward | Sequence[Forward] | None = None,
        *,
        weights: Sequence[float] | None = None,
    ) -> RefreshReport | None:
        """Refresh the geometry if it is due; return the report or None."""
        return self.refresh(forward, weights=weights) if self.refresh_due else None

    def register_refresh_hook(self, hook: RefreshHook) -> Callable[[], None]:
        """Call ``hook(optimizer, report)`` after every refresh; return what removes it again."""
        self._refresh_hooks.append(hook)
        return lambda: self._refresh_hooks.remove(hook)

    def _warn_once(self, message: str) -> None:
        key = message[:40]
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=5)


def as_list(forward: Forward | Sequence[Forward]) -> list[Forward]:
    """Return one forward or several as a list; refuse what is not callable."""
    forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    if not forwards or not all(callable(f) for f in forwards):
        raise TypeError(
            f"forward: expected a function without arguments or a list of them, got {forward!r}"
        )
    return forwards
