"""The four ways in, what step() leaves behind, and refreshes."""

import warnings

import pytest
import torch
from torch import nn

import llqr
from tables import BASES, PERTURBATIONS, SHORT_ROWS
from tiny import (
    F64,
    STRUCTURES,
    WAYS,
    dropout_mlp,
    everything,
    gradients,
    llqr_of,
    mlp,
    norm_net,
    optimizer_of,
    random_metric,
    same,
    sgd,
    train,
    weights,
)

PROBES = [name for name in PERTURBATIONS if name != "none"]


def ends(make, way, steps=6, base=None, **options):
    """Losses and everything else after some steps, options made anew each time."""
    problem = make()
    torch.manual_seed(1)
    optimizer = optimizer_of(
        problem, base and base(problem.model.parameters()), **{k: v() for k, v in options.items()}
    )
    losses = train(optimizer, problem, steps, way)
    return losses, everything(optimizer)


# -- the four ways in ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "perturbation, structure",
    [
        (p, s) for p in PERTURBATIONS for s in (None, *STRUCTURES)
        if p not in SHORT_ROWS or s == "diagonal"
    ],
)  # fmt: skip
def test_four_ways_agree_bitwise(perturbation, structure):
    if structure is None and perturbation == "none":
        pytest.skip("nothing but the base: test_reductions compares it with the base itself")
    options = {
        "perturbation": PERTURBATIONS[perturbation],
        "geometry": lambda: structure and llqr_of(structure),
    }
    first = ends(mlp, "minimize", **options)
    for way in WAYS:
        same(ends(mlp, way, **options), first)


@pytest.mark.parametrize("base", ["AdamW", "RMSprop", "Adagrad"])
def test_four_ways_agree_with_other_bases(base):
    options = {"perturbation": lambda: llqr.SAM(0.1), "geometry": lambda: llqr_of("kfac")}
    first = ends(mlp, "minimize", base=BASES[base], **options)
    for way in WAYS:
        same(ends(mlp, way, base=BASES[base], **options), first)


@pytest.mark.parametrize("make", [dropout_mlp, lambda: norm_net(dropout=0.5)])
def test_three_ways_agree_with_dropout(make):
    options = {"perturbation": lambda: llqr.SAM(0.1), "geometry": lambda: llqr_of("kfac")}
    first = ends(make, "minimize", **options)
    same(ends(make, "passes", **options), first)
    same(ends(make, "closure", **options), first)


def test_perturbed_keeps_the_buffers_of_a_batch_norm():
    """perturbed() differs from the other ways only in the random numbers of the second pass."""
    options = {"perturbation": lambda: llqr.SAM(0.1), "geometry": lambda: llqr_of("kfac")}
    same(ends(norm_net, "perturbed", **options), ends(norm_net, "minimize", **options))


def test_one_step_is_the_formula():
    problem = mlp()
    geometry = random_metric(problem)
    optimizer = optimizer_of(
        problem, sgd(problem, lr=0.3), geometry=geometry, perturbation=llqr.SAM(0.2)
    )
    start, g = weights(problem.model), problem.gradient()
    flat = torch.cat([v.flatten() for v in g.values()])
    U = geometry.U
    eps = 0.2 * (U @ flat) / (flat @ U @ flat + 1e-12).sqrt()
    theta = torch.cat([v.flatten() for v in start.values()])
    nn.utils.vector_to_parameters(theta + eps, problem.model.parameters())
    second = torch.cat([v.flatten() for v in problem.gradient().values()])
    nn.utils.vector_to_parameters(theta.clone(), problem.model.parameters())
    optimizer.minimize(problem)
    end = nn.utils.parameters_to_vector(problem.model.parameters()).detach()
    torch.testing.assert_close(end, theta - 0.3 * U @ second, rtol=0, atol=1e-13)


def test_minimize_returns_the_clean_loss_detached():
    problem = mlp()
    expected = problem.loss().detach()
    loss = optimizer_of(problem, perturbation=llqr.SAM(1.0)).minimize(problem)
    same(loss, expected)
    assert not loss.requires_grad


def test_minimize_takes_a_forward_that_returns_the_loss_alone():
    problem, other = mlp(), mlp()
    optimizer_of(problem, perturbation=llqr.SAM(0.1)).minimize(problem.loss)
    optimizer_of(other, perturbation=llqr.SAM(0.1)).minimize(other)
    same(problem.model.state_dict(), other.model.state_dict())


def test_step_returns_the_first_loss_of_the_closure():
    problem = mlp()
    expected = problem.loss().detach()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(1.0))
    same(WAYS["closure"](optimizer, problem), expected)
    optimizer = optimizer_of(problem)
    problem.backward()
    assert optimizer.step() is None


def test_closure_may_leave_the_clearing_of_gradients_to_us():
    problem, other = mlp(), mlp()
    one, two = (optimizer_of(p, perturbation=llqr.SAM(0.1)) for p in (problem, other))
    one.step(problem.backward)
    WAYS["closure"](two, other)
    same(everything(one), everything(two))


def test_closure_refreshes_through_refresh_forward():
    problem, other = mlp(), mlp()
    one = optimizer_of(problem, geometry=llqr_of(), refresh_forward=problem)
    two = optimizer_of(other, geometry=llqr_of())
    for _ in range(5):
        one.step(problem.backward)
    train(two, other, 5)
    same(everything(one), everything(two))


def test_minimize_refreshes_on_a_minibatch_of_its_own():
    problem = mlp()
    own = problem.part(0, 6)
    optimizer = optimizer_of(problem, geometry=llqr_of(every=2))
    for _ in range(4):
        optimizer.minimize(problem, refresh=own)
    assert own.calls == 2 * forwards_of_a_refresh()
    assert problem.calls == 4
    with_default = optimizer_of(problem, geometry=llqr_of(every=2), refresh_forward=own)
    own.calls = 0
    assert with_default.refresh().accepted
    assert own.calls == forwards_of_a_refresh()


