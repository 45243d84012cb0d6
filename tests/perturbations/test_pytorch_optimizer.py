"""The probes beside pytorch_optimizer's: the same steps where both follow the paper, and where not.

Of release 4.1, which has neither ESAM nor MSAM nor FisherSAM. Its norms of gradients are float32.
"""

import pytest
import torch
from torch import nn

import llqr
from tiny import F64, Problem, mlp, optimizer_of, train, weights

other = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")

RHO, LR, STEPS = 0.2, 0.1, 7
SGD = torch.optim.SGD


def without_biases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    return Problem(model.to(F64), torch.randn(12, 5, dtype=F64), torch.randint(3, (12,)))


def one_tensor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).to(F64)
    return Problem(model, torch.randn(12, 5, dtype=F64), torch.randint(3, (12,)))


def two_passes(kind, **options):
    """Of those whose step() wants the clean gradients in p.grad: "closure(); step(closure)"."""

    def run(problem, momentum):
        optimizer = kind(problem.model.parameters(), SGD, lr=LR, momentum=momentum, **options)

        def closure():
            optimizer.zero_grad()
            return problem.backward()

        for _ in range(STEPS):
            closure()
            optimizer.step(closure)

    return run


def wsam(**options):
    def run(problem, momentum):
        model = problem.model
        optimizer = other.WSAM(
            model, model.parameters(), SGD, rho=RHO, lr=LR, momentum=momentum, **options
        )

        def closure():
            optimizer.zero_grad()
            return problem.backward()

        for _ in range(STEPS):
            optimizer.step(closure)

    return run


def gsam(problem, momentum):
    class Constant:
        def step(self):
            return RHO

    base = SGD(problem.model.parameters(), lr=LR, momentum=momentum)
    optimizer = other.GSAM(
        problem.model.parameters(), base, problem.model, rho_scheduler=Constant(), alpha=0.4
    )
    optimizer.set_closure(nn.functional.cross_entropy, problem.x, problem.y)
    for _ in range(STEPS):
        optimizer.step()


def distance(make, probe, run, momentum=0.9):
    """The largest difference of weights after some steps of both, relative to the way they went."""
    ours, theirs = make(), make()
    start = weights(ours.model)
    base = SGD(ours.model.parameters(), lr=LR, momentum=momentum)
    train(optimizer_of(ours, base, perturbation=probe), ours, STEPS)
    run(theirs, momentum)
    a, b = weights(ours.model), weights(theirs.model)
    way = max(float((a[n] - start[n]).abs().max()) for n in a)
    return max(float((a[n] - b[n]).abs().max()) for n in a) / way


EQUAL = {
    "SAM": (mlp, lambda: llqr.SAM(RHO), two_passes(other.SAM, rho=RHO)),
    "ASAM without biases": (
        without_biases,
        lambda: llqr.ASAM(RHO, eta=0.0),
        two_passes(other.SAM, rho=RHO, adaptive=True),
    ),
    "GSAM": (mlp, lambda: llqr.GSAM(RHO, alpha=0.4), gsam),
    "WSAM, decouple=False": (
        mlp,
        lambda: llqr.WSAM(RHO, gamma=0.8),
        wsam(gamma=0.8, decouple=False),
    ),
    "LookSAM of one tensor": (
        one_tensor,
        lambda: llqr.LookSAM(RHO, interval=3, alpha=0.7),
        two_passes(other.LookSAM, rho=RHO, k=3, alpha=0.7),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_where_both_follow_the_paper_they_agree(name):
    make, probe, run = EQUAL[name]
    assert distance(make, probe(), run) < 1e-6


def test_wsam_decoupled_is_ours_without_momentum():
    """It adds the sharpness with the bare learning rate; here it goes through the momentum."""
    for momentum, agree in ((0.0, True), (0.9, False)):
        probe, run = llqr.WSAM(RHO, gamma=0.8), wsam(gamma=0.8, decouple=True)
        assert (distance(mlp, probe, run, momentum) < 1e-6) is agree


UNEQUAL = {
    # |w| of a bias is its size by chance, often zero; the paper's authors leave biases out (T = 1).
    "ASAM scales biases": (
        lambda: llqr.ASAM(RHO, eta=0.0),
        two_passes(other.SAM, rho=RHO, adaptive=True),
    ),
    # The paper's g and g_s are the whole gradient.
    "LookSAM takes each tensor by itself": (
        lambda: llqr.LookSAM(RHO, interval=3, alpha=0.7),
        two_passes(other.LookSAM, rho=RHO, k=3, alpha=0.7),
    ),
    # Here at zero, as in the paper: m = (1 - lambda) g after the first step.
    "FriendlySAM starts its mean at the first gradient": (
        lambda: llqr.FriendlySAM(RHO, sigma=1.0, decay=0.9),
        two_passes(other.FriendlySAM, rho=RHO, sigma=1.0, lmbda=0.9),
    ),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_where_they_differ(name):
    """If one fails, pytorch_optimizer has changed: say so in the docstring of the probe."""
    probe, run = UNEQUAL[name]
    assert distance(mlp, probe(), run) > 1e-3


def test_friendly_sam_from_the_same_mean_is_theirs():
    ours, theirs = mlp(), mlp()
    probe = llqr.FriendlySAM(RHO, sigma=0.7, decay=0.9)
    optimizer = optimizer_of(ours, SGD(ours.model.parameters(), LR, 0.9), perturbation=probe)
    first = ours.gradient()
    train(optimizer, ours, 1)
    for name, entries in probe.state().items():
        entries["memory"].copy_(first[name])
    train(optimizer, ours, STEPS - 1)
    two_passes(other.FriendlySAM, rho=RHO, sigma=0.7, lmbda=0.9)(theirs, 0.9)
    for name, weight in weights(theirs.model).items():
        torch.testing.assert_close(ours.model.get_parameter(name), weight, rtol=0, atol=1e-6)
