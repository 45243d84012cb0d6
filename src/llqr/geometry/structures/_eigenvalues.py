"""Eigenvalues of blocks: extremes, clipping, and the nearest orthogonal matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..._devices import widest_dtype

__all__ = [
    "EXACT_BELOW",
    "LANCZOS_STEPS",
    "WITH_LAPACK",
    "clip_eigenvalues",
    "decompose_symmetric",
    "eigenvectors",
    "extremes_of_kronecker",
    "extremes_of_matrices",
    "extremes_of_operator",
    "follow_eigenvectors",
    "nearest_orthogonal",
    "orthogonalise_by_cholesky",
]

#: Types of device whose QR decompositions are LAPACK's, which are fast. A plan adds the meta device
#: when tensors without memory stand for those of a CPU.
WITH_LAPACK = {"cpu"}
EXACT_BELOW = 64
LANCZOS_STEPS = 24
NEWTON_STEPS = 8


def clip_eigenvalues(matrices: Tensor, low: float, high: float) -> Tensor:
    """Symmetrise (b, n, n) matrices and move their eigenvalues into [low, high].

    Two Cholesky factorisations tell which matrices already comply; only the others are
    decomposed. Those are moved a rounding error inside, so that the result complies too.
    """
    # u'Uu sees only the symmetric part of U.
    matrices = 0.5 * (matrices + matrices.mT)
    n = matrices.shape[-1]
    eye = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
    below = torch.linalg.cholesky_ex(matrices - low * eye).info != 0
    above = torch.linalg.cholesky_ex(high * eye - matrices).info != 0
    bad = below | above
    if not bool(bad.any()):
        return matrices
    values, vectors = decompose_symmetric(matrices[bad])
    margin = min(8 * n * torch.finfo(matrices.dtype).eps * high, 0.25 * (high - low))
    values = values.clamp(low + margin, high - margin)
    clipped = (vectors * values[:, None, :]) @ vectors.mT
    result = matrices.clone()
    result[bad] = 0.5 * (clipped + clipped.mT)
    return result


def decompose_symmetric(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of symmetric (b, n, n) matrices."""
    values, vectors = _again_in_double(torch.linalg.eigh, matrices, _decompose_singular)
    return values, vectors


