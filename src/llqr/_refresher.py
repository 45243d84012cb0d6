"""When the geometry is refreshed, on which forwards, and what is told about it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ._module_state import autocast_off, autocast_overruled, evaluated_without_trace
from ._parameters import NamedParameters
from ._progress import Progress
from .distributed import Ranks
from .geometry import Geometry, RefreshReport

__all__ = ["Forward", "HookHandle", "RefreshHook", "Refresher", "as_forwards"]

#: A function without arguments that returns the loss or (loss, outputs).
Forward = Callable[[], Any]
RefreshHook = Callable[[Any, RefreshReport], None]


class HookHandle(RemovableHandle):
    """Remove a hook, by ``remove()`` or by a call; again does nothing."""

    __call__ = RemovableHandle.remove


class Refresher:
    """Refresh a geometry when it is due, without a trace in the model.

    Args:
        geometry: what is refreshed, or None.
        parameters: of the base optimizer.
        ranks: the processes that train together.
        progress: the counters of the training.
        default_forward: used if no forward is given.
        autocast: whether autocast stays as the forward has it.

    Attributes:
        hooks: called by the optimizer after a refresh.
    """

    def __init__(
        self,
        geometry: Geometry | None,
        parameters: NamedParameters,
        ranks: Ranks,
        progress: Progress,
        *,
        default_forward: Forward | None,
        autocast: bool,
    ) -> None:
        self._geometry, self._parameters = geometry, parameters
        self._ranks, self._progress = ranks, progress
        self.default_forward, self.autocast = default_forward, autocast
        self.last_report: RefreshReport | None = None
        self.hooks: OrderedDict[int, RefreshHook] = OrderedDict()

    @property
    def due(self) -> bool:
        """Whether the geometry wants a refresh before the next step."""
        return self._geometry is not None and self._geometry.due(self._progress.step)

    def refresh(
        self,
        forward: Forward | Sequence[Forward] | None,
        weights: Sequence[float] | None,
    ) -> RefreshReport:
        """Refresh the geometry now, due or not; return and keep the report."""
        if self._geometry is None:
            raise RuntimeError("refresh: this optimizer has no geometry (geometry=None)")
        forward = self.default_forward if forward is None else forward
        if forward is None:
            raise ValueError("refresh: no forward; pass one, or refresh_forward to llqr.Optimizer")
        forwards = as_forwards(forward)
        device = self._parameters.device
        precision = nullcontext() if self.autocast else autocast_off(device, self._warn_of_autocast)
        trace = evaluated_without_trace(self._parameters.model, device)
        with trace, precision, self._ranks.bypassed():
            report = self._geometry.refresh(forwards, step=self._progress.step, weights=weights)
        self.last_report = report
        return report

    def _warn_of_autocast(self) -> None:
        self._progress.warn_once(
            "the forward's autocast is switched off during a refresh, since curvature products in "
            "low precision are wrong in the third digit; refresh_autocast=True leaves it on"
        )

    def register_hook(self, hook: RefreshHook) -> HookHandle:
        """Keep a hook; return its handle."""
        handle = HookHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, hooks stay behind in copies.
        return {**self.__dict__, "hooks": OrderedDict()}


def as_forwards(forward: Forward | Sequence[Forward]) -> list[Forward]:
    """Return one forward or several as a list, model outputs unpacked; refuse what is not one."""
    forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    if not forwards or not all(callable(f) for f in forwards):
        raise TypeError(
            f"forward: expected a function without arguments or a list of them, got {forward!r}"
        )
    return [partial(call_and_unpack, f) for f in forwards]


def call_and_unpack(forward: Forward) -> Any:
    """Call a forward; a model output with ``loss`` and ``logits`` becomes that pair.

    Such are transformers' ModelOutput and dataclasses of one's own.
    """
    with autocast_overruled():
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
