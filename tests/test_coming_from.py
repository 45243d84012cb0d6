"""What docs/coming-from.md says of davda54/sam: its formulas by hand, against ours in float64."""

import pytest
import torch
from torch import nn

import llqr

X, Y = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(20) % 3
LR = 0.1


def network(bias):
    torch.manual_seed(1)
    layers = nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)
    return nn.Sequential(*layers).double()


def backward(model):
    nn.functional.cross_entropy(model(X), Y).backward()


def theirs(model, radii, adaptive):
    """One step: eps = rho T^2 g / |T g| with T = |w| or 1, then SGD along the second gradient."""
    held = list(model.parameters())
    backward(model)
    before = [p.detach().clone() for p in held]
    t = [p.detach().abs() if adaptive else torch.ones_like(p) for p in held]
    norm = torch.cat([(a * p.grad).flatten() for a, p in zip(t, held, strict=True)]).norm()
    with torch.no_grad():
        for a, p, rho in zip(t, held, radii, strict=True):
            p += rho * a**2 * p.grad / (norm + 1e-12)
    model.zero_grad()
    backward(model)
    return [w - LR * p.grad for w, p in zip(before, held, strict=True)]


def ours(model, radii, perturbation):
    groups = [{"params": [p], "rho": rho} for p, rho in zip(model.parameters(), radii, strict=True)]
    base = torch.optim.SGD(groups, lr=LR)
    optimizer = llqr.Optimizer(base, model, perturbation=perturbation)
    for _ in optimizer.passes():
        backward(model)
    optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize(
    "bias, radii, perturbation, same",
    [
        (True, [0.1] * 4, llqr.SAM(), True),
        (True, [0.1, 0.1, 0.3, 0.3], llqr.SAM(), True),
        (True, [0.1, 0.1, 0.0, 0.0], llqr.SAM(), False),  # the norm leaves them out
        (False, [0.5] * 2, llqr.ASAM(eta=0.0), True),
        (False, [0.5] * 2, llqr.ASAM(), False),  # eta
        (True, [0.5] * 4, llqr.ASAM(eta=0.0), False),  # biases
    ],
)
def test_the_step_of_davda54_sam(bias, radii, perturbation, same):
    adaptive = isinstance(perturbation, llqr.ASAM)
    expected = theirs(network(bias), radii, adaptive)
    found = ours(network(bias), radii, perturbation)
    pairs = zip(expected, found, strict=True)
    difference = max(float((a - b.detach()).abs().max()) for a, b in pairs)
    assert (difference < 1e-11) is same and (same or difference > 1e-6)
