"""What a second pass and a refresh must not do again: count in metrics, and log."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["metrics_put_back", "refuse_late_mixin", "replace_attribute", "silenced"]

# What nn.Module keeps in dicts of its own: parts of it, not the state of a metric.
PARTS = ("_parameters", "_modules")


def refuse_late_mixin(cls: type, mixin: type, packages: tuple[str, ...]) -> None:
    """Refuse a class in which the framework's methods hide those of the mixin.

    Args:
        cls: a subclass of the mixin.
        mixin: has to stand before every class of the framework.
        packages: of the framework, by their top names.
    """
    for before in cls.__mro__[: cls.__mro__.index(mixin)]:
        if before.__module__.partition(".")[0] in packages:
            raise TypeError(
                f"{cls.__name__}: {mixin.__name__} stands behind {before.__name__}, whose methods "
                f"hide it; write class {cls.__name__}({mixin.__name__}, ...)"
            )


def replace_attribute(instance: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of an instance; return the function that takes it away again."""
    own = vars(instance)
    missing = name not in own
    before = own.get(name)
    own[name] = value

    def undo() -> None:
        if missing:
            own.pop(name, None)
        else:
            own[name] = before

    return undo


@contextmanager
def silenced(instance: Any, name: str) -> Iterator[None]:
    """Let a method of an instance do nothing within the body."""
    undo = replace_attribute(instance, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        undo()


@contextmanager
def metrics_put_back(module: nn.Module) -> Iterator[None]:
    """Put the metrics of a module back after the body, so that it counts nothing in them.

    A metric is a submodule or an attribute with methods ``update``, ``compute`` and ``reset``, as
    torchmetrics, torcheval and Ignite have them; no package is imported for that.
    """
    states = [_MetricState(metric) for metric in _metrics_of(module)]
    try:
        yield
    finally:
        for state in states:
            state.restore()


def _metrics_of(module: nn.Module) -> list[Any]:
    found = [m for m in module.modules() if m is not module and _is_metric(m)]
    return found + [v for v in vars(module).values() if _is_metric(v) and hasattr(v, "__dict__")]


def _is_metric(value: Any) -> bool:
    kind = type(value)  # an instance of nn.Module would search its parts for the name
    return hasattr(kind, "update") and hasattr(kind, "compute") and hasattr(kind, "reset")


class _MetricState:
    """The attributes of a metric at one moment: tensors, lists and dicts by their contents."""

    def __init__(self, metric: Any) -> None:
        self._attributes = vars(metric)
        self._kept = {
            name: (value, _copy_of(value))
            for name, value in self._attributes.items()
            if name not in PARTS
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Write everything back, into the very objects: metrics of a collection share them."""
        for name in [n for n in self._attributes if n not in self._kept and n not in PARTS]:
            del self._attributes[name]
        for name, (value, copy) in self._kept.items():
            _write_back(value, copy)
            self._attributes[name] = value


def _copy_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value._version, value.detach().clone()
    if isinstance(value, dict):
        return {k: (v, _copy_of(v)) for k, v in value.items()}
    # A list's tensors are not copied: one entry a batch is appended, and never written to.
    return value.copy() if isinstance(value, (list, deque, set)) else None


def _write_back(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        version, before = copy
        if value._version != version:
            value.resize_(before.shape).copy_(before)
    elif isinstance(value, dict):
        value.clear()
        for key, (entry, entry_copy) in copy.items():
            _write_back(entry, entry_copy)
            value[key] = entry
    elif isinstance(value, list):
        value[:] = copy
    elif isinstance(value, (deque, set)):
        value.clear()
        (value.extend if isinstance(value, deque) else value.update)(copy)
