"""Many starts in one optimizer are many optimizers, and both are Algorithm 1."""

import pytest
import torch
from torch import nn

import llqr
from llqr_lab.theory.sharp_well import SharpWell
from llqr_lab.theory.swarm import METHODS, first_arrivals, train_paths

F64 = torch.float64
WELL = SharpWell()
U = WELL.average_inverse(points=1000)
STEPS = 8  # few: the paths of the SAM variants are chaotic and amplify rounding
STARTS = torch.tensor([[4.85, 0.1], [-3.1, 3.7], [0.2, -4.75], [2.0, 1.0]], dtype=F64)
ETAS = torch.tensor([0.132, 0.1, 0.132, 0.15], dtype=F64)
RHOS = torch.tensor([0.12, 0.12, 0.2, 0.05], dtype=F64)
NOISE = 1e-2 * torch.randn(4, STEPS, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


class Single(nn.Module):
    def __init__(self, xy):
        super().__init__()
        self.xy = nn.Parameter(xy.clone())


def alone(method, start, eta, rho, noise):
    """One optimizer for one start, with SAM as it comes."""
    through_u, probes = METHODS[method]
    model = Single(start)
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=eta),
        model,
        geometry=llqr.FixedGeometry(U) if through_u else None,
        perturbation=llqr.SAM(rho) if probes else None,
    )
    path = [start]
    for kick in noise:
        optimizer.minimize(
            lambda: WELL.loss(model.xy), before_step=lambda kick=kick: model.xy.grad.add_(kick)
        )
        path.append(model.xy.detach().clone())
    return torch.stack(path)


def algorithm_1(method, start, eta, rho, noise):
    """The formulas, without a library."""
    through_u, probes = METHODS[method]
    metric = U if through_u else torch.eye(2, dtype=F64)
    theta, path = start, [start]
    for kick in noise:
        g = WELL.gradient(theta[None])[0]
        if probes:
            probe = theta + rho * metric @ g / (g @ metric @ g + 1e-12).sqrt()
            g = WELL.gradient(probe[None])[0]
        theta = theta - eta * metric @ (g + kick)
        path.append(theta)
    return torch.stack(path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("one", [alone, algorithm_1])
def test_a_swarm_is_every_start_alone(method, one):
    together = train_paths(WELL, method, STARTS, U, ETAS, RHOS, range(STEPS), NOISE)
    for i, start in enumerate(STARTS):
        expected = one(method, start, float(ETAS[i]), float(RHOS[i]), NOISE[i])
        torch.testing.assert_close(together[i], expected, rtol=0, atol=1e-10)


def test_one_number_for_eta_and_rho_and_no_noise():
    rows = torch.full((4,), 0.132, dtype=F64), torch.full((4,), 0.12, dtype=F64)
    same = train_paths(WELL, "LLQR+SAM", STARTS, U, *rows, range(3))
    assert torch.equal(train_paths(WELL, "LLQR+SAM", STARTS, U, 0.132, 0.12, range(3)), same)


def test_arrivals_are_first_steps_inside():
    r = torch.tensor([[5.0, 4.0, 3.0], [2.0, 0.9, 3.0], [0.5, 2.0, 0.1]])
    paths = torch.stack([r, torch.zeros_like(r)], -1)
    assert first_arrivals(paths).tolist() == [-1, 1, 0]


def test_it_stops_once_all_have_arrived():
    starts = torch.tensor([[0.5, 0.0], [1.2, 0.0]], dtype=F64)
    assert train_paths(WELL, "GD", starts, U, 0.1, 0.0, range(50), enough=10).shape == (2, 11, 2)
    far = torch.tensor([[0.5, 0.0], [4.85, 0.0]], dtype=F64)
    assert train_paths(WELL, "GD", far, U, 0.1, 0.0, range(50), enough=10).shape == (2, 51, 2)
