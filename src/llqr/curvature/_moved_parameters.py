"""Parameters moved for one forward, and where they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["are_moved", "parameters_moved", "value_before_move"]

_before: ContextVar[dict[int, Tensor] | None] = ContextVar("before", default=None)


@contextmanager
def parameters_moved(parameters: Sequence[Tensor], d: Sequence[Tensor], e: float) -> Iterator[None]:
    """Move the parameters for one forward, unseen by the graph that is kept."""
    kept = [p.detach().clone() for p in parameters]
    token = _before.set({id(p): value for p, value in zip(parameters, kept, strict=True)})
    try:
        # Through .data, which counts no version: the graph is not used before they are back.
        for p, v in zip(parameters, d, strict=True):
            p.data.add_(v, alpha=e)
        yield
    finally:
        _before.reset(token)
        for p, value in zip(parameters, kept, strict=True):
            p.data.copy_(value)


def are_moved() -> bool:
    """Tell whether the forward runs at moved parameters."""
    return _before.get() is not None


def value_before_move(x: Tensor) -> Tensor:
    """Return the value of a parameter where derivatives are taken, detached."""
    return (_before.get() or {}).get(id(x), x.detach())
