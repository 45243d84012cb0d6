"""The baselines of other packages follow the formulas of their papers."""

import math

import pytest
import torch

from llqr_lab.study.bases import BASES

LR, DECAY = 0.05, 0.3


class Matrix(torch.nn.Module):
    """One weight, and a loss whose gradient changes from step to step."""

    def __init__(self):
        super().__init__()
        draws = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(4, 3, generator=draws, dtype=torch.float64))
        self.x = torch.randn(6, 4, 3, generator=draws, dtype=torch.float64)

    def loss(self, step, weight):
        return (weight * self.x[step]).sum().tanh() + (weight - self.x[step]).square().sum()

    def gradient(self, step, weight):
        w = weight.detach().requires_grad_()
        return torch.autograd.grad(self.loss(step, w), w)[0]


def steps_of(name, steps):
    """Return the weights that a base arrives at, after each step."""
    row = BASES[name]
    if row.missing:
        pytest.skip(f"{name} needs {row.missing}")
    model = Matrix()
    (base, *_) = row.make(model, LR, DECAY) if name != "Muon" else [muon_alone(model)]
    if row.own_schedule:
        base.train()
    found = []
    for step in range(steps):
        base.zero_grad()
        model.loss(step, model.weight).backward()
        base.step()
        if row.own_schedule:
            base.eval()
        found.append(model.weight.detach().clone())
        if row.own_schedule:
            base.train()
    return Matrix(), found


def muon_alone(model):
    model.bias = torch.nn.Parameter(torch.zeros(2))  # what AdamW gets
    return BASES["Muon"].make(model, LR, DECAY)[0]


def check(found, expected, tolerance=1e-6):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore")
def test_soap():
    """Vyas et al., algorithm 3; the first gradient only begins L and R."""
    model, found = steps_of("SOAP", 6)
    w, m = model.weight.detach().clone(), 0.0
    v, (left, right) = torch.zeros_like(w), (torch.zeros(4, 4).double(), torch.zeros(3, 3).double())
    bases, expected = None, []
    for step in range(6):
        g = model.gradient(step, w)
        if step > 0:
            q, r = bases
            m = 0.95 * m + 0.05 * g
            v = 0.95 * v + 0.05 * (q.T @ g @ r).square()
            rate = LR * math.sqrt(1 - 0.95**step) / (1 - 0.95**step)
            w = w - rate * q @ ((q.T @ m @ r) / (v.sqrt() + 1e-8)) @ r.T
            w = w * (1 - LR * DECAY)
        left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
        if bases is None:
            bases = [torch.linalg.eigh(x)[1] for x in (left, right)]
        expected.append(w)
    check(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_shampoo():
    """Gupta et al., algorithm 1, with roots of the statistics at every tenth step."""
    pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    from pytorch_optimizer import Shampoo

    model = Matrix()
    base = Shampoo(model.parameters(), lr=LR, matrix_eps=0.01)
    w, left, right = model.weight.detach().clone(), 0.01 * torch.eye(4), 0.01 * torch.eye(3)
    for step in range(4):
        base.zero_grad()
        model.loss(step, model.weight).backward()
        base.step()
        g = Matrix().gradient(step, w)
        left, right = left + g @ g.T, right + g.T @ g
        w = w - LR * root(left, -0.25) @ g @ root(right, -0.25)
        torch.testing.assert_close(model.weight.detach(), w, rtol=0, atol=1e-5)


def root(matrix, power):
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors @ torch.diag(values**power) @ vectors.T


@pytest.mark.filterwarnings("ignore")
def test_schedule_free():
    """Defazio et al., algorithm 1: gradients at y, steps of z, and x as their average."""
    model, found = steps_of("schedule-free AdamW", 5)
    x = z = model.weight.detach().clone()
    v, expected = torch.zeros_like(x), []
    for t in range(1, 6):
        y = 0.1 * z + 0.9 * x
        g = model.gradient(t - 1, y)
        v = 0.999 * v + 0.001 * g.square()
        z = z - LR * (g / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + DECAY * y)
        x = (1 - 1 / t) * x + z / t
        expected.append(x)
    check(found, expected)


def test_muon():
    """Jordan: momentum of Nesterov, five steps of Newton and Schulz, AdamW's length."""
    model, found = steps_of("Muon", 4)
    w = model.weight.detach().clone()
    momentum, expected = torch.zeros_like(w), []
    for step in range(4):
        g = model.gradient(step, w)
        momentum = 0.95 * momentum + 0.05 * g
        x = (0.05 * g + 0.95 * momentum).T
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        w = w * (1 - LR * DECAY) - LR * 0.2 * math.sqrt(4) * x.T
        expected.append(w)
    check(found, expected, tolerance=5e-3)  # torch's runs in bfloat16
