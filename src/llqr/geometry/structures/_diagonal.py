"""One number per entry, U x = s o x; also for the 1-D parameters of Kronecker layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._devices import unflatten
from ..layout._blocks import CutRule
from ._base import Bounds, State, Structure

__all__ = ["Diagonal", "Vector"]


class Diagonal(Structure):
    """One number per entry: U x = s o x."""

    name: ClassVar[str] = "diagonal"
    trainable: ClassVar[tuple[str, ...]] = ("U",)
    linear: ClassVar[bool] = True
    cut: ClassVar[CutRule] = "layer"
    elementwise: ClassVar[bool] = True
    #: The latest U, and views of it in the shapes of the parameters; no part of a copy.
    _cut: tuple[Tensor, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_cut"}

    def identity(self, device: torch.device) -> State:
        """Return all ones."""
        return {"U": torch.ones(self.group.numel, dtype=self.group.dtype, device=device)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return s o x."""
        return state["U"] * x

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return r o x."""
        return {"U": r * x}

    def pull_rotated(self, x: Tensor, r: Tensor) -> State:
        """Return r o x."""
        return {"U": r * x}

    def kernel_product(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write x o x o r."""
        torch.mul(x, r, out=out).mul_(x)

    def scale_tensors(self, state: State, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """Multiply the tensors as they lie: nothing is gathered."""
        # The slices of an elementwise block are whole parameters, in the order of the group.
        given = [x for x in tensors if x is not None]
        if len(given) == len(tensors):
            return list(torch._foreach_mul(self._cut_like(state["U"], given), given))
        factors = torch.split(state["U"], [s.numel for s, _ in self.group.slice_offsets])
        pairs = zip(factors, tensors, strict=True)
        views = [u.view(x.shape) for u, x in pairs if x is not None]
        products = iter(torch._foreach_mul(views, given) if given else [])
        return [None if x is None else next(products) for x in tensors]

    def _cut_like(self, u: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        """Return views of U in the tensors' shapes: to make them takes as long as the product."""
        if self._cut is None or self._cut[0] is not u:
            self._cut = u, unflatten(u, tensors)
        return self._cut[1]

    def project(self, state: State, bounds: Bounds) -> State:
        """Clamp every entry."""
        return {"U": state["U"].clamp(*bounds)}

    def floor_entries(self, state: State) -> State:
        """Keep every entry above 1e-8."""
        return {"U": state["U"].clamp(min=1e-8)}

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the least and greatest entry of each block."""
        # The eigenvalues of a diagonal matrix are its entries.
        pairs = [part.aminmax() for part in self.split_by_block(state)]
        return torch.stack([p.min for p in pairs]), torch.stack([p.max for p in pairs])


class Vector(Diagonal):
    """The diagonal of a 1-D parameter in a Kronecker layer: a block of its own."""

    def floor_entries(self, state: State) -> State:
        """Return the state: the authors' code bounds no vector."""
        return state
