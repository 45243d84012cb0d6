"""Save and restore what a second pass or a refresh changes: buffers, modes and random state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Buffers",
    "RandomState",
    "autocast_off",
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

    Curvature products in bfloat16 are wrong in the third digit.

    Args:
        device: where the model is.
        notice: called when a forward's own autocast was overruled.
    """
    enter: Callable[..., Any] = torch.amp.autocast_mode.autocast.__enter__

    def disabled(self: torch.amp.autocast_mode.autocast) -> Any:
        asked, self._enabled = self._enabled, False
        if asked:
            notice()
        try:
            return enter(self)
        finally:
            self._enabled = asked

    torch.amp.autocast_mode.autocast.__enter__ = disabled  # type: ignore[method-assign]
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.amp.autocast_mode.autocast.__enter__ = enter  # type: ignore[method-assign]
