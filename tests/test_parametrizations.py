"""Weights that are computed: spectral norm, weight norm and other parametrizations."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import llqr
from byhand import sam_step
from tables import PERTURBATIONS
from tiny import (
    F64,
    STRUCTURES,
    WAYS,
    Problem,
    buffers,
    close,
    flat,
    llqr_of,
    optimizer_of,
    same,
    sgd,
    train,
    weights,
)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def weight_norm_of_old(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(module)


KINDS = {
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm, hooks": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm, hooks": weight_norm_of_old,
    "orthogonal": lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"),
    "own": lambda m: parametrize.register_parametrization(m, "weight", Doubled()) or m,
}
WITH_BUFFERS = {"spectral_norm", "spectral_norm, hooks"}


def parametrized(kind):
    torch.manual_seed(0)
    first, last = nn.Linear(5, 6).to(F64), nn.Linear(6, 3).to(F64)
    model = nn.Sequential(KINDS[kind](first), nn.Tanh(), last)
    return Problem(model, torch.randn(12, 5, dtype=F64), torch.randint(3, (12,)))


def sam_keeping_buffers(base, problem, rho, *, from_start):
    """The hand-written step; what the second pass does to the buffers is taken back.

    With ``from_start`` both passes start from the same buffers, else the second from those that the
    first left.
    """
    start, clean = buffers(problem.model), {}

    def write(values):
        for name, buffer in problem.model.named_buffers():
            buffer.copy_(values[name])

    def backward():
        if clean:
            write(start if from_start else clean)
        problem.backward()
        if clean:
            write(clean)
        clean.update(buffers(problem.model))

    sam_step(base, backward, rho)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_sam_is_the_hand_written_loop(kind, way):
    """Spectral norm's power iteration advances once per step, from the same vectors twice."""
    ours, theirs = parametrized(kind), parametrized(kind)
    optimizer, base = optimizer_of(ours, perturbation=llqr.SAM(0.3)), sgd(theirs, momentum=0.9)
    start = buffers(ours.model)
    for _ in range(4):
        train(optimizer, ours, 1, way)
        sam_keeping_buffers(base, theirs, 0.3, from_start=way != "perturbed")
    same(weights(ours.model), weights(theirs.model))
    same(buffers(ours.model), buffers(theirs.model))
    moved = [n for n, b in buffers(ours.model).items() if not torch.equal(b, start[n])]
    assert bool(moved) == (kind in WITH_BUFFERS)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_products_against_the_jacobian(kind):
    """J'HJd through the parametrization, J by torch one row at a time."""
    problem = parametrized(kind)
    problem.model.eval()
    named = dict(problem.model.named_parameters())
    model = llqr.quadratic_model(problem, list(named.values()), "fisher")
    z = problem()[1]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(e, named.values(), retain_graph=True)])
        for e in z.flatten()
    ]
    J, p = torch.stack(rows), z.detach().softmax(-1)
    H = torch.block_diag(*[(torch.diag(r) - torch.outer(r, r)) / len(z) for r in p])
    d = {n: torch.randn_like(p) for n, p in named.items()}
    product = flat(dict(zip(named, model.product(list(d.values())), strict=True)))
    close({"Cd": product}, {"Cd": J.T @ H @ J @ flat(d)})
    assert product.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_newton_products_against_differences_of_gradients(kind):
    """Not against torch's own Hessian: that of weight norm is wrong in torch (2.9 to 2.13)."""
    problem = parametrized(kind)
    problem.model.eval()
    named = dict(problem.model.named_parameters())
    d = {n: torch.randn_like(p) for n, p in named.items()}

    def gradient_at(step):
        with torch.no_grad():
            for n, p in named.items():
                p.add_(d[n], alpha=step)
        g = flat(problem.gradient())
        with torch.no_grad():
            for n, p in named.items():
                p.sub_(d[n], alpha=step)
        return g

    h = 3e-5  # fourth order: about 1e-14 / h from rounding, 1e4 h^4 from the formula
    near, far = (gradient_at(s * h) - gradient_at(-s * h) for s in (1, 2))
    differences = (8 * near - far) / (12 * h)
    model = llqr.quadratic_model(problem, list(named.values()), "newton")
    product = flat(dict(zip(named, model.product(list(d.values())), strict=True)))
    torch.testing.assert_close(product, differences, rtol=0, atol=1e-8)
    assert product.abs().max() > 1e-2


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_u_goes_down_and_refreshes_leave_no_trace(kind, structure):
    problem = parametrized(kind)
    optimizer = optimizer_of(
        problem, geometry=llqr_of(structure), perturbation=PERTURBATIONS["SAM"]()
    )
    before = buffers(problem.model)
    assert optimizer.refresh(problem).accepted
    same(buffers(problem.model), before)
    losses = train(optimizer, problem, 8)
    assert losses[-1] < losses[0]
    if structure != "identity":
        assert optimizer.last_report.change > 1e-4


def test_removing_a_parametrization_after_training():
    """The parameter that is left is a new one: the optimizer is built anew for it."""
    problem = parametrized("weight_norm")
    train(optimizer_of(problem, perturbation=llqr.SAM(0.1)), problem, 2)
    z = problem()[1].detach()
    parametrize.remove_parametrizations(problem.model[0], "weight")
    close({"z": problem()[1].detach()}, {"z": z})
    train(optimizer_of(problem, perturbation=llqr.SAM(0.1)), problem, 2)
