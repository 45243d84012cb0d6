"""Functions whose backward is not the derivative of their forward, or not linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import llqr
from explicit import F64, agree, vector
from products import curvature_matrix
from replaced import ready

X, Y = torch.linspace(-2, 2, 24, dtype=F64).view(6, 4).sin(), torch.tensor([0, 1, 2, 0, 1, 2])


def rounded(x: Tensor) -> Tensor:
    return torch.round(x * 4) / 4


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class StraightThroughOnce(StraightThrough):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Saturating(torch.autograd.Function):
    """The sign, whose backward lets through what lies within [-1, 1] (binary networks)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0].abs() <= 1)


class Reversal(torch.autograd.Function):
    """The identity, whose backward turns the gradient round (domain-adversarial training)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


class Clipped(torch.autograd.Function):
    """The identity, whose backward clips: no linear map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-1e-3, 1e-3)


class Normalised(Clipped):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / g.norm()


class Noisy(Clipped):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.rand_like(g)


class KeptSlope(torch.autograd.Function):
    """The sine, whose slope is computed in the forward: its own second derivative is hidden."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class FusedCrossEntropy(torch.autograd.Function):
    """The gradient is computed in the forward, as fused kernels do: H is hidden."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.gradient = (z.softmax(1) - F.one_hot(Y, 3)) / len(z)
        return F.cross_entropy(z, Y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.gradient


def composed(value: Callable[[Tensor], Tensor], surrogate: Callable[[Tensor], Tensor]) -> Any:
    """The value of one function with the derivatives of another, without a Function."""
    return lambda x: surrogate(x) + (value(x) - surrogate(x)).detach()


def problem(between: Callable[[Tensor], Tensor], top: Any = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    net = ready(nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)]))

    def forward() -> tuple[Tensor, Tensor]:
        h = F.linear(X, between(net[0].weight), net[0].bias).tanh()
        z = net[1](between(h))
        return (F.cross_entropy(z, Y) if top is None else top(z)), z

    return net, forward


