"""Scaled dot-product attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import LinearisedOperation, Values, are_plain

__all__ = ["Attention"]


class Attention(LinearisedOperation):
    """Y = P V with P = softmax(scale Q K'), causal or not: kept are P and the inputs."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> None:
        self.tensors = (q, k, v)
        self.q, self.k, self.v, self.scale = q.detach(), k.detach(), v.detach(), scale
        scores = self.q @ self.k.mT * scale  # (queries, keys)
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores.masked_fill_(later, -torch.inf)
        self.p = scores.softmax(-1)
        self.value = self.p @ self.v

    @staticmethod
    def from_call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Attention | None:
        """Take the arguments of F.scaled_dot_product_attention; None for forms not covered."""
        covered = attn_mask is None and dropout_p == 0 and not enable_gqa
        # Leading dimensions that broadcast would have to be summed over in the vjp.
        equal = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        if not (covered and equal and are_plain(query, key, value)):
            return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return Attention(query, key, value, is_causal, scale)

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return dS K, dS'Q and P'G with dS = scale P o (G V' - its mean under P)."""
        ds = self._through_softmax(g @ self.v.mT) if needed[0] or needed[1] else None
        return (
            ds @ self.k if needed[0] and ds is not None else None,
            ds.mT @ self.q if needed[1] and ds is not None else None,
            self.p.mT @ g if needed[2] else None,
        )

    def jvp(self, d: Values) -> Tensor | None:
        """Return dP V + P dV."""
        dq, dk, dv = d
        # (dq, dk) -> dS = dq K' + Q dk' -> dP -> dP V
        scores = [
            a @ b.mT for a, b in ((dq, self.k), (self.q, dk)) if a is not None and b is not None
        ]
        y = self._through_softmax(sum(scores[1:], scores[0])) @ self.v if scores else None
        if dv is not None:
            y = self.p @ dv if y is None else y.add_(self.p @ dv)
        return y

    def _through_softmax(self, x: Tensor) -> Tensor:
        """Return scale P o (x - its mean under P), the derivative of the softmax."""
        # It is symmetric, so that torch's backward of the softmax serves both maps.
        dp: Tensor = torch.ops.aten._softmax_backward_data(x, self.p, -1, x.dtype)
        return dp.mul_(self.scale)
