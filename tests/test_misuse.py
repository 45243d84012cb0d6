"""Mistakes that would train something else than was meant."""

import copy

import pytest
import torch
from torch import nn

import llqr
from tiny import llqr_of, mlp, optimizer_of, says, sgd, train, weights


def test_gradients_of_other_parameters_are_those_of_one_pass():
    """Two optimizers may share a model: the second pass leaves the other's gradients alone."""
    problem = mlp()
    base = torch.optim.SGD(problem.model[0].parameters(), lr=0.1)
    optimizer = optimizer_of(problem, base, perturbation=llqr.SAM(0.1))
    clean = problem.gradient()
    for _ in optimizer.passes():
        problem.backward()
    for name in ("weight", "bias"):
        torch.testing.assert_close(
            getattr(problem.model[2], name).grad, clean[f"2.{name}"], rtol=0, atol=0
        )


def test_what_was_learned_of_one_model_is_not_taken_to_another():
    problem, other = mlp(), mlp()
    geometry, perturbation = llqr_of("kfac"), llqr.FriendlySAM(0.05)
    optimizer = optimizer_of(problem, geometry=geometry, perturbation=perturbation)
    train(optimizer, problem, 2)
    with says(ValueError, "geometry: ", "another model"):
        optimizer_of(other, geometry=geometry)
    with says(ValueError, "perturbation: ", "another"):
        optimizer_of(other, perturbation=perturbation)
    train(optimizer, problem, 2)
    train(copy.deepcopy(optimizer), other, 0)
    again = optimizer_of(problem, geometry=geometry, perturbation=perturbation)
    assert again.geometry.counters()["refreshes"] == 2


@pytest.mark.parametrize("curvature", ["newton", llqr.Newton()])
def test_the_papers_settings_go_by_the_curvature_and_not_by_its_spelling(curvature):
    settings = llqr.LLQR.paper("diagonal", curvature).settings
    assert (settings.scale, settings.ema) == ("mean", 0.9)
    settings = llqr.LLQR.paper("diagonal", llqr.Fisher()).settings
    assert (settings.scale, settings.ema) == ("sum", 0.95)


def test_an_option_that_is_refused_does_not_come_in_by_a_state_dict():
    problem = mlp()
    optimizer = optimizer_of(problem)
    with says(ValueError, "maximize=True"):
        optimizer.load_state_dict(sgd(mlp(), maximize=True).state_dict())
    assert optimizer.param_groups[0]["maximize"] is False


def test_U_that_leaves_the_range_of_float16_skips_the_step():
    problem = mlp(torch.float16)
    metric = llqr.FixedGeometry({"0.weight": torch.tensor(1e6)})
    optimizer = optimizer_of(problem, geometry=metric)
    start = weights(problem.model)
    with pytest.warns(UserWarning, match="skipped"):
        train(optimizer, problem, 1)
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(start[n], p) for n, p in weights(problem.model).items())


def test_weights_come_back_when_the_move_itself_fails():
    class Wrong(llqr.SAM):
        def displacement(self, probe):
            moves = probe.gradients.items()
            return {n: torch.ones(7) if n == "2.bias" else g for n, g in moves}

    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=Wrong(0.1))
    start = weights(problem.model)
    with pytest.raises(RuntimeError):
        train(optimizer, problem, 1)
    assert all(torch.equal(start[n], p) for n, p in weights(problem.model).items())


def test_a_lazy_module_that_was_not_run():
    model = nn.Sequential(nn.LazyLinear(3))
    with says(ValueError, "lazy"):
        llqr.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_a_radius_of_a_group_survives_a_checkpoint_without_one():
    problem = mlp()
    group = {"params": list(problem.model.parameters()), "rho": 0.2}
    optimizer = optimizer_of(problem, torch.optim.SGD([group], lr=0.1), perturbation=llqr.SAM())
    optimizer.load_state_dict(optimizer_of(mlp(), perturbation=llqr.SAM()).state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.2


def test_the_rho_of_adadelta_is_no_radius():
    ends = []
    for rho in (0.9, 0.5):
        problem = mlp()
        base = torch.optim.Adadelta(problem.model.parameters(), rho=rho)
        ends.append(optimizer_of(problem, base, perturbation=llqr.SAM(0.05))._probing.radii)
    assert set(ends[0].values()) == set(ends[1].values()) == {0.05}


def test_warnings_name_the_line_that_calls_the_library():
    model = torch.nn.Linear(2, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, model, geometry=llqr.LLQR(), perturbation=llqr.SAM(0.1))
    model(torch.ones(3, 2)).sum().backward()
    with pytest.warns(UserWarning) as told:
        optimizer.step()
        optimizer.load_state_dict(base.state_dict())
    assert len(told) == 3
    assert {warning.filename for warning in told} == {__file__}
