"""Gradient, products and value of the quadratic model against explicit matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, split, vector
from nets import NETS, TARGET, Case, Y, case, matrix, mlp, product, with_loss
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
    "weights, shares",
    [(None, [1 / 3] * 3), ([1, 2, 5], [0.125, 0.25, 0.625]), ([0.0, 2.0, 2.0], [0, 0.5, 0.5])],
)
def test_several_forwards(weights, shares, curvature):
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
        sum(w * p.matrices[key] for w, p in zip(shares, parts, strict=True))
        for key in ("g", curvature)
    )
    d = torch.randn_like(g)
    losses = [float(p()[0].detach()) for p in parts]
    mean = sum(w * loss for w, loss in zip(shares, losses, strict=True))
    assert float(model.loss) == pytest.approx(mean, rel=1e-13)
    agree(vector(model.gradient), g)
    agree(product(model, net.parameters, d), C @ d)
    assert model.products == 1
    by_rows = llqr.quadratic_model(parts, net.parameters, curvature, weights=weights, scale="sum")
    rows = sum(len(x) for w, x in zip(shares, xs, strict=True) if w)
    agree(product(by_rows, net.parameters, d), rows * (C @ d))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]])
def test_weights_are_checked(weights):
    net = case("mlp")
    with says(ValueError, "weights"):
        llqr.quadratic_model([net, net], net.parameters, weights=weights)
    with says(ValueError, "forward"):
        llqr.quadratic_model([], net.parameters)


class TwoHeads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        a, b = self.a(h), self.b(h)
        if self.form == "tuple":
            return a, b
        return {"a": a, "rest": [b]}


@pytest.mark.parametrize("form", ["tuple", "dict"])
@pytest.mark.parametrize("coupled", [False, True])
def test_several_outputs(form, coupled):
    """H has a block between the outputs where the loss couples them."""
    x = torch.randn(6, 4, dtype=F64)
    y = torch.randn(6, 2, dtype=F64)

    def loss(out: Any) -> Tensor:
        a, b = out if form == "tuple" else (out["a"], out["rest"][0])
        own = F.cross_entropy(a, Y) + 0.5 * F.mse_loss(b, y)
        return own + 0.3 * (a[:, :2] * b).square().mean() if coupled else own

    net = Case(TwoHeads(form), lambda m: m(x), loss)
    model = llqr.quadratic_model(net, net.parameters)
    d = torch.randn_like(net.matrices["g"])
    agree(vector(model.gradient), net.matrices["g"])
    agree(product(model, net.parameters, d), net.matrices["fisher"] @ d)


def test_an_output_that_the_loss_does_not_read_changes_nothing():
    x = torch.randn(6, 4, dtype=F64)
    net = Case(TwoHeads("tuple"), lambda m: m(x), lambda out: F.cross_entropy(out[0], Y))
    d = torch.randn_like(net.matrices["g"])
    agree(
        product(llqr.quadratic_model(net, net.parameters), net.parameters, d),
        net.matrices["fisher"] @ d,
    )


def test_one_output_computed_from_another_is_refused():
    net = case("mlp")

    def forward() -> tuple[Tensor, Any]:
        h = net.outputs()
        z = h.tanh()
        return F.cross_entropy(z, Y), (h, z)

    with says(ValueError, "computed from another", "Divergence"):
        llqr.quadratic_model(forward, net.parameters)


# -- parameters that take no part ------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_frozen_and_unused_parameters_are_zero(curvature):
    net = mlp()
    frozen = net.model[0].bias
    frozen.requires_grad_(False)
    unused = nn.Parameter(torch.randn(3, dtype=F64))
    active = [p for p in net.model.parameters() if p.requires_grad]
    everything = [*net.model.parameters(), unused]
    model = llqr.quadratic_model(net, everything, curvature)
    reduced = llqr.quadratic_model(net, active, curvature)
    d = [torch.randn_like(p) for p in everything]
    moved = [v for p, v in zip(everything, d, strict=True) if p is not frozen and p is not unused]
    image = model.product(d)
    for p, g, v in zip(everything, model.gradient, image, strict=True):
        assert g.shape == v.shape == p.shape
        if p is frozen or p is unused:
            assert not g.any() and not v.any()
    known = [v for p, v in zip(everything, image, strict=True) if any(p is q for q in active)]
    agree(vector(known), vector(reduced.product(moved)), 1e-14)


def test_a_penalty_on_the_weights_has_no_gauss_newton_curvature():
    """It does not pass through the outputs; its gradient counts, and Newton sees all of it."""
    net = mlp()
    plain = Case.matrices.func(net)  # type: ignore[attr-defined]

    def forward() -> tuple[Tensor, Tensor]:
        loss, z = net()
        return loss + 0.05 * sum(p.square().sum() for p in net.parameters), z

    d = torch.randn_like(plain["g"])
    model = llqr.quadratic_model(forward, net.parameters)
    agree(vector(model.gradient), plain["g"] + 0.1 * vector(net.parameters))
    agree(product(model, net.parameters, d), plain["fisher"] @ d)
    newton = llqr.quadratic_model(forward, net.parameters, "newton")
    agree(product(newton, net.parameters, d), plain["newton"] @ d + 0.1 * d)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.nll_loss(z, Y),
        lambda z: F.l1_loss(z, TARGET),
        lambda z: (1 - z.gather(1, Y[:, None]) + z).clamp(min=0).mean(),  # hinge
        lambda z: z.mean(),
    ],
)
def test_a_loss_linear_in_the_outputs_is_refused(loss):
    net = with_loss(loss)
    with says(ValueError, "linear in `outputs`", "return the logits"):
        llqr.quadratic_model(net, net.parameters)
    llqr.quadratic_model(net, net.parameters, "newton")


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


def test_outputs_must_be_what_the_loss_was_computed_from():
    net = case("mlp")
    with says(ValueError, "no tensor in `outputs` has a graph"):
        llqr.quadratic_model(lambda: (net()[0], net()[1].detach()), net.parameters)
    with says(ValueError, "not computed from `outputs`"):
        llqr.quadratic_model(lambda: (net()[0], net()[1]), net.parameters)


@pytest.mark.parametrize(
    "forward, said",
    [
        (lambda net: net()[0].detach(), "no graph"),
        (lambda net: (net()[1], net()[1]), r"scalar loss, got shape \(6, 3\)"),
        (lambda net: 1.0, "tensor, got float"),
        (lambda net: (*net(), 3), "got 3 values"),
    ],
)
def test_forward_is_checked(forward, said):
    net = case("mlp")
    with says(ValueError, "forward", said):
        llqr.quadratic_model(lambda: forward(net), net.parameters)


def test_wrong_directions_and_curvatures_are_refused():
    net = case("mlp")
    model = llqr.quadratic_model(net, net.parameters)
    with says(ValueError, "d: expected 4 tensors", "got 1"):
        model.product(model.gradient[:1])
    with says(ValueError, "curvature", "'ngd'"):
        llqr.quadratic_model(net, net.parameters, "ngd")


def test_an_indefinite_second_derivative_warns():
    net = with_loss(lambda z: (z.square() * torch.tensor([1.0, -4.0, 1.0], dtype=F64)).mean())
    with pytest.warns(UserWarning, match="indefinite"):
        model = llqr.quadratic_model(net, net.parameters)
    d = torch.randn_like(net.matrices["g"])
    agree(product(model, net.parameters, d), net.matrices["fisher"] @ d)
