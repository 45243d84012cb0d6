"""Trace, diagonal and spectral density against the explicit matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from explicit import F64, agree, vector
from llqr import sharpness
from sharpness_nets import network, quadratic


@pytest.mark.parametrize("sketch", [0, 6])
def test_trace_is_within_its_standard_error(sketch):
    """Hutchinson's and Hutch++, over 25 seeds: z-scores of mean 0 and size 1."""
    net = network()
    C = net.matrices["newton"]
    found = [
        sharpness.trace(net, net.model, batches=net.whole, products=30, sketch=sketch, seed=s)
        for s in range(25)
    ]
    errors = torch.tensor([(f.value - float(C.trace())) / f.standard_error for f in found])
    assert float(errors.mean().abs()) < 3 / math.sqrt(25)
    assert 0.7 < float(errors.std()) < 1.4
    assert {f.evaluations for f in found} == {30} and {f.sketch for f in found} == {sketch}


def test_few_probes_are_refused_and_ten_cover():
    """From ten probes on 2 standard errors cover 92 % (Student's t); from two it would be 70 %."""
    A = torch.randn(12, 12, dtype=F64, generator=torch.Generator().manual_seed(2))
    w = nn.Parameter(torch.zeros(12, dtype=F64))

    def loss():
        return w @ A @ w / 2

    for options in ({"products": 9}, {"products": 13, "sketch": 2}):
        with pytest.raises(ValueError, match="products: expected an integer >= 1[04], got"):
            sharpness.trace(loss, [w], **options)
    assert sharpness.trace(loss, [w], products=14).sketch == 2
    found = [sharpness.trace(loss, [w], products=10, seed=s) for s in range(200)]
    off = torch.tensor([abs(f.value - float(A.trace())) / f.standard_error for f in found])
    # The binomial standard error of a share is 0.019 here.
    assert 0.86 < float((off < 2).double().mean()) < 0.98
    assert "(standard error" in str(found[0]) and found[0].probes == 10


def test_the_sketch_lowers_the_error_and_takes_all_of_a_low_rank():
    net = network()
    plain, sketched = (
        sharpness.trace(net, net.model, "fisher", batches=net.whole, products=60, sketch=s)
        for s in (0, 20)
    )
    assert sketched.standard_error < 0.5 * plain.standard_error
    loss, parameters = quadratic([4.0, -1.0, 0.0, 0.0, 0.0])
    exact = sharpness.trace(loss, parameters, products=20)
    assert exact.value == pytest.approx(3.0, abs=1e-12) and exact.sketch == 2


@pytest.mark.parametrize("sketch", [0, 1])
def test_diagonal(sketch):
    """Its mean over seeds is the explicit one, and its sum is the trace."""
    A = torch.randn(4, 4, dtype=F64)
    A = A + A.mT
    w = nn.Parameter(torch.zeros(2, 2, dtype=F64))
    each = []
    for seed in range(40, 60):
        found = sharpness.trace(
            lambda: w.flatten() @ A @ w.flatten() / 2,
            [w],
            products=2 * sketch + 40,
            sketch=sketch,
            diagonal=True,
            seed=seed,
        )
        assert float(found.diagonal[0].sum()) == pytest.approx(found.value, rel=1e-12)
        assert found.diagonal[0].shape == (2, 2)
        each.append(vector(found.diagonal))
    error = torch.stack(each).std(0) / math.sqrt(20)
    off = torch.stack(each).mean(0) - A.diagonal()
    assert float((off / error).abs().max()) < 3.5 and float(error.max()) < 0.1 * float(A.norm())


def test_error_between_batches():
    """With Q complete there are no probes left to be random, and it is exact."""
    net = network()
    n = len(net.matrices["newton"])
    found = sharpness.trace(net, net.model, batches=net.batches, products=2 * n + 10, sketch=n)
    assert found.value == pytest.approx(float(net.matrices["newton"].trace()), rel=1e-9)
    each = torch.stack([net.matrix_of(b, "newton").trace() for b in net.batches])
    shares = torch.tensor([10.0, 8.0, 6.0], dtype=F64) / 24
    variance = float((shares**2 * (each - found.value) ** 2).sum() * 3 / 2)
    assert found.batch_error == pytest.approx(math.sqrt(variance), rel=1e-8)
    assert "standard error" in str(found) and "between 3 batches" in str(found)


@pytest.mark.parametrize("curvature", ["newton", "fisher"])
def test_moments_of_the_density(curvature):
    """Those of each probe are v' C^p v up to p = 2 m - 1, and their mean is within the error."""
    net = network()
    C = net.matrices[curvature]
    found = sharpness.density(net, net.model, curvature, batches=net.batches, steps=4, probes=6)
    generator = torch.Generator().manual_seed(0)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        v = (torch.randint(2, (len(C),), generator=generator) * 2 - 1).double() / len(C) ** 0.5
        power = v
        for order in range(8):
            agree((weights * nodes**order).sum(), v @ power, 1e-9)
            power = C @ power
    with torch.random.fork_rng([]):
        many = sharpness.density(net, net.model, curvature, batches=net.whole, steps=4, probes=40)
    for order in (1, 2, 3):
        mean, error = many.moment(order)
        expected = float(torch.linalg.matrix_power(C, order).trace()) / len(C)
        assert abs(mean - expected) < 3 * error < 2 * abs(expected) + 3 * error


def test_the_density_is_one():
    net = network()
    found = sharpness.density(net, net.model, batches=net.whole, probes=4)
    assert float(torch.trapezoid(found.values, found.grid)) == pytest.approx(1, abs=0.01)
    spectrum = torch.linalg.eigvalsh(net.matrices["newton"])
    # Against the explicit density at the same width, within what four probes allow.
    explicit = torch.exp(-0.5 * ((found.grid[:, None] - spectrum) / found.width) ** 2).mean(1)
    explicit /= found.width * math.sqrt(2 * math.pi)
    distance = torch.trapezoid((found.values - explicit).abs(), found.grid)
    assert float(distance) < 0.35
    assert float(found.errors.max()) > 0 and "spectral density of Newton()" in str(found)


def test_a_density_of_one_eigenvalue():
    for value in (0.0, 2.0):
        loss, parameters = quadratic([value] * 3)
        found = sharpness.density(loss, parameters)
        assert float((found.nodes - value).abs().max()) < 1e-12
        assert found.values.isfinite().all()
