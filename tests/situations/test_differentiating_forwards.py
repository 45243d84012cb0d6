"""Forwards that differentiate: residuals of equations, forces, inner loops, penalties."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr
from explicit import F64, agree, vector
from products import check_fisher
from replaced import ready

ACTIVATIONS = [nn.Tanh, nn.GELU, lambda: nn.GELU("tanh")]


def derivative(y: Tensor, x: Tensor, create_graph: bool = True) -> Tensor:
    return torch.autograd.grad(y.sum(), x, create_graph=create_graph)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", [1, 2])
def test_the_residual_of_a_differential_equation(activation: Callable[[], nn.Module], order: int):
    net = nn.Sequential(
        nn.Linear(2, 5), activation(), nn.LayerNorm(5), nn.Linear(5, 5), activation(),
        nn.Linear(5, 1),
    )  # fmt: skip
    net, points = ready(net), torch.rand(7, 2, dtype=F64)

    def forward() -> tuple[Tensor, Tensor]:
        at = points.clone().requires_grad_()
        u = net(at)
        du = derivative(u, at)
        if order == 2:
            du = derivative(du[:, 0], at)
        r = du[:, 0] + u[:, 0] * du[:, 1] - 1
        return r.square().mean(), r

    check_fisher(forward, lambda r: r.square().mean(), list(net.parameters()))


class Attending(nn.Module):
    """One tensor as query, key and value; and values computed from keys."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        k = self.inner(x)
        return self.outer(F.scaled_dot_product_attention(k.sin(), k, k.exp()))


ENERGIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 1)), (3, 4)),
    "one weight twice": (lambda: nn.Sequential(*[nn.Linear(4, 4), nn.GELU()] * 2), (3, 4)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.GELU(), nn.Conv1d(3, 1, 2)), (2, 2, 4)
    ),
    "conv_transpose2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.GELU(), nn.Conv2d(2, 1, 3)),
        (2, 2, 3, 3),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.GELU(), nn.Linear(3, 1)),
        (3, 4),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1)), (3, 4)
    ),
    "attention": (Attending, (2, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*ENERGIES, "batch norm in training mode"])
def test_energies_and_forces(name: str):
    """Interatomic potentials: the outputs are an energy and its negative derivative."""
    make, shape = ENERGIES[name.removesuffix(" in training mode")]
    net, x = ready(make()).train(name not in ENERGIES), torch.randn(shape, dtype=F64)

    def forward() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        at = x.clone().requires_grad_()
        energy = net(at).flatten(1).sum(1)
        force = -derivative(energy, at)
        return loss((energy, force)), (energy, force)

    def loss(z: tuple[Tensor, Tensor]) -> Tensor:
        return z[0].square().mean() + (z[1] - 1).square().mean()

    parameters = list(net.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # for what is expected
        check_fisher(forward, loss, parameters)


def test_an_inner_loop():
    """MAML: the outer loss runs through two inner steps of gradient descent."""
    net = ready(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)))
    xs, ys = torch.randn(2, 5, 3, dtype=F64), torch.randint(2, (2, 5))

    def forward() -> tuple[Tensor, Tensor]:
        fast = dict(net.named_parameters())
        for _ in range(2):
            inner = F.cross_entropy(functional_call(net, fast, xs[0]), ys[0])
            grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
            fast = {n: p - 0.3 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        z = functional_call(net, fast, xs[1])
        return F.cross_entropy(z, ys[1]), z

    check_fisher(forward, lambda z: F.cross_entropy(z, ys[1]), list(net.parameters()))


def test_an_adversarial_example_made_in_the_forward():
    """A derivative without a graph: its value is a constant to the loss."""
    net = ready(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)))
    x, y = torch.randn(5, 3, dtype=F64), torch.randint(2, (5,))

    def forward() -> tuple[Tensor, Tensor]:
        at = x.clone().requires_grad_()
        step = derivative(F.cross_entropy(net(at), y), at, create_graph=False)
        z = net(x + 0.1 * step)
        return F.cross_entropy(z, y), z

    check_fisher(forward, lambda z: F.cross_entropy(z, y), list(net.parameters()))


def test_a_gradient_penalty_beside_the_outputs():
    """The gradient of the loss has the penalty in it; C is that of the outputs."""
    net = ready(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)))
    x, y = torch.randn(5, 3, dtype=F64), torch.randint(2, (5,))
    parameters = list(net.parameters())

    def forward() -> tuple[Tensor, Tensor]:
        at = x.clone().requires_grad_()
        z = net(at)
        penalty = derivative(z.logsumexp(1), at).square().sum(1).mean()
        return F.cross_entropy(z, y) + penalty, z

    model = llqr.quadratic_model(forward, parameters)
    agree(vector(model.gradient), vector(torch.autograd.grad(forward()[0], parameters)), 1e-10)


def test_a_jacobian_taken_in_the_forward():
    net, x = ready(nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2))), torch.randn(2)

    def forward() -> tuple[Tensor, Tensor]:
        z = torch.autograd.functional.jacobian(net, x.to(F64), create_graph=True)
        return z.square().sum(), z

    check_fisher(forward, lambda z: z.square().sum(), list(net.parameters()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, once
def test_forward_mode_in_the_forward():
    net = ready(nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2)))
    x, d = torch.randn(2, 4, 2, dtype=F64)

    def forward() -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            z = forward_ad.unpack_dual(net(forward_ad.make_dual(x, d))).tangent
        return z.square().sum(), z

    check_fisher(forward, lambda z: z.square().sum(), list(net.parameters()))


def test_training_a_pinn_with_a_learned_metric():
    """Both curvatures refresh and train; the gradient of a refresh is that of the loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, 1)).to(F64)
    points = torch.linspace(0, 1, 12, dtype=F64)[:, None]

    def forward() -> tuple[Tensor, Tensor]:
        at = points.clone().requires_grad_()
        u = net(at)
        r = derivative(u, at) + u  # u' = -u, u(0) = 1
        r = torch.cat([r[:, 0], 3 * (net(torch.zeros(1, 1, dtype=F64))[0] - 1)])
        return r.square().mean(), r

    for curvature in ("fisher", "newton"):
        base = torch.optim.SGD(net.parameters(), lr=0.05)
        geometry = llqr.LLQR("diagonal", curvature=curvature, every=5, lr=0.1)
        optimizer = llqr.Optimizer(base, net, geometry=geometry)
        losses = [float(optimizer.minimize(forward)) for _ in range(20)]
        assert losses[-1] < losses[0]
