"""Batch norm in evaluation mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import LinearisedOperation, Values, per_channel

__all__ = ["EvalBatchNorm"]


class EvalBatchNorm(LinearisedOperation):
    """y = w o (x - mean) / sqrt(var + eps) + b with running statistics: affine in x."""

    def __init__(
        self, x: Tensor, mean: Tensor, var: Tensor, w: Tensor | None, b: Tensor | None, eps: float
    ) -> None:
        self.tensors = (x, w, b)
        scale = torch.rsqrt(var.detach() + eps)
        self.gain = per_channel(scale if w is None else scale * w.detach(), x)
        self.shift, self.scale = per_channel(mean.detach(), x), per_channel(scale, x)
        self.x = x.detach()
        # torch's own kernel, so that the value is the network's bit for bit.
        self.value = F.batch_norm(
            self.x,
            mean.detach(),
            var.detach(),
            None if w is None else w.detach(),
            None if b is None else b.detach(),
            training=False,
            eps=eps,
        )

    @staticmethod
    def from_call(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> EvalBatchNorm | None:
        """Take the arguments of F.batch_norm; None in training mode and for mixed dtypes."""
        if training or running_mean is None or running_var is None:
            return None
        if input.dtype != running_mean.dtype:
            return None
        return EvalBatchNorm(input, running_mean, running_var, weight, bias, eps)

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return g o gain, and the sums over all but the channels."""
        over = [i for i in range(g.dim()) if i != 1]
        # With running statistics each channel is scaled and shifted: the mean and the variance do
        # not move with x, as they would in training mode.
        dx = g * self.gain if needed[0] else None
        dw = None
        if needed[1]:
            dw = (g * (self.x - self.shift)).sum(over) * self.scale.reshape(-1)
        db = g.sum(over) if needed[2] else None
        return dx, dw, db

    def jvp(self, d: Values) -> Tensor | None:
        """Return dx o gain + xhat o dw + db."""
        dx, dw, db = d
        y = None if dx is None else dx * self.gain
        if dw is not None:
            # xhat o dw = x o slope + offset: per channel, so that xhat itself is never formed.
            slope = per_channel(dw, self.x) * self.scale
            offset = -self.shift * slope
            if db is not None:
                offset, db = offset + per_channel(db, self.x), None
            if y is None:
                y = torch.addcmul(offset, self.x, slope)
            else:
                y = y.addcmul_(self.x, slope).add_(offset)
        if db is not None:
            shift = per_channel(db, self.x)
            y = shift.expand_as(self.x) if y is None else y + shift
        return y
