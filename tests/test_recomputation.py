"""Activation checkpointing: the passes and the refresh recompute what the plain run keeps."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import llqr
from tiny import F64, WAYS, Problem, close, llqr_of, optimizer_of, refused, same, train


class Net(nn.Module):
    """A convolution, a norm, dropout and attention in the checkpointed part."""

    def __init__(self, recompute, reentrant=False):
        super().__init__()
        self.recompute, self.reentrant = recompute, reentrant
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh(), nn.Dropout(0.3)
        )
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def attend(self, z):
        z = self.norm(z.flatten(2).mT)
        return z + self.attention(z, z, z, need_weights=False)[0]

    def forward(self, x):
        z = self.first(x)
        for part in (self.body, self.attend):
            if self.recompute:
                z = checkpoint(part, z, use_reentrant=self.reentrant)
            else:
                z = part(z)
        return self.head(z.mean(1))


def attentive(recompute, reentrant=False):
    torch.manual_seed(0)
    model = Net(recompute, reentrant).to(F64)
    return Problem(model, torch.randn(6, 2, 4, 4, dtype=F64), torch.randint(3, (6,)))


def trained(problem, way="minimize", steps=4, **options):
    optimizer = optimizer_of(problem, **options)
    torch.manual_seed(1)
    losses = train(optimizer, problem, steps, way)
    return losses, problem.model.state_dict(), torch.rand(2)


@pytest.mark.parametrize("way", WAYS)
def test_the_passes_are_those_of_the_plain_run(way):
    """Dropout included: the recomputation and the second pass both replay the masks."""
    runs = [trained(attentive(r), way, perturbation=llqr.SAM(0.3)) for r in (True, False)]
    same(*runs)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_a_refresh_is_that_of_the_plain_run(structure, curvature):
    """Recomputed and replaced operations differ in the order of their sums alone."""
    runs = [
        trained(
            attentive(r),
            geometry=llqr_of(structure, curvature=curvature),
            perturbation=llqr.SAM(0.3),
        )
        for r in (True, False)
    ]
    close(runs[0][1], runs[1][1])


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_products_of_recomputed_graphs(curvature):
    """Several products from one graph: each recomputes, and all equal the plain ones."""
    products = []
    for recompute in (True, False):
        problem = attentive(recompute)
        problem.model.eval()
        held = list(problem.model.parameters())
        model = llqr.quadratic_model(problem, held, curvature)
        noise = torch.Generator().manual_seed(3)
        directions = [
            [torch.randn(p.shape, dtype=F64, generator=noise) for p in held] for _ in range(3)
        ]
        products.append([model.product(d) for d in directions])
    for ours, theirs in zip(*products, strict=True):
        close(dict(enumerate(ours)), dict(enumerate(theirs)))
        assert any(bool(t.any()) for t in theirs)


@pytest.mark.parametrize("way", WAYS)
def test_reentrant_recomputation_serves_the_passes(way):
    """What it cannot give is a second derivative."""
    runs = [
        trained(attentive(r, reentrant=r), way, perturbation=llqr.SAM(0.3)) for r in (True, False)
    ]
    same(*runs)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_reentrant_recomputation_is_refused_in_a_refresh(curvature):
    problem = attentive(True, reentrant=True)
    optimizer = optimizer_of(
        problem, geometry=llqr_of("kfac", curvature=curvature), perturbation=llqr.SAM(0.3)
    )
    with refused(optimizer, ValueError, "reentrant", "use_reentrant=False"):
        optimizer.minimize(problem)
