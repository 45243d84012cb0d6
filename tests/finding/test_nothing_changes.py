"""Looking for settings leaves a training as it was, bit for bit, also when it fails."""

from __future__ import annotations

import copy
import weakref
from functools import partial

import pytest
import torch

import llqr
from tiny import norm_net, optimizer_of

FINDERS = {
    "rho": partial(llqr.find_rho, rhos=[0.05, 0.5]),
    "inner_lr": partial(llqr.find_inner_lr, lrs=["auto", 0.05]),
}


def training():
    """A few steps of a network with BatchNorm and dropout, with U and a memory."""
    problem = norm_net(dropout=0.3)
    optimizer = optimizer_of(
        problem,
        geometry=llqr.LLQR("e-kfac", bases="gradient", every=2, steps=5),
        perturbation=llqr.FriendlySAM(0.1, interval=2),
    )
    for _ in range(3):
        optimizer.minimize(problem)
    return problem, optimizer


def snapshot(problem, optimizer):
    """Everything that a training goes on from."""
    model = problem.model
    geometry = optimizer.geometry
    return copy.deepcopy(
        {
            "weights": {n: p.detach() for n, p in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "gradients": {n: p.grad for n, p in model.named_parameters()},
            "modes": [m.training for m in model.modules()],
            "optimizer": optimizer.state_dict(),
            "history": vars(geometry.history),
            "settings": repr(geometry),
            "perturbation": {
                n: v for n, v in vars(optimizer.perturbation).items() if n != "_parameters"
            },
            "steps": optimizer._progress.counters(),
            "random": torch.get_rng_state(),
        }
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("fails_at", [None, 1, 3], ids=["whole", "at once", "on the way"])
@pytest.mark.parametrize("name", FINDERS)
def test_nothing_changes(name, fails_at):
    problem, optimizer = training()
    calls, report = [], optimizer.last_report

    def forward(factor):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyError("on purpose")
        loss, z = problem()
        return factor * loss, z

    before = snapshot(problem, optimizer)
    if fails_at is None:
        FINDERS[name](optimizer, forward, batches=[1.0, 2.0])
    else:
        with pytest.raises(KeyError, match="on purpose"):
            FINDERS[name](optimizer, forward, batches=[1.0, 2.0])
    after = snapshot(problem, optimizer)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert len(calls) >= (fails_at or 4) and optimizer.last_report is report
    # And it goes on as a training that never looked.
    other, untouched = training()
    torch.set_rng_state(after["random"])
    a = optimizer.minimize(problem)
    torch.set_rng_state(after["random"])
    b = untouched.minimize(other)
    assert torch.equal(a, b)
    assert same(snapshot(problem, optimizer)["weights"], snapshot(other, untouched)["weights"])


def test_modules_beside_the_model_are_put_back():
    problem = norm_net()
    beside = torch.nn.BatchNorm1d(3).double()
    optimizer = optimizer_of(problem, modules=[beside], geometry=llqr.LLQR("kfac"))
    hidden = weakref.ref(beside)  # not found among what the forward names

    def forward():
        loss, z = problem()
        return loss + hidden()(z).square().mean(), z

    before = copy.deepcopy(beside.state_dict())
    llqr.find_rho(optimizer, [forward, forward], rhos=[0.1])
    llqr.find_inner_lr(optimizer, [forward, forward], lrs=["auto"])
    assert same(before, beside.state_dict())
