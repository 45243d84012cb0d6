"""Matrices of low rank: the span of a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["span_of_columns"]

#: Below this side the calls cost more than the arithmetic that a smaller basis saves.
WORTH_COMPRESSING = 64
#: A rank beyond this part of the side saves too little to look for.
LARGEST_PART = 0.5
#: Random columns beyond the rank, so that no direction is caught by a hair's breadth.
MORE_COLUMNS = 8


def span_of_columns(x: Tensor) -> Tensor | None:
    """Return orthonormal bases P of the columns of (b, m, n) matrices: X = P P'X to rounding.

    The gradient of a layer is a sum over the rows of the batch, so that its rank is at most their
    number. Random combinations of the columns tell (Halko, Martinsson and Tropp, "Finding structure
    with randomness", 2011), and what lies outside is measured.

    Args:
        x: (b, m, n), m <= n.

    Returns:
        (b, m, k), k the largest rank of the batch and a few more; None if that is more than half of m.
    """
    m, n = x.shape[1:]
    most = int(LARGEST_PART * m)
    if m < WORTH_COMPRESSING:
        return None
    enough = 32 * torch.finfo(x.dtype).eps
    basis, triangle = torch.linalg.qr(x @ _noise(x, n, most))
    # Combinations of more columns than the rank are zero outside those before them.
    sizes = triangle.diagonal(dim1=-2, dim2=-1).abs()
    seen = (sizes > enough * sizes.amax(-1, keepdim=True)).sum(-1)
    rank = int(seen.max()) + MORE_COLUMNS
    if rank > most:
        return None
    span = basis[..., :rank].contiguous()
    outside = torch.linalg.matrix_norm(torch.baddbmm(x, span, span.mT @ x, alpha=-1))
    return span if bool((outside <= enough * torch.linalg.matrix_norm(x)).all()) else None


def _noise(like: Tensor, *shape: int) -> Tensor:
    """Return the same random numbers for the same shape, on every device."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like)
