"""Stacks of vectors, and inner products that are sums of millions of terms."""

from __future__ import annotations

import pytest
import torch

from explicit import F64
from llqr._vectors import PIECE, dots, dots_of_runs
from llqr.geometry.inner_solve._rows import Rows


@pytest.mark.parametrize("n", [0, 1, 5, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7])
def test_dots(n):
    rows, v = torch.randn(3, n, dtype=F64), torch.randn(n, dtype=F64)
    torch.testing.assert_close(dots(rows, v), (rows * v).sum(1), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(dots(rows[0], v), (rows[0] * v).sum(), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("length", [1, 6, PIECE, PIECE + 3, 3 * PIECE, 7 * 900])
@pytest.mark.parametrize("many", [1, 2])
def test_dots_of_runs(length, many):
    stack = torch.randn(3, many * length + 10, dtype=F64)
    rows, v = stack[:, 4:-6], torch.randn(many * length, dtype=F64)  # a part of longer rows
    explicit = (rows * v).view(3, many, length).sum(2).T
    torch.testing.assert_close(dots_of_runs(rows, v, length), explicit, rtol=1e-12, atol=1e-10)


def test_long_sums_in_single_precision():
    """Terms of one sign: torch.mv is off by 1e-4 here."""
    rows, v = torch.rand(2, 5_000_000), torch.rand(5_000_000)
    exact = torch.stack([(row.double() * v.double()).sum() for row in rows])
    for found in (dots(rows, v), dots_of_runs(rows, v, 2_500_000).sum(0)):
        assert float(((found - exact) / exact).abs().max()) < 1e-8


def test_rows_join_their_chunks():
    stack = Rows(torch.zeros(4, dtype=F64), 7)
    vectors = torch.randn(7, 4, dtype=F64)
    for v in vectors:
        assert not stack.full
        stack.append_row().copy_(v)
    assert stack.full and torch.equal(torch.cat(stack.matrices()), vectors)
    assert torch.equal(torch.cat(stack.matrices(3)), vectors[:3])
    c, target = torch.randn(7, dtype=F64), torch.zeros(4, dtype=F64)
    stack.subtract_combination(c, target)
    torch.testing.assert_close(target, -(c @ vectors))
    torch.testing.assert_close(stack.map_matrices(lambda q: q @ target), vectors @ target)
