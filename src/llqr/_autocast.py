"""Autocast switched off for this thread only: around a call, and within a forward of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["AS_IT_IS", "autocast_off", "autocast_overruled", "without_autocast"]


#: Changes nothing; one for all, since a step enters several.
AS_IT_IS = nullcontext()


def without_autocast(*devices: torch.device) -> AbstractContextManager[Any]:
    """Switch the caller's autocast off for the body, on the devices where it is on."""
    on = {d.type for d in devices if torch.is_autocast_enabled(d.type)}
    if not on:
        return AS_IT_IS
    stack = ExitStack()
    for kind in on:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


@contextmanager
def autocast_off(device: torch.device, notice: Callable[[], None]) -> Iterator[None]:
    """Switch autocast off, around the call and wherever a forward switches it on by itself.

    Curvature products in bfloat16 are wrong in the third digit. A forward's own autocast is seen
    where the forward runs within :func:`autocast_overruled`. All of it holds for this thread only.

    Args:
        device: where the model is.
        notice: called when a forward's own autocast was overruled.
    """
    before = _overruling.set(_AutocastOverruled(device.type, notice))
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _overruling.reset(before)


def autocast_overruled() -> AbstractContextManager[Any]:
    """Return what a forward runs within: it follows the ``autocast_off`` around it, if any."""
    return _overruling.get()


class _AutocastOverruled(TorchFunctionMode):
    """Switch autocast off again at the first function called after it was switched on."""

    def __init__(self, device_type: str, notice: Callable[[], None]) -> None:
        super().__init__()
        self._device_type, self._notice = device_type, notice

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` without autocast."""
        if torch.is_autocast_enabled(self._device_type):
            # The end of the forward's autocast sets what was before it, whatever is set now.
            torch.set_autocast_enabled(self._device_type, False)
            self._notice()
        return func(*args, **(kwargs or {}))


_overruling: ContextVar[AbstractContextManager[Any]] = ContextVar("overruling", default=AS_IT_IS)
