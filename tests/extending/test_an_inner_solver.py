"""An inner solver of one's own: Nesterov's momentum in the place of the paper's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llqr

F64 = torch.float64


def nesterov(tensors, options):
    return torch.optim.SGD(tensors, lr=options.lr, momentum=options.momentum, nesterov=True)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    x, y = torch.randn(12, 5, dtype=F64), torch.randint(3, (12,))

    def forward():
        z = model(x)
        return nn.functional.cross_entropy(z, y), z

    return model, forward


def explicit_diagonal(model, forward, steps=50, lr=0.3, mu=0.9):
    """The solve written out: U = diag(s), v <- mu v + d, s <- s - lr (d + mu v)."""
    quadratic = llqr.quadratic_model(forward, model.parameters())
    s = [torch.ones_like(g) for g in quadratic.gradient]
    v = [torch.zeros_like(g) for g in quadratic.gradient]
    for _ in range(steps):
        image = quadratic.product([-a * g for a, g in zip(s, quadratic.gradient, strict=True)])
        for a, b, g, c in zip(s, v, quadratic.gradient, image, strict=True):
            slope = -g * (g + c)
            b.mul_(mu).add_(slope)
            a.sub_(lr * (slope + mu * b))
    return s


@pytest.mark.parametrize("tolerance", [0, 1e-6])
def test_it_is_solved_right(tolerance):
    model, forward = problem()
    geometry = llqr.LLQR(
        "diagonal", solver=nesterov, tolerance=tolerance,
        lr=0.3, ema=0.0, clip=None, bounds=(1e-6, 1e6),
    )  # fmt: skip
    geometry.bind(model)
    report = geometry.refresh([forward])
    assert report.accepted and (report.products == 51 if tolerance == 0 else report.products < 40)
    expected = explicit_diagonal(model, forward)
    for entries, s in zip(geometry.state().values(), expected, strict=True):
        torch.testing.assert_close(entries["U"], s, rtol=max(1e-10, 10 * tolerance), atol=1e-12)
    plain = llqr.LLQR("diagonal", tolerance=0, lr=0.3, ema=0.0, clip=None, bounds=(1e-6, 1e6))
    plain.bind(model)
    plain.refresh([forward])
    a, b = (torch.cat([e["U"].flatten() for e in g.state().values()]) for g in (geometry, plain))
    assert float((a - b).norm()) > 1e-3 * float((b - 1).norm())  # it is another method


def test_what_is_no_solver_is_refused():
    with pytest.raises(ValueError, match="solver: expected one of momentum.*'nestrov'"):
        llqr.LLQR("diagonal", solver="nestrov")
