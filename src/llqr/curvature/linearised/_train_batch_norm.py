"""Batch norm in training mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._base import LinearisedOperation, Values, are_plain, per_channel

__all__ = ["TrainBatchNorm"]


class TrainBatchNorm(LinearisedOperation):
    """y = w o xhat + b, with xhat = (x - mean) / sqrt(var + eps) normalised over the batch.

    Args:
        x: the input, channels in dimension 1.
        running: the running mean and variance, which the batch's go into; or two None.
        w: the weight, or None.
        b: the bias, or None.
        momentum: of the running statistics.
        eps: added to the variance.
    """

    def __init__(
        self,
        x: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        w: Tensor | None,
        b: Tensor | None,
        momentum: float,
        eps: float,
    ) -> None:
        self.tensors, self.written, self.eps = (x, w, b), running, eps
        self.x, self.w = x.detach(), None if w is None else w.detach()
        # What F.batch_norm calls, so that the value is the network's bit for bit on every device,
        # and its statistics come along.
        self.value, self.mean, self.rstd, self._reserved, self._kernel = (
            torch._batch_norm_impl_index(
                self.x,
                self.w,
                None if b is None else b.detach(),
                *running,
                True,
                momentum,
                eps,
                torch.backends.cudnn.enabled,
            )
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
    ) -> TrainBatchNorm | None:
        """Take the arguments of F.batch_norm; None in evaluation mode and for forms not covered."""
        # In half precision the statistics have another dtype than the values; of one value per
        # channel, or with an eps of zero, torch raises an error.
        covered = training and eps > 0 and input.dtype in (torch.float32, torch.float64)
        if not covered or input.dim() < 2 or input.numel() <= input.shape[1]:
            return None
        if not are_plain(input, running_mean, running_var, weight, bias):
            return None
        running = running_mean, running_var
        return TrainBatchNorm(input, running, weight, bias, momentum, eps)

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return the gradients that torch's own backward computes."""
        grads = self._backward(g, list(needed))
        return tuple(v if n else None for v, n in zip(grads, needed, strict=True))

    def jvp(self, d: Values) -> Tensor | None:
        """Return w o rstd (dx - mean(dx) - xhat mean(xhat o dx)) + xhat o dw + db."""
        dx, dw, db = d
        # xhat stays normalised whatever x is: the parts of dx along 1 and xhat are taken out. In
        # each channel that is a symmetric map of dx, so that the kernel of the vjp computes it.
        y = None if dx is None else self._backward(dx, [True, False, False])[0]
        if dw is not None:
            # xhat o dw = x o slope + offset: per channel, so that xhat itself is never formed.
            slope = dw * self.rstd
            offset = -self.mean * slope if db is None else db - self.mean * slope
            slope, db = per_channel(slope, self.x), offset
            y = self.x * slope if y is None else y.addcmul_(self.x, slope)
        if db is not None:
            shift = per_channel(db, self.x)
            y = shift.expand_as(self.x) if y is None else y.add_(shift)
        return y

    def _backward(self, g: Tensor, needed: list[bool]) -> Any:
        return torch.ops.aten._batch_norm_impl_index_backward(
            self._kernel,
            self.x,
            g,
            self.w,
            *self.written,  # not read in training mode
            self.mean,
            self.rstd,
            True,
            self.eps,
            needed,
            self._reserved,
        )
