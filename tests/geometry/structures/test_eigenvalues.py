"""Eigenvalues of blocks: clipping, the nearest orthogonal matrix, exact and estimated extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llqr
from explicit import F64, agree
from llqr.geometry.structures._eigenvalues import (
    clip_eigenvalues,
    decompose_symmetric,
    extremes_of_matrices,
    extremes_of_operator,
    follow_eigenvectors,
    nearest_orthogonal,
    orthogonalise_by_cholesky,
)


def symmetric(n: int, count: int = 3, dtype: torch.dtype = F64) -> Tensor:
    raw = torch.randn(count, n, n, dtype=dtype)
    return 0.5 * (raw + raw.mT)


@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clipped_matrices_comply(n, dtype):
    """In exact comparison, not up to rounding: the bounds are promises."""
    low, high = 0.5, 2.0
    result = clip_eigenvalues(3 * torch.randn(4, n, n, dtype=dtype), low, high)
    assert torch.equal(result, result.mT)
    values = torch.linalg.eigvalsh(result.double())
    assert float(values.min()) >= low and float(values.max()) <= high


def test_clipping_is_the_nearest_point():
    raw = torch.randn(3, 6, 6, dtype=F64)
    values, vectors = torch.linalg.eigh(0.5 * (raw + raw.mT))
    nearest = vectors @ torch.diag_embed(values.clamp(0.5, 2.0)) @ vectors.mT
    agree(clip_eigenvalues(raw, 0.5, 2.0), nearest, 1e-12)


def test_only_matrices_that_do_not_comply_are_touched():
    good = torch.eye(4, dtype=F64) + 0.1 * symmetric(4, 1)[0].clamp(-1, 1)
    batch = torch.stack([good, -good, good])
    result = clip_eigenvalues(batch, 0.2, 3.0)
    assert torch.equal(result[0], good) and torch.equal(result[2], good)
    assert float(torch.linalg.eigvalsh(result[1])[0]) >= 0.2
    again = clip_eigenvalues(result, 0.2, 3.0)
    assert torch.equal(again, result)  # once is enough


def test_narrow_bounds():
    result = clip_eigenvalues(symmetric(5), 1 - 1e-12, 1 + 1e-12)
    agree(result, torch.eye(5, dtype=F64).expand(3, 5, 5), 1e-11)


@pytest.mark.parametrize("distance", [1e-3, 0.1, 0.3, 1.0, 10.0])
def test_polar(distance, monkeypatch):
    """Orthogonal, and what is left is symmetric positive: M = Q P; near Q without decomposition."""
    start = torch.linalg.qr(torch.randn(3, 5, 5, dtype=F64))[0]
    matrices = start + distance * torch.randn(3, 5, 5, dtype=F64)
    if distance <= 0.1:
        monkeypatch.setattr(torch.linalg, "svd", None)
    q = nearest_orthogonal(matrices)
    agree(q @ q.mT, torch.eye(5, dtype=F64).expand(3, 5, 5), 1e-13)
    p = q.mT @ matrices
    agree(p, p.mT.contiguous(), 1e-12)
    assert float(torch.linalg.eigvalsh(p).min()) > 0
    agree(nearest_orthogonal(q), q, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bases_follow(dtype):
    """One step is Q R = (L + dI) Q, the greatest first in R; columns go on as they were."""
    n, eps = 12, torch.finfo(dtype).eps
    raw = torch.randn(3, n, 30, dtype=dtype) * torch.logspace(0, -2, n, dtype=dtype)[:, None]
    matrices = raw @ raw.mT
    q = torch.linalg.qr(torch.randn(3, n, n, dtype=dtype))[0]
    values = (q * (matrices @ q)).sum(1)
    shift = 1e-3 * values.mean(1)[:, None, None]
    order = values.argsort(1, descending=True)[:, None, :].expand(-1, n, -1)
    y = (matrices @ q + shift * q).gather(2, order)
    expected = torch.linalg.qr(y)[0]
    # The host takes reflections, an accelerator Cholesky factors.
    by_products = orthogonalise_by_cholesky(y.double(), dtype)
    stepped = follow_eigenvectors(matrices, q)
    for step in (stepped.gather(2, order), by_products):
        agree((step * expected).sum(1).abs(), torch.ones(3, n, dtype=dtype), 1e4 * eps)
        agree(step.mT @ step, torch.eye(n, dtype=dtype).expand(3, n, n).contiguous(), 50 * eps)
    assert orthogonalise_by_cholesky(torch.zeros(3, n, n, dtype=F64), dtype) is None
    for _ in range(400):
        q = follow_eigenvectors(matrices, q)
    agree(q.mT @ q, torch.eye(n, dtype=dtype).expand(3, n, n).contiguous(), 50 * eps)
    values, exact = decompose_symmetric(matrices)
    found = (q * (matrices @ q)).sum(1).argsort(1)[:, None, :].expand(-1, n, -1)
    agree((q.gather(2, found) * exact).sum(1).abs(), torch.ones(3, n, dtype=dtype), 1e-3)
    # Where eigenvalues change places, columns do not.
    swapped = (exact * values.flip(1)[:, None, :]) @ exact.mT
    same = (follow_eigenvectors(swapped, exact) * exact).sum(1).abs()
    agree(same, torch.ones(3, n, dtype=dtype), 1e4 * eps)


@pytest.mark.parametrize("n", [1, 3, 64, 65, 90])
def test_exact_extremes(n):
    matrices = torch.randn(3, n, n, dtype=F64)
    low, high = extremes_of_matrices(matrices, exact=True)
    values = torch.linalg.eigvalsh(0.5 * (matrices + matrices.mT))
    agree(low, values[:, 0], 1e-12)
    agree(high, values[:, -1], 1e-12)
    estimated = extremes_of_matrices(matrices, exact=False)
    if n <= 64:
        assert torch.equal(estimated[0], low) and torch.equal(estimated[1], high)


@pytest.mark.parametrize("n", [70, 200])
@pytest.mark.parametrize("dtype, slack", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_estimates_lie_inside_and_near(n, dtype, slack):
    """Lanczos: within the true interval, and within 3 % of its length of the ends."""
    matrices = symmetric(n, dtype=dtype)
    low, high = extremes_of_matrices(matrices, exact=False)
    values = torch.linalg.eigvalsh(matrices)
    length = values[:, -1] - values[:, 0]
    assert bool((low >= values[:, 0] - slack * length).all())
    assert bool((high <= values[:, -1] + slack * length).all())
    assert bool((low <= values[:, 0] + 0.03 * length).all())
    assert bool((high >= values[:, -1] - 0.03 * length).all())


def test_estimates_of_few_distinct_eigenvalues_are_exact():
    """The Krylov space is exhausted early; other blocks of the batch go on."""
    q = torch.linalg.qr(torch.randn(80, 80, dtype=F64)).Q
    few = torch.ones(80, dtype=F64)
    few[0], few[1] = 0.25, 7.0
    batch = torch.stack([torch.eye(80, dtype=F64), (q * few) @ q.T, symmetric(80, 1)[0]])
    low, high = extremes_of_matrices(batch, exact=False)
    assert low[:2].tolist() == pytest.approx([1.0, 0.25], rel=1e-10)
    assert high[:2].tolist() == pytest.approx([1.0, 7.0], rel=1e-10)
    values = torch.linalg.eigvalsh(batch[2])
    assert float(values[0]) - 1e-12 <= float(low[2]) and float(high[2]) <= float(values[-1]) + 1e-12


@pytest.mark.parametrize("m, n", [(2, 3), (8, 8), (9, 8), (30, 10)])
def test_operators_on_matrices(m, n):
    """X -> B X A with symmetric factors: the eigenvalues are the products."""
    a, b = symmetric(n, 2), symmetric(m, 2)
    like = torch.empty(2, m, n, dtype=F64)
    whole = torch.stack([torch.kron(y, x) for x, y in zip(a, b, strict=True)])
    values = torch.linalg.eigvalsh(whole)
    low, high = extremes_of_operator(lambda x: b @ x @ a, like, exact=True)
    agree(low, values[:, 0], 1e-10)
    agree(high, values[:, -1], 1e-10)
    low, high = extremes_of_operator(lambda x: b @ x @ a, like, exact=False)
    length = values[:, -1] - values[:, 0]
    assert bool((low >= values[:, 0] - 1e-12 * length).all())
    assert bool((high <= values[:, -1] + 1e-12 * length).all())
    assert bool((low <= values[:, 0] + 0.05 * length).all())
    assert bool((high >= values[:, -1] - 0.05 * length).all())


@pytest.mark.parametrize("exact", [True, False])
def test_the_global_random_state_is_left_alone(exact):
    before = torch.get_rng_state()
    extremes_of_matrices(torch.eye(70).expand(2, 70, 70), exact)
    assert torch.equal(torch.get_rng_state(), before)


def test_reports_estimate_and_spectrum_decomposes():
    """On a layer wider than 64: the estimate is inside the exact interval."""
    torch.manual_seed(0)
    model = torch.nn.Linear(80, 3)
    x, y = torch.randn(200, 80), torch.randint(3, (200,))

    def forward() -> tuple[Tensor, Tensor]:
        z = model(x)
        return torch.nn.functional.cross_entropy(z, y), z

    geometry = llqr.LLQR("kfac", lr=0.1, ema=0.0)
    geometry.bind(model)
    report = geometry.refresh([forward])
    assert report.accepted
    low, high = geometry.spectrum()[""]
    A, B = (geometry.state()["weight"][k].double() for k in ("A.0", "B.0"))
    a, b = torch.linalg.eigvalsh(A), torch.linalg.eigvalsh(B)
    bias = geometry.state()["bias"]["U"]
    assert low == pytest.approx(min(float(a[0] * b[0]), float(bias.min())), rel=1e-5)
    assert high == pytest.approx(max(float(a[-1] * b[-1]), float(bias.max())), rel=1e-5)
    assert low * (1 - 1e-5) <= report.eigenvalue_min <= report.eigenvalue_max <= high * (1 + 1e-5)


def test_many_zero_eigenvalues():
    """X X' of an embedding's gradient, where few words occurred: LAPACK fails in float32."""
    few = 0
    for seed in range(3):
        draws = torch.Generator().manual_seed(seed)
        x = torch.zeros(512, 64)
        rows = torch.randperm(512, generator=draws)[:57]
        x[rows] = 0.01 * torch.randn(57, 64, generator=draws)
        x[:, 1::2] *= 1e-4
        matrix = (x @ x.mT)[None]
        try:
            torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError:
            few += 1
        values, vectors = decompose_symmetric(matrix)
        assert values.dtype == vectors.dtype == torch.float32
        again = (vectors * values[:, None, :]) @ vectors.mT
        assert (again - matrix).abs().max() <= 1e-6 * matrix.abs().max()
    if not few:
        pytest.skip("this LAPACK decomposes them in float32")
