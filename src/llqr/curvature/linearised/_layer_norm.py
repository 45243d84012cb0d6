"""Layer norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._base import LinearisedOperation, Values

__all__ = ["LayerNorm"]


class LayerNorm(LinearisedOperation):
    """y = w o xhat + b, with xhat normalised over the last dimensions."""

    def __init__(
        self, x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, eps: float
    ) -> None:
        self.tensors = (x, w, b)
        self.x, self.shape = x.detach(), shape
        self.w = None if w is None else w.detach()
        self.b = None if b is None else b.detach()
        # torch's own kernel: the value is the network's bit for bit, and the statistics come along.
        self.value, self.mean, self.rstd = torch.native_layer_norm(
            self.x, shape, self.w, self.b, eps
        )

    @staticmethod
    def from_call(
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> LayerNorm | None:
        """Take the arguments of F.layer_norm; None for mixed dtypes."""
        if weight is not None and weight.dtype != input.dtype:
            return None
        return LayerNorm(input, list(normalized_shape), weight, bias, eps)

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return the gradients that torch's own backward computes."""
        grads = torch.ops.aten.native_layer_norm_backward(
            g, self.x, self.shape, self.mean, self.rstd, self.w, self.b, list(needed)
        )
        return tuple(v if n else None for v, n in zip(grads, needed, strict=True))

    def jvp(self, d: Values) -> Tensor | None:
        """Return w o rstd (dx - mean(dx) - xhat mean(xhat o dx)) + xhat o dw + db."""
        dx, dw, db = d
        over = list(range(self.x.dim() - len(self.shape), self.x.dim()))
        xhat = (self.x - self.mean) * self.rstd
        y: Tensor | None = None
        if dx is not None:
            # xhat stays normalised whatever x is: the parts of dx along 1 and xhat are taken out.
            y = dx - dx.mean(over, keepdim=True) - xhat * (xhat * dx).mean(over, keepdim=True)
            y = y.mul_(self.rstd)
            y = y if self.w is None else y.mul_(self.w)
        if dw is not None:
            y = xhat * dw if y is None else y.addcmul_(xhat, dw.expand_as(xhat))
        if db is not None:
            y = db.expand_as(xhat) if y is None else y.add_(db)
        return y
