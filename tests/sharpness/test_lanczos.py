"""The basis of all measurements of the curvature, on matrices."""

from __future__ import annotations

import torch

from explicit import F64, agree
from llqr.sharpness._lanczos import LanczosBasis, orthogonalise


def test_a_small_rest_is_orthogonal_too():
    """In float32, where the rest of one subtraction is rounding of what was subtracted."""
    rows = torch.linalg.qr(torch.randn(3000, 20)).Q.mT.contiguous()
    inside, outside = torch.randn(20) @ rows, torch.randn(3000)
    w = inside + 1e-5 * outside
    h, rest = orthogonalise(w, rows)
    assert float((rows @ w).abs().max()) < 1e-6 * rest
    torch.testing.assert_close(h, rows @ inside, atol=1e-3, rtol=1e-3)
    zero = inside.clone()
    assert orthogonalise(zero, rows)[1] == 0.0


def test_the_relation_of_lanczos_holds_after_a_restart():
    C = torch.randn(40, 40, dtype=F64)
    C = C + C.mT
    space = LanczosBasis(lambda v: C @ v, torch.randn(40, dtype=F64), 12)
    for _ in range(12):
        space.expand()
    values, vectors = space.ritz()
    space.restart(values, vectors, [11, 0, 10, 1])
    for _ in range(5):
        space.expand()
    Q, H = space.rows[:9], space.H[:9, :9]
    agree(Q @ Q.mT, torch.eye(9, dtype=F64), 1e-12)
    agree(Q @ C @ Q.mT, H, 1e-12)
    rest = C @ Q.mT - Q.mT @ H
    assert float(rest[:, :8].abs().max()) < 1e-12
    agree(rest[:, 8], space.rest * space.rows[9], 1e-10)
