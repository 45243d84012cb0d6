"""Gradient, products and value of the quadratic model against explicit matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr
from explicit import F64, agree, gauss_newton, gradient_and_hessian, split, vector
from tiny import says


class Case:
    """A model, its outputs, and the loss as a function of them."""

    def __init__(
        self, model: nn.Module, run: Callable[[nn.Module], Any], loss: Callable[[Any], Tensor]
    ) -> None:
        self.model, self.loss = model.to(F64).eval(), loss
        with torch.no_grad():  # away from the small default initialisation
            for p in self.model.parameters():
                p.copy_(0.7 * torch.randn_like(p))
        self.outputs = lambda: run(self.model)

    def __call__(self) -> tuple[Tensor, Any]:
        z = self.outputs()
        return self.loss(z), z

    @functools.cached_property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    @functools.cached_property
    def matrices(self) -> dict[str, Tensor]:
        """g and C in full."""
        fisher = gauss_newton(self.outputs(), self.loss, self.parameters)
        with sdpa_kernel(SDPBackend.MATH):  # the attention kernel that has second derivatives
            g, hessian = gradient_and_hessian(self()[0], self.parameters)
        return {"g": g, "fisher": fisher, "newton": hessian}


def product(model: llqr.QuadraticModel, parameters: list[Tensor], d: Tensor) -> Tensor:
    return vector(model.product(split(d, parameters)))


def matrix(model: llqr.QuadraticModel, parameters: list[Tensor]) -> Tensor:
    """C, column by column."""
    n = sum(p.numel() for p in parameters)
    return torch.stack([product(model, parameters, e) for e in torch.eye(n, dtype=F64)], 1)


def cross_entropy(rows: int, classes: int = 3, **options: Any) -> Callable[[Tensor], Tensor]:
    y = torch.randint(classes, (rows,))
    return lambda z: F.cross_entropy(z.reshape(-1, classes), y, **options)


# -- networks --------------------------------------------------------------------------------------


def mlp(activation: type[nn.Module] = nn.Tanh) -> Case:
    x = torch.randn(6, 4, dtype=F64)
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))
    net = Case(model, lambda m: m(x), cross_entropy(6))
    net.x = x
    return net


def conv_net() -> Case:
    x = torch.randn(4, 2, 5, 5, dtype=F64)
    norm = nn.BatchNorm2d(3)
    norm.running_mean = 0.3 * torch.randn(3)
    norm.running_var = 0.5 + torch.rand(3)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), norm, nn.GELU(), nn.Flatten(), nn.Linear(27, 3)
    )
    return Case(model, lambda m: m(x), cross_entropy(4))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def attention() -> Case:
    x = torch.randn(2, 3, 4, dtype=F64)
    return Case(SelfAttention(), lambda m: m(x), cross_entropy(6))


def encoder() -> Case:
    x = torch.randn(2, 3, 4, dtype=F64)
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True, norm_first=True)
    return Case(nn.Sequential(layer, nn.Linear(4, 3)), lambda m: m(x), cross_entropy(6))


def embedding() -> Case:
    tokens = torch.randint(7, (3, 4))
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3))
    return Case(model, lambda m: m(tokens), cross_entropy(3))


class Tied(nn.Module):
    """The embedding is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


def tied() -> Case:
    tokens = torch.randint(6, (2, 4))
    return Case(Tied(), lambda m: m(tokens), cross_entropy(8, 6))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def gru() -> Case:
    x = torch.randn(3, 4, 3, dtype=F64)
    return Case(Recurrent(), lambda m: m(x), cross_entropy(3))


NETS: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "mlp-relu": lambda: mlp(nn.ReLU),
    "conv-bn": conv_net,
    "attention": attention,
    "encoder": encoder,
    "embedding": embedding,
    "tied": tied,
    "gru": gru,
}


@functools.cache
def case(name: str) -> Case:
    with torch.random.fork_rng([]):
        torch.manual_seed(sorted(NETS).index(name))
        return NETS[name]()


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


# -- losses ----------------------------------------------------------------------------------------


def with_loss(loss: Callable[[Any], Tensor]) -> Case:
    x = torch.randn(6, 4, dtype=F64)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Case(model, lambda m: m(x), loss)


Y = torch.tensor([0, 2, 1, 1, 0, 2])
IGNORED = torch.tensor([0, -100, 1, 1, -100, 2])
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=F64)
MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=F64)
TARGET = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
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
    for curvature in ("fisher", llqr.Divergence(kl)):
        with says(ValueError, "loss alone", "outputs"):
            llqr.quadratic_model(lambda: net()[0], net.parameters, curvature)
    with says(ValueError, "loss alone", "outputs"):
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


# -- no trace --------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Batch norm, dropout, attention: what a forward may leave traces of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.drop(self.norm(self.conv(x)).relu()).mT
        return self.head(self.encoder(h).mean(1))


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_refresh_leaves_no_trace(curvature, fails):
    model = Everything()
    model.encoder.eval()  # a mode of its own is kept
    x, y = torch.randn(4, 2, 5), torch.tensor([0, 1, 2, 1])
    modes, passes = [], []

    def forward() -> tuple[Tensor, Tensor]:
        modes.append(any(m.training for m in model.modules()))
        torch.randn(3)
        z = model(x)
        if fails:
            raise RuntimeError("on purpose")
        passes.append(z.detach())
        return F.cross_entropy(z, y), z

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    geometry = llqr.LLQR("kfac", curvature=curvature, steps=3)
    optimizer = llqr.Optimizer(base, model, geometry=geometry)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    training = {n: m.training for n, m in model.named_modules()}
    fast, random = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            optimizer.refresh(forward)
    else:
        optimizer.refresh(forward)
    assert modes == [False]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert {n: m.training for n, m in model.named_modules()} == training
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), k
    for n, p in model.named_parameters():
        assert p.grad is grads[n][0] and torch.equal(p.grad, grads[n][1]), n
    assert optimizer.state == {}


# -- wrapped models --------------------------------------------------------------------------------


class DistributedDataParallel(nn.Module):
    """Wraps as torch's class of that name does; a forward through it may run hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def wrapped_refresh(wrap: Callable[[nn.Module], nn.Module], curvature: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    outer = wrap(model)

    def forward() -> tuple[Tensor, Tensor]:
        z = outer(x)
        return F.cross_entropy(z, y), z

    base = torch.optim.SGD(outer.parameters(), lr=0.1)
    geometry = llqr.LLQR("kfac", curvature=curvature, steps=5, lr=0.1, ema=0.0)
    optimizer = llqr.Optimizer(base, outer, geometry=geometry)
    if wrap is compiled:
        optimizer.minimize(forward, refresh=forward)  # compiled code runs
    report = optimizer.refresh(forward)
    return report, geometry


def compiled(model: nn.Module) -> nn.Module:
    """A backend whose graphs refuse a double backward, as inductor's do, and builds fast."""
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize("wrap", [DistributedDataParallel, nn.DataParallel])
@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_wrapped_models_are_looked_through(wrap, curvature):
    plain, geometry = wrapped_refresh(lambda model: model, curvature)
    report, inside = wrapped_refresh(wrap, curvature)
    assert report.accepted and report.J_after == plain.J_after
    assert list(inside.state()) == list(geometry.state()) == [
        "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias",
    ]  # fmt: skip
    for name, entries in geometry.state().items():
        for key, value in entries.items():
            assert torch.equal(inside.state()[name][key], value)


def test_a_compiled_model_is_refreshed_in_eager_mode():
    report, geometry = wrapped_refresh(compiled, "fisher")
    assert report.accepted and report.change > 0.01
    assert "0.weight" in geometry.state()