SURROGATES = {
    "straight through": (StraightThrough.apply, composed(rounded, lambda x: x)),
    "saturating": (Saturating.apply, composed(torch.sign, lambda x: x.clamp(-1, 1))),
    "reversal": (Reversal.apply, composed(lambda x: x, lambda x: -0.5 * x)),
    "kept slope": (KeptSlope.apply, torch.sin),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_the_metric_is_that_of_the_surrogate(name: str):
    """As training's gradient is; without a warning."""
    function, same = SURROGATES[name]
    (net, forward), (other, expected) = problem(function), problem(same)
    model = llqr.quadratic_model(forward, net.parameters())
    C = curvature_matrix(model, list(net.parameters()))
    plain = llqr.quadratic_model(expected, other.parameters())
    agree(C, curvature_matrix(plain, list(other.parameters())))
    agree(C, C.T)
    agree(vector(model.gradient), vector(plain.gradient))


@pytest.mark.parametrize("name", ["straight through", "saturating", "reversal"])
def test_the_hessian_of_a_surrogate(name: str):
    """Differences of the gradient would mix it with the forward."""
    function, same = SURROGATES[name]
    (net, forward), (other, expected) = problem(function), problem(same)
    C = curvature_matrix(
        llqr.quadratic_model(forward, net.parameters(), "newton"), list(net.parameters())
    )
    plain = llqr.quadratic_model(expected, other.parameters(), "newton")
    agree(C, curvature_matrix(plain, list(other.parameters())))


def test_the_hessian_of_a_slope_that_is_kept_is_taken_by_differences():
    (net, forward), (other, expected) = problem(KeptSlope.apply), problem(torch.sin)
    model = llqr.quadratic_model(forward, net.parameters(), "newton")
    with pytest.warns(UserWarning, match="KeptSlope.*central differences"):
        C = curvature_matrix(model, list(net.parameters()))
    plain = llqr.quadratic_model(expected, other.parameters(), "newton")
    agree(C, curvature_matrix(plain, list(other.parameters())), 1e-6)


@pytest.mark.parametrize("function", [Clipped, Normalised, Noisy, StraightThroughOnce])
def test_what_is_no_linear_map_is_refused(function: Any):
    net, forward = problem(function.apply)
    model = llqr.quadratic_model(forward, net.parameters())
    with pytest.raises(ValueError, match=f"{function.__name__}.*linear"):
        model.product(model.gradient)


def test_a_hessian_without_derivatives_is_refused():
    """Neither a second backward nor differences of the gradient give one."""
    net, forward = problem(StraightThroughOnce.apply)
    model = llqr.quadratic_model(forward, net.parameters(), "newton")
    with pytest.raises(ValueError, match="StraightThroughOnce.*derivative"):
        model.product(model.gradient)


def test_a_fused_loss_is_refused():
    net, forward = problem(torch.tanh, FusedCrossEntropy.apply)
    with pytest.raises(ValueError, match="second derivative"):
        llqr.quadratic_model(forward, net.parameters())


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_quantised_training_goes_as_without_a_function(structure: str):
    losses = []
    for between in SURROGATES["straight through"]:
        net, forward = problem(between)
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer = llqr.Optimizer(base, net, geometry=llqr.LLQR(structure, every=2, lr=0.1))
        losses.append([float(optimizer.minimize(forward)) for _ in range(8)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_a_loss_that_is_fused_in_part_is_refused():
    """H is not zero, only wrong: found by differences of the loss's slope."""
    net, forward = problem(torch.tanh, lambda z: FusedCrossEntropy.apply(z) + z.square().mean())
    model = llqr.quadratic_model(forward, net.parameters())
    with pytest.raises(ValueError, match="FusedCrossEntropy.*second derivative of the loss"):
        model.product(model.gradient)


def test_a_loss_function_with_all_its_derivatives():
    class Logistic(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return F.softplus(z).mean()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (z,) = ctx.saved_tensors
            return g * z.sigmoid() / z.numel()

    net, forward = problem(torch.tanh, Logistic.apply)
    other, expected = problem(torch.tanh, lambda z: F.softplus(z).mean())
    C = curvature_matrix(llqr.quadratic_model(forward, net.parameters()), list(net.parameters()))
    plain = llqr.quadratic_model(expected, other.parameters())
    agree(C, curvature_matrix(plain, list(other.parameters())))


# -- the same by hooks on what the forward computes ------------------------------------------------


def hooked(hook: Any) -> Callable[[Tensor], Tensor]:
    def between(x: Tensor) -> Tensor:
        x = 1 * x
        x.register_hook(hook)
        return x

    return between


def test_a_reversal_by_a_hook():
    (net, forward), (other, expected) = problem(hooked(lambda g: -0.5 * g)), problem(Reversal.apply)
    C = curvature_matrix(llqr.quadratic_model(forward, net.parameters()), list(net.parameters()))
    plain = llqr.quadratic_model(expected, other.parameters())
    agree(C, curvature_matrix(plain, list(other.parameters())))


def test_a_hook_that_only_looks():
    seen: list[Any] = []
    (net, forward), (other, expected) = (
        problem(hooked(seen.append)),
        problem(torch.clone),
    )
    C = curvature_matrix(llqr.quadratic_model(forward, net.parameters()), list(net.parameters()))
    plain = llqr.quadratic_model(expected, other.parameters())
    agree(C, curvature_matrix(plain, list(other.parameters())))


@pytest.mark.parametrize(
    "hook", [lambda g: g.clamp(-1e-3, 1e-3), lambda g: g / g.norm(), lambda g: g * torch.rand(1)]
)
def test_a_hook_that_is_no_linear_map_is_refused(hook: Any):
    net, forward = problem(hooked(hook))
    model = llqr.quadratic_model(forward, net.parameters())
    with pytest.raises(ValueError, match="a hook on a tensor.*linear"):
        model.product(model.gradient)


def test_a_deep_equilibrium():
    """The backward pass solves a linear system in a hook, without a graph of its own."""
    torch.manual_seed(0)
    inner, outer = ready(nn.Linear(4, 4)), ready(nn.Linear(4, 3))
    parameters = [*inner.parameters(), *outer.parameters()]
    with torch.no_grad():
        inner.weight.mul_(0.3)

    def settled(z: Tensor) -> Tensor:
        for _ in range(60):
            z = (inner(z) + X).tanh()
        return z

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            z = settled(torch.zeros_like(X))
        z = (inner(z) + X).tanh()
        at = z.detach().requires_grad_()
        again = (inner(at) + X).tanh()

        def solve(g: Tensor) -> Tensor:
            v = g.detach()
            for _ in range(60):
                v = torch.autograd.grad(again, at, v, retain_graph=True)[0] + g.detach()
            return v

        z.register_hook(solve)
        z = outer(z)
        return F.cross_entropy(z, Y), z

    def unrolled() -> tuple[Tensor, Tensor]:
        z = outer(settled(torch.zeros_like(X)))
        return F.cross_entropy(z, Y), z

    model = llqr.quadratic_model(forward, parameters)
    with pytest.warns(UserWarning, match="a hook on a tensor.*forward-mode"):
        C = curvature_matrix(model, parameters)
    expected = llqr.quadratic_model(unrolled, parameters)
    agree(vector(model.gradient), vector(expected.gradient), 1e-9)
    agree(C, curvature_matrix(expected, parameters), 1e-9)


class ClippedAt(torch.autograd.Function):
    """Pass through, with gradients clipped on the way back."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-ctx.limit, ctx.limit), None


@pytest.mark.parametrize("limit", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_a_backward_that_clips_is_refused_at_whatever_size_it_clips(seed, limit):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(4, 5), torch.arange(4) % 3

    def forward():
        z = model[2](ClippedAt.apply(model[:2](x), limit))
        return nn.functional.cross_entropy(z, y), z

    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, geometry=llqr.LLQR("kfac")
    )
    with pytest.raises(ValueError, match="ClippedAt.*linear in"):
        optimizer.refresh(forward)
