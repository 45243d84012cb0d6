"""Complex numbers, losses without a second derivative, default devices, odd places in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from explicit import F64, agree, gauss_newton, split, vector
from products import check_fisher, curvature_matrix
from replaced import ready

# -- complex numbers -------------------------------------------------------------------------------


class FourierLayer(nn.Module):
    """A Fourier neural operator's layer: complex weights kept as pairs of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(1, 3)  # 6 entries, its bias 3: the weights begin at an odd place
        self.bias = nn.Parameter(torch.zeros(3))
        self.weights = nn.Parameter(torch.zeros(3, 3, 2, 2))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x).mT + self.bias[:, None]
        modes = torch.fft.rfft(h)[..., :2]
        mixed = torch.einsum("bik,iok->bok", modes, torch.view_as_complex(self.weights))
        return self.head(torch.fft.irfft(mixed, n=x.shape[1]).mT.tanh())


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "dense", "scalar"])
def test_complex_weights_as_pairs_of_numbers(structure: str, curvature: str):
    torch.manual_seed(0)
    net, x = ready(FourierLayer()), torch.randn(4, 6, 1, dtype=F64)
    target = x.cumsum(1)

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return F.mse_loss(z, target), z

    geometry = llqr.LLQR(structure, curvature=curvature, lr=1e-3)
    base = torch.optim.SGD(net.parameters(), lr=1e-4)
    optimizer = llqr.Optimizer(base, net, geometry=geometry)
    losses = [float(optimizer.minimize(forward)) for _ in range(5)]
    assert optimizer.last_report.accepted and losses[-1] < losses[0]


def test_directions_at_odd_places():
    """Slices of one flat vector, as a solver hands them over."""
    torch.manual_seed(0)
    net, x = ready(FourierLayer()), torch.randn(4, 6, 1, dtype=F64)
    parameters = list(net.parameters())

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return z.square().mean(), z

    C = gauss_newton(net(x), lambda z: z.square().mean(), parameters)
    flat = torch.randn(len(C) + 1, dtype=F64)
    for start in (0, 1):
        d = flat[start : start + len(C)]
        agree(
            vector(llqr.quadratic_model(forward, parameters).product(split(d, parameters))), C @ d
        )


def test_complex_outputs():
    net, x = ready(nn.Linear(4, 6)), torch.randn(8, 4, dtype=F64)
    y = torch.randn(8, 3, dtype=torch.complex128)

    def as_complex(v: Tensor) -> Tensor:
        return torch.view_as_complex(v.view(8, 3, 2))

    def loss(z: Tensor) -> Tensor:
        return ((z - y).abs().square() * torch.arange(1, 4)).mean()

    def forward() -> tuple[Tensor, Tensor]:
        z = as_complex(net(x))
        return loss(z), z

    parameters = list(net.parameters())
    C = gauss_newton(net(x), lambda v: loss(as_complex(v)), parameters)
    agree(curvature_matrix(llqr.quadratic_model(forward, parameters), parameters), C)


def test_a_spectrum_as_output():
    """Complex in between and at the end, with a divergence of one's own."""
    net, x = ready(nn.Sequential(nn.Linear(4, 5), nn.GELU())), torch.randn(3, 4, dtype=F64)
    parameters = list(net.parameters())

    def distance(z: Tensor, z0: Tensor) -> Tensor:
        return torch.view_as_real(z - z0).square().sum((1, 2)).mean() / 2

    def forward() -> tuple[Tensor, Tensor]:
        z = torch.fft.rfft(net(x))
        return (z.abs() - 1).square().mean(), z

    model = llqr.quadratic_model(forward, parameters, llqr.Divergence(distance))
    spectrum = torch.view_as_real(forward()[1])
    C = gauss_newton(spectrum, lambda z: z.square().sum((1, 2)).mean() / 2, parameters)
    agree(curvature_matrix(model, parameters), C)


# -- losses without a second derivative ------------------------------------------------------------


