"""lr="auto": J in units of its own, and the inner learning rate that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import llqr
from explicit import agree, explicit_U, vector
from llqr.geometry.inner_solve import FlatModel, Objective, _own_units
from llqr.geometry.inner_solve._own_units import in_own_units, inner_rates
from nets import LEARNED, bound, trio
from tiny import mlp, same


def multiplied(forward: Callable, factor: float) -> Callable:
    def scaled() -> tuple[Tensor, Tensor]:
        loss, z = forward()
        return factor * loss, z

    return scaled


@pytest.mark.parametrize("structure", [*LEARNED, "e-kfac gradient"])
def test_u_does_not_depend_on_any_scale(structure):
    """The loss times 1,000 and the summed curvature give the same U, also from a warm start."""
    problem = trio()
    name, *bases = structure.split()
    settings = {"ema": 0.3, "bases": "gradient" if bases else "learned", "clip": 0.5}
    U, J = [], []
    for scale, factor in (("mean", 1.0), ("mean", 1e3), ("sum", 1.0), (7.0, 1e-3)):
        geometry = bound(problem, name, scale=scale, **settings)
        reports = [geometry.refresh([multiplied(problem, factor)]) for _ in range(3)]
        assert all(r.accepted and r.J_after < r.J_before for r in reports), reports
        J.append([r.J_after for r in reports])
        U.append(explicit_U(problem.model, name, geometry.state()))
    for other in U[1:]:
        agree(other, U[0], 1e-7)
    assert float((U[0] - torch.eye(len(U[0]))).norm()) > 0.05  # it moved at all
    assert J[1] == pytest.approx([1e3 * j for j in J[0]])  # in units of the loss
    assert J[2] == pytest.approx([j / 6 for j in J[0]])  # six rows: a sixth of the best step


def prepared(structure: str, curvature: str = "fisher", damping: float = 0.2):
    """J at a U that is not the identity, its matrices, and U as a matrix."""
    problem = trio()
    geometry = bound(problem, structure, lr=0.02, ema=0.0, curvature=curvature)
    geometry.refresh([problem])
    parameters = list(problem.model.parameters())
    model = llqr.quadratic_model(problem, parameters, curvature)
    flat = FlatModel(model, geometry.layout, list(geometry.parameters))
    with torch.no_grad():
        objective = Objective(geometry.blocks, flat.gradient, flat.product, damping)
        n = len(flat.gradient)
        C = torch.stack([flat.product(e) for e in torch.eye(n, dtype=torch.float64)])
        U = torch.stack(
            [geometry.blocks.apply(geometry.states, e) for e in torch.eye(n, dtype=torch.float64)]
        ).mT
    return geometry, objective, C + damping * torch.eye(n, dtype=torch.float64), U


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_own_units(curvature, tolerance):
    """g-hat has length one, and the best multiple of U the g-hat'U g-hat of the identity."""
    geometry, objective, C, U = prepared("kfac", curvature)
    g = objective.gradient.clone()
    with torch.no_grad():
        scaled = in_own_units(objective, geometry.states, tolerance, 8)
        own = scaled.objective
        agree(own.gradient, g / g.norm())
        u = U @ g
        kappa = abs(u @ C @ u) / (g @ u) ** 2 * (g @ g)
        assert scaled.unit == pytest.approx(float(g @ g / kappa), rel=1e-10)
        agree(own.product(-u / g.norm()), -C @ u / g.norm() / kappa)
        # The best step along U g takes off half of the unit.
        best = (g @ u) ** 2 / (2 * abs(u @ C @ u))
        assert scaled.unit / 2 == pytest.approx(float(best), rel=1e-10)


@pytest.mark.parametrize("structure", LEARNED)
def test_the_rate_is_a_part_of_the_best_step_along_the_gradient(structure):
    """|G|^2 / v'Cv, with v by central differences of the control."""
    geometry, objective, C, _ = prepared(structure)
    blocks, g = geometry.blocks, objective.gradient
    solver, options = geometry.settings.inner_solver, geometry.settings.learner_at(0).options
    with torch.no_grad():
        rates = inner_rates(objective, geometry.states, solver, options)
        _, G = objective.value_and_gradient(geometry.states)

    def control(t: float) -> Tensor:
        moved = [
            {k: v - t * c[k] if k in c else v for k, v in s.items()}
            for s, c in zip(geometry.states, G, strict=True)
        ]
        return -blocks.apply(moved, g)

    v = (control(1e-6) - control(-1e-6)) / 2e-6
    square = sum(float(x.square().sum()) for c in G for x in c.values())
    best = square / float(v @ C @ v)
    expected = _own_units.REACH * best * (1 - options.momentum) / options.steps
    assert rates == pytest.approx([expected, expected / 4, expected / 16], rel=1e-2)


def test_the_rate_is_lowered_until_j_goes_down(monkeypatch):
    """And products are shared, so that a second try costs less than the first."""
    monkeypatch.setattr(_own_units, "REACH", 3000.0)
    problem = mlp()
    found = {}
    for fractions in ((1.0,), (1.0, 1 / 64), (1 / 64,)):
        monkeypatch.setattr(_own_units, "FRACTIONS", fractions)
        geometry = bound(problem, "kfac", ema=0.0)
        with pytest.warns(UserWarning) if fractions == (1.0,) else nullcontext():
            report = geometry.refresh([problem])
        found[fractions] = report, geometry.state()
    refused, second, direct = found.values()
    assert refused[0].reason == "J did not go down"
    assert second[0].accepted and direct[0].accepted


@pytest.mark.parametrize("solver", ["sgd", "adam", "lbfgs"])
def test_other_solvers_learn_in_own_units_too(solver):
    problem = mlp()
    one, other = (bound(problem, "kfac", solver=solver, steps=8, ema=0.0) for _ in range(2))
    assert one.refresh([problem]).accepted
    assert other.refresh([multiplied(problem, 2.0**10)]).accepted
    for name, own in one.state().items():
        for key, value in own.items():
            agree(other.state()[name][key], value, 1e-5)


def test_nothing_to_learn_is_no_refusal():
    problem = mlp()
    geometry = bound(problem, "diagonal")
    with torch.no_grad():
        target = problem.model(problem.x)
    still = lambda: (((z := problem.model(problem.x)) - target).square().mean(), z)  # noqa: E731
    before = vector(v for e in geometry.state().values() for v in e.values())
    report = geometry.refresh([still])
    assert report.accepted and report.J_before == report.J_after == 0.0
    same(vector(v for e in geometry.state().values() for v in e.values()), before)


def test_a_string_that_is_no_rate_is_refused():
    with pytest.raises(ValueError, match="lr: expected 'auto', a number > 0 or a function"):
        llqr.LLQR(lr="automatic")
    assert llqr.LLQR().settings.lr == "auto" and llqr.LLQR.paper().settings.lr == 1e-3
