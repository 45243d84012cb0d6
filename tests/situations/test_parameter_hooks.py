"""Hooks on parameters: a refresh asks for no gradient that they were made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, gauss_newton, gradient_and_hessian
from products import curvature_matrix
from replaced import ready

X, Y = 5 * torch.linspace(-2, 2, 24, dtype=F64).view(6, 4).sin(), torch.tensor([0, 1, 2, 0, 1, 2])


def problem(outer_hook: Any = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = ready(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))

    def forward() -> tuple[Tensor, Tensor]:
        z = net(X)
        if outer_hook is not None:
            z.register_hook(outer_hook)
        return F.cross_entropy(z, Y), z

    return net, forward


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_hooks_that_clip(curvature: str):
    net, forward = problem()
    parameters = list(net.parameters())
    if curvature == "fisher":
        C = gauss_newton(net(X), lambda z: F.cross_entropy(z, Y), parameters)
    else:
        _, C = gradient_and_hessian(forward()[0], parameters)
    for p in parameters:
        p.register_hook(lambda g: g.clamp(-0.02, 0.02))
    found = curvature_matrix(llqr.quadratic_model(forward, parameters, curvature), parameters)
    agree(found, C)
    agree(found, found.T)


@pytest.mark.parametrize("kind", ["grad", "after accumulation", "on the outputs"])
def test_hooks_that_count(kind: str):
    """A logger sees the two gradients of each step, and none of a refresh."""
    calls: list[int] = []

    def count(*_: Any) -> None:
        calls.append(1)

    net, forward = problem(count if kind == "on the outputs" else None)
    if kind != "on the outputs":
        for p in net.parameters():
            hook = p.register_hook if kind == "grad" else p.register_post_accumulate_grad_hook
            hook(count)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    geometry = llqr.LLQR("kfac", every=1, lr=0.1)
    optimizer = llqr.Optimizer(base, net, geometry=geometry, perturbation=llqr.SAM(0.05))
    optimizer.refresh(forward)
    assert calls == []
    optimizer.minimize(forward)
    assert len(calls) == 2 * (1 if kind == "on the outputs" else 4)


def test_hooks_come_back_after_an_error():
    net, _ = problem()
    for p in net.parameters():
        p.register_hook(lambda g: 2 * g)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise ArithmeticError("on purpose")

    def forward() -> tuple[Tensor, Tensor]:
        z = Broken.apply(net(X))
        return F.cross_entropy(z, Y), z

    with pytest.raises(ArithmeticError, match="on purpose"):
        llqr.quadratic_model(forward, net.parameters())
    F.cross_entropy(net(X), Y).backward()
    hooked = [p.grad.clone() for p in net.parameters()]
    for p in net.parameters():
        p._backward_hooks.clear()
        p.grad = None
    F.cross_entropy(net(X), Y).backward()
    for p, g in zip(net.parameters(), hooked, strict=True):
        assert torch.equal(g, 2 * p.grad)


def test_a_mask_on_gradients_still_holds_for_the_steps():
    """Entries kept at zero by a hook stay there; the refresh between sees the whole network."""
    net, forward = problem()
    weight = net[0].weight
    mask = torch.rand_like(weight) < 0.5
    with torch.no_grad():
        weight.mul_(mask)
    weight.register_hook(lambda g: g * mask)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, net, geometry=llqr.LLQR("diagonal", every=1, lr=0.1))
    for _ in range(4):
        optimizer.minimize(forward)
    assert not weight[~mask].any() and weight[mask].any()
