"""find_rho: the rises of the training's own probe, and what is said about them."""

from __future__ import annotations

import math

import pytest
import torch

import llqr
from explicit import F64
from llqr.finding import RhoRow
from llqr.finding._rho import advise
from tiny import mlp, optimizer_of, random_metric, sgd, train

RHOS = [0.02, 0.3]


def weights_of(problem):
    return {n: p.detach().clone() for n, p in problem.model.named_parameters()}


def loss_and_gradient(problem, weights):
    """The loss and its gradient at given weights, as if by hand."""
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    z = torch.func.functional_call(problem.model, leaves, (problem.x,))
    loss = torch.nn.functional.cross_entropy(z, problem.y)
    gradient = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), dict(zip(leaves, gradient, strict=True))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def by_hand(part, rho, metric=None, along="metric", held=()):
    """[rise, g'eps, cosine, loss] of one batch; ``held`` are not perturbed."""
    weights = weights_of(part)
    loss, g = loss_and_gradient(part, weights)
    moved = {n: torch.zeros_like(v) if n in held else v for n, v in g.items()}
    d = moved if metric is None or along == "gradient" else metric.apply(moved)
    d = {n: torch.zeros_like(v) if n in held else v for n, v in d.items()}
    scale = rho / math.sqrt(float(flat(moved) @ flat(d)))
    after, second = loss_and_gradient(part, {n: w + scale * d[n] for n, w in weights.items()})
    a, b = flat(g), flat(second)
    linear = scale * float(a @ flat(d))
    return [after - loss, linear, float(a @ b / a.norm() / b.norm()), loss]


@pytest.mark.parametrize(
    "geometry, along, held",
    [
        (None, "metric", ()),
        (random_metric, "metric", ()),
        (random_metric, "gradient", ()),
        (None, "metric", ("0.bias", "2.bias")),
    ],
    ids=["U=I", "metric", "gradient", "groups"],
)
def test_a_rise_is_that_of_a_hand_computation(geometry, along, held):
    problem = mlp(rows=15)
    parts = [problem.part(i, i + 5) for i in (0, 5, 10)]
    metric = geometry and geometry(problem)
    named = dict(problem.model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n not in held]},
        *([{"params": [named[n] for n in held], "rho": 0.0}] if held else []),
    ]
    base = torch.optim.SGD(groups, lr=0.1)
    # In training none of the first steps is probed; here all are.
    sam = llqr.SAM(lambda step: 0.1, along=along, start=7, interval=3)
    optimizer = optimizer_of(problem, base, geometry=metric, perturbation=sam)
    table = llqr.find_rho(optimizer, parts, rhos=RHOS[::-1])
    assert [row.rho for row in table.rows] == RHOS and table.batches == 3
    for row in table.rows:
        each = torch.tensor([by_hand(p, row.rho, metric, along, held) for p in parts], dtype=F64)
        rise, linear, cosine, loss = each.mean(0).tolist()
        assert row.rise == pytest.approx(rise, rel=1e-9)
        assert row.standard_error == pytest.approx(float(each[:, 0].std()) / math.sqrt(3))
        assert row.linear == pytest.approx(linear) and row.ratio == pytest.approx(rise / linear)
        assert row.cosine == pytest.approx(cosine) and row.share == pytest.approx(rise / loss)
        assert table.loss == pytest.approx(loss)


def test_the_rise_is_that_of_a_training_step():
    """Of a perturbation with a memory, at the step that comes next."""
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.FriendlySAM(0.2))
    train(optimizer, problem, 3)
    row = llqr.find_rho(optimizer, problem, rhos=[0.2]).rows[0]
    losses = []
    for _ in optimizer.passes():
        losses.append(float(problem.backward()))
    assert row.rise == pytest.approx(losses[1] - losses[0], rel=1e-12)


def test_a_probe_of_ones_own_runs_without_gradients():
    class Ascent(llqr.Perturbation):
        def displacement(self, probe):
            for name, w in probe.parameters.items():
                w.add_(probe.gradients[name]).sub_(probe.gradients[name])
            return probe.scale_by_radius(probe.gradients, 1.0)

    part = mlp(F64)
    optimizer = optimizer_of(part, perturbation=Ascent(rho=0.1))
    train(optimizer, part, 1)
    rows = llqr.find_rho(optimizer, part, rhos=RHOS).rows
    assert [row.rho for row in rows] == RHOS and all(row.rise > 0 for row in rows)


