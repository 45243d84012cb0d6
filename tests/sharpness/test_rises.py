"""worst_case against brute force, m_sharpness against a loop by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, vector
from llqr import sharpness
from sharpness_nets import network

RHO = 0.7


def bumpy():
    """A loss of two parameters with several maxima in a ball."""
    w = nn.Parameter(torch.tensor([0.6, -0.9], dtype=F64))

    def at(w):
        a, b = w[..., 0], w[..., 1]
        return (3 * a).sin() * (2 * b).cos() + 0.3 * a * b + 0.2 * a**2

    return w, at


METRIC = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=F64)


def fixed(w):
    model = nn.Module()
    model.w = w
    geometry = llqr.FixedGeometry(METRIC)
    geometry.bind(model)
    return geometry


NORMS = {
    "euclidean": (lambda w: "euclidean", lambda w: torch.eye(2, dtype=F64)),
    "adaptive": (lambda w: "adaptive", lambda w: torch.diag((w.detach().abs() + 0.1) ** 2)),
    "geometry": (fixed, lambda w: METRIC),
    "function": (lambda w: lambda vs: [METRIC @ vs[0]], lambda w: METRIC),
}


@pytest.mark.parametrize("name", NORMS)
def test_worst_case_is_that_of_brute_force(name):
    w, at = bumpy()
    norm, metric = (f(w) for f in NORMS[name])
    found = sharpness.worst_case(
        lambda: at(w), [w], RHO, norm, eta=0.1, steps=60, starts=8, displacement=True
    )
    # All points of the ball are d = R x with R R' = U and |x| <= rho.
    angle = torch.linspace(0, 2 * math.pi, 2001, dtype=F64)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    radii = torch.linspace(0, RHO, 201, dtype=F64)
    points = (radii[:, None, None] * x).reshape(-1, 2) @ torch.linalg.cholesky(metric).mT
    rises = at(w.detach() + points) - at(w.detach())
    assert found.rise == pytest.approx(float(rises.max()), abs=2e-5)
    d = found.displacement[0]
    assert float(d @ torch.linalg.solve(metric, d)) <= RHO**2 * (1 + 1e-12)
    assert float(at(w.detach() + d) - at(w.detach())) == pytest.approx(found.rise, rel=1e-12)
    assert found.rise == float(found.rises.max())


def test_the_first_step_is_that_of_sam():
    net = network()
    found = sharpness.worst_case(
        net, net.model, 1e-3, batches=net.batches, steps=1, starts=1, displacement=True
    )
    g = vector(torch.autograd.grad(net(net.whole[0])[0], net.parameters))
    agree(vector(found.displacement), 1e-3 * g / g.norm())
    assert found.rise == pytest.approx(1e-3 * float(g.norm()), rel=1e-2)
    assert found.evaluations == 2


def test_worst_case_between_batches():
    net = network()
    found = sharpness.worst_case(net, net.model, 0.2, batches=net.batches, displacement=True)
    losses = [float(net(b)[0].detach()) for b in net.batches]
    with torch.no_grad():
        for p, d in zip(net.parameters, found.displacement, strict=True):
            p.add_(d)
        moved = [float(net(b)[0]) for b in net.batches]
        for p, d in zip(net.parameters, found.displacement, strict=True):
            p.sub_(d)
    rises = torch.tensor(moved, dtype=F64) - torch.tensor(losses, dtype=F64)
    shares = torch.tensor([10.0, 8.0, 6.0], dtype=F64) / 24
    mean = float((shares * rises).sum())
    variance = float((shares**2 * (rises - mean) ** 2).sum()) * 3 / 2
    assert found.rise == pytest.approx(mean, rel=1e-12)
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-10)
    assert found.loss == pytest.approx(float(net(net.whole[0])[0].detach()), rel=1e-12)
    assert "rise of the loss within rho = 0.2 (euclidean)" in str(found)


def test_at_a_minimum_the_random_starts_find_the_rise():
    w = nn.Parameter(torch.zeros(3, dtype=F64))
    a = torch.tensor([1.0, 5.0, 2.0], dtype=F64)
    found = sharpness.worst_case(lambda: (a * w.square()).sum() / 2, [w], 0.1, steps=40)
    assert found.rises.tolist() == pytest.approx([0, 0.025, 0.025], rel=1e-6)
    peak = sharpness.worst_case(lambda: -(a * w.square()).sum() / 2, [w], 0.1, steps=40)
    assert peak.rise == 0


@pytest.mark.parametrize("norm", ["euclidean", "adaptive"])
def test_m_sharpness_is_that_of_a_loop_by_hand(norm):
    net = network()
    found = sharpness.m_sharpness(net, net.model, 0.05, norm, m=4, eta=0.02, batches=net.batches)
    # Of 10, 8 and 6 rows, sub-batches of 4 leave two rows over twice.
    parts = [(0, 4), (4, 8), (10, 14), (14, 18), (18, 22)]
    rises = []
    for low, high in parts:
        x, y = net.x[low:high], net.y[low:high]
        loss = F.cross_entropy(net.model(x), y)
        gs = torch.autograd.grad(loss, net.parameters)
        size = [p.detach().abs() + 0.02 if norm == "adaptive" else 1.0 for p in net.parameters]
        length = sum((t * g).square().sum() for t, g in zip(size, gs, strict=True)).sqrt()
        start = [p.detach().clone() for p in net.parameters]
        with torch.no_grad():
            for p, t, g in zip(net.parameters, size, gs, strict=True):
                p.add_(0.05 * t * t * g / length)
            rises.append(float(F.cross_entropy(net.model(x), y) - loss))
            for p, old in zip(net.parameters, start, strict=True):
                p.copy_(old)
    each = torch.tensor(rises, dtype=F64)
    assert found.rise == pytest.approx(float(each.mean()), rel=1e-10)
    assert found.standard_error == pytest.approx(float(each.std()) / math.sqrt(5), rel=1e-10)
    assert (found.batches, found.examples, found.m) == (5, 20, 4)
    assert "between 5 sub-batches" in str(found)


def test_m_sharpness_of_a_flat_loss_is_zero():
    w = nn.Parameter(torch.zeros(2))
    assert sharpness.m_sharpness(lambda: (w * 0).sum(), [w]).rise == 0
