"""The identity: U x = x, on parameters that keep the Euclidean metric."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..layout._blocks import CutRule
from ._base import Bounds, State, Structure

__all__ = ["Identity"]


class Identity(Structure):
    """U x = x: nothing is stored and nothing is learned."""

    name: ClassVar[str] = "identity"
    trainable: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = True
    cut: ClassVar[CutRule] = "layer"
    elementwise: ClassVar[bool] = True

    def identity(self, device: torch.device) -> State:
        """Return the empty state."""
        return {}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def kernel_product(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write zero: U x does not change."""
        out.zero_()

    def scale_tensors(self, state: State, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """Return copies."""
        return [None if x is None else x.clone() for x in tensors]

    def project(self, state: State, bounds: Bounds) -> State:
        """Return the state: 1 lies within the bounds."""
        return state

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return ones."""
        ones = torch.ones(self.count, device="cpu")
        return ones, ones

    @classmethod
    def variant(cls, *, bases: str, constraint: str) -> type[Structure]:
        """Return the identity, under any settings."""
        return cls
