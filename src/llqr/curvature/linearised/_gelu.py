"""The GELU activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import LinearisedOperation, Values

__all__ = ["Gelu"]


class Gelu(LinearisedOperation):
    """y = gelu(x), entry by entry: both maps multiply by the derivative."""

    def __init__(self, x: Tensor, approximate: str) -> None:
        self.tensors = (x,)
        self.x, self.approximate = x.detach(), approximate
        self.value = F.gelu(self.x, approximate=approximate)

    @staticmethod
    def from_call(input: Tensor, approximate: str = "none") -> Gelu:
        """Take the arguments of F.gelu."""
        return Gelu(input, approximate)

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return gelu'(x) g."""
        return (torch.ops.aten.gelu_backward(g, self.x, approximate=self.approximate),)

    def jvp(self, d: Values) -> Tensor | None:
        """Return gelu'(x) dx."""
        # J is diagonal, hence symmetric: J d = J'd.
        return None if d[0] is None else self.vjp(d[0], (True,))[0]
