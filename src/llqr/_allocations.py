"""How much memory a computation takes, counted on the tensors that it makes.

On the meta device nothing is computed and nothing is allocated, so that the memory of a network of
any size is counted in milliseconds, by running the very code that will use it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Allocations", "bytes_of", "peak_bytes_of"]


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Count the memory of the tensors made in the body, while they live.

    Attributes:
        held: bytes that live now.
        peak: the most that lived at a time.

    Example:
        >>> import torch
        >>> with Allocations() as made:
        ...     x = torch.ones(1000, device="meta")
        ...     y = x + x
        ...     del x
        >>> made.held, made.peak
        (4000, 8000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._living: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation; count the memory that is new in what it returns."""
        known = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._count(t, known)
        self.peak = max(self.peak, self.held)
        return result

    def _count(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in known or key in self._living:  # a view, or written in place
            return
        self._living[key] = storage.nbytes()
        self.held += storage.nbytes()
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.held -= self._living.pop(key, 0)


def peak_bytes_of(compute: Callable[[], object]) -> int:
    """Return the most bytes that a computation holds at a time, beside what was there before."""
    made = Allocations()
    with made, torch.no_grad():
        compute()
    return made.peak


def bytes_of(tensors: Any) -> int:
    """Return the bytes of all tensors in nested lists and dicts."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))
