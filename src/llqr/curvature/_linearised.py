"""An operation with its two linear maps at fixed inputs; linear layers, GELU and attention.

None of them keeps a cotangent, as torch's own double backward would: the graph of J'u then holds
what the forward holds, in place of twice that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Attention", "Gelu", "Linear", "Linearised", "Values"]

Values = tuple[Tensor | None, ...]


class Linearised:
    """An operation at fixed inputs: its value, and its two linear maps (base class).

    ``tensors`` are the inputs that may carry gradients, ``needed`` says which do.
    """

    tensors: Values
    value: Tensor

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return J'g for each of ``tensors``; None where it is not needed."""
        raise NotImplementedError

    def jvp(self, d: Values) -> Tensor | None:
        """Return J d for a tangent (or None) of each of ``tensors``."""
        raise NotImplementedError


class Linear(Linearised):
    """y = x W' + b: bilinear in (x, W)."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None) -> None:
        self.tensors = (x, w, b)
        self.x, self.w = x.detach(), w.detach()
        self.value = F.linear(self.x, self.w, None if b is None else b.detach())

    @staticmethod
    def of(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Linear | None:
        """Take the arguments of F.linear; None for those not known here."""
        known = input.dim() >= 2 and weight.dim() == 2 and _plain(input, weight, bias)
        return Linear(input, weight, bias) if known else None

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return G W, G'X and the sum of G over all but the outputs."""
        rows = g.reshape(-1, g.shape[-1])
        return (
            g @ self.w if needed[0] else None,
            rows.mT @ self.x.reshape(-1, self.x.shape[-1]) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )

    def jvp(self, d: Values) -> Tensor | None:
        """Return x dW' + dx W' + db."""
        dx, dw, db = d
        if dw is None:
            if dx is not None:
                return F.linear(dx, self.w, db)
            return None if db is None else db.expand_as(self.value)
        y = F.linear(self.x, dw, db)
        if dx is not None:  # in place: a sum of two results would take one more buffer
            y.view(-1, y.shape[-1]).addmm_(dx.reshape(-1, dx.shape[-1]), self.w.mT)
        return y


class Gelu(Linearised):
    """y = gelu(x), entry by entry: both maps multiply by the derivative."""

    def __init__(self, x: Tensor, approximate: str) -> None:
        self.tensors = (x,)
        self.x, self.approximate = x.detach(), approximate
        self.value = F.gelu(self.x, approximate=approximate)

    @staticmethod
    def of(input: Tensor, approximate: str = "none") -> Gelu:
        """Take the arguments of F.gelu."""
        return Gelu(input, approximate)

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return gelu'(x) g."""
        return (torch.ops.aten.gelu_backward(g, self.x, approximate=self.approximate),)

    def jvp(self, d: Values) -> Tensor | None:
        """Return gelu'(x) dx."""
        return None if d[0] is None else self.vjp(d[0], (True,))[0]


class Attention(Linearised):
    """Y = P V with P = softmax(scale Q K'), causal or not: kept are P and the inputs."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> None:
        self.tensors = (q, k, v)
        self.q, self.k, self.v, self.scale = q.detach(), k.detach(), v.detach(), scale
        scores = self.q @ self.k.mT * scale
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores.masked_fill_(later, -torch.inf)
        self.p = scores.softmax(-1)
        self.value = self.p @ self.v

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Attention | None:
        """Take the arguments of F.scaled_dot_product_attention; None for those not known here."""
        known = attn_mask is None and dropout_p == 0 and not enable_gqa
        equal = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        if not (known and equal and _plain(query, key, value)):
            return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return Attention(query, key, value, is_causal, scale)

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return dS K, dS'Q and P'G with dS = scale P o (G V' - its mean under P)."""
        ds = self._softmax(g @ self.v.mT) if needed[0] or needed[1] else None
        return (
            ds @ self.k if needed[0] and ds is not None else None,
            ds.mT @ self.q if needed[1] and ds is not None else None,
            self.p.mT @ g if needed[2] else None,
        )

    def jvp(self, d: Values) -> Tensor | None:
        """Return dP V + P dV."""
        dq, dk, dv = d
        scores = [
            a @ b.mT for a, b in ((dq, self.k), (self.q, dk)) if a is not None and b is not None
        ]
        y = self._softmax(sum(scores[1:], scores[0])) @ self.v if scores else None
        if dv is not None:
            y = self.p @ dv if y is None else y.add_(self.p @ dv)
        return y

    def _softmax(self, x: Tensor) -> Tensor:
        """Return the derivative of the softmax (symmetric, so its backward), times the scale."""
        dp: Tensor = torch.ops.aten._softmax_backward_data(x, self.p, -1, x.dtype)
        return dp.mul_(self.scale)


def _plain(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether all are strided tensors of one dtype, which no autocast changes."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    return all(
        t is None or (t.dtype == x.dtype and t.layout == torch.strided and not t.is_nested)
        for t in (x, *others)
    )
