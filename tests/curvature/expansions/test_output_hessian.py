"""H on the outputs: several of them, what they must be, and losses that have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, vector
from llqr.curvature import LinearLoss
from nets import TARGET, Case, Y, case, product, with_loss
from tiny import says


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
    with pytest.raises(LinearLoss):
        llqr.quadratic_model(net, net.parameters)
    llqr.quadratic_model(net, net.parameters, "newton")


def test_outputs_must_be_what_the_loss_was_computed_from():
    net = case("mlp")
    with says(ValueError, "no tensor in `outputs` has a graph"):
        llqr.quadratic_model(lambda: (net()[0], net()[1].detach()), net.parameters)
    with says(ValueError, "not computed from `outputs`"):
        llqr.quadratic_model(lambda: (net()[0], net()[1]), net.parameters)


def test_an_indefinite_second_derivative_warns():
    net = with_loss(lambda z: (z.square() * torch.tensor([1.0, -4.0, 1.0], dtype=F64)).mean())
    with pytest.warns(UserWarning, match="indefinite"):
        model = llqr.quadratic_model(net, net.parameters)
    d = torch.randn_like(net.matrices["g"])
    agree(product(model, net.parameters, d), net.matrices["fisher"] @ d)


def test_a_loss_that_is_exactly_minimal_has_no_curvature_and_no_error():
    """Nothing to learn, nothing wrong; a divergence is always stationary, and that is no excuse."""
    net = with_loss(lambda z: (z - z.detach()).abs().pow(3).sum())
    model = llqr.quadratic_model(net, net.parameters)
    d = torch.randn_like(net.matrices["g"])
    assert not product(model, net.parameters, d).any()
    cubic = llqr.Divergence(lambda z, z0: (z - z0).abs().pow(3).sum())
    with pytest.raises(LinearLoss):
        llqr.quadratic_model(net, net.parameters, cubic)
