"""torch.func inside the forward, and the comparison of replaced operations with torch's own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr
from explicit import F64, agree, gauss_newton, vector
from llqr.curvature.linearised._gelu import Gelu
from products import check_fisher, curvature_matrix
from replaced import ready

X, Y = torch.linspace(-2, 2, 24, dtype=F64).view(6, 4).sin(), torch.tensor([0, 1, 1, 0, 1, 0])


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, Y)


def test_a_block_under_vmap():
    """Batched heads, beside ordinary layers that are replaced."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.plain = nn.Parameter(torch.zeros(3, 2, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x) + vmap(lambda w: F.linear(x, w))(self.w).tanh().mean(0)

    net = ready(Heads())
    check_fisher(lambda: (cross_entropy(z := net(X)), z), cross_entropy, list(net.parameters()))


def test_an_ensemble_by_functional_call():
    members = [
        ready(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 2)))
        for _ in range(3)
    ]
    stacked, buffers = stack_module_state(members)
    parameters = [p.requires_grad_() for p in stacked.values()]

    def call(values: Any, rest: Any) -> Tensor:
        return functional_call(members[0], (values, rest), (X,))

    def forward() -> tuple[Tensor, Tensor]:
        z = vmap(call)(stacked, buffers).mean(0)
        return cross_entropy(z), z

    check_fisher(forward, cross_entropy, parameters)


def test_attention_under_vmap():
    net = ready(nn.Linear(4, 4))

    def forward() -> tuple[Tensor, Tensor]:
        h = net(X).view(2, 3, 4)
        z = vmap(F.scaled_dot_product_attention)(h, h.sin(), h.cos()).flatten(0, 1)[:, :2]
        return cross_entropy(z), z

    with sdpa_kernel(SDPBackend.MATH):
        check_fisher(forward, cross_entropy, list(net.parameters()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, once
def test_derivatives_by_transforms():
    """Gradients, Jacobians and directional derivatives in the input, all in one forward."""
    net = ready(nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)))
    d = X.cos()

    def forward() -> tuple[Tensor, Tensor]:
        slope = grad(lambda x: net(x).square().sum())(X)
        along = jvp(net, (X,), (d,))[1]
        jacobian = vmap(jacrev(net))(X)
        z = net(X) + slope[:, :2] + along + jacobian.sum(2)
        return cross_entropy(z), z

    check_fisher(forward, cross_entropy, list(net.parameters()))


# -- the comparison --------------------------------------------------------------------------------


def two_layers(width: int) -> tuple[nn.Module, Any]:
    net = ready(nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 2)))
    calls: list[int] = []

    def forward() -> tuple[Tensor, Tensor]:
        calls.append(1)
        z = net(X)
        return cross_entropy(z), z

    forward.calls = calls  # type: ignore[attr-defined]
    return net, forward


def test_operations_are_compared_once_for_each_kind_of_forward():
    net, forward = two_layers(13)  # a width that no other test has
    counts = []
    for _ in range(3):
        model = llqr.quadratic_model(forward, net.parameters())
        model.product(model.gradient)
        counts.append(len(forward.calls))
    assert counts == [2, 3, 4]


@pytest.mark.parametrize("wrong", ["vjp", "jvp"])
def test_a_wrong_replacement_steps_aside(wrong: str, monkeypatch, caplog):
    """Products are torch's own then, without a warning to the user, and so ever after."""
    monkeypatch.setattr(
        Gelu, wrong, lambda self, d, *needed: 2 * d[0] if wrong == "jvp" else (2 * d,)
    )
    net, forward = two_layers({"vjp": 14, "jvp": 15}[wrong])
    parameters = list(net.parameters())
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "llqr"):
            model = llqr.quadratic_model(forward, parameters)
        agree(vector(model.gradient), vector(torch.autograd.grad(forward()[0], parameters)))
        C = gauss_newton(forward()[1], cross_entropy, parameters)
        agree(curvature_matrix(model, parameters), C)
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_a_forward_that_does_not_repeat_itself_is_no_disagreement(caplog):
    """A queue of keys, read and then written: the second run meets another loss."""
    net, shift = ready(nn.Linear(4, 16)), torch.zeros(16, dtype=F64)
    target = torch.tensor([0, 1, 2, 3, 4, 5])

    def forward() -> tuple[Tensor, Tensor]:
        z = net(X) + shift
        shift.add_(z.detach().mean(0))
        return F.cross_entropy(z, target), z

    with caplog.at_level(logging.WARNING, "llqr"):
        model = llqr.quadratic_model(forward, net.parameters())
        model.product(model.gradient)
    assert not caplog.records
    z = net(X)  # the first run is the one that is expanded
    agree(
        vector(model.gradient),
        vector(torch.autograd.grad(F.cross_entropy(z, target), list(net.parameters()))),
    )
