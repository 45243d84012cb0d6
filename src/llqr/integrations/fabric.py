"""Lightning Fabric: the passes of a step, with the scaler of Fabric's precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._micro_batches import find_optimizer

__all__ = ["passes"]


def passes(fabric: Any, optimizer: Any) -> Iterator[int]:
    """Yield once, or twice when a perturbation is active, as :meth:`llqr.Optimizer.passes` does.

    The body runs forward and ``fabric.backward``, for all micro-batches of the step; after the
    loop come ``fabric.clip_gradients`` and ``optimizer.step()``. A refresh comes before it:
    ``optimizer.refresh_if_due(forward)``.

    Args:
        fabric: the lightning.fabric.Fabric.
        optimizer: a llqr.Optimizer that ``fabric.setup`` returned.
    """
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return find_optimizer(optimizer).passes(scaler)
