"""The landscape of the toy: its constants, and derivatives against explicit formulas."""

import math

import pytest
import torch

from llqr_lab.theory.sharp_well import SharpWell

WELL = SharpWell()


def at(r):
    return torch.tensor([[r, 0.0]], dtype=torch.float64)


def test_bottom_and_barrier():
    assert WELL.bottom == pytest.approx(4.8021, abs=1e-4)
    assert WELL.barrier == pytest.approx(4.5632, abs=1e-4)
    assert float(WELL.loss(at(WELL.bottom))) == pytest.approx(6.543, abs=5e-4)
    height = float(WELL.loss(at(WELL.barrier)) - WELL.loss(at(WELL.bottom)))
    assert height == pytest.approx(0.087, abs=5e-4)
    for radius in (WELL.bottom, WELL.barrier):
        assert abs(float(WELL.gradient(at(radius))[0, 0])) < 1e-13


def test_curvature_at_the_bottom():
    assert float(WELL.hessian(at(WELL.bottom))[0, 0, 0]) == pytest.approx(10.288, abs=5e-4)


def test_derivatives_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    xy = 6 * torch.rand(50, 2, dtype=torch.float64, generator=generator) - 3 + 1.5
    r = xy.norm(dim=-1)
    well = 1.9 * torch.exp(-((r - 5) ** 2) / 0.18)
    slope = 0.7 * r + well * (r - 5) / 0.09
    bend = 0.7 + well / 0.09 - well * (r - 5) ** 2 / 0.0081
    ray = xy / r[:, None]
    torch.testing.assert_close(WELL.gradient(xy), slope[:, None] * ray, rtol=0, atol=1e-12)
    outer = ray[:, :, None] * ray[:, None, :]
    around = torch.eye(2, dtype=torch.float64) - outer
    expected = bend[:, None, None] * outer + (slope / r)[:, None, None] * around
    torch.testing.assert_close(WELL.hessian(xy), expected, rtol=0, atol=1e-11)


def test_the_origin_is_smooth():
    assert torch.equal(
        WELL.gradient(torch.zeros(1, 2, dtype=torch.float64)), torch.zeros(1, 2).double()
    )
    expected = 0.7 * torch.eye(2, dtype=torch.float64)[None]
    torch.testing.assert_close(WELL.hessian(at(0.0)), expected, rtol=0, atol=1e-12)


def test_u_is_the_inverse_of_the_average_hessian():
    expected = torch.tensor([[1.3632, 0.0243], [0.0243, 1.4537]], dtype=torch.float64)
    torch.testing.assert_close(WELL.average_inverse(), expected, rtol=0, atol=5e-5)


def test_many_points_give_the_integral():
    # By symmetry the average is a number: half the mean Laplacian, by Gauss's theorem
    # L'(R) / R of the disc's rim.
    rim = float(WELL.gradient(at(8.0))[0, 0]) / 8.0
    sampled = torch.linalg.inv(WELL.average_inverse(points=400_000))
    torch.testing.assert_close(sampled, rim * torch.eye(2, dtype=torch.float64), rtol=0, atol=0.03)
    assert math.isclose(rim, 0.7, abs_tol=1e-12)
