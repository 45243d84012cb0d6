"""What every square root of H offers, and the random numbers that all of them draw from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IndefiniteHessian", "Probes", "SquareRoot", "random_signs", "widened"]


class IndefiniteHessian(ValueError):
    """A second derivative in the outputs that has no square root."""

    def __init__(self, eigenvalue: float) -> None:
        super().__init__(
            "loss: its second derivative in the outputs is not positive semidefinite (it has a "
            f"curvature of {eigenvalue:.2e} along a direction), so that C has no square root to "
            "draw samples from; hand over outputs in which the loss is convex (the logits, "
            "scaled as the softmax takes them), or use "
            "llqr.Divergence with a convex divergence of the outputs, or llqr.LLQR, which needs "
            "only products with C"
        )


@dataclass(frozen=True)
class Probes:
    """Random directions over one tensor of outputs, and what H makes of them.

    H acts on all tensors of outputs at once, so that a coupling between them shows as well.

    Attributes:
        v: (2, *z.shape), random.
        image: (2, *z.shape), the rows of H v for this tensor.
        ones: (*z.shape), the rows of H 1.
        eps: the relative rounding error of the images.
    """

    v: Tensor
    image: Tensor
    ones: Tensor
    eps: float

    @property
    def tolerance(self) -> float:
        """The relative error up to which two images count as equal."""
        return min(0.05, math.sqrt(self.eps))


class SquareRoot(ABC):
    """F with F F' = H, for the part of H that belongs to one tensor of outputs (base class)."""

    @classmethod
    @abstractmethod
    def recognise(cls, z: Tensor, probes: Probes) -> SquareRoot | None:
        """Return F if H is of this kind, as far as rounding tells; otherwise None.

        Args:
            z: one tensor of outputs, detached, in at least float32.
            probes: what H makes of random directions.

        Raises:
            IndefiniteHessian: H is of this kind, but has no square root.
        """

    @abstractmethod
    def product(self, e: Tensor) -> Tensor:
        """Return F e, for every e in a batch: (count, *z.shape) -> (count, *z.shape)."""


def random_signs(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return e with E e e' = I, of shape (count, *like.shape): -1 or 1 with equal chance.

    Of all white noise these have the smallest fourth moment, and so of all estimates of C by
    w w', w = J' F e, the one with the smallest variance. The CPU draws 32 of them at a time, so
    that the numbers are the same on every device.
    """
    entries = count * like.numel()
    words = torch.randint(
        -(1 << 31),
        1 << 31,
        (-(-entries // 32), 1),
        generator=generator,
        dtype=torch.int32,
        device="cpu",
    )
    bits = words.to(like.device) >> torch.arange(32, dtype=torch.int32, device=like.device) & 1
    signs = bits.view(-1)[:entries].to(like.dtype).mul_(2).sub_(1)
    return signs.view(count, *like.shape)


def widened(tensor: Tensor) -> Tensor:
    """Return a detached tensor in at least float32."""
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
