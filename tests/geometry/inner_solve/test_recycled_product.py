"""Recycled products against the exact ones, and inner solves with and without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import llqr
from explicit import F64, agree, vector
from llqr.geometry.inner_solve._recycled_product import RecycledProduct
from tiny import mlp, norm_net, says


class Counted:
    """The product with an explicit matrix; remembers its directions."""

    def __init__(self, n: int = 40, rank: int | None = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        factor = torch.randn(n, rank or n, dtype=F64, generator=generator)
        self.C = factor @ factor.mT / n
        self.g = torch.randn(n, dtype=F64, generator=generator)
        self.directions: list[Tensor] = []

    def __call__(self, d: Tensor) -> Tensor:
        self.directions.append(d.clone())
        return self.C @ d


@pytest.mark.parametrize("capacity", [1, 2, 5, 64])
def test_independent_directions_are_answered_exactly(capacity):
    """One real product each; beyond the capacity it is spent and forgotten."""
    exact = Counted()
    recycled = RecycledProduct(exact, exact.g, 1e-8, capacity)
    for i in range(20):
        d = torch.randn_like(exact.g)
        agree(recycled(d), exact.C @ d)
        assert len(exact.directions) == i + 1
    for q in exact.directions:
        assert float(q.norm()) == pytest.approx(1.0, rel=1e-12)
    Q = torch.stack(exact.directions[: min(capacity, 20)])
    agree(Q @ Q.mT, torch.eye(len(Q), dtype=F64), 1e-12)


def test_directions_in_the_span_cost_nothing():
    exact = Counted()
    recycled = RecycledProduct(exact, exact.g, 1e-8)
    span = torch.randn(3, 40, dtype=F64)
    for d in span:
        recycled(d)
    for _ in range(10):
        d = torch.randn(3, dtype=F64) @ span
        agree(recycled(d), exact.C @ d)
    assert len(exact.directions) == 3


def test_beyond_the_capacity_products_are_repeated():
    exact = Counted()
    recycled = RecycledProduct(exact, exact.g, 1e-8, capacity=2)
    span = torch.randn(3, 40, dtype=F64)
    for d in (*span, span[2], span[2], span[0], span[1]):
        agree(recycled(d), exact.C @ d)
    assert len(exact.directions) == 5  # the third direction is paid for each time


@pytest.mark.parametrize("tolerance", [1e-6, 1e-3, 1e-1])
def test_what_is_left_out_is_below_the_tolerance(tolerance):
    """|C d - answer| <= tolerance |g + answer|, where the largest eigenvalue has been seen."""
    exact = Counted(rank=3)
    values, vectors = torch.linalg.eigh(exact.C)
    recycled = RecycledProduct(exact, exact.g, tolerance)
    recycled(vectors[:, -1])
    skipped = 0
    for i in range(60):
        d = vectors[:, -1] + 10 ** (-i / 10) * torch.randn_like(exact.g)
        before = len(exact.directions)
        answer = recycled(d)
        error = float((answer - exact.C @ d).norm())
        assert error <= tolerance * float((exact.g + answer).norm())
        assert len(exact.directions) - before <= 1
        skipped += len(exact.directions) == before
    assert 0 < skipped < 60


def test_zero_directions():
    exact = Counted()
    recycled = RecycledProduct(exact, exact.g, 1e-2)
    assert not recycled(torch.zeros_like(exact.g)).any()
    recycled(exact.g)
    assert not recycled(torch.zeros_like(exact.g)).any()
    assert len(exact.directions) == 1


def test_answers_take_no_fresh_memory():
    """Without a product, an answer makes nothing of a vector's size."""
    exact = Counted()
    recycled = RecycledProduct(exact, exact.g, 1e-8)
    recycled(exact.g)
    d = 2 * exact.g
    first = recycled(d).data_ptr()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        assert recycled(d).data_ptr() == first
    largest = max(e.self_cpu_memory_usage for e in trace.events())
    assert len(exact.directions) == 1 and largest < exact.g.numel() * 8


def test_two_reads_at_most(monkeypatch):
    """An answer without a product reads from the device once, one with a product twice."""
    exact, reads = Counted(), []
    move = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: reads.append(1) or move(self))
    recycled = RecycledProduct(exact, exact.g, 1e-4)
    span = torch.randn(3, 40, dtype=F64)
    for d in span:
        recycled(d)
    assert len(exact.directions) == 3 and len(reads) == 6
    for d in span:
        recycled(3 * d)
    assert len(exact.directions) == 3 and len(reads) == 9


