"""What the structures of Kronecker form share: they act on the matrix view of each parameter."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layout._blocks import CutRule
from ._base import Structure
from ._diagonal import Vector

__all__ = ["MatrixStructure", "extreme_products"]


class MatrixStructure(Structure):
    """A structure that acts on matrices X of (rows, columns); 1-D parameters are elementwise."""

    cut: ClassVar[CutRule] = "rectangles"
    vector_kind: ClassVar[Any] = Vector


def extreme_products(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the extreme products of two intervals of eigenvalues: those of A (x) B."""
    products = torch.stack([x * y for x in a for y in b])
    return products.amin(0), products.amax(0)