def speech() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net, x, y = ready(nn.Linear(4, 5)), torch.randn(7, 2, 4, dtype=F64), torch.randint(1, 5, (2, 3))

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        lengths = torch.tensor([7, 7]), torch.tensor([3, 3])
        return F.ctc_loss(z.log_softmax(-1), y, *lengths), z

    return net, forward


def test_ctc_in_a_newton_refresh():
    net, forward = speech()
    parameters = list(net.parameters())
    d = [torch.randn_like(p) for p in parameters]
    model = llqr.quadratic_model(forward, parameters, "newton")
    with pytest.warns(UserWarning, match="ctc_loss.*central differences"):
        product = model.product(d)
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, v in zip(parameters, d, strict=True):
                p.add_(v, alpha=step)
        ends.append(vector(torch.autograd.grad(forward()[0], parameters)))
    agree(vector(product), (ends[0] - ends[1]) / 2e-5, 1e-5)


def test_ctc_in_a_fisher_refresh_says_what_to_do():
    net, forward = speech()
    with pytest.raises(ValueError, match=r"ctc_loss.*newton.*Divergence"):
        llqr.quadratic_model(forward, net.parameters())


def test_ctc_with_a_divergence_of_the_outputs():
    net, forward = speech()
    parameters = list(net.parameters())

    def kl(z: Tensor, z0: Tensor) -> Tensor:
        return F.kl_div(z.log_softmax(-1), z0.softmax(-1), reduction="sum") / z.shape[1]

    model = llqr.quadratic_model(forward, parameters, llqr.Divergence(kl))
    z = forward()[1]
    C = gauss_newton(z, lambda v: kl(v, z.detach()), parameters)
    agree(curvature_matrix(model, parameters), C)


# -- default devices -------------------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Any:
    """Another default device than the model's, where no number can be read."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize(
    "structure", ["identity", "scalar", "diagonal", "diag-kfac", "kfac", "e-kfac", "dense"]
)
@pytest.mark.parametrize("options", [{}, {"tolerance": 0}, {"curvature": "newton"}])
def test_a_default_device_that_is_not_the_models(structure: str, options: Any, elsewhere: None):
    with torch.device("cpu"):
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        x, y = torch.randn(16, 4), torch.randint(3, (16,))

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return F.cross_entropy(z, y), z

    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    geometry = llqr.LLQR(structure, every=1, steps=5, **options)
    optimizer = llqr.Optimizer(base, net, geometry=geometry, perturbation=llqr.FriendlySAM(0.1))
    losses = [float(optimizer.minimize(forward)) for _ in range(3)]
    assert losses[-1] < losses[0]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.geometry.spectrum()


@pytest.mark.parametrize("way", ["once", "function"])
def test_checks_and_differences_under_a_default_device(way: str, elsewhere: None):
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return (g if way == "function" else g.detach()) * ctx.saved_tensors[0].cos()

    with torch.device("cpu"):
        net, x = ready(nn.Linear(4, 3)), torch.randn(6, 4, dtype=F64)
    parameters = list(net.parameters())

    def forward() -> tuple[Tensor, Tensor]:
        z = Sine.apply(net(x))
        return z.square().mean(), z

    model = llqr.quadratic_model(forward, parameters)
    d = [torch.ones_like(p) for p in parameters]
    if way == "once":
        with pytest.warns(UserWarning, match="central differences"):
            product = model.product(d)
    else:
        product = model.product(d)
    with torch.device("cpu"):
        C = gauss_newton(net(x).sin(), lambda z: z.square().mean(), parameters)
    agree(vector(product), C @ vector(d), 1e-6)


def test_a_layer_under_two_derivatives_and_a_default_device(elsewhere: None):
    with torch.device("cpu"):
        net, x = ready(nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 1))), torch.rand(5, 2)

    def forward() -> tuple[Tensor, Tensor]:
        at = x.to(F64).requires_grad_()
        (du,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
        return du.square().mean(), du

    with torch.device("cpu"):
        check_fisher(forward, lambda z: z.square().mean(), list(net.parameters()))
    model = llqr.quadratic_model(forward, net.parameters())
    assert all(v.isfinite().all() for v in model.product(model.gradient))
