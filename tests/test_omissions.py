"""Warnings for what was left out, and steps that are none: no gradient, zero gradient, lr 0."""

import warnings

import pytest
import torch

import llqr
from tables import PERTURBATIONS
from tiny import (
    WAYS,
    by_perturbed,
    everything,
    llqr_of,
    mlp,
    optimizer_of,
    random_metric,
    same,
    sgd,
    train,
    weights,
)


def caught(action):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in found]


def plain_step(optimizer, problem):
    optimizer.zero_grad()
    problem.backward()
    optimizer.step()


def test_warns_once_without_a_perturbed_pass():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM())
    messages = caught(lambda: [plain_step(optimizer, problem) for _ in range(3)])
    assert len(messages) == 1 and "without a perturbed pass" in messages[0]
    assert caught(lambda: train(optimizer, problem, 1)) == []


def test_no_warning_where_no_second_pass_is_needed():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.1, start=2))
    assert caught(lambda: [plain_step(optimizer, problem) for _ in range(2)]) == []
    assert len(caught(lambda: plain_step(optimizer, problem))) == 1


def test_a_perturbed_pass_counts_for_one_step_only():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM())
    assert caught(lambda: by_perturbed(optimizer, problem)) == []
    assert len(caught(lambda: plain_step(optimizer, problem))) == 1


def test_warns_once_while_a_refresh_is_due():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of(every=2))
    messages = caught(lambda: [plain_step(optimizer, problem) for _ in range(3)])
    assert len(messages) == 1 and "refresh" in messages[0]
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of(every=2, start=5))
    assert caught(lambda: [plain_step(optimizer, problem) for _ in range(5)]) == []
    assert len(caught(lambda: plain_step(optimizer, problem))) == 1


def test_both_omissions_warn():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of(), perturbation=llqr.SAM())
    assert len(caught(lambda: [plain_step(optimizer, problem) for _ in range(3)])) == 2


def idle_step(optimizer, zeros):
    """A step as torch.distributed.checkpoint makes it."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if zeros else None
    optimizer.step(closure=None)
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("when", [0, 3])
def test_a_step_at_lr_zero_with_zero_gradients_neither_counts_nor_refreshes(when, zeros):
    problem = mlp()
    probe = llqr.FriendlySAM(0.1)
    optimizer = optimizer_of(
        problem, sgd(problem), geometry=llqr_of(), perturbation=probe, refresh_forward=problem
    )
    train(optimizer, problem, when)
    before, calls = everything(optimizer), problem.calls
    due = optimizer.refresh_due
    assert caught(lambda: idle_step(optimizer, zeros)) == []
    same(everything(optimizer), before)
    assert problem.calls == calls and optimizer.refresh_due is due


def test_a_step_at_lr_zero_with_gradients_counts():
    problem = mlp()
    optimizer = optimizer_of(problem, sgd(problem, lr=0.0), perturbation=llqr.SAM(0.1, start=2))
    for _ in range(2):
        assert not optimizer.needs_second_pass
        train(optimizer, problem, 1)
    assert optimizer.needs_second_pass


@pytest.mark.parametrize("way", WAYS)
def test_zero_gradients_give_no_perturbation_and_no_nan(way):
    problem = mlp()
    x = problem.x
    optimizer = optimizer_of(
        problem, sgd(problem), geometry=random_metric(problem), perturbation=llqr.SAM(0.5)
    )
    problem.__class__ = type("Flat", (type(problem),), {"__call__": flat})
    start = weights(problem.model)
    train(optimizer, problem, 2, way)
    same(weights(problem.model), start)
    assert x is problem.x and optimizer.skipped_probes == 0


def flat(problem):
    z = problem.model(problem.x)
    return (0 * z).sum(), z


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_step_before_any_gradient_is_a_noop(perturbation):
    problem = mlp()
    optimizer = optimizer_of(
        problem, geometry=llqr_of(), perturbation=PERTURBATIONS[perturbation]()
    )
    before = everything(optimizer)
    assert caught(optimizer.step) == []
    same(everything(optimizer), before)
