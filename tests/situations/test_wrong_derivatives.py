"""Operations of torch whose backward, or whose higher derivatives, are not what they should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import llqr
from explicit import F64, agree, gauss_newton, vector
from llqr.curvature import curvature_samples
from products import curvature_matrix

X, Y = torch.linspace(-2, 2, 12, dtype=F64).view(6, 2).sin(), torch.tensor([0, 1, 2, 0, 1, 2])


def hessian_by_differences(forward: Callable[[], Any], parameters: Sequence[Tensor]) -> Tensor:
    """Central differences of the gradient, entry by entry."""
    return differences(lambda: vector(torch.autograd.grad(forward()[0], parameters)), parameters)


def differences(function: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """One row for every entry of the parameters."""
    rows, e = [], 1e-5
    for p in parameters:
        for i in range(p.numel()):
            entry, ends = p.data.view(-1), []
            for step in (e, -2 * e):
                entry[i] += step
                ends.append(function().detach())
            entry[i] += e
            rows.append((ends[0] - ends[1]) / (2 * e))
    return torch.stack(rows)


# -- the third derivative, of forwards that differentiate ------------------------------------------


class Logit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid().square().logit()


class Native(nn.LayerNorm):
    """What no function mode sees in TorchScript."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, [4], self.weight, self.bias, self.eps)[0]


INNER: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "no statistics": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.Flatten(),
    ),
    "weight norm": lambda: weight_norm(nn.Linear(4, 4)),
    "logit": Logit,
}


def residual(net: nn.Module, way: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """u' + u u' - 1, squared: the residual of a differential equation."""

    def forward() -> tuple[Tensor, Tensor]:
        if way == "torch.func":
            u, du = net(X), torch.func.grad(lambda x: net(x).sum())(X)
        else:
            at = X.clone().requires_grad_()
            u = checkpoint(net, at, use_reentrant=False) if way == "checkpoint" else net(at)
            (du,) = torch.autograd.grad(u.sum(), at, create_graph=True)
        r = du[:, :1] + u * du[:, 1:] - 1
        return r.square().mean(), r

    return forward


def network(inner: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), inner, nn.Tanh(), nn.Linear(4, 1)).to(F64)


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "grad") for name in INNER]
    + [("layer norm", "torch.func"), ("no statistics", "torch.func"), ("logit", "torch.func")]
    + [("layer norm", "checkpoint"), ("weight norm", "checkpoint")],
)
def test_the_hessian_of_a_differential_equation(name: str, way: str):
    net = network(INNER[name]())
    parameters, forward = list(net.parameters()), residual(net, way)
    C = curvature_matrix(llqr.quadratic_model(forward, parameters, "newton"), parameters)
    agree(C, C.T, 1e-10)
    agree(C, hessian_by_differences(forward, parameters), 1e-6)


class Rows(llqr.Fisher):
    """Samples that are the rows of J."""

    def sample(self, loss: Tensor, outputs: Tensor, *, count: int, generator: Any) -> list[Tensor]:
        return [torch.eye(count, dtype=F64).view(count, *outputs.shape)]


def test_samples_after_an_inner_step():
    """J' of a step's result takes a second derivative of the weight norm."""
    torch.manual_seed(0)
    v, g = torch.randn(3, 2, dtype=F64), torch.rand(3, 1, dtype=F64)
    parameters = [v.requires_grad_(), g.requires_grad_()]

    def forward() -> tuple[Tensor, Tensor]:
        inner = F.cross_entropy(X @ torch._weight_norm(v, g, 0).T, Y)
        (slope,) = torch.autograd.grad(inner, v, create_graph=True)
        z = X @ torch._weight_norm(v - slope, g, 0).T
        return F.cross_entropy(z, Y), z

    drawn = curvature_samples(forward, parameters, Rows()).draw(18, torch.Generator())
    J = torch.cat([w.flatten(1) for w in drawn], 1)
    agree(J.T, differences(lambda: forward()[1].flatten(), parameters), 1e-6)