def test_a_model_is_measured_with_sam_around_its_usual_radius():
    problem = mlp()
    seen = []
    table = llqr.find_rho(
        problem.model, problem, progress=lambda done, total: seen.append((done, total))
    )
    assert [row.rho for row in table.rows] == [0.05 * 2.0**k for k in range(-4, 5)]
    assert seen == [(i, 10) for i in range(1, 11)] and table.evaluations == 10
    assert table.rows[4].rise == pytest.approx(by_hand(problem, 0.05)[0])
    assert table.rows[0].standard_error is None
    text = str(table)
    assert text.startswith("SAM, loss ") and "rise/linear" in text and table.advice in text
    assert "<pre>" in table._repr_html_()
    with_schedule = optimizer_of(problem, perturbation=llqr.SAM(lambda step: 0.4))
    assert llqr.find_rho(with_schedule, problem).rows[4].rho == 0.4


def test_a_refresh_that_is_due_is_told():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr.LLQR("kfac", every=50))
    assert "A refresh is due" in llqr.find_rho(optimizer, problem, rhos=[0.1]).advice
    train(optimizer, problem, 1)
    assert "A refresh is due" not in llqr.find_rho(optimizer, problem, rhos=[0.1]).advice


def rows_of(*shares_and_ratios):
    """Rows at a loss of one with rho 1, 2, 3, ..."""
    return [
        RhoRow(rho=i, rise=s, standard_error=None, linear=s / r, share=s, cosine=1.0)
        for i, (s, r) in enumerate(shares_and_ratios, 1)
    ]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "rows, low, high, said",
    [
        (rows_of((0.01, 1), (0.06, 1), (0.4, 1.9), (0.6, 2)), 2, 3, "Try rho 2 to 3"),
        (rows_of((0.01, 1), (0.1, 1), (0.2, 2.1)), 2, 2, "Try rho = 2: there"),
        (rows_of((0.01, 1), (0.04, 1)), None, None, "pass larger rhos"),
        (rows_of((0.6, 1), (INF, NAN)), None, None, "pass smaller rhos"),
        (rows_of((0.01, 1), (0.6, 1)), None, None, "Above rho = 1 the rise jumps"),
        (rows_of((0.01, 1), (0.04, 1.5), (0.1, 3)), 2, 2, "Try rho = 2 or less"),
        (rows_of((0.04, 4), (0.1, 5)), None, None, "nor is it for smaller rhos"),
        (rows_of((NAN, 1), (NAN, 1)), None, None, "The loss is not positive"),
        (rows_of((-0.3, -1), (-0.1, -1)), None, None, "pass larger rhos"),
    ],
)
def test_advice(rows, low, high, said):
    found = advise(rows)
    assert found[:2] == (low, high) and said in found[2]


def test_a_loss_that_overflows_at_a_radius_is_a_row():
    w = torch.nn.Parameter(torch.ones(2))
    model = torch.nn.ParameterList([w])
    rows = llqr.find_rho(model, lambda: w.exp().sum(), rhos=[0.1, 1e4]).rows
    assert math.isfinite(rows[0].rise) and rows[1].rise == INF
    assert rows[1].share == INF and math.isnan(rows[1].cosine)


def with_own_rho(problem):
    groups = [{"params": list(problem.model.parameters()), "rho": 0.1}]
    return optimizer_of(problem, torch.optim.SGD(groups, lr=0.1), perturbation=llqr.SAM())


def with_negative_metric(problem):
    class Negative(llqr.Geometry):
        def apply(self, gradients):
            return {n: -g for n, g in gradients.items()}

    return optimizer_of(problem, geometry=Negative())


@pytest.mark.parametrize(
    "make, options, error, said",
    [
        (lambda p: sgd(p), {}, TypeError, "optimizer: expected .* got SGD; .* pass its model"),
        (lambda p: p.model, {"rhos": []}, ValueError, "rhos: there is none"),
        (lambda p: p.model, {"rhos": [0.1, 0]}, ValueError, r"rhos: expected a number > 0, got 0"),
        (
            lambda p: optimizer_of(p, perturbation=llqr.MSAM()),
            {},
            ValueError,
            "MSAM probes along the momentum.*llqr.SAM",
        ),
        (with_own_rho, {}, ValueError, "take 'rho' out of the groups"),
        (with_negative_metric, {}, RuntimeError, "constraint='positive'"),
        (lambda p: p.model.requires_grad_(False), {}, ValueError, "requires grad"),
    ],
)
def test_what_is_refused(make, options, error, said):
    problem = mlp()
    with pytest.raises(error, match=said):
        llqr.find_rho(make(problem), problem, **options)


def test_a_loss_that_is_not_finite_at_the_weights_is_refused():
    problem = mlp()
    with pytest.raises(ValueError, match="the loss of batch 1 is nan"):
        llqr.find_rho(problem.model, [problem, lambda: problem.loss() * math.nan])


def test_within_a_perturbed_pass_it_is_refused():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM())
    problem.backward()
    with optimizer.perturbed():
        problem.backward()
        with pytest.raises(RuntimeError, match="find_rho: called within a perturbed pass"):
            llqr.find_rho(optimizer, problem)