def _decompose_singular(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors where many eigenvalues are zero.

    LAPACK's divide and conquer sometimes gives up on those, in float64 too; t I on top changes no
    eigenvector, and the eigenvalues by t.
    """
    n = matrices.shape[-1]
    size = matrices.abs().amax((-2, -1)).clamp(min=torch.finfo(matrices.dtype).tiny)
    shift = 1e-6 * size[..., None]
    eye = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
    values, vectors = torch.linalg.eigh(matrices + shift[..., None] * eye)
    return values - shift, vectors


def nearest_orthogonal(matrices: Tensor) -> Tensor:
    """Return the nearest orthogonal matrix to each of (b, n, n) matrices.

    Bases that a solve moved are nearly orthogonal still, and a few steps of Newton and Schulz,
    X <- X (3 I - X'X) / 2, make them so in products alone; others are decomposed.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    enough = 8 * matrices.shape[-1] * torch.finfo(matrices.dtype).eps
    x = matrices
    for step in range(NEWTON_STEPS):
        square = x.mT @ x
        # The largest row sum bounds |X'X - I|; below 2 no singular value is beyond sqrt 3, from
        # where a step would turn its sign.
        error = float((square - eye).abs().sum(-1).amax())
        if error <= enough:
            return x
        if step == 0 and not error < 2:
            break
        x = 1.5 * x - 0.5 * x @ square
    # The polar factor: U V' of the decomposition.
    u, _, vh = _again_in_double(torch.linalg.svd, matrices)
    return torch.matmul(u, vh)


def _again_in_double(
    decompose: Callable[[Tensor], Sequence[Tensor]],
    matrices: Tensor,
    again: Callable[[Tensor], Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """Return a decomposition; if it fails, that of ``again`` in float64.

    In float32 LAPACK gives up on many repeated eigenvalues, such as the zeros of X X' where X is
    the gradient of an embedding with few of its words; a device without float64 leaves that to
    the host.
    """
    try:
        return list(decompose(matrices))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        on_device = widest_dtype(matrices.device) == torch.float64
        found = (again or decompose)((matrices if on_device else matrices.cpu()).double())
        return [t.to(matrices.dtype).to(matrices.device) for t in found]


def eigenvectors(matrices: Tensor) -> Tensor:
    """Return those of symmetric (b, n, n) matrices, of the greatest eigenvalues first."""
    return decompose_symmetric(matrices)[1].flip(-1)


def follow_eigenvectors(matrices: Tensor, bases: Tensor) -> Tensor:
    """Turn orthogonal bases towards the eigenvectors of matrices that changed: Q R = (L + dI) Q.

    One step of orthogonal iteration, in a fraction of the time of eigenvectors. The small shift d
    keeps directions of which L knows nothing as they are.

    Args:
        matrices: L, symmetric positive semidefinite (b, n, n).
        bases: Q, orthogonal (b, n, n).

    Returns:
        The new bases; each column goes on as the direction that it was.
    """
    # LAPACK has a fast QR. An accelerator is a hundred times faster in products and Cholesky
    # factors, whose squared condition needs float64.
    on_host = matrices.device.type in WITH_LAPACK
    wide = matrices.dtype if on_host else widest_dtype(matrices.device)
    wide_matrices, q = matrices.to(wide), bases.to(wide)
    lq = wide_matrices @ q
    values = (q * lq).sum(-2)
    mean = values.mean(-1)[:, None, None]
    shift = 1e-3 * torch.where(mean > 0, mean, 1.0)  # where L is zero, Q stays
    # Each column is made orthogonal to those before it, so the greatest come first meanwhile.
    order = values.argsort(-1, descending=True)
    y = lq.add_(shift * q).gather(-1, order[:, None, :].expand_as(lq))
    found: Tensor | None = None
    if on_host:
        found = torch.linalg.qr(y).Q
    elif wide == torch.float64:
        found = orthogonalise_by_cholesky(y, bases.dtype)
    if found is None:
        found = eigenvectors(matrices)
    return found.gather(-1, order.argsort(-1)[:, None, :].expand_as(lq))


def orthogonalise_by_cholesky(y: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the Q of the decompositions y = Q R of float64 matrices, or None if one has none."""
    factor, info = torch.linalg.cholesky_ex(y.mT @ y)
    if bool((info != 0).any()):
        return None
    q = cast(Tensor, torch.linalg.solve_triangular(factor.mT, y, upper=True, left=False)).to(dtype)
    # What the squared condition costs in orthogonality, one step of Newton and Schulz gives back.
    return 1.5 * q - 0.5 * q @ (q.mT @ q)


def _eigenvalues_of(matrices: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric matrices, in ascending order."""
    return _again_in_double(lambda a: [torch.linalg.eigvalsh(a)], matrices)[0]


def extremes_of_matrices(matrices: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest eigenvalue of the symmetric part of (b, n, n) matrices.

    Args:
        matrices: (b, n, n).
        exact: decompose; otherwise matrices wider than 64 get a Lanczos estimate, which lies
            inside the true interval.
    """
    matrices = 0.5 * (matrices + matrices.mT)
    if exact or matrices.shape[-1] <= EXACT_BELOW:
        values = _eigenvalues_of(matrices)
        return values[:, 0], values[:, -1]
    # Symmetric, so the vector may stand on the left: a batch of GEMVs takes five times as long.
    return _estimate_by_lanczos(
        lambda v: torch.bmm(v[:, None, :], matrices)[:, 0], matrices[:, 0, :]
    )


def extremes_of_operator(
    apply: Callable[[Tensor], Tensor], like: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    """Return the extreme eigenvalues of symmetric operators on (b, ...) batches.

    Args:
        apply: the operators, on a batch shaped like ``like``.
        like: gives shape, dtype and device; n entries per operator.
        exact: form the operators as matrices (n <= 2048); otherwise a Lanczos estimate.
    """
    flat = like.reshape(len(like), -1)
    n = flat.shape[1]

    def apply_flat(v: Tensor) -> Tensor:
        return apply(v.view(like.shape)).reshape(flat.shape)

    if n <= EXACT_BELOW or (exact and n <= 2048):
        columns = []
        for i in range(n):
            unit = torch.zeros_like(flat)
            unit[:, i] = 1
            columns.append(apply_flat(unit))
        return extremes_of_matrices(torch.stack(columns, -1), exact=True)
    return _estimate_by_lanczos(apply_flat, flat)


def extremes_of_kronecker(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the extreme eigenvalues of Kronecker products, from those of their factors."""
    products = torch.stack([x * y for x in a for y in b])
    return products.amin(0), products.amax(0)


def _estimate_by_lanczos(
    apply: Callable[[Tensor], Tensor], like: Tensor, steps: int = LANCZOS_STEPS
) -> tuple[Tensor, Tensor]:
    """Estimate extreme eigenvalues by Lanczos with full reorthogonalisation (batched)."""
    noise = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(like.shape, generator=noise, dtype=torch.float32, device="cpu").to(like)
    count = min(steps, like.shape[1])
    q = start.div_(start.norm(dim=1, keepdim=True))
    tiny, eps = torch.finfo(like.dtype).tiny, torch.finfo(like.dtype).eps
    # U q_j is a combination of q_0 .. q_(j+1): the coefficients are all that is kept of it.
    small = like.new_zeros(len(like), count, count)
    basis, dead = [q], torch.zeros_like(small[:, 0], dtype=torch.bool)
    for j in range(count):
        v = apply(basis[-1])
        small[:, : j + 1, j] = torch.stack([(q * v).sum(1) for q in basis], 1)
        if j == count - 1:
            break
        length = v.norm(dim=1)
        for _ in range(2):
            for q in basis:
                v = v - (q * v).sum(1, keepdim=True) * q
        norm = v.norm(dim=1)
        # A block whose Krylov space is exhausted adds zero vectors; they are dropped below.
        alive = norm > 100 * eps * length
        small[:, j + 1, j], dead[:, j + 1] = norm * alive, ~alive
        basis.append(v.div_(norm.clamp(min=tiny)[:, None]).mul_(alive[:, None]))
    small = 0.5 * (small + small.mT)
    # Give an exhausted direction the value of the first one, which is inside the interval.
    values = _eigenvalues_of(small + torch.diag_embed(small[:, :1, 0] * dead))
    return values[:, 0], values[:, -1]
