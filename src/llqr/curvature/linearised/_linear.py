"""The linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._base import LinearisedOperation, Values, are_plain

__all__ = ["Linear"]


class Linear(LinearisedOperation):
    """y = x W' + b: bilinear in (x, W)."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None) -> None:
        self.tensors = (x, w, b)
        self.x, self.w = x.detach(), w.detach()
        self.value = F.linear(self.x, self.w, None if b is None else b.detach())

    @staticmethod
    def from_call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Linear | None:
        """Take the arguments of F.linear; None for forms not covered."""
        covered = input.dim() >= 2 and weight.dim() == 2 and are_plain(input, weight, bias)
        return Linear(input, weight, bias) if covered else None

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return G W, G'X and the sum of G over all but the last dimension."""
        rows = g.reshape(-1, g.shape[-1])  # (batch, out)
        return (
            g @ self.w if needed[0] else None,
            # (out, batch) @ (batch, in)
            rows.mT @ self.x.reshape(-1, self.x.shape[-1]) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )

    def jvp(self, d: Values) -> Tensor | None:
        """Return x dW' + dx W' + db."""
        dx, dw, db = d
        if dw is None:  # only the input or the bias moves
            if dx is not None:
                return F.linear(dx, self.w, db)
            return None if db is None else db.expand_as(self.value)
        y = F.linear(self.x, dw, db)
        if dx is not None:  # in place: a sum of two results would take one more buffer
            y.view(-1, y.shape[-1]).addmm_(dx.reshape(-1, dx.shape[-1]), self.w.mT)
        return y
