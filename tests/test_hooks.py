"""Hooks and the profiler see our optimizer as they see any other: once a step, in torch's order."""

import copy

import pytest
import torch

import llqr
from tiny import (
    WAYS,
    everything,
    gradients,
    llqr_of,
    mlp,
    optimizer_of,
    random_metric,
    same,
    sgd,
    train,
)


@pytest.mark.parametrize("way", WAYS)
def test_step_hooks_fire_once_a_step_in_order(way):
    problem, seen = mlp(), []
    base = sgd(problem)
    optimizer = optimizer_of(problem, base, geometry=llqr_of(), perturbation=llqr.SAM())

    def note(name):
        return lambda opt, args, kwargs: seen.append((name, opt))

    base.register_step_pre_hook(note("base pre"))
    base.register_step_post_hook(note("base post"))
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    train(optimizer, problem, 2, way)
    once = [("pre", optimizer), ("base pre", base), ("base post", base), ("post", optimizer)]
    assert seen == once * 2


def test_hooks_of_the_base_see_the_transported_gradient_ours_see_the_users():
    problem = mlp()
    base, U = sgd(problem), random_metric(problem)
    optimizer = optimizer_of(problem, base, geometry=U)
    seen = {}

    def look(name):
        return lambda *_: seen.update({name: gradients(problem.model)})

    optimizer.register_step_pre_hook(look("pre"))
    base.register_step_pre_hook(look("base"))
    optimizer.register_step_post_hook(look("post"))
    problem.backward()
    g = gradients(problem.model)
    optimizer.step()
    same(seen["pre"], g)
    same(seen["base"], U.apply(g))
    same(seen["post"], g)


def test_step_hooks_are_removed():
    problem, seen = mlp(), []
    optimizer = optimizer_of(problem)
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    train(optimizer, problem, 1)
    handle.remove()
    train(optimizer, problem, 1)
    assert seen == [1]


@pytest.mark.parametrize("how", ["remove", "call"])
def test_refresh_hooks_are_removed_as_torchs_are(how):
    problem, seen = mlp(), []
    optimizer = optimizer_of(problem, geometry=llqr_of())
    handle = optimizer.register_refresh_hook(lambda opt, report: seen.append((opt, report)))
    other = optimizer.register_refresh_hook(lambda *_: seen.append("other"))
    report = optimizer.refresh(problem)
    assert seen == [(optimizer, report), "other"]
    for _ in range(2):  # again does nothing
        handle.remove() if how == "remove" else handle()
    optimizer.refresh(problem)
    assert seen[2:] == ["other"]
    with other:
        pass
    optimizer.refresh(problem)
    assert len(seen) == 3


def test_state_dict_hooks():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of())
    order = []
    optimizer.register_state_dict_pre_hook(lambda opt: order.append(opt))
    optimizer.register_state_dict_post_hook(lambda opt, state: state.update(extra=1))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "more": 2})
    state = optimizer.state_dict()
    assert order == [optimizer]
    assert state["extra"] == 1 and state["more"] == 2


def test_load_state_dict_hooks():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of())
    train(optimizer, problem, 3)
    wanted = everything(optimizer)["optimizer"]
    fresh = optimizer_of(mlp(), geometry=llqr_of())
    order = []

    def swap(opt, state):
        order.append("pre")
        assert state == {"nothing": True}
        return copy.deepcopy(optimizer.state_dict())

    fresh.register_load_state_dict_pre_hook(swap)
    fresh.register_load_state_dict_post_hook(lambda opt: order.append(opt))
    fresh.load_state_dict({"nothing": True})
    assert order == ["pre", fresh]
    same(everything(fresh)["optimizer"], wanted)


def test_hooks_of_the_base_fire_for_our_state_dict():
    problem, order = mlp(), []
    base = sgd(problem, momentum=0.9)
    optimizer = optimizer_of(problem, base, geometry=llqr_of())
    train(optimizer, problem, 1)
    base.register_state_dict_pre_hook(lambda opt: order.append("save"))
    base.register_load_state_dict_post_hook(lambda opt: order.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == ["save", "load"]


def test_profiler_names_both_steps():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, problem, 2)
    count = {event.key: event.count for event in profile.key_averages()}
    assert count["Optimizer.step#Optimizer.step"] == 2
    assert count["Optimizer.step#SGD.step"] == 2


def test_a_subclass_of_a_base_is_a_base():
    class Noted(torch.optim.SGD):
        steps = 0

        @torch.no_grad()
        def step(self, closure=None):
            type(self).steps += 1
            return super().step(closure)

    problem = mlp()
    optimizer = optimizer_of(problem, Noted(problem.model.parameters(), lr=0.1))
    train(optimizer, problem, 3)
    assert Noted.steps == 3


def test_an_optimizer_of_the_users_own_is_a_base():
    class Signed(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.25})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad.sign())

    problem = mlp()
    optimizer = optimizer_of(problem, Signed(problem.model.parameters()), geometry=llqr_of())
    start = problem.model[0].weight.detach().clone()
    train(optimizer, problem, 1)
    moved = (problem.model[0].weight - start).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25), rtol=0, atol=1e-15)
