"""Networks around one operation, and their products against torch's own double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, split, vector


def plain_product(
    z: Tensor, loss: Callable[[Tensor], Tensor], parameters: list[Tensor], d: Tensor
) -> Tensor:
    """J' H J d by torch's own double backward."""
    u = torch.zeros_like(z, requires_grad=True)
    options = {"retain_graph": True, "materialize_grads": True}
    gu = torch.autograd.grad(z, parameters, u, create_graph=True, materialize_grads=True)
    (zd,) = torch.autograd.grad(gu, u, split(d, parameters), retain_graph=True)
    free = z.detach().requires_grad_()
    (gz,) = torch.autograd.grad(loss(free), free, create_graph=True)
    (hz,) = torch.autograd.grad(gz, free, zd)
    return vector(torch.autograd.grad(z, parameters, hz, **options))


class Net(nn.Module):
    """An operation between others, so that its input, too, carries a gradient."""

    def __init__(self, op: nn.Module, shape: tuple[int, ...], inner: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape[1:])) if inner else None
        self.op = op
        width = self.body(torch.zeros(shape)).shape[1]
        self.head = nn.Linear(width, 3)

    def body(self, x: Tensor) -> Tensor:
        x = x if self.scale is None else torch.sin(self.scale * x)
        return self.op(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def ready(net: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, away from the initialisation."""
    with torch.no_grad():
        for module in net.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.copy_(0.3 * torch.randn_like(module.running_mean))
                module.running_var.copy_(0.5 + torch.rand_like(module.running_var))
        for p in net.parameters():
            p.copy_(0.7 * torch.randn_like(p))
    return net.to(F64).eval()


def check(net: nn.Module, x: Tensor, tolerance: float = 1e-10, value: float = 0) -> None:
    y = torch.randint(3, (len(x),))

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return loss(z), z

    parameters = [p for p in net.parameters() if p.requires_grad]
    model = llqr.quadratic_model(forward, parameters)
    expected, _ = forward()
    # The very kernels of the network, but for attention's.
    torch.testing.assert_close(model.loss, expected.detach(), rtol=value, atol=0)
    g = vector(torch.autograd.grad(expected, parameters, materialize_grads=True))
    agree(vector(model.gradient), g, tolerance)
    for _ in range(2):
        d = torch.randn_like(g)
        expected = plain_product(net(x), loss, parameters, d)
        assert expected.any()
        agree(vector(model.product(split(d, parameters))), expected, tolerance)
    # A tangent of each parameter alone takes the operations' other branches.
    for i, p in enumerate(parameters):
        d = vector([torch.randn_like(q) if i == j else q * 0 for j, q in enumerate(parameters)])
        expected = plain_product(net(x), loss, parameters, d)
        image = vector(model.product(split(d, parameters)))
        floor = float(expected.abs().max()) or 1.0
        assert float((image - expected).abs().max()) <= tolerance * floor, tuple(p.shape)
    # Operations that are found wrong are not used: what was compared above is theirs.
    assert model._terms[0][1]._ways[0].name == "replaced operations"


class Heads(nn.Module):
    """Attention over positions, from one linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.options = nn.Linear(6, 18), nn.Linear(6, 6), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.out(mixed.transpose(1, 2).flatten(2))
