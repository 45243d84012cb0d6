"""U in closed form against its formula written out: samples, averages, bases, eigenvalues."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llqr
from explicit import agree
from llqr.curvature import curvature_samples
from llqr.geometry.structures.closed_form import CLOSED_FORMS
from tiny import F64, Problem, mlp

STRUCTURES = [kind.name for kind in CLOSED_FORMS]
DAMPING, EMA = 0.1, 0.8


def nets():
    """Matrices, convolutions, an embedding, tied weights, blocks of several shapes."""
    torch.manual_seed(1)
    embedding = nn.Embedding(7, 4).double()
    tied = nn.Linear(4, 7, bias=False).double()
    tied.weight = embedding.weight
    text = Problem(
        nn.Sequential(embedding, nn.Linear(4, 4).double(), nn.Tanh(), tied),
        torch.arange(63) % 7,
        torch.randint(7, (63,)),
    )
    images = Problem(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ).double(),
        torch.randn(60, 2, 2, 2, dtype=F64),
        torch.randint(3, (60,)),
    )
    return {"mlp": mlp(), "images": images, "text": text}


def bound(problem, structure, **settings):
    settings = {"samples": 25, "damping": DAMPING, "ema": EMA, "renew_every": 1, **settings}
    geometry = llqr.NaturalGradient(structure, **settings)
    geometry.bind(problem.model)
    return geometry


def draw(geometry, problem):
    """The samples that the coming refresh of a geometry will draw: {name: (m, *shape)}."""
    parameters = list(geometry.parameters.values())
    samples = curvature_samples([problem], parameters)
    drawn = samples.draw(geometry.settings.samples, geometry._generator())
    return dict(zip(geometry.parameters, drawn, strict=True))


def matrix_of(w):
    """The matrix view of a parameter's samples: (m, rows, columns), or None for vectors."""
    return None if w.dim() < 3 else w.reshape(len(w), w.shape[1], -1)


class ByHand:
    """U for whole parameters, one weight at a time (no blocks): the formulas of the docstring."""

    def __init__(self, structure):
        self.structure, self.known, self.refreshes = structure, {}, 0

    def refresh(self, samples):
        keep = EMA * (1 - EMA**self.refreshes) / (1 - EMA ** (self.refreshes + 1))
        self.refreshes += 1
        for name, w in samples.items():
            new = self._moments(self.known.get(name), w, keep)
            self.known[name] = new
        moments = torch.cat([m.reshape(-1) for _, m, *_ in self.known.values()])
        lam = DAMPING * moments.mean()
        c = 1 / (1 / (moments + lam)).mean()
        self.U = {
            name: turn @ torch.diag(c / (m.reshape(-1) + lam)) @ turn.mT
            for name, (turn, m, *_) in self.known.items()
        }

    def _moments(self, old, w, keep):
        """(Q, M, averages) of one parameter."""
        flat, x = w.reshape(len(w), -1), matrix_of(w)
        kind = self.structure
        if kind == "dense":
            c = flat.mT @ flat / len(w)
            c = c if old is None else keep * old[2] + (1 - keep) * c
            values, q = torch.linalg.eigh(c)
            return q, values.clamp(min=0), c, None
        if kind == "diagonal" or x is None:
            m = flat.square().mean(0)
            return torch.eye(len(m), dtype=F64), _mix(old and old[1], m, keep), None, None
        left, right = (x @ x.mT).mean(0), (x.mT @ x).mean(0)
        if old is not None:
            left = keep * old[2][0] + (1 - keep) * left
            right = keep * old[2][1] + (1 - keep) * right
        qb, qa = (_bases(s, old and old[3][i]) for i, s in enumerate((left, right)))
        a, b = ((q * (s @ q)).sum(0) for q, s in ((qb, left), (qa, right)))
        turn = torch.kron(qb, qa)
        if kind == "kfac":
            return turn, torch.outer(a, b).reshape(-1) / b.sum(), (left, right), (qb, qa)
        m = (qb.mT @ x @ qa).square().mean(0).reshape(-1)
        if old is not None:
            before = old[0] @ torch.diag(old[1]) @ old[0].mT
            m = keep * (turn.mT @ before @ turn).diagonal() + (1 - keep) * m
        return turn, m, (left, right), (qb, qa)


def _bases(s, old):
    """Eigenvectors at first; then orthogonal iteration, the greatest first."""
    if old is None:
        return torch.linalg.eigh(s)[1].flip(-1)
    values = (old * (s @ old)).sum(0)
    y = s @ old + 1e-3 * values.mean() * old
    return torch.linalg.qr(y[:, values.argsort(descending=True)])[0]


def _mix(old, new, keep):
    return new if old is None else keep * old + (1 - keep) * new


@pytest.mark.parametrize("net", ["mlp", "images", "text"])
@pytest.mark.parametrize("structure", ["kfac", "e-kfac", "diagonal"])
def test_formula(structure, net):
    problem = nets()[net]
    geometry, by_hand = bound(problem, structure), ByHand(structure)
    for step in range(3):
        by_hand.refresh(draw(geometry, problem))
        report = geometry.refresh([problem], step=step)
        assert report.accepted and report.samples == 25
        with torch.no_grad():  # another curvature each time
            for p in problem.model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    g = {n: torch.randn_like(p) for n, p in geometry.parameters.items()}
    for name, u in geometry.apply(g).items():
        expected = by_hand.U[name] @ g[name].detach().reshape(-1)
        agree(u.detach().reshape(-1), expected, 1e-8)
