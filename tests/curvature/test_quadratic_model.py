"""Gradient, products and value of the quadratic model against explicit matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, split, vector
from nets import NETS, Case, case, matrix, mlp, product
from tiny import says


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("name", NETS)
def test_gradient_product_and_value(name, curvature):
    net = case(name)
    model = llqr.quadratic_model(net, net.parameters, curvature)
    g, C = net.matrices["g"], net.matrices[curvature]
    assert float(model.loss) == pytest.approx(float(net()[0].detach()), rel=1e-14)
    agree(vector(model.gradient), g)
    for _ in range(3):
        d = torch.randn_like(g)
        agree(product(model, net.parameters, d), C @ d)
        agree(model.value(split(d, net.parameters)), g @ d + 0.5 * d @ C @ d)
    agree(product(model, net.parameters, g), C @ g)
    assert model.products == 7


def test_the_networks_tell_the_curvatures_apart():
    """Otherwise the test above would pass with one for the other."""
    for name in NETS:
        fisher, newton = case(name).matrices["fisher"], case(name).matrices["newton"]
        assert float((fisher - newton).norm()) > 0.1 * float(fisher.norm()), name
        assert float(torch.linalg.eigvalsh(fisher)[0]) > -1e-12
        assert float(torch.linalg.eigvalsh(newton)[0]) < -1e-3, name


def test_every_column():
    net = case("mlp")
    for curvature in ("fisher", "newton"):
        C = matrix(llqr.quadratic_model(net, net.parameters, curvature), net.parameters)
        agree(C, net.matrices[curvature])


def test_float32():
    net = case("mlp")
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model.load_state_dict(net.model.state_dict())
    single = Case.__new__(Case)
    single.loss, single.outputs = net.loss, lambda: model(net.x.float())
    q = llqr.quadratic_model(single, model.parameters())
    d = torch.randn(len(net.matrices["g"]))
    image = product(q, list(model.parameters()), d)
    agree(image.double(), net.matrices["fisher"] @ d.double(), 1e-5)


# -- scale -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("scale, factor", [("mean", 1.0), ("sum", 6.0), (2.5, 2.5), (1, 1.0)])
def test_scale(scale, factor, curvature):
    net = case("mlp")
    model = llqr.quadratic_model(net, net.parameters, curvature, scale=scale)
    d = torch.randn_like(net.matrices["g"])
    agree(vector(model.gradient), net.matrices["g"])
    agree(product(model, net.parameters, d), factor * (net.matrices[curvature] @ d))


def test_sum_is_the_sum_over_rows_of_the_rows_own_curvature():
    """As the authors' code has it: sum over b of J_b' (diag p_b - p_b p_b') J_b."""
    net = case("mlp")
    z = net.outputs()
    C = torch.zeros_like(net.matrices["fisher"])
    for i in range(6):
        p = z[i].softmax(-1).detach()
        J = torch.stack([
            vector(torch.autograd.grad(z[i, c], net.parameters, retain_graph=True))
            for c in range(3)
        ])  # fmt: skip
        C += J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    model = llqr.quadratic_model(net, net.parameters, scale="sum")
    agree(matrix(model, net.parameters), C)


@pytest.mark.parametrize("scale", [0, -1.0, "total", True, math.inf, math.nan, None])
def test_scale_is_checked(scale):
    with says(ValueError, "scale", str(scale)):
        llqr.quadratic_model(case("mlp"), case("mlp").parameters, scale=scale)


# -- several forwards, several outputs -----------------------------------------------------------


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize(
    "weights, relative",
    [(None, [1 / 3] * 3), ([1, 2, 5], [0.125, 0.25, 0.625]), ([0.0, 2.0, 2.0], [0, 0.5, 0.5])],
)
def test_several_forwards(weights, relative, curvature):
    net = mlp()
    xs = [torch.randn(n, 4, dtype=F64) for n in (3, 6, 4)]
    ys = [torch.randint(3, (len(x),)) for x in xs]
    parts = []
    for x, y in zip(xs, ys, strict=True):
        part = Case.__new__(Case)
        part.model, part.loss = net.model, lambda z, y=y: F.cross_entropy(z, y)
        part.outputs = lambda x=x: net.model(x)
        parts.append(part)
    model = llqr.quadratic_model(parts, net.parameters, curvature, weights=weights)
    g, C = (
        sum(w * p.matrices[key] for w, p in zip(relative, parts, strict=True))
        for key in ("g", curvature)
    )
    d = torch.randn_like(g)
    losses = [float(p()[0].detach()) for p in parts]
    mean = sum(w * loss for w, loss in zip(relative, losses, strict=True))
    assert float(model.loss) == pytest.approx(mean, rel=1e-13)
    agree(vector(model.gradient), g)
    agree(product(model, net.parameters, d), C @ d)
    assert model.products == 1
    by_rows = llqr.quadratic_model(parts, net.parameters, curvature, weights=weights, scale="sum")
    rows = sum(len(x) for w, x in zip(relative, xs, strict=True) if w)
    agree(product(by_rows, net.parameters, d), rows * (C @ d))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]])
def test_weights_are_checked(weights):
    net = case("mlp")
    with says(ValueError, "weights"):
        llqr.quadratic_model([net, net], net.parameters, weights=weights)
    with says(ValueError, "forward"):
        llqr.quadratic_model([], net.parameters)


# -- refusals --------------------------------------------------------------------------------------


def test_outputs_are_asked_for():
    net = case("mlp")
    squared = llqr.Divergence(lambda z, z0: (z - z0).square().mean())
    for curvature in ("fisher", squared):
        with says(ValueError, "only a loss", "outputs"):
            llqr.quadratic_model(lambda: net()[0], net.parameters, curvature)
    with says(ValueError, "only a loss", "outputs"):
        llqr.quadratic_model(lambda: net()[0], net.parameters, "newton", scale="sum")
    model = llqr.quadratic_model(lambda: net()[0], net.parameters, "newton")
    agree(vector(model.gradient), net.matrices["g"])


def test_wrong_directions_and_curvatures_are_refused():
    net = case("mlp")
    model = llqr.quadratic_model(net, net.parameters)
    with says(ValueError, "d: expected 4 tensors", "got 1"):
        model.product(model.gradient[:1])
    with says(ValueError, "curvature", "'ngd'"):
        llqr.quadratic_model(net, net.parameters, "ngd")
