"""H of a softmax cross-entropy: a multiple of diag(p) - p p' in every row."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import IndefiniteHessian, Probes, SquareRoot

__all__ = ["SoftmaxRoot"]


class SoftmaxRoot(SquareRoot):
    r"""The square root of the second derivative of a softmax cross-entropy, row by row.

    .. math:: H = w (\mathrm{diag}(p) - p p^\top) = F F^\top, \qquad
              F = \sqrt w (\mathrm{diag}(\sqrt p) - p \sqrt p^\top), \qquad p = \mathrm{softmax}(z)

    since the cross terms of :math:`F F^\top` are :math:`-2 p p^\top` and its last one is
    :math:`p (\sqrt p^\top \sqrt p) p^\top = p p^\top`. Labels, soft targets and label smoothing
    are in no H; reductions, class weights, masks and ignored labels are in w, which is read off.

    Labels drawn from p, as :math:`\sqrt w (p - \mathrm{onehot}(\tilde y))`, have this H as their
    second moment, too. But where the network is certain, a rare label carries all of it: most
    draws are nearly zero and a few are large. F with random signs has no such tail.

    Args:
        p: the softmax of z.
        w: the weight of every row, of size 1 along the classes.
        dim: the dimension of the classes, counted from the end.
    """

    def __init__(self, p: Tensor, w: Tensor, dim: int) -> None:
        self._p, self._sqrt_p, self._sqrt_w, self._dim = p, p.sqrt(), w.sqrt(), dim

    @classmethod
    def recognise(cls, z: Tensor, probes: Probes) -> SquareRoot | None:
        """Return F if H v = w (p o v - p (p'v)) along one of the dimensions of z."""
        # Classes come last, or second as in (N, C, d1, d2); no other place is in common use.
        last, second = -1, 1 - z.dim()
        for dim in dict.fromkeys([last, second if z.dim() > 2 else last]):
            if z.dim() == 0 or z.shape[dim] < 2:
                continue
            p = torch.softmax(z, dim)
            w = _row_weights(p, dim, probes)
            if w is not None:
                return cls(p, w, dim)
        return None

    def product(self, e: Tensor) -> Tensor:
        """Return sqrt(w) (sqrt(p) o e - p (sqrt(p)'e))."""
        r = self._sqrt_p * e
        return self._sqrt_w * (r - self._p * r.sum(self._dim, keepdim=True))


def _row_weights(p: Tensor, dim: int, probes: Probes) -> Tensor | None:
    """Return w of every row, or None if H is not of this kind along ``dim``."""

    def norm(x: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        return length

    v, h, eps = probes.v, probes.image, probes.eps
    pv = p * v
    q = pv - p * pv.sum(dim, keepdim=True)  # H v = w q
    # q is a difference of terms as large as `terms`, and errs by their rounding.
    terms, length = norm(pv), norm(q)
    smallest = torch.finfo(q.dtype).tiny
    w = (q[0] * h[0]).sum(dim, keepdim=True) / length[0].square().clamp(min=smallest)
    # Where the network is certain, w is mostly rounding: how large it is, other rows tell.
    clear = length[0] >= 0.01 * length[0].max()
    typical = torch.where(clear, w.abs(), 0).max()
    known = length[0] > 1e3 * eps * terms[0]
    scale = torch.maximum(torch.where(known, w.abs(), 0), typical)
    # The first direction gave w; the second one tells whether it was right. With two classes
    # every first one would be, and a coupling of rows would not show in it.
    noise = terms[1] + terms[0] * length[1] / length[0].clamp(min=smallest)
    allowed = probes.tolerance * w.abs() * length[1] + 8 * eps * scale * noise
    if not bool((norm(h[1] - w * q[1]) <= allowed).all()):
        return None
    least = float(torch.where(known | clear, w, 0).min())
    if least < -probes.tolerance * float(typical):
        raise IndefiniteHessian(least)
    return w.clamp(min=0)
