"""Matrices of low rank: the span of a gradient, and what a factor adds to the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._devices import widen
from ._eigenvalues import decompose_symmetric

__all__ = ["beside_identity", "span_of_columns"]

#: Below this side the calls cost more than the arithmetic that a smaller basis saves.
WORTH_COMPRESSING = 64
#: A rank beyond this part of the side saves too little to look for.
LARGEST_PART = 0.5
#: Random columns beyond the rank, so that no direction is caught by a hair's breadth.
MORE_COLUMNS = 8
#: Vectors and rounds by which the norm of a matrix is estimated, and what is added for its error.
PROBES, ROUNDS, MARGIN = 8, 4, 1.5


def span_of_columns(x: Tensor) -> Tensor | None:
    """Return orthonormal bases P of the columns of (b, m, n) matrices: X = P P'X to rounding.

    The gradient of a layer is a sum over the rows of the batch, so that its rank is at most their
    number. Random combinations of the columns tell (Halko, Martinsson and Tropp, "Finding structure
    with randomness", 2011), and what lies outside is measured.

    Args:
        x: (b, m, n).

    Returns:
        (b, m, k), k the largest rank of the batch and a few more; None if that is more than half
        of m.
    """
    m, n = x.shape[1:]
    most = int(LARGEST_PART * m)
    if m < WORTH_COMPRESSING or x.is_meta:  # without numbers it may have any rank
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


def beside_identity(
    matrices: Tensor, error: float, most: int, symmetric: bool
) -> tuple[Tensor, Tensor] | None:
    """Return L and R, (b, n, k) each, with M near I + L R' for each of (b, n, n) matrices M.

    The rank k is the largest that a matrix of the batch needs. What is left is measured: the
    largest singular value of M - I - L R' is below ``error``.

    Args:
        matrices: M.
        error: see above.
        most: the largest k.
        symmetric: whether R is L times a symmetric matrix: P M P on the span of L, with P = L L',
            and the identity beside it. The eigenvalues then lie between those of M, or are 1.

    Returns:
        L and R; None if no rank up to ``most`` suffices.
    """
    n = matrices.shape[-1]
    change = matrices - torch.eye(n, dtype=matrices.dtype, device=matrices.device)
    if _norms_are_below(change, error):
        nothing = change[..., :0]
        return nothing, nothing
    if most < 1:
        return None
    columns = min(most + MORE_COLUMNS, n)
    # Two rounds of subspace iteration: the spectrum of a change decays slowly.
    q = torch.linalg.qr(change @ _noise(change, n, columns)).Q
    q = torch.linalg.qr(change @ (change.mT @ q)).Q
    found = widen(q.mT @ change)  # (columns, n): their squares need the digits
    squares, turn = decompose_symmetric(found @ found.mT)  # in ascending order
    rank = int((squares.clamp(min=0).sqrt() > error / (2 * MARGIN)).sum(-1).max())
    if rank > most:
        return None
    left = q @ turn[..., columns - rank :].to(q.dtype)
    right = change.mT @ left
    if symmetric:
        core = left.mT @ right
        right = left @ (0.5 * (core + core.mT))
    rest = torch.baddbmm(change, left, right.mT, alpha=-1)
    return (left, right) if _norms_are_below(rest, error) else None


def _norms_are_below(matrices: Tensor, bound: float) -> bool:
    """Tell whether the largest singular value of every matrix is below a bound, by estimates.

    Block iterations give it from below, and closely after a few rounds; the margin is for the rest.
    """
    # The norms of the columns are lower bounds that cost nothing.
    if bool((torch.linalg.vector_norm(matrices, dim=-2) > bound).any()):
        return False
    v = _noise(matrices, matrices.shape[-1], PROBES)
    for _ in range(ROUNDS):
        v = torch.linalg.qr(matrices.mT @ (matrices @ v)).Q
    return bool((MARGIN * torch.linalg.matrix_norm(matrices @ v, ord=2) <= bound).all())


def _noise(like: Tensor, *shape: int) -> Tensor:
    """Return the same random numbers for the same shape, on every device."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like)
