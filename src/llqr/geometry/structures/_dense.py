"""A full matrix on the block's flat vector: U x."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..layout._blocks import CutRule
from ._base import Bounds, State, Structure
from ._eigenvalues import clip_eigenvalues, extremes_of_matrices

__all__ = ["Dense"]


class Dense(Structure):
    """A full matrix on the block's flat vector: U x."""

    name: ClassVar[str] = "dense"
    trainable: ClassVar[tuple[str, ...]] = ("U",)
    linear: ClassVar[bool] = True
    cut: ClassVar[CutRule] = "runs"

    def identity(self, device: torch.device) -> State:
        """Return identity matrices."""
        assert self.group.shape is not None
        return {"U": self.batch_of_identities(self.group.shape[0], device)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return U x."""
        return torch.bmm(state["U"], x[:, :, None])[:, :, 0]  # (n, n) @ (n, 1) per block

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return r x'."""
        return self.pull_rotated(x, r)

    def pull_rotated(self, x: Tensor, r: Tensor) -> State:
        """Return r x'."""
        # (n, 1) * (1, n) per block
        return {"U": r[:, :, None] * x[:, None, :]}

    def kernel_product(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write (r x') x = |x|^2 r."""
        torch.mul(r, x.square().sum(1, keepdim=True), out=out)

    def project(self, state: State, bounds: Bounds) -> State:
        """Symmetrise and clip the eigenvalues."""
        return {"U": clip_eigenvalues(state["U"], *bounds)}

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme eigenvalues of the symmetric part."""
        return extremes_of_matrices(state["U"], exact)