def test_float32_stays_orthogonal():
    """Directions that are nearly parallel, as those of an inner solve are."""
    exact = Counted()
    exact.C, exact.g = exact.C.float(), exact.g.float()
    recycled = RecycledProduct(exact, exact.g, 1e-7)
    d = torch.randn(40)
    for _ in range(15):
        d = d + 1e-3 * torch.randn(40)
        agree(recycled(d), exact.C @ d, 1e-5)
    Q = torch.stack(exact.directions)
    assert float((Q @ Q.mT - torch.eye(len(Q))).abs().max()) < 1e-4


def test_rounding_of_long_vectors_costs_no_product():
    """A million entries of one sign: the sums keep their digits, and no loss passes for new."""
    n, calls = 1_000_000, []
    span = torch.rand(3, n)
    curvature = torch.linspace(0.1, 1, n)
    final = span.sum(0)

    def product(d: Tensor) -> Tensor:
        calls.append(d)
        return curvature * d

    # The residual g + C d ends near zero, so that very little may be left out.
    recycled = RecycledProduct(product, -curvature * final * (1 + 1e-4), 1e-2, capacity=20)
    generator = torch.Generator().manual_seed(0)
    for t in range(20):
        d = final + 0.5**t * (torch.rand(3, generator=generator) @ span)
        agree(recycled(d), curvature * d, 5e-7)
    assert len(calls) == 3


def test_what_rounding_hides_is_not_taken_for_known():
    """A part outside the span of about the square root of a rounding error, in float32."""
    n, tolerance = 100_000, 1e-2
    eps = torch.finfo(torch.float32).eps
    generator = torch.Generator().manual_seed(0)

    def stiff() -> Tensor:
        sizes = 10 ** (-3 * torch.rand(n, generator=generator))
        return sizes * torch.randn(n, generator=generator)

    directions = [stiff() for _ in range(30)]
    Q = torch.linalg.qr(torch.stack(directions).double().T)[0]
    for factor in (1.2, 2.0, 3.0):
        outside = torch.randn(n, generator=generator).double()
        outside -= Q @ (Q.T @ outside)
        d = (directions[0] / directions[0].norm()).double()
        d = (d + (factor * eps) ** 0.5 * outside / outside.norm()).float()
        residual = stiff()
        residual *= (1.02 * eps) ** 0.5 / tolerance / residual.norm()
        recycled = RecycledProduct(Tensor.clone, residual - d, tolerance)  # C = I
        for v in directions:
            recycled(v)
        answer = recycled(d).double()
        assert float((answer - d).norm()) <= tolerance * float((residual - d + answer).norm())


def test_a_direction_that_overflows_is_answered_by_a_product():
    """The square of its length is beyond float32."""
    n = 100_000
    recycled = RecycledProduct(lambda d: 2 * d, torch.ones(n), 1e-2)
    for _ in range(2):
        assert torch.equal(recycled(torch.full((n,), 1e30)), torch.full((n,), 2e30))


# -- whole solves ----------------------------------------------------------------------------------


# What the solve leaves, as it is.
RAW = {"ema": 0.0, "lr": 0.03, "constraint": "none"}


def learned(problem, structure: str, tolerance: float, **settings):
    geometry = llqr.LLQR(structure, tolerance=tolerance, **{**RAW, **settings})
    problem.model.eval()
    geometry.bind(problem.model)
    report = geometry.refresh([problem])
    return vector(v for entries in geometry.state().values() for v in entries.values()), report


STRUCTURES = ("scalar", "diagonal", "diag-kfac", "kfac", "e-kfac", "dense")


@pytest.mark.filterwarnings("ignore:U has a negative eigenvalue:UserWarning")
@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_recycled_solves_are_the_literal_ones(structure, curvature):
    """Within the tolerance, and to rounding at 1e-8; with fewer products."""
    problem = norm_net()
    literal, report = learned(problem, structure, 0, curvature=curvature)
    assert report.products >= 50 and report.J_after < report.J_before
    assert report.change > 0.01  # something was learned
    moved = float((literal - 1).norm()) if structure != "kfac" else float(literal.norm())
    for tolerance in (1e-2, 1e-4, 1e-8):
        state, recycled = learned(problem, structure, tolerance, curvature=curvature)
        error = float((state - literal).norm()) / moved
        assert error <= max(tolerance, 1e-11)
        assert recycled.products < report.products
    assert learned(problem, structure, 1e-2, curvature=curvature)[1].products <= 25


def test_tolerance_zero_computes_every_product():
    for steps in (1, 7, 50):
        _, report = learned(mlp(), "diagonal", 0, steps=steps)
        assert report.products >= steps


@pytest.mark.parametrize("tolerance", [1e-9, -1e-2, 1.0, float("nan"), "exact", None])
def test_tolerance_is_checked(tolerance):
    with says(ValueError, "tolerance", str(tolerance)):
        llqr.LLQR("diagonal", tolerance=tolerance)
