"""Eager code in place of compiled code, in this thread only."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["eager_where"]

_lock = threading.Lock()
_users = 0


@contextmanager
def eager_where(mode: type[Any]) -> Iterator[None]:
    """Run compiled functions eagerly in the threads in which a function mode is on.

    A compiled graph has no double backward. torch's stance of the compiler is one for all threads;
    so the one set here answers each thread by that thread's modes, and all others as before.

    Args:
        mode: the class of the mode.
    """
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:  # loading it takes seconds; without it nothing is compiled
        yield
        return
    _begin(compiler, mode)
    try:
        yield
    finally:
        _end(compiler)


class _StancePerThread:
    """As the stance before, but "force_eager" where a mode is on."""

    def __init__(self, before: Any, mode: type[Any]) -> None:
        self.before, self._mode = before, mode

    @property
    def stance(self) -> str:
        """What ``torch.compiler.set_stance`` sets."""
        # The modes of a thread go along with its backward pass to the threads of a device.
        modes: list[Any] = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if any(isinstance(m, self._mode) for m in modes):
            return "force_eager"
        return str(self.before.stance)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)


def _begin(compiler: Any, mode: type[Any]) -> None:
    global _users
    with _lock:
        if not isinstance(compiler._stance, _StancePerThread):
            compiler._stance = _StancePerThread(compiler._stance, mode)
        _users += 1


def _end(compiler: Any) -> None:
    global _users
    with _lock:
        _users -= 1
        # If another one was set on top of it, that one puts it back later; it does no harm there.
        if not _users and isinstance(compiler._stance, _StancePerThread):
            compiler._stance = compiler._stance.before
