"""SAM in plain torch, from the formula: what the loops under test are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sam_step(
    base: torch.optim.Optimizer,
    backward: Callable[[], Any],
    rho: float,
    before_step: Callable[[], Any] | None = None,
) -> Any:
    """Do one step: g at w, g~ at w + rho g / |g|, w back, base.step() with g~.

    A parameter group's own ``rho`` goes before ``rho``. Returns what the first backward returned.
    """
    held = [
        (p, group.get("rho", rho))
        for group in base.param_groups
        for p in group["params"]
        if p.requires_grad
    ]
    base.zero_grad()
    result = backward()
    with torch.no_grad():
        norm = length([p.grad for p, r in held if r > 0])
        clean = [p.clone() for p, _ in held]
        for p, r in held:
            p.add_(p.grad, alpha=float(r / norm))  # one rounding, as the library has it
    base.zero_grad()
    backward()
    with torch.no_grad():
        for (p, _), value in zip(held, clean, strict=True):
            p.copy_(value)
    if before_step is not None:
        before_step()
    base.step()
    return result


def length(gradients: list[Tensor]) -> Tensor:
    """Return |g|, summed as the library sums it, so that runs can be compared bit for bit."""
    flat = torch.cat([g.flatten() for g in gradients]).double()
    return (torch.dot(flat, flat) + 1e-12).sqrt()