def forwards_of_a_refresh():
    """How often a refresh calls its forward for this network (one eager forward)."""
    problem = mlp()
    optimizer_of(problem, geometry=llqr_of()).refresh(problem)
    return problem.calls


def test_before_step_acts_on_the_second_gradient_before_U():
    problem = mlp()
    U = random_metric(problem)
    optimizer = optimizer_of(problem, sgd(problem, lr=1.0), geometry=U, perturbation=llqr.SAM(0.1))
    start, seen = weights(problem.model), []

    def clip():
        assert torch.equal(problem.model[0].weight, start["0.weight"])  # back already
        seen.append(nn.utils.clip_grad_norm_(problem.model.parameters(), 1e-3))

    optimizer.minimize(problem, before_step=clip)
    assert len(seen) == 1 and seen[0] > 1e-3
    clipped = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
    assert abs(clipped.norm() - 1e-3) < 1e-8
    moved = torch.cat([(start[n] - p).flatten() for n, p in problem.model.named_parameters()])
    torch.testing.assert_close(moved.detach(), U.U @ clipped, rtol=1e-9, atol=1e-15)


# -- what a step leaves behind ---------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_grad_after_step_is_what_the_user_computed(structure):
    problem = mlp()
    optimizer = optimizer_of(
        problem, geometry=llqr_of(structure), perturbation=llqr.SAM(0.1), graft=True
    )
    train(optimizer, problem, 3)
    optimizer.refresh_if_due(problem)
    for _ in optimizer.passes():
        problem.backward()
    before = gradients(problem.model)
    objects = [p.grad for p in problem.model.parameters()]
    optimizer.step()
    same(gradients(problem.model), before)
    assert all(p.grad is g for p, g in zip(problem.model.parameters(), objects, strict=True))


def test_grad_comes_back_when_the_base_raises():
    problem = mlp()
    base = sgd(problem)
    optimizer = optimizer_of(problem, base, geometry=random_metric(problem))

    def refuse(*_):
        raise RuntimeError("no")

    problem.backward()
    before = gradients(problem.model)
    handle = base.register_step_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    same(gradients(problem.model), before)
    handle.remove()
    optimizer.step()


def test_groups_state_and_defaults_are_those_of_the_base():
    problem = mlp()
    base = torch.optim.AdamW(problem.model.parameters())
    optimizer = optimizer_of(problem, base, geometry=llqr_of(), perturbation=llqr.FriendlySAM())
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(optimizer, problem, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert set(base.state[problem.model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.base is base
    optimizer.param_groups[0]["lr"] = 0.5
    assert base.param_groups[0]["lr"] == 0.5


def test_zero_grad():
    problem = mlp()
    optimizer = optimizer_of(problem)
    problem.backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in problem.model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.model.parameters())


def test_attributes():
    problem = mlp()
    geometry, probe = llqr_of(), llqr.SAM()
    optimizer = optimizer_of(problem, geometry=geometry, perturbation=probe)
    assert optimizer.geometry is geometry and optimizer.perturbation is probe
    assert optimizer.last_report is None
    report = optimizer.refresh(problem)
    assert optimizer.last_report is report and report.accepted


def test_refresh_hooks_are_called_and_removed():
    problem, seen = mlp(), []
    optimizer = optimizer_of(problem, geometry=llqr_of(every=2))
    remove = optimizer.register_refresh_hook(lambda *call: seen.append(call))
    train(optimizer, problem, 3)
    assert [(o, r.step) for o, r in seen] == [(optimizer, 0), (optimizer, 2)]
    assert seen[-1][1] is optimizer.last_report
    remove()
    train(optimizer, problem, 2)
    assert len(seen) == 2


def test_an_explicit_refresh_always_runs():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of(every=100))
    assert optimizer.refresh_due
    assert optimizer.refresh(problem).step == 0
    assert not optimizer.refresh_due
    assert optimizer.refresh_if_due(problem) is None
    assert optimizer.refresh([problem.part(0, 6), problem.part(6, 12)]).accepted
    assert optimizer.geometry.counters()["refreshes"] == 2


def test_a_refresh_leaves_no_trace():
    problem = norm_net(dropout=0.5)
    problem.model[3].eval()
    optimizer = optimizer_of(problem, geometry=llqr_of())
    problem.backward()
    before = everything(optimizer)["model"], gradients(problem.model), torch.get_rng_state()
    modes = [m.training for m in problem.model.modules()]
    for curvature in ("fisher", "newton"):
        optimizer.geometry.curvature = {"fisher": llqr.Fisher(), "newton": llqr.Newton()}[curvature]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.refresh(problem)
        after = everything(optimizer)["model"], gradients(problem.model), torch.get_rng_state()
        same(after, before)
        assert [m.training for m in problem.model.modules()] == modes


def test_repr_shows_base_geometry_and_perturbation():
    problem = mlp()
    base = torch.optim.AdamW(problem.model.parameters(), lr=0.0123)
    optimizer = optimizer_of(problem, base, geometry=llqr_of("kfac"), perturbation=llqr.SAM(0.07))
    text = repr(optimizer)
    for part in (repr(base), "lr: 0.0123", "LLQR('kfac'", "SAM(rho=0.07"):
        assert part in text, part
    assert "geometry: None" in repr(optimizer_of(problem))


def test_float64_is_kept_throughout():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of("e-kfac"), perturbation=llqr.FriendlySAM())
    train(optimizer, problem, 3)
    states = (optimizer.geometry.state(), optimizer.perturbation.state())
    assert {v.dtype for s in states for e in s.values() for v in e.values()} == {F64}
