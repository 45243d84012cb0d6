"""Save and restore what a second pass or a refresh changes: buffers, modes and random state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "Buffers",
    "RandomState",
    "autocast_off",
    "autocast_overruled",
    "evaluated_without_trace",
    "without_autocast",
]


class Buffers:
    """The values of all buffers of some modules at one moment."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._entries: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the values back, into the very tensors that held them."""
        for module, name, buffer, value in self._entries:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            if buffer is None or value is None:
                continue
            if buffer.shape != value.shape:
                buffer.resize_(value.shape)
            # Along expanded dimensions all entries are one, which torch does not write to twice.
            once = tuple(slice(1) if step == 0 else slice(None) for step in buffer.stride())
            buffer[once].copy_(value[once])


class RandomState:
    """The random number generators of the CPU and of one accelerator at one moment."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cpu = torch.get_rng_state()
        on_device = device is not None and device.type not in ("cpu", "meta")
        self._device = device if on_device else None
        if self._device is not None:
            self._state = torch.get_device_module(self._device).get_rng_state(self._device)

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        if self._device is not None:
            torch.get_device_module(self._device).set_rng_state(self._state, self._device)


@contextmanager
def evaluated_without_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate a module without a trace: evaluation mode, buffers and random state put back."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    buffers, random = Buffers(modules), RandomState(device)
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        buffers.restore()
        random.restore()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch the caller's autocast off for the body, where it is on."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


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
    return _overruling.get() or nullcontext()


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


_overruling: ContextVar[_AutocastOverruled | None] = ContextVar("overruling", default=None)