@pytest.mark.parametrize("name", ["batch norm", "instance norm"])
def test_running_statistics_advance_as_in_torch(name: str):
    net, other = network(INNER[name]()), network(INNER[name]())
    llqr.quadratic_model(residual(net, "grad"), net.parameters(), "newton")
    for _ in range(2):  # the forward ran twice
        residual(other, "grad")()
    for a, b in zip(net.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_no_mode_sees_is_taken_by_differences():
    net = network(Native(4))
    parameters, forward = list(net.parameters()), residual(net, "grad")
    model = llqr.quadratic_model(forward, parameters, "newton")
    with pytest.warns(UserWarning, match="derivative of a layer norm.*central differences"):
        C = curvature_matrix(model, parameters)
    agree(C, hessian_by_differences(forward, parameters), 1e-6)


# -- embeddings ------------------------------------------------------------------------------------

INDEX = torch.tensor([[0, 1, 1], [2, 0, 1], [3, 3, 0], [1, 4, 4], [1, 1, 2], [0, 2, 1]])
COUNTS = torch.bincount(INDEX.view(-1)).to(F64)[:, None]


def classified(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    z = h.flatten(1).tanh() @ weight
    return F.cross_entropy(z, Y), z


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_an_embedding_scaled_by_frequency(curvature: str, padding: int | None):
    """As of W0 + S (W - W0), whose derivative S the backward follows."""
    torch.manual_seed(0)
    table, last = torch.randn(5, 3, dtype=F64), torch.randn(9, 3, dtype=F64)
    parameters = [table.requires_grad_(), last.requires_grad_()]
    scale = 1 / COUNTS
    if padding is not None:
        scale[padding] = 0

    def forward() -> tuple[Tensor, Tensor]:
        return classified(F.embedding(INDEX, table, padding, scale_grad_by_freq=True), last)

    def surrogate() -> tuple[Tensor, Tensor]:
        return classified((table.detach() + scale * (table - table.detach()))[INDEX], last)

    found = llqr.quadratic_model(forward, parameters, curvature)
    expected = llqr.quadratic_model(surrogate, parameters, curvature)
    agree(vector(found.gradient), vector(torch.autograd.grad(forward()[0], parameters)))
    agree(curvature_matrix(found, parameters), curvature_matrix(expected, parameters))


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_of_padding_stand_still_also_for_differences(scaled: bool):
    torch.manual_seed(0)
    table, last = torch.randn(5, 3, dtype=F64), torch.randn(9, 3, dtype=F64)
    parameters = [table.requires_grad_(), last.requires_grad_()]

    def forward(distance: Any = torch.cdist) -> tuple[Tensor, Tensor]:
        h = F.embedding(INDEX, table, 0, scale_grad_by_freq=scaled).flatten(1)
        return classified(h + 0.1 * distance(h, h + 1).mean(1, keepdim=True), last)

    def plain_distance(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] - b).square().sum(-1).sqrt()

    model = llqr.quadratic_model(forward, parameters)
    with pytest.warns(UserWarning, match="cdist"):
        C = curvature_matrix(model, parameters)
    expected = llqr.quadratic_model(lambda: forward(plain_distance), parameters)
    agree(C, curvature_matrix(expected, parameters), 1e-8)


def test_a_scaled_bag_is_refused():
    bag = nn.EmbeddingBag(5, 3, scale_grad_by_freq=True, mode="sum").to(F64)
    last = torch.randn(3, 3, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"EmbeddingBag\(scale_grad_by_freq=True\)"):
        llqr.quadratic_model(lambda: classified(bag(INDEX), last), [bag.weight, last])


def test_a_quantisation_without_a_second_derivative_is_refused():
    torch.manual_seed(0)
    weight, scale = torch.randn(3, 2, requires_grad=True), torch.full((1,), 0.1, requires_grad=True)

    def forward() -> tuple[Tensor, Tensor]:
        quantise = torch._fake_quantize_learnable_per_tensor_affine
        z = X.float() @ quantise(weight, scale, torch.zeros(1), -8, 7, 1.0).T
        return F.cross_entropy(z, Y), z

    with pytest.raises(ValueError, match="FakeQuantizeLearnable"):
        model = llqr.quadratic_model(forward, [weight, scale])
        model.product(model.gradient)


# -- hooks on nodes of the graph -------------------------------------------------------------------


def hooked(hook: Any, prehook: bool = False) -> tuple[list[Tensor], Any]:
    torch.manual_seed(0)
    first, last = torch.randn(2, 4, dtype=F64), torch.randn(4, 3, dtype=F64)
    parameters = [first.requires_grad_(), last.requires_grad_()]

    def forward() -> tuple[Tensor, Tensor]:
        h = (X @ first).sin()
        if h.grad_fn is not None:
            (h.grad_fn.register_prehook if prehook else h.grad_fn.register_hook)(hook)
        return classified(h, last)

    return parameters, forward


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_hooks_on_nodes_that_clip_are_refused(curvature: str, caplog: pytest.LogCaptureFixture):
    for prehook in (False, True):
        parameters, forward = hooked(
            lambda *gs: tuple(g.clamp(-1e-3, 1e-3) for g in gs[0]), prehook
        )
        with pytest.raises(ValueError, match=r"grad_fn\.register_hook.*is not linear|not linear"):
            llqr.quadratic_model(forward, parameters, curvature)
        with pytest.raises(ValueError, match=r"grad_fn\.register_hook.*is not linear"):
            curvature_samples(forward, parameters).draw(1, torch.Generator())
    assert not caplog.records  # the replaced operations are not to blame


def test_hooks_on_nodes_that_hide_their_derivative_are_refused():
    parameters, forward = hooked(lambda *gs: tuple(2 * g.detach() for g in gs[0]))
    with pytest.raises(ValueError, match=r"grad_fn\.register_hook.*not the transpose"):
        llqr.quadratic_model(forward, parameters)


@pytest.mark.parametrize("hook", [None, lambda *gs: tuple(-0.5 * g for g in gs[0])])
def test_linear_hooks_on_nodes_give_the_metric_of_the_surrogate(hook: Any):
    parameters, forward = hooked(hook or (lambda *gs: None))
    C = curvature_matrix(llqr.quadratic_model(forward, parameters), parameters)
    first, last = parameters

    def surrogate() -> Tensor:
        moved = first if hook is None else first.detach() * 1.5 - 0.5 * first
        return classified((X @ moved).sin(), last)[1]

    agree(C, gauss_newton(surrogate(), lambda z: F.cross_entropy(z, Y), parameters))


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("mode", ["all", "any"])
def test_hooks_on_many_tensors_rest_in_a_refresh(curvature: str, mode: str):
    """With a parameter among them they fail wherever backward() is not what runs."""
    net, calls = network(nn.Identity()), []

    def forward() -> tuple[Tensor, Tensor]:
        h = net[:3](X)
        register = torch.autograd.graph.register_multi_grad_hook
        register([h, net[0].weight], calls.append, mode=mode)
        z = net[3](h)
        return z.square().mean(), z

    model = llqr.quadratic_model(forward, net.parameters(), curvature)
    model.product(model.gradient)
    curvature_samples(forward, net.parameters()).draw(1, torch.Generator())
    assert not calls
    forward()[0].backward()
    assert len(calls) == 1
