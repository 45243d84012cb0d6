"""What a computation does, counted on the meta device by the operations that it calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from llqr.geometry.inner_solve import Allocations

__all__ = ["Work", "measure_work"]


@dataclass(frozen=True)
class Work:
    """What a computation does.

    Attributes:
        flops: floating-point operations of products.
        convolved: of convolutions.
        factored: of QR and Cholesky factorisations.
        moved: bytes that its operations read and write.
        calls: how many operations are called.
        peak: the most bytes that it holds at a time, beside what was there.
        held: bytes that it leaves.
    """

    flops: float = 0.0
    convolved: float = 0.0
    factored: float = 0.0
    moved: float = 0.0
    calls: float = 0.0
    peak: int = 0
    held: int = 0

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            self.flops + other.flops,
            self.convolved + other.convolved,
            self.factored + other.factored,
            self.moved + other.moved,
            self.calls + other.calls,
            max(self.peak, other.peak),
            self.held + other.held,
        )

    def __mul__(self, times: float) -> Work:
        """Again and again."""
        rates = ("flops", "convolved", "factored", "moved", "calls")
        return replace(self, **{name: getattr(self, name) * times for name in rates})

    @property
    def operations(self) -> float:
        """Return the floating-point operations of all kinds."""
        return self.flops + self.convolved + self.factored


class _Traffic(Allocations):
    """Count what operations read and write, too."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation; add up its tensors unless it only looks at one in another way."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls += 1
        if not func.is_view and func is not torch.ops.aten.detach.default:
            touched = tree_leaves((args, kwargs, result))
            self.moved += sum(
                t.numel() * t.element_size()
                for t in {id(t): t for t in touched if isinstance(t, Tensor)}.values()
            )
        return result


def measure_work(compute: Callable[[], object]) -> Work:
    """Run a computation on the meta device and return what it does."""
    with _Traffic() as traffic, FlopCounterMode(display=False) as counter:
        kept = compute()
        held = traffic.held
    del kept
    found = counter.get_flop_counts().get("Global", {})
    convolved = sum(n for f, n in found.items() if "convolution" in str(f))
    products = sum(found.values()) - convolved
    return Work(products, convolved, 0.0, traffic.moved, traffic.calls, traffic.peak, held)
