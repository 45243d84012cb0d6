"""Which matrix C is: losses of every kind, divergences, Newton, against explicit matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import llqr
from explicit import F64, agree, gauss_newton, vector
from nets import TARGET, Y, case, matrix, mlp, product, with_loss
from tiny import says

# -- losses ----------------------------------------------------------------------------------------

IGNORED = torch.tensor([0, -100, 1, 1, -100, 2])
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=F64)
MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=F64)
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # The loss, and the rows that "sum" counts.
    "class weights": (lambda z: F.cross_entropy(z, Y, weight=WEIGHT), 6),
    "ignore_index": (lambda z: F.cross_entropy(z, IGNORED), 4),
    "sum reduction": (lambda z: F.cross_entropy(z, Y, reduction="sum"), 6),
    "label smoothing": (lambda z: F.cross_entropy(z, Y, label_smoothing=0.3), 6),
    "soft labels": (lambda z: F.cross_entropy(z, TARGET.softmax(-1)), 6),
    "all at once": (
        lambda z: F.cross_entropy(z, IGNORED, weight=WEIGHT, label_smoothing=0.2), 4,
    ),
    "masked tokens": (
        lambda z: (F.cross_entropy(z, Y, reduction="none") * MASK).sum() / MASK.sum(), 3,
    ),
    "indexed tokens": (lambda z: F.cross_entropy(z[MASK > 0], Y[MASK > 0]), 3),
    "binary": (lambda z: F.binary_cross_entropy_with_logits(z, (TARGET > 0).double()), 6),
    "squared": (lambda z: F.mse_loss(z, TARGET), 6),
    "huber": (lambda z: F.huber_loss(z, TARGET), 6),
    "log-softmax outside": (lambda z: F.nll_loss(z.log_softmax(-1), Y), 6),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss, counted = LOSSES[name]
    net = with_loss(loss)
    d = torch.randn_like(net.matrices["g"])
    for curvature in ("fisher", "newton"):
        model = llqr.quadratic_model(net, net.parameters, curvature)
        agree(vector(model.gradient), net.matrices["g"])
        agree(product(model, net.parameters, d), net.matrices[curvature] @ d)
    model = llqr.quadratic_model(net, net.parameters, scale="sum")
    agree(product(model, net.parameters, d), counted * (net.matrices["fisher"] @ d))


def test_labels_and_smoothing_drop_out_of_the_fisher():
    net = with_loss(lambda z: F.cross_entropy(z, Y))
    C = matrix(llqr.quadratic_model(net, net.parameters), net.parameters)
    for loss in (
        lambda z: F.cross_entropy(z, Y, label_smoothing=0.3),
        lambda z: F.cross_entropy(z, (Y + 1) % 3),
    ):
        net.loss = loss
        model = llqr.quadratic_model(net, net.parameters)
        agree(matrix(model, net.parameters), C, 1e-13)
        newton = llqr.quadratic_model(net, net.parameters, "newton")
        assert float((matrix(newton, net.parameters) - C).norm()) > 0.1 * float(C.norm())


def test_ignored_rows_stay_out():
    """The curvature is that of the batch without them."""
    net = with_loss(lambda z: F.cross_entropy(z, IGNORED))
    kept = IGNORED >= 0
    without = lambda: (F.cross_entropy(z := net.outputs()[kept], IGNORED[kept]), z)  # noqa: E731
    d = torch.randn_like(net.matrices["g"])
    a, b = (llqr.quadratic_model(f, net.parameters) for f in (net, without))
    agree(product(a, net.parameters, d), product(b, net.parameters, d))


# -- divergences -----------------------------------------------------------------------------------


def kl(z: Tensor, z0: Tensor) -> Tensor:
    """KL(p || p0)."""
    log_p, log_p0 = z.log_softmax(-1), z0.log_softmax(-1)
    return (log_p.exp() * (log_p - log_p0)).sum(-1).mean()


def reverse_kl(z: Tensor, z0: Tensor) -> Tensor:
    return kl(z0, z)


def renyi(order: float) -> Callable[[Tensor, Tensor], Tensor]:
    def divergence(z: Tensor, z0: Tensor) -> Tensor:
        mixed = order * z.log_softmax(-1) + (1 - order) * z0.log_softmax(-1)
        return mixed.logsumexp(-1).mean() / (order - 1)

    return divergence


DIVERGENCES = {
    "kl": (kl, 1.0),
    "reverse kl": (reverse_kl, 1.0),
    "renyi 1/2": (renyi(0.5), 0.5),
    "renyi 2": (renyi(2.0), 2.0),
}


@pytest.mark.parametrize("net", ["mlp", "attention"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_multiples_of_the_fisher(name, net):
    net = case(net)

    def per_row(z: Tensor, z0: Tensor) -> Tensor:
        return divergence(z.reshape(-1, 3), z0.reshape(-1, 3))

    divergence, factor = DIVERGENCES[name]
    model = llqr.quadratic_model(net, net.parameters, llqr.Divergence(per_row))
    d = torch.randn_like(net.matrices["g"])
    agree(vector(model.gradient), net.matrices["g"])  # of the loss, not of the divergence
    agree(product(model, net.parameters, d), factor * (net.matrices["fisher"] @ d))


def test_an_intermediate_layer_metric():
    """The paper's intermediate-layer metrics: D looks at hidden features."""
    net = mlp()
    x = torch.randn(6, 4, dtype=F64)

    def features() -> dict[str, Tensor]:
        hidden = net.model[1](net.model[0](x))
        return {"hidden": hidden, "logits": net.model[2](hidden)}

    def forward() -> tuple[Tensor, dict[str, Tensor]]:
        out = features()
        return F.cross_entropy(out["logits"], Y), out

    def squared(out: dict[str, Tensor], out0: dict[str, Tensor]) -> Tensor:
        hidden = 0.5 * (out["hidden"] - out0["hidden"]).square().sum() / 6
        return 0.3 * hidden + kl(out["logits"], out0["logits"])

    start = {k: v.detach() for k, v in features().items()}
    C = gauss_newton(features(), lambda out: squared(out, start), net.parameters)
    model = llqr.quadratic_model(forward, net.parameters, llqr.Divergence(squared))
    agree(matrix(model, net.parameters), C)
    # Of the hidden features alone, the head has no curvature.
    only = llqr.Divergence(lambda out, out0: squared(out, out0) - kl(out["logits"], out0["logits"]))
    model = llqr.quadratic_model(forward, net.parameters, only)
    head = torch.cat([torch.zeros(25, dtype=F64), torch.ones(18, dtype=F64)])
    assert not product(model, net.parameters, head).any()


def test_divergence_is_checked():
    net = case("mlp")
    with says(TypeError, "divergence", "kl"):
        llqr.Divergence("kl")  # type: ignore[arg-type]
    for bad, said in ((lambda z, z0: (z - z0).square(), r"\(6, 3\)"), (lambda z, z0: 1.0, "1.0")):
        with says(ValueError, "divergence", said):
            llqr.quadratic_model(net, net.parameters, llqr.Divergence(bad))
