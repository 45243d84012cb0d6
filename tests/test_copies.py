"""Copies of an optimizer are optimizers: deepcopy and pickle, alone and with the model."""

import copy
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

import llqr
from tables import GEOMETRIES, PERTURBATIONS
from tiny import everything, llqr_of, mlp, norm_net, optimizer_of, same, sgd, train

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


def start(geometry="kfac", perturbation="FriendlySAM", steps=3, **options):
    problem = norm_net()
    optimizer = optimizer_of(
        problem,
        torch.optim.AdamW(problem.model.parameters(), lr=0.01),
        geometry=GEOMETRIES[geometry](),
        perturbation=PERTURBATIONS[perturbation](),
        **options,
    )
    train(optimizer, problem, steps)
    return problem, optimizer


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_copy_goes_on_bitwise_and_apart(geometry, steps, how):
    problem, optimizer = start(geometry, steps=steps)
    again, fresh = COPIES[how]((problem, optimizer))
    assert fresh.model is again.model and fresh.model is not problem.model
    ids = [{id(p) for g in o.param_groups for p in g["params"]} for o in (optimizer, fresh)]
    assert not ids[0] & ids[1]
    assert ids[1] == {id(p) for p in again.model.parameters()}
    before = everything(optimizer)
    train(fresh, again, 3)
    same(everything(optimizer), before)
    train(optimizer, problem, 3)
    same(everything(fresh), everything(optimizer))


@pytest.mark.parametrize("how", COPIES)
def test_the_optimizer_alone_brings_its_model(how):
    problem, optimizer = start()
    fresh = COPIES[how](optimizer)
    assert isinstance(fresh, llqr.Optimizer) and isinstance(fresh.base, torch.optim.AdamW)
    assert fresh.param_groups is fresh.base.param_groups and fresh.state is fresh.base.state
    again = copy.copy(problem)
    again.model = fresh.model
    train(fresh, again, 3)
    train(optimizer, problem, 3)
    same(everything(fresh), everything(optimizer))


@pytest.mark.parametrize("how", COPIES)
def test_public_attributes_are_copied(how):
    problem, optimizer = start(transport=False, graft=True, buffers="perturbed", replay_rng=False)
    optimizer._progress.skipped_steps = 5
    fresh = COPIES[how](optimizer)
    assert fresh.transport is False and fresh.graft is True
    assert fresh.skipped_steps == 5 and fresh.last_report == optimizer.last_report
    assert repr(fresh) == repr(optimizer)
    for part in ("model", "base", "geometry", "perturbation"):
        assert getattr(fresh, part) is not getattr(optimizer, part)
    assert set(vars(fresh)) == set(vars(optimizer))


@pytest.mark.parametrize("how", COPIES)
def test_hooks_and_scheduler_patches_stay_behind(how):
    """As with torch's own optimizers."""
    problem, optimizer = start()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    optimizer.register_refresh_hook(lambda *_: seen.append("refresh"))
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    again, fresh = COPIES[how]((problem, optimizer))
    train(fresh, again, 3)
    assert seen == []
    train(optimizer, problem, 1)
    assert "step" in seen
    scheduler.step()
    lr_scheduler.StepLR(fresh, 1)
    train(fresh, again, 1)
    assert fresh._opt_called
    fresh.register_step_pre_hook(lambda *_: seen.append("fresh"))
    fresh.register_refresh_hook(lambda *_: None)
    train(fresh, again, 1)
    assert seen[-1] == "fresh"


def test_a_copy_may_be_made_between_two_passes():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    start = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
    for i in optimizer.passes():
        problem.backward()
        if i:
            copied = copy.deepcopy(optimizer)
    optimizer.step()
    copied.zero_grad()
    copied.step()
    same({n: p.detach() for n, p in copied.model.named_parameters()}, start)


@pytest.mark.parametrize("how", COPIES)
def test_the_parts_alone(how):
    problem, optimizer = start()
    g = problem.gradient()
    geometry = COPIES[how](optimizer.geometry)
    same(geometry.apply(g), optimizer.geometry.apply(g))
    assert repr(geometry) == repr(optimizer.geometry)
    probe = COPIES[how](optimizer.perturbation)
    same(probe.state(), optimizer.perturbation.state())
    report = COPIES[how](optimizer.last_report)
    assert report == optimizer.last_report


def test_the_copy_of_an_unbound_geometry_is_unbound():
    geometry = copy.deepcopy(llqr_of("kfac"))
    with pytest.raises(RuntimeError, match="bind"):
        geometry.apply({})
    problem = mlp()
    assert optimizer_of(problem, sgd(problem), geometry=geometry).refresh(problem).accepted
