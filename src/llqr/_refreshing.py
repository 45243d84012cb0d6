"""The part of an optimizer that keeps its geometry up to date."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ._module_state import autocast_off, undisturbed
from ._parameters import NamedParameters
from ._passes import Passes
from ._shared import SharedOptimizer
from .distributed import Ranks
from .geometry import Geometry, RefreshReport

__all__ = ["Forward", "RefreshHook", "Refreshing", "as_list"]

Forward = Callable[[], Any]
RefreshHook = Callable[[Any, RefreshReport], None]


class HookHandle(RemovableHandle):
    """Take a hook away, by ``remove()`` or by a call; again does nothing."""

    __call__ = RemovableHandle.remove


class Refreshing(SharedOptimizer):
    """Refresh a geometry when it is due, without a trace in the model (base class)."""

    model: nn.Module
    geometry: Geometry | None
    refresh_forward: Forward | None
    refresh_autocast: bool
    ranks: Ranks
    _passes: Passes
    _reports: list[RefreshReport]
    _refresh_hooks: OrderedDict[int, RefreshHook]
    _step: int
    _warned: set[str]

    @property
    def _parameters(self) -> NamedParameters:
        raise NotImplementedError

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

        Raises:
            RuntimeError: there is no geometry, or a perturbed pass is open.
        """
        if self.geometry is None:
            raise RuntimeError("refresh: this optimizer has no geometry (geometry=None)")
        forward = self.refresh_forward if forward is None else forward
        if forward is None:
            raise ValueError(
                "refresh: no forward; hand one over, or pass refresh_forward to llqr.Optimizer"
            )
        self._passes.refuse("refresh", "refresh before the passes of a step, or after them")
        forwards = as_list(forward)
        device = self._parameters.device
        precision = nullcontext() if self.refresh_autocast else autocast_off(device, self._notice)
        with undisturbed(self.model, device), precision, self.ranks.bypassed():
            report = self.geometry.refresh(forwards, step=self._step, weights=weights)
        self._reports[:] = [report]
        for hook in list(self._refresh_hooks.values()):
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

    def register_refresh_hook(self, hook: RefreshHook) -> HookHandle:
        """Call ``hook(optimizer, report)`` after every refresh.

        Returns:
            A handle as of torch's own hooks, whose ``remove()`` takes the hook away again; a call
            of the handle does the same.
        """
        handle = HookHandle(self._refresh_hooks)
        self._refresh_hooks[handle.id] = hook
        return handle

    def _warn_once(self, message: str) -> None:
        key = message[:40]
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=5)


def as_list(forward: Forward | Sequence[Forward]) -> list[Forward]:
    """Return one forward or several as a list, model outputs unpacked; refuse what is not one."""
    forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    if not forwards or not all(callable(f) for f in forwards):
        raise TypeError(
            f"forward: expected a function without arguments or a list of them, got {forward!r}"
        )
    return [partial(unpacked, f) for f in forwards]


def unpacked(forward: Forward) -> Any:
    """Call a forward; a model output with ``loss`` and ``logits`` becomes that pair.

    Such are transformers' ModelOutput and dataclasses of one's own.
    """
    result = forward()
    if hasattr(result, "loss") and hasattr(result, "logits"):
        return result.loss, result.logits
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        return result
    loss, outputs = result
    if outputs is None or any(isinstance(z, Tensor) for z in pytree.tree_leaves(outputs)):
        return result
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return loss, outputs.logits
    raise ValueError(
        f"forward: no tensor found in `outputs` of type {type(outputs).__name__}; return (loss, "
        "outputs) with a tensor, or a list, tuple or dict of tensors, or an object whose `logits` "
        "is one"
    )
