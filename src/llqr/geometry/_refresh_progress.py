"""How far a long refresh is."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["ProgressCallback", "RefreshProgress"]

#: (done, total, seconds): products computed, about how many there are at most, and since when.
ProgressCallback = Callable[[int, int, float], object]

#: Seconds of a refresh before anything is told, and from one telling to the next.
PATIENCE, PAUSE = 2.0, 0.25


class RefreshProgress:
    """Tell a callback how far a refresh is, once it has taken two seconds.

    Args:
        tell: gets (done, total, seconds), at most four times a second; None: nobody listens.
        total: how many products there are at most, as far as is known.
    """

    def __init__(self, tell: ProgressCallback | None, total: int) -> None:
        self._tell, self._total, self._done = tell, total, 0
        self._began = time.perf_counter()
        self._next = self._began + PATIENCE

    def advance(self) -> None:
        """Count one product."""
        self._done += 1
        if self._tell is None:
            return
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + PAUSE
            self._tell(self._done, max(self._total, self._done), now - self._began)
