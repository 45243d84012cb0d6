"""find_inner_lr: U of a refresh at each rate, judged on other batches."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llqr
from explicit import F64
from llqr.finding import InnerLRRow
from llqr.finding._inner_lr import advise
from tiny import llqr_of, mlp, optimizer_of, train

LRS = ["auto", 0.01, 0.3]


def softmax_regression():
    """A linear model, whose Fisher is the Hessian of its loss; three batches."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(24, 4, dtype=F64), torch.randint(3, (24,))

    def loss_of(rows):
        z = model(x[rows])
        return F.cross_entropy(z, y[rows]), z

    def dense(rows):
        """The gradient and the Hessian of a batch, in model order."""

        def loss(w):
            z = x[rows] @ w[:12].view(3, 4).mT + w[12:]
            return F.cross_entropy(z, y[rows])

        w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        functional = torch.autograd.functional
        return functional.jacobian(loss, w), functional.hessian(loss, w)

    return model, loss_of, dense, list(torch.arange(24).split(8))


def applied(geometry, g):
    """U g of a flat g."""
    shapes = {n: p.shape for n, p in geometry.parameters.items()}
    parts = g.split([s.numel() for s in shapes.values()])
    moved = geometry.apply({n: t.view(s) for (n, s), t in zip(shapes.items(), parts, strict=True)})
    return torch.cat([v.reshape(-1) for v in moved.values()])


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_gains_are_those_of_dense_matrices(structure, damping):
    model, loss_of, dense, batches = softmax_regression()
    settings = {"damping": damping, "steps": 20, "tolerance": 0}
    geometry = llqr.LLQR(structure, ema=0.9, **settings)
    geometry.bind(model)
    table = llqr.find_inner_lr(geometry, loss_of, batches=batches, lrs=LRS)
    assert [row.lr for row in table.rows] == LRS

    def best(v, g, C):
        return float((g @ v) ** 2 / (v @ C @ v))

    for row in table.rows:
        twin = llqr.LLQR(structure, lr=row.lr, ema=0.0, **settings)
        twin.bind(model)
        report = twin.refresh([lambda: loss_of(batches[0])])
        assert (row.J_before, row.J_after) == (report.J_before, report.J_after)
        assert row.products == report.products
        assert row.change == pytest.approx(report.change)
        gains = []
        for rows in batches:
            g, C = dense(rows)
            C = C + damping * torch.eye(len(C), dtype=F64)
            gains.append(best(applied(twin, g), g, C) / best(g, g, C))
        assert row.gain == pytest.approx(gains[0])
        others = torch.tensor(gains[1:], dtype=F64)
        assert row.held_out == pytest.approx(float(others.mean()))
        assert row.standard_error == pytest.approx(float(others.std()) / math.sqrt(2))
    assert all(abs(row.gain - 1) > 1e-3 for row in table.rows)  # U acts, so the test can fail


def test_a_refused_rate_is_a_row_with_its_reason():
    model, loss_of, _, batches = softmax_regression()
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, geometry=llqr.LLQR("kfac")
    )
    seen = []
    table = llqr.find_inner_lr(
        optimizer,
        loss_of,
        batches=batches,
        lrs=[0.1, 1e4],
        progress=lambda done, total: seen.append((done, total)),
    )
    good, bad = table.rows
    assert good.reason is None and bad.reason == "J did not go down" and math.isnan(bad.held_out)
    assert seen == [(i, 5) for i in range(1, 6)]
    text = str(table)
    assert "J did not go down" in text and table.advice in text
    assert text.startswith("inner rates of LLQR('kfac'); 3 batches, ")


def row(lr, held_out, error=None, change=0.5, reason=None):
    return InnerLRRow(lr=lr, held_out=held_out, standard_error=error, change=change, reason=reason)


@pytest.mark.parametrize(
    "rows, lr, said",
    [
        ([row(0.1, 1.5), row(1.0, 1.2)], 0.1, "Try lr = 0.1: on other batches .* 1.5 times"),
        ([row("auto", 1.4, 0.1), row(0.1, 1.45, 0.1)], "auto", "Try lr='auto'.* 1.4 times"),
        ([row("auto", 1.1, 0.1), row(0.1, 1.45, 0.1)], 0.1, "Try lr = 0.1"),
        ([row(0.1, 1.05, 0.1), row(1.0, 0.9)], None, "No rate helps on other batches"),
        ([row(0.1, 1.01, change=0.001)], 0.1, "U hardly acts there"),
        ([row(0.1, math.nan, reason="J is not finite")], None, "J is not finite.*smaller rates"),
    ],
)
def test_advice(rows, lr, said):
    found, text = advise(rows)
    assert found == lr and re.search(said, text)


def unbound(problem):
    return llqr.LLQR()


def bound(problem):
    geometry = llqr.LLQR()
    geometry.bind(problem.model)
    return geometry


@pytest.mark.parametrize(
    "make, count, options, error, said",
    [
        (unbound, 2, {}, RuntimeError, "not bound to a model"),
        (bound, 1, {}, ValueError, "batches: expected at least two, .* got 1"),
        (bound, 2, {"lrs": []}, ValueError, "lrs: there is none"),
        (bound, 2, {"lrs": [0.1, -1]}, ValueError, "lrs: expected a number > 0, got -1"),
        (bound, 2, {"lrs": ["Auto"]}, ValueError, "lrs: expected a number > 0, got 'Auto'"),
        (bound, 2, {"batches": [1]}, TypeError, "forward: with batches"),
        (
            lambda p: optimizer_of(p, geometry=llqr.NaturalGradient()),
            2,
            {},
            TypeError,
            "expected a llqr.LLQR .* got NaturalGradient",
        ),
    ],
)
def test_what_is_refused(make, count, options, error, said):
    problem = mlp()
    with pytest.raises(error, match=said):
        llqr.find_inner_lr(make(problem), [problem] * count, **options)


def test_it_starts_from_the_present_U():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of("kfac"))
    train(optimizer, problem, 3)
    before = optimizer.geometry.refresh([problem], step=3).J_after
    table = llqr.find_inner_lr(optimizer, [problem, problem], lrs=[1e-6])
    assert table.rows[0].J_before == pytest.approx(before)
