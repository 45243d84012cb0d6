"""In which order the kinds of H are tried, and the square root over all outputs together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._devices import widest_dtype
from .._output_hessian import OutputHessian
from .._random import random_normal
from ._base import Probes, SquareRoot, random_signs, widened
from ._diagonal import DiagonalRoot
from ._lanczos import lanczos_square_root
from ._softmax import SoftmaxRoot

__all__ = ["OutputSquareRoot"]

#: What a mean over many rows makes of a probe leaves the range of float16; times this it does not.
LIFT = 2.0**10
#: Kinds of H that are recognised from products with random directions; the stricter test first.
KINDS: tuple[type[SquareRoot], ...] = (DiagonalRoot, SoftmaxRoot)


class OutputSquareRoot:
    """H^(1/2) over all tensors of outputs, in closed form where H is of a kind that has one.

    Args:
        hessian: products with H; kept as an attribute.

    Raises:
        ValueError: the outputs are complex.
        IndefiniteHessian: H has no square root (if it is of no known kind, a product says so).
    """

    def __init__(self, hessian: OutputHessian) -> None:
        for z in hessian.points:
            if z.is_complex():
                raise ValueError(
                    f"forward: `outputs` hold a tensor of dtype {z.dtype}, and samples of the "
                    "curvature are drawn for real outputs only; return torch.view_as_real of it, "
                    "from which the loss is then computed"
                )
        self.hessian = hessian
        self._zs = [widened(z) for z in hessian.points]
        self._eps = max(torch.finfo(z.dtype).eps for z in hessian.points)
        self._roots = self._recognised()

    def draw(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Return H^(1/2) e for ``count`` white e: one (count, *z.shape) per tensor of outputs."""
        return self.product([random_signs(count, z, generator) for z in self._zs])

    def product(self, e: Sequence[Tensor]) -> list[Tensor]:
        """Return H^(1/2) e, for every e in a batch."""
        if self._roots is not None:
            return [root.product(x) for root, x in zip(self._roots, e, strict=True)]
        rows = zip(*e, strict=True)
        return [torch.stack(same) for same in zip(*map(self._lanczos, rows), strict=True)]

    def _recognised(self) -> list[SquareRoot] | None:
        """Return the square root of each tensor, or None if one is of no known kind."""
        # Tensors that get the same numbers would hide how they are coupled.
        numbered = list(enumerate(self._zs))
        vs = [
            [random_normal(z.shape, z.dtype, 2 * i + s).to(z.device) for i, z in numbered]
            for s in (1, 2)
        ]
        images = [self._hessian_product(v) for v in vs]
        ones = self._hessian_product([torch.ones_like(z) for z in self._zs])
        if not all(bool(h.isfinite().all()) for image in (*images, ones) for h in image):
            # Whoever uses the samples sees that they are not finite.
            return [DiagonalRoot(torch.full_like(z, torch.nan)) for z in self._zs]
        roots: list[SquareRoot] = []
        for i, z in enumerate(self._zs):
            v, image = (torch.stack([x[i] for x in both]) for both in (vs, images))
            probes = Probes(v, image, ones[i], self._eps)
            found = (kind.recognise(z, probes) for kind in KINDS)
            root = next((r for r in found if r is not None), None)
            if root is None:
                return None
            roots.append(root)
        return roots

    def _hessian_product(self, v: Sequence[Tensor]) -> list[Tensor]:
        points = self.hessian.points
        lifted = [(x * LIFT).to(z.dtype) for x, z in zip(v, points, strict=True)]
        image = self.hessian.product(lifted)
        return [
            torch.zeros_like(z) if h is None else widened(h) / LIFT
            for h, z in zip(image, self._zs, strict=True)
        ]

    def _lanczos(self, e: Sequence[Tensor]) -> list[Tensor]:
        dtype = widest_dtype(self._zs[0].device)
        sizes = [z.numel() for z in self._zs]

        def product(v: Tensor) -> Tensor:
            pieces = [x.view_as(z) for x, z in zip(torch.split(v, sizes), self._zs, strict=True)]
            return _flat(self._hessian_product(pieces)).to(dtype)

        root = lanczos_square_root(product, _flat(e).to(dtype), self._eps)
        return [
            x.view_as(z).to(z.dtype)
            for x, z in zip(torch.split(root, sizes), self._zs, strict=True)
        ]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
