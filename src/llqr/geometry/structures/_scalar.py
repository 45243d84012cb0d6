"""One number per layer: U x = s x."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..layout._blocks import CutRule
from ._base import Bounds, State, Structure

__all__ = ["Scalar"]


class Scalar(Structure):
    """One number per layer: U x = s x."""

    name: ClassVar[str] = "scalar"
    trainable: ClassVar[tuple[str, ...]] = ("U",)
    linear: ClassVar[bool] = True
    cut: ClassVar[CutRule] = "layer"

    def identity(self, device: torch.device) -> State:
        """Return all ones."""
        return {"U": self.batch_of_ones(device=device)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return s x, block by block."""
        counts = [count for count, _ in self.group.equal_runs]
        factors = torch.split(state["U"], counts)
        # (blocks, 1) * (blocks, length), blocks of one length together
        parts = zip(self.group.split_equal_runs(x), factors, strict=True)
        return torch.cat([(f[:, None] * part).view(-1) for part, f in parts])

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return <r, x>, block by block."""
        return self.pull_rotated(x, r)

    def pull_rotated(self, x: Tensor, r: Tensor) -> State:
        """Return <r, x>, block by block."""
        return {"U": torch.cat([part.sum(1) for part in self.group.split_equal_runs(r * x)])}

    def kernel_product(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write x <r, x>, block by block."""
        torch.mul(x, r, out=out)
        pairs = zip(self.group.split_equal_runs(out), self.group.split_equal_runs(x), strict=True)
        for part, xs in pairs:
            torch.mul(xs, part.sum(1, keepdim=True), out=part)

    def project(self, state: State, bounds: Bounds) -> State:
        """Clamp every number."""
        return {"U": state["U"].clamp(*bounds)}

    def floor_entries(self, state: State) -> State:
        """Keep every number above 1e-8."""
        return {"U": state["U"].clamp(min=1e-8)}

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the number itself, twice."""
        return state["U"], state["U"]
